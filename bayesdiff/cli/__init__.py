"""The command line."""

from bayesdiff.cli.main import app as app
