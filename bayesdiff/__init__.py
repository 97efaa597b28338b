"""Uncertainty of pretrained diffusion and flow models, through a Laplace posterior over their output layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesdiff import calibration as calibration
    from bayesdiff import rng as rng
    from bayesdiff import zoo as zoo
    from bayesdiff.calibration.comparison import compare as compare
    from bayesdiff.calibration.evaluation import Evaluation as Evaluation
    from bayesdiff.calibration.evaluation import evaluate as evaluate
    from bayesdiff.checks import BayesdiffError as BayesdiffError
    from bayesdiff.checks import BayesdiffWarning as BayesdiffWarning
    from bayesdiff.data import open_images as open_images
    from bayesdiff.diffusion.density import LogitNormal as LogitNormal
    from bayesdiff.diffusion.density import TruncatedNormal as TruncatedNormal
    from bayesdiff.diffusion.weighting import P2 as P2
    from bayesdiff.diffusion.weighting import MinSNR as MinSNR
    from bayesdiff.fitting import features as features
    from bayesdiff.fitting import fit as fit
    from bayesdiff.gaussian import Gaussian as Gaussian
    from bayesdiff.head.find import Head as Head
    from bayesdiff.head.find import find_head as find_head
    from bayesdiff.laplace import links as links
    from bayesdiff.laplace.checkpoint import Checkpoint as Checkpoint
    from bayesdiff.laplace.loss import L1 as L1
    from bayesdiff.laplace.loss import Huber as Huber
    from bayesdiff.laplace.loss import PseudoHuber as PseudoHuber
    from bayesdiff.laplace.posterior import LaplacePosterior as LaplacePosterior
    from bayesdiff.laplace.statistics import Statistics as Statistics
    from bayesdiff.output import UncertaintyOutput as UncertaintyOutput
    from bayesdiff.pipeline import UncertaintyPipeline as UncertaintyPipeline
    from bayesdiff.pipeline import propagate as propagate
    from bayesdiff.propagation.settings import BayesDiff as BayesDiff
    from bayesdiff.propagation.settings import Ensemble as Ensemble
    from bayesdiff.propagation.settings import Tangents as Tangents

__version__ = "0.1.0"

# Imported when they are asked for: ``bayesdiff --help`` needs no torch.
_MODULES = {
    "BayesDiff": "propagation.settings",
    "BayesdiffError": "checks",
    "BayesdiffWarning": "checks",
    "Checkpoint": "laplace.checkpoint",
    "Ensemble": "propagation.settings",
    "Evaluation": "calibration.evaluation",
    "Gaussian": "gaussian",
    "calibration": "calibration",
    "compare": "calibration.comparison",
    "evaluate": "calibration.evaluation",
    "Head": "head.find",
    "Huber": "laplace.loss",
    "L1": "laplace.loss",
    "LaplacePosterior": "laplace.posterior",
    "LogitNormal": "diffusion.density",
    "MinSNR": "diffusion.weighting",
    "P2": "diffusion.weighting",
    "PseudoHuber": "laplace.loss",
    "Statistics": "laplace.statistics",
    "Tangents": "propagation.settings",
    "TruncatedNormal": "diffusion.density",
    "UncertaintyOutput": "output",
    "UncertaintyPipeline": "pipeline",
    "find_head": "head.find",
    "features": "fitting",
    "fit": "fitting",
    "links": "laplace.links",
    "open_images": "data",
    "propagate": "pipeline",
    "rng": "rng",
    "zoo": "zoo",
}
_ARE_MODULES = ("calibration", "links", "rng", "zoo")

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """The public names."""
    if name not in _MODULES:
        raise AttributeError(f"module 'bayesdiff' has no attribute {name!r}")
    module = import_module(f"bayesdiff.{_MODULES[name]}")
    value = module if name in _ARE_MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
