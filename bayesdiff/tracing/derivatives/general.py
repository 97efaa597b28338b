"""Operations without a rule: ``vmap(jvp(op))``, in chunks of the tangents."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesdiff.tracing.derivatives.beside import HALF, up
from bayesdiff.tracing.derivatives.call import Call, Rule, Tangents, leaves, unsupported

#: torch's forward-mode levels are counted for the process, not for the thread.
LOCK = threading.RLock()


def generic(c: Call, picked: Sequence[int]) -> list[Tensor]:
    """``vmap(jvp(op))`` for some of its outputs, in chunks of the tangents.

    Raises:
        UnsupportedPipelineError: torch has no derivative of it.
    """
    ids = list(c.tangents)
    primals = tuple(up(c.values[k].detach()) for k in ids)
    ts = [t.to(p.dtype) for t, p in zip(c.tangents.values(), primals, strict=True)]

    def apply(*parts: Tensor) -> tuple[Tensor, ...]:
        new = dict(zip(ids, parts, strict=True))
        tensors = list(leaves(c.func(*swapped(c.args, new), **swapped(c.kwargs, new))))
        return tuple(tensors[n] for n in picked)

    def push(*parts: Tensor) -> Any:
        return torch.func.jvp(apply, primals, parts)[1]

    if _opaque(c.func):
        raise unsupported(c, "PyTorch cannot see inside a custom operator")
    states = _random_states(primals)
    with LOCK:
        try:
            out = mapped(push, ts, c.chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise unsupported(c, f"PyTorch has no forward derivative of it: {error}") from error
    if not all(torch.equal(a, b) for a, b in zip(states, _random_states(primals), strict=True)):
        raise unsupported(c, "it draws random numbers")
    return out


def mapped(f: Callable[..., Any], ts: list[Tensor], chunk: int) -> list[Tensor]:
    """``f`` of each tangent, at once if torch can, else one after the other."""
    warns = torch._C._functorch._set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
    warns(False)
    try:
        out = torch.vmap(f, chunk_size=chunk)(*ts)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if "random" in str(error):
            raise
        out = tuple(torch.stack(parts) for parts in zip(*[f(*parts) for parts in zip(*ts, strict=True)], strict=True))
    finally:
        warns(True)
    return list(out)


def swapped(value: Any, new: dict[int, Tensor]) -> Any:
    """Arguments with other tensors in the place of some, and in float32 instead of half precision."""
    if isinstance(value, Tensor):
        return new[id(value)] if id(value) in new else up(value)
    if isinstance(value, (list, tuple)):
        parts = [swapped(v, new) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    if isinstance(value, dict):
        return {k: swapped(v, new) for k, v in value.items()}
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


def _random_states(xs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(x.device) for x in xs if x.is_cuda)]


def _opaque(func: Any) -> bool:
    """Whether it is an operator that someone registered without saying what it is made of: its derivative would be 0."""
    packet = getattr(func, "_overloadpacket", func)
    name = getattr(packet, "_qualified_op_name", None)
    if name is None or name.split("::")[0] in ("aten", "prims"):
        return False
    names = [name if n == "default" else f"{name}.{n}" for n in packet.overloads()]
    return not any(torch._C._dispatch_has_kernel_for_dispatch_key(n, "CompositeImplicitAutograd") for n in names)


def _batch_norm(c: Call) -> Tangents:
    """Its own derivative would move the running averages a second time."""
    kept = c.get(1, "running_mean")
    if kept is not None and c.get(5, "training", "use_input_stats", default=False):
        raise unsupported(c, "it changes running averages")
    return NotImplemented


RULES: list[tuple[Rule, str]] = [(_batch_norm, "batch_norm instance_norm")]
