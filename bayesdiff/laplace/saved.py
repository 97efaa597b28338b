"""What is written of a posterior, and of statistics: a folder with ``posterior.json`` or ``statistics.json``, and tensors.

Of a posterior only what prediction needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bayesdiff.checks import EmptyDataError, PosteriorFileError
from bayesdiff.head.geometry import HeadGeometry
from bayesdiff.head.identity import NetworkIdentity
from bayesdiff.io import read_folder, write_folder
from bayesdiff.laplace.covariance import Covariance

if TYPE_CHECKING:
    from bayesdiff.laplace.posterior import LaplacePosterior
    from bayesdiff.laplace.statistics import Statistics

FORMAT = 3
STATISTICS_FORMAT = 5
#: What a file that was not written by us may raise.
UNREADABLE = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError)
#: Plain values that are saved as they are.
PLAIN = (
    "structure", "covariance", "rank", "tolerance", "temperature", "log_likelihood", "num_timesteps", "num_images",
    "dataset_size", "draws_per_image", "training_draws", "cut_share", "amplification",
)  # fmt: skip
#: Tensors of the same name.
TENSORS = ("mean", "spectrum", "weights", "noise_variance", "origins")


def write_posterior(posterior: LaplacePosterior, folder: str | os.PathLike[str]) -> None:
    """Write a posterior; what was there stays whole until the new one is.

    Raises:
        OutputFolderError: The folder cannot be written.
    """
    sigma, network = posterior.sigma, posterior.network
    tensors = {name: getattr(posterior, name) for name in TENSORS}
    tensors["prior_precision"] = posterior.channel_precisions()
    tensors |= {f"sigma.{name}": value for name, value in sigma.parts.items()}
    if network is not None:
        tensors["network"] = network.samples
    meta = {
        "fingerprint": posterior.fingerprint, "head": posterior.head_path, "geometry": posterior.geometry.to_dict(),
        "form": sigma.form, "approximation_error": sigma.approximation_error,
        "network": None if network is None else network.layout, **{name: getattr(posterior, name) for name in PLAIN},
    }  # fmt: skip
    write_folder(folder, "posterior", FORMAT, tensors, meta)


def read_posterior(folder: str | os.PathLike[str], made: Callable[..., LaplacePosterior]) -> LaplacePosterior:
    """What :func:`write_posterior` wrote.

    Args:
        folder: The folder.
        made: Makes the posterior of its fields.

    Raises:
        PosteriorFileError: A file is missing, damaged, truncated or of an unknown version, or fields do not fit each other.
    """
    tensors, meta = read_folder(folder, "posterior", FORMAT)
    try:
        parts = {k.removeprefix("sigma."): v for k, v in tensors.items() if k.startswith("sigma.")}
        geometry = HeadGeometry.from_dict(meta["geometry"])
        shape = (geometry.out_channels, geometry.in_features)
        layout = meta["network"]
        posterior = made(
            **{name: tensors[name] for name in (*TENSORS, "prior_precision")}, **{name: meta[name] for name in PLAIN},
            geometry=geometry, sigma=Covariance(meta["form"], parts, shape, float(meta["approximation_error"])),
            head_path=_text(meta["head"]), network=None if layout is None else NetworkIdentity(layout, tensors["network"]),
        )  # fmt: skip
        recorded = _text(meta["fingerprint"])
    except UNREADABLE as error:
        raise PosteriorFileError(
            f"expected a posterior saved by LaplacePosterior.save in {str(folder)!r}, got {type(error).__name__}: {error}"
        ) from error
    if posterior.fingerprint != recorded:
        raise PosteriorFileError(f"expected the fingerprint {recorded} in {str(folder)!r}, got {posterior.fingerprint}")
    return posterior


def write_statistics(statistics: Statistics, folder: str | os.PathLike[str]) -> None:
    """Write statistics; what was there stays whole until the new ones are.

    Raises:
        OutputFolderError: The folder cannot be written.
        EmptyDataError: There are no draws.
    """
    if not statistics.num_draws:
        raise EmptyDataError("expected at least one image to save the sums of, got none")
    statistics.settle()
    tensors = {**statistics.sums(), **statistics.draws_since(0)}
    write_folder(folder, "statistics", STATISTICS_FORMAT, tensors, statistics.meta())


def read_statistics(folder: str | os.PathLike[str], made: Callable[..., Statistics]) -> Statistics:
    """What :func:`write_statistics` wrote.

    Args:
        folder: The folder.
        made: Makes the statistics of what they are, their sums, and what is kept of single draws.

    Raises:
        PosteriorFileError: A file is missing, damaged, truncated or of an unknown version.
    """
    tensors, meta = read_folder(folder, "statistics", STATISTICS_FORMAT)
    try:
        return made(meta, tensors, [tensors] if "scores" in tensors else [])
    except UNREADABLE as error:
        raise PosteriorFileError(
            f"expected what Statistics.save wrote in {str(folder)!r}, got {type(error).__name__}: {error}"
        ) from error


def _text(value: Any) -> str:
    """A string as it is.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value
