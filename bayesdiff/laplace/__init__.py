"""The Laplace posterior of a head: its sums, its structures, its predictive."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesdiff.laplace.head_laplace import HeadLaplace as HeadLaplace

__all__ = ["HeadLaplace"]


def __getattr__(name: str) -> Any:
    """``HeadLaplace`` on demand: laplace-torch takes seconds to import."""
    if name == "HeadLaplace":
        from bayesdiff.laplace.head_laplace import HeadLaplace

        return HeadLaplace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
