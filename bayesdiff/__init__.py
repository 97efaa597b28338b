"""Uncertainty of pretrained diffusion and flow models, through a Laplace posterior over their output layer."""

from bayesdiff import rng, zoo
from bayesdiff.checks import BayesdiffError, BayesdiffWarning
from bayesdiff.fit import fit
from bayesdiff.gaussian import Gaussian
from bayesdiff.head.find import Head, find_head
from bayesdiff.laplace import links
from bayesdiff.laplace.posterior import LaplacePosterior
from bayesdiff.laplace.statistics import Statistics
from bayesdiff.output import UncertaintyOutput
from bayesdiff.pipeline import UncertaintyPipeline, propagate
from bayesdiff.propagation.settings import BayesDiff, Ensemble, Tangents

__version__ = "0.1.0"

__all__ = [
    "BayesDiff",
    "BayesdiffError",
    "BayesdiffWarning",
    "Ensemble",
    "Gaussian",
    "Head",
    "LaplacePosterior",
    "Statistics",
    "Tangents",
    "UncertaintyOutput",
    "UncertaintyPipeline",
    "find_head",
    "fit",
    "links",
    "propagate",
    "rng",
    "zoo",
]
