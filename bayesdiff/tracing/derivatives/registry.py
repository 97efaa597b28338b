"""What is known of each function of PyTorch, looked up once and remembered."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bayesdiff.tracing.derivatives import copies, general, indexing, linear, masks, pointwise
from bayesdiff.tracing.derivatives.call import Call, Rule, base_name, leaves

#: Operations are remembered up to this number; a closure may be a new function each time.
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Op:
    """What is known of a function.

    Args:
        name: Its name.
        kind: What :class:`~bayesdiff.tracing.dual.DualNumbers` does with it: ``pass``, ``escape``, ``derive``, ``flat`` (its
            derivative is 0), ``clear`` (the target loses its tangents), ``inplace``, ``setitem``, ``refuse``.
        rule: Tangents of the output; None for the general way.
        carry: Tangents that passed by a clamp go through the same rule.
        twin: The functional twin of an in-place operation.
        inplace: Place of an argument ``inplace``.
        why: Of ``refuse``.
    """

    name: str
    kind: str
    rule: Rule | None = None
    carry: bool = False
    twin: Callable[..., Any] | None = None
    inplace: int | None = None
    why: str = ""

    @property
    def clamp(self) -> bool:
        """Whether it is a clamp."""
        return self.rule is masks.clamp


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_AUGMENTED = {f"__i{k}__" for k in _words("add sub mul truediv div floordiv mod pow and or xor lshift rshift")}
_KINDS = {
    "pass": """
        size dim stride numel nelement element_size is_floating_point is_complex is_contiguous storage_offset data_ptr
        untyped_storage storage _typed_storage ndimension get_device is_signed is_conj is_neg is_inference is_pinned
        is_shared is_set_to is_same_size requires_grad_ retain_grad register_hook __repr__ __str__ __format__ __len__
        __hash__ __dir__ result_type can_cast is_tensor is_storage has_names __reduce_ex__ __setstate__ __getstate__
        set_ detach_ squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ as_strided_ rename_ share_memory_
        is_distributed is_coalesced __dlpack_device__ __cuda_array_interface__ _is_view""",
    "escape": """
        numpy item tolist __bool__ __float__ __int__ __index__ __complex__ __array__ __dlpack__ equal allclose is_nonzero
        __contains__""",
    "clear": "zero_ normal_ uniform_ random_ exponential_ cauchy_ log_normal_ geometric_ bernoulli_",
    "flat": """
        sign round floor ceil trunc fix floor_divide __floordiv__ __rfloordiv__ heaviside histc bernoulli poisson
        multinomial new __array_wrap__ zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros
        new_ones new_empty new_empty_strided""",
    "setitem": "__setitem__",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in _words(names)}
_REFUSED = {
    "backward": "gradients of gradients are not followed",
    "apply_": "what it runs is not followed",
    "map_": "what it runs is not followed",
    "_make_dual": "torch.func's transformations are not followed",
    "resize_": "it changes the memory's size",
    "resize_as_": "it changes the memory's size",
}
#: Modules of rules; each names its operations.
_FAMILIES = (pointwise, masks, copies, indexing, linear, general)
_RULES = {name: rule for family in _FAMILIES for rule, names in family.RULES for name in _words(names)}
#: What takes tangents past a clamp along.
_CARRY = {name for name, rule in _RULES.items() if rule in (*pointwise.CARRYING, *copies.CARRYING, *indexing.CARRYING)}
#: These may have several dual arguments and still carry.
_MANY = {"cat", "concat", "concatenate", "stack", "tensor", "as_tensor", "copy_", "fill_"}
_OWNERS = (torch, torch.Tensor, F, torch.linalg, torch.fft, torch.special, torch._C._nn)
#: Operators may have the name of a method: ``__pow__`` that of ``pow``.
_DUNDER = {getattr(torch.Tensor, n): n for n in dir(torch.Tensor) if n.startswith("__") and n.endswith("pow__")}
_OPS: dict[Any, Op] = {}


def operation(func: Callable[..., Any]) -> Op:
    """What is known of a function that the mode was called with."""
    op = _OPS.get(func)
    if op is None:
        op = _resolve(func)
        if len(_OPS) < _REMEMBERED:
            _OPS[func] = op
    return op


def carries(op: Op, c: Call) -> bool:
    """Whether tangents that pass by a clamp go on through this operation."""
    return op.carry and (op.name in _MANY or sum(id(x) in c.values for x in leaves((c.args, c.kwargs))) == 1)


def _resolve(func: Any) -> Op:
    name = _DUNDER.get(func, base_name(func))
    if name in ("__get__", "__set__", "__delete__"):
        return Op(name, "pass")
    if not _ours(func, name):
        return Op(name, "derive")
    if name in _KIND_OF:
        return Op(name, _KIND_OF[name])
    if name in _REFUSED:
        return Op(name, "refuse", why=_REFUSED[name])
    if name in ("copy_", "fill_"):
        return Op(name, "inplace", copies.second, carry=True)
    if (name.endswith("_") and not name.endswith("__")) or name in _AUGMENTED:
        twin = _twin(func, name)
        if twin is None:
            return Op(name, "refuse", why="it changes a tensor in a way that is not known")
        known = operation(twin)
        return Op(name, "clear" if known.kind == "flat" else "inplace", known.rule, known.carry, twin)
    return Op(name, "derive", _RULES.get(name), name in _CARRY, None, _inplace(func))


def _ours(func: Any, name: str) -> bool:
    """Whether the name means what torch means by it."""
    packet = getattr(func, "_overloadpacket", func)
    if str(getattr(packet, "_qualified_op_name", "")).startswith("aten::"):
        return True
    if name.startswith("__") and name.endswith("__"):
        return getattr(torch.Tensor, name, None) == func
    return any(getattr(owner, name, None) == func for owner in _OWNERS)


def _twin(func: Any, name: str) -> Callable[..., Any] | None:
    """``add`` for ``add_``, ``__add__`` for ``__iadd__``."""
    base = f"__{name[3:]}" if name in _AUGMENTED else name[:-1]
    owners = [owner for owner in _OWNERS if getattr(owner, name, None) == func]
    for owner in (*owners, torch.Tensor, torch, F):
        found: Callable[..., Any] | None = getattr(owner, base, None)
        if callable(found):
            return found
    return None


def _inplace(func: Any) -> int | None:
    """Place of an argument ``inplace``."""
    try:
        names = list(inspect.signature(func).parameters)
    except (ValueError, TypeError):
        return None
    return names.index("inplace") if "inplace" in names else None
