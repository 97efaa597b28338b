"""Uncertainty of pretrained diffusion and flow models, through a Laplace posterior over their output layer."""

from bayesdiff import rng, zoo
from bayesdiff.checks import BayesdiffError, BayesdiffWarning
from bayesdiff.fit import fit
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.find import Head, find_head
from bayesdiff.laplace import links
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.pipeline import UncertaintyOutput, UncertaintyPipeline

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
