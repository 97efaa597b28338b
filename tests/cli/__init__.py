"""Commands, run in this process on the shipped model with few steps."""

from typer.testing import CliRunner

from bayesdiff.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_map(out, posterior, *more, samples=2):
    few = ("--num-samples", samples, "--steps", 3, "--num-tangents", 2)
    return invoke("map", "--class", "sneaker", "--out", out, "--posterior", posterior, *few, *more)
