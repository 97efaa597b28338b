"""What is imported when: help needs no torch, and the package little beyond what it stands on."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys

import bayesdiff
from bayesdiff.cli import main as options
from bayesdiff.laplace.structure import COVARIANCES, STRUCTURES
from bayesdiff.propagation.settings import PROPAGATIONS, Ensemble, Tangents


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_help_needs_no_torch() -> None:
    code = "import sys, bayesdiff.cli.main; print(sorted({'torch', 'diffusers', 'laplace'} & set(sys.modules)))"
    assert python(code) == "[]"


def test_the_package_adds_little_to_torch_and_diffusers() -> None:
    code = (
        "import time, torch, diffusers; from diffusers import UNet2DModel, SD3Transformer2DModel; t = time.process_time(); "
        "import bayesdiff; bayesdiff.fit, bayesdiff.UncertaintyPipeline, bayesdiff.propagate, bayesdiff.find_head; "
        "print(time.process_time() - t)"
    )
    assert float(python(code)) < 1.0  # half a second on a quiet machine


def test_every_public_name_is_there() -> None:
    assert all(getattr(bayesdiff, name) is not None for name in bayesdiff.__all__)
    assert callable(bayesdiff.fit)
    importlib.import_module("bayesdiff.fitting")  # a module of its name would hide the function
    assert callable(bayesdiff.fit)


def test_the_options_of_the_command_line_are_those_of_the_modules() -> None:
    assert options.PROPAGATIONS == PROPAGATIONS
    assert (Tangents().draws, Ensemble().members) == (options.DRAWS, options.MEMBERS)
    assert options.STRUCTURES == STRUCTURES
    assert options.COVARIANCES == COVARIANCES
    assert bayesdiff.zoo.names() == options.MODELS
    assert bayesdiff.zoo.scheduler_names() == options.SCHEDULERS


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "bayesdiff.cli", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 0 < after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5
    assert "demo" in done.stdout


def test_a_command_imports_what_it_needs_only() -> None:
    code = (
        "import sys, bayesdiff; bayesdiff.fit, bayesdiff.UncertaintyPipeline, bayesdiff.propagate, bayesdiff.LaplacePosterior; "
        "print(sorted({'laplace', 'matplotlib', 'bayesdiff.zoo', 'bayesdiff.plotting', 'torchmetrics'} & set(sys.modules)))"
    )
    assert python(code) == "[]"
