"""Uncertainty of pretrained diffusion and flow models, through a Laplace posterior over their output layer."""

from bayesdiff import links, rng, zoo
from bayesdiff.checks import BayesdiffError, BayesdiffWarning
from bayesdiff.curvature import Statistics
from bayesdiff.fit import fit
from bayesdiff.gaussian import Gaussian
from bayesdiff.head import Head, find_head
from bayesdiff.pipeline import UncertaintyOutput, UncertaintyPipeline
from bayesdiff.posterior import LaplacePosterior

__version__ = "0.1.0"

__all__ = [
    "BayesdiffError",
    "BayesdiffWarning",
    "Gaussian",
    "Head",
    "LaplacePosterior",
    "Statistics",
    "UncertaintyOutput",
    "UncertaintyPipeline",
    "find_head",
    "fit",
    "links",
    "rng",
    "zoo",
]
