"""``python -m bayesdiff.cli``."""

from bayesdiff.cli.main import app

app()
