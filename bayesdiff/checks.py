"""The errors and warnings of the package, and the checks that raise them.

Every error derives from :class:`BayesdiffError` and from the built-in that fits it, so both
``except bayesdiff.BayesdiffError`` and ``except ValueError`` work. Every message says what was
expected, what came, and, where it is not plain, what to do.
"""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class BayesdiffError(Exception):
    """Base of every error that this package raises on purpose."""


class HeadNotFoundError(BayesdiffError, LookupError):
    """The model has no output layer at the expected path, or the family is unknown."""


class AmbiguousHeadError(BayesdiffError, LookupError):
    """The model has several layers that could be its output layer."""


class UnsupportedHeadError(BayesdiffError, TypeError):
    """The output layer is of a kind, or has a setting, that the package does not treat."""


class HeadMismatchError(BayesdiffError, ValueError):
    """A posterior was fitted to other weights than those of this network's head."""


class NonFiniteError(BayesdiffError, ValueError):
    """NaN or infinity where finite numbers are needed."""


class EmptyDataError(BayesdiffError, ValueError):
    """There are no data to fit to."""


class BadImagesError(BayesdiffError, ValueError):
    """Some images of the data cannot be used: all of them, with the reason, are in the message and in ``problems``.

    Attributes:
        problems: (name or number of the image, what is wrong with it).
    """

    def __init__(self, message: str, problems: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class CheckpointError(BayesdiffError, ValueError):
    """The checkpoint of a fit is damaged, or is that of another fit; the message says what differs."""


class ShapeError(BayesdiffError, ValueError):
    """A tensor has the wrong shape."""


class UnequalTangentsError(ShapeError):
    """An operation was given tensors with different numbers of tangents."""


class ArgumentError(BayesdiffError, ValueError):
    """An argument is outside what it may be."""


class NegativeVarianceError(BayesdiffError, ArithmeticError):
    """A variance is negative or NaN."""


class NotPositiveDefiniteError(BayesdiffError, ArithmeticError):
    """A precision matrix has no Cholesky factor."""


class PosteriorFileError(BayesdiffError, ValueError):
    """A stored posterior is missing, damaged, truncated or of an unknown version."""


class UnsupportedPipelineError(BayesdiffError, TypeError):
    """The pipeline does something that the package cannot follow; the message has the residual."""


class NotRepeatableError(BayesdiffError, RuntimeError):
    """A network or a sampler does not do the same again from the same state; the message says where."""


class UnsupportedSchedulerError(BayesdiffError, TypeError):
    """The scheduler cannot be used for this; the message says why."""


class UnknownNameError(BayesdiffError, LookupError):
    """No model, class or scheduler of that name."""


class OutputFolderError(BayesdiffError, OSError):
    """The output folder cannot be written."""


class BayesdiffWarning(UserWarning):
    """Something was repaired, approximated or left out."""


class NegativeVarianceWarning(BayesdiffWarning):
    """A method returned negative variances; they are left as they are where a number is asked for, and 0 in a std."""


class TrainingDrawsWarning(BayesdiffWarning):
    """It is not known how many draws (t, ε) each image had in the network's training; the message says what is assumed."""


class SketchWarning(BayesdiffWarning):
    """The gradients of single images are no longer kept but as random mixtures; the message says what that costs."""


class ProjectionWarning(BayesdiffWarning):
    """An estimate of a covariance was not positive semidefinite, and was projected; the message says how much was cut."""


def check_int(name: str, value: object, *, least: int) -> int:
    """``value`` as an int of at least ``least``.

    Raises:
        ArgumentError: It is not an integer, or too small.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        raise ArgumentError(f"expected {name} to be an integer >= {least}, got {value!r}") from None
    if isinstance(value, bool) or number < least:
        raise ArgumentError(f"expected {name} >= {least}, got {value!r}")
    return number


def check_positive(name: str, value: object) -> float:
    """``value`` as a finite float > 0.

    Raises:
        ArgumentError: It is not a number, not finite, or not positive.
    """
    try:
        number = float("nan") if isinstance(value, str | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"expected {name} to be a number > 0, got {value!r}") from None
    if not 0 < number < float("inf"):
        raise ArgumentError(f"expected {name} to be finite and > 0, got {value!r}")
    return number


def check_number(name: str, value: object) -> float:
    """``value`` as a finite float.

    Raises:
        ArgumentError: It is not a number, or not finite.
    """
    try:
        number = float("nan") if isinstance(value, str | bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise ArgumentError(f"expected {name} to be a finite number, got {value!r}")
    return number


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """``value`` if it is one of ``choices``.

    Raises:
        ArgumentError: It is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"expected {name} to be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_finite(name: str, tensor: Tensor, hint: str = "") -> Tensor:
    """``tensor`` if all its elements are finite.

    Raises:
        NonFiniteError: Some are NaN or infinite.
    """
    # A finite sum proves finite elements, in one pass and without a mask; where it overflows, float64 does not.
    if not (bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor.sum(dtype=torch.float64)))):
        nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        raise NonFiniteError(
            f"expected finite {name}, got {nan} NaN and {inf} infinite of {tensor.numel()} elements"
            f"{'; ' + hint if hint else ''}"
        )
    return tensor


def check_returned(call: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """What a function of the user returned, as a float64 tensor of this shape.

    Args:
        call: The call, for messages.
        value: What it returned.
        shape: That it should have.

    Raises:
        ArgumentError: It is not numbers.
        ShapeError: It has another shape.
    """
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"expected {call} to return a tensor {shape}, got {type(value).__name__}") from error
    if tuple(numbers.shape) != shape:
        raise ShapeError(f"expected {call} to return a tensor {shape}, got {tuple(numbers.shape)}")
    return numbers


def check_output_folder(folder: str | os.PathLike[str]) -> Path:
    """Make ``folder`` if need be and prove that a file can be written there, before any work is done.

    Raises:
        OutputFolderError: It cannot be made or written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".bayesdiff-"):
            pass
    except OSError as error:
        raise OutputFolderError(
            f"expected a folder that can be written, got {str(path)!r}: {error.strerror or error}; choose another folder"
        ) from error
    return path
