"""What memory has tangents: for each storage a shadow, ``(L, n)`` in the order of its n elements."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bayesdiff.checks import UnequalTangentsError, UnsupportedPipelineError
from bayesdiff.tracing.derivatives.beside import fit, real_dtype
from bayesdiff.tracing.modes import Quiet


class Shadow:
    """Tangents of one storage.

    Args:
        data: ``(L, n)``, each row contiguous.
        free: The same as if the last clamp had not been there.
        dtype: What the n elements are.
        shared: Whether others may hold the same memory: copy before a write.
    """

    __slots__ = ("data", "dtype", "free", "seen", "shared")

    def __init__(self, data: Tensor, free: Tensor | None, dtype: torch.dtype, shared: bool = False):
        self.data, self.free, self.dtype, self.shared = data, free, dtype, shared
        self.seen: Tensor | None = None  # the storage's bytes when it was handed out as an array

    def memory(self) -> list[int]:
        return [t.untyped_storage()._cdata for t in (self.data, self.free) if t is not None]


class Entry:
    """A storage and its shadow; it begins at ``offset``, in bytes of values."""

    __slots__ = ("offset", "ref", "shadow")

    def __init__(self, ref: StorageWeakRef, shadow: Shadow, offset: int):
        self.ref, self.shadow, self.offset = ref, shadow, offset

    def data(self, x: Tensor) -> Tensor:
        """Tangents of a tensor in this storage."""
        return self._seen(self.shadow.data, x)

    def free(self, x: Tensor) -> Tensor:
        """Those past a clamp, or the tangents."""
        return self._seen(self.shadow.data if self.shadow.free is None else self.shadow.free, x)

    def _seen(self, data: Tensor, x: Tensor) -> Tensor:
        dtype = self.shadow.dtype
        if x.dtype != dtype:
            if dtype.is_complex and x.dtype == dtype.to_real():
                data = torch.view_as_real(data).flatten(1)
            elif x.dtype.is_complex and dtype == x.dtype.to_real():
                data = torch.view_as_complex(data.unflatten(1, (-1, 2)))
            else:
                raise UnsupportedPipelineError(
                    f"cannot follow memory with tangents that is read as {x.dtype} and was written as {dtype}; "
                    "use propagation='ensemble', which needs no derivatives"
                )
        offset = data.storage_offset() + x.storage_offset() + self.offset // x.element_size()
        out = data.as_strided((data.shape[0], *x.shape), (data.stride(0), *x.stride()), offset)
        if x.is_conj():
            out = out.conj()
        return torch._neg_view(out) if x.is_neg() else out


#: Dual arguments by their id, each with what is known of its storage.
Found = dict[int, tuple[Tensor, Entry]]


class Shadows:
    """The storages that have tangents, and those among them whose memory others hold as arrays."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.handed: list[tuple[int, int, Entry]] = []  # sorted: first byte, number of bytes
        self.due = 0

    def entry(self, x: Tensor) -> Entry | None:
        """What is known of the storage of ``x``."""
        try:
            storage = x.untyped_storage()
        except (RuntimeError, NotImplementedError):
            return None
        entry = self.entries.get(storage._cdata)
        return self.returned(x, storage) if entry is None and self.handed else entry

    def drop(self, x: Tensor) -> None:
        """The memory of ``x`` has no tangents any more."""
        entry = self.entries.pop(x.untyped_storage()._cdata, None)
        if entry is not None:
            self.handed = [h for h in self.handed if h[2] is not entry]

    def purge(self) -> None:
        """Forget storages that are gone."""
        gone = [key for key, entry in self.entries.items() if entry.ref.expired()]
        for key in gone:
            del self.entries[key]
        if gone and self.handed:
            self.handed = [h for h in self.handed if not h[2].ref.expired()]
        self.due = len(self.entries) // 64  # registrations until the next time: a look at each costs

    def write(self, x: Tensor, t: Tensor | None, free: Tensor | None, found: Found | None = None) -> None:
        """New tangents of ``x``; None for none."""
        storage = x.untyped_storage()
        entry = self.entries.get(storage._cdata)
        if t is None:
            if entry is None:
                return
            if whole(x) and all(h[2].shadow is not entry.shadow for h in self.handed):
                del self.entries[storage._cdata]
                return
            self.ensure(x, entry.shadow.data.shape[0], False)
            entry.data(x).zero_()
            entry.free(x).zero_()
            return
        t, free = _converted(t, x), None if free is None else _converted(free, x)
        if whole(x) and (entry is None or entry.shadow.data.shape[1] == x.numel()):
            shadow = Shadow(_flat(t, x), None if free is None else _flat(free, x), x.dtype)
            memory = shadow.memory()
            for _, source in (found or {}).values():
                if source is not entry and any(m in memory for m in source.shadow.memory()):
                    shadow.shared = source.shadow.shared = True
            if entry is None:
                self._register(storage, shadow)
            else:
                s = entry.shadow
                kept = s.shared and any(m in memory for m in s.memory())
                s.data, s.free, s.dtype, s.shared, s.seen = (
                    shadow.data,
                    shadow.free,
                    x.dtype,
                    kept or shadow.shared,
                    None,
                )
            return
        entry = self.ensure(x, t.shape[0], free is not None)
        entry.data(x).copy_(t)
        if entry.shadow.free is not None:
            entry.free(x).copy_(t if free is None else free)

    def ensure(self, x: Tensor, length: int, free: bool) -> Entry:
        """A shadow for the storage of ``x`` that may be written to."""
        entry = self.entry(x)
        if entry is None:
            storage = x.untyped_storage()
            data = torch.zeros(length, storage.nbytes() // x.element_size(), dtype=real_dtype(x.dtype), device=x.device)
            entry = self._register(storage, Shadow(data, None, x.dtype))
        s = entry.shadow
        if s.data.shape[0] != length:
            raise UnequalTangentsError(
                f"expected {s.data.shape[0]} tangents, as the memory that is written to has, got {length}"
            )
        if s.shared:
            s.data, s.free, s.shared = s.data.clone(), None if s.free is None else s.free.clone(), False
        if free and s.free is None:
            s.free = s.data.clone()
        s.seen = None
        return entry

    def _register(self, storage: torch.UntypedStorage, shadow: Shadow, offset: int = 0) -> Entry:
        self.due -= 1
        if self.due <= 0:
            self.purge()
        entry = self.entries[storage._cdata] = Entry(StorageWeakRef(storage), shadow, offset)
        return entry

    def hand_out(self, x: Tensor, entry: Entry) -> None:
        """The memory of ``x`` is given to others as an array: it is known again when it comes back."""
        storage = x.untyped_storage()
        entry.shadow.seen = _bytes(storage)
        if all(h[2] is not entry for h in self.handed):
            bisect.insort(self.handed, (storage.data_ptr(), storage.nbytes(), entry), key=lambda h: h[0])

    def returned(self, x: Tensor, storage: torch.UntypedStorage) -> Entry | None:
        """The entry of a storage that is in the memory of another: come back from numpy."""
        pointer, size = storage.data_ptr(), storage.nbytes()
        n = bisect.bisect_right(self.handed, pointer, key=lambda h: h[0]) - 1
        if n < 0 or not size or x.device.type != "cpu":
            return None
        first, length, entry = self.handed[n]
        offset = pointer - first
        if offset + size > length or entry.ref.expired():
            return None
        with Quiet():
            seen = entry.shadow.seen
            if seen is not None and not torch.equal(seen[offset : offset + size], _bytes(storage)):
                raise UnsupportedPipelineError(
                    f"a numpy array that shares memory with a tensor {list(x.shape)} with tangents was changed in place; "
                    "use propagation='ensemble', which needs no derivatives"
                )
        return self._register(storage, entry.shadow, entry.offset + offset)


def key(x: Tensor) -> int:
    """The storage; 0 if there is none."""
    try:
        return int(x.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return 0


def whole(x: Tensor) -> bool:
    """Whether ``x`` is all of its storage."""
    return x.numel() * x.element_size() == x.untyped_storage().nbytes()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


def _converted(t: Tensor, x: Tensor) -> Tensor:
    """To the dtype, device and shape of the tangents of ``x``."""
    dtype = real_dtype(x.dtype)
    if t.is_complex() and not dtype.is_complex:
        t = t.real
    if t.dtype != dtype or t.device != x.device:
        t = t.to(device=x.device, dtype=dtype)
    return fit(t, x.shape) if t.shape[1:] != x.shape else t


def _flat(t: Tensor, x: Tensor) -> Tensor:
    """``(L, n)`` in the order of the storage, all of which is ``x``; without a copy where that is possible."""
    length, n, stride = t.shape[0], x.numel(), t.stride()
    if stride[1:] == x.stride() or (x.is_contiguous() and t.is_contiguous()):
        own = t.untyped_storage().nbytes() <= 2 * t.numel() * t.element_size()
        if own and (length == 1 or stride[0] >= n) and not (t.is_conj() or t.is_neg() or t.is_inference()):
            return t.as_strided((length, n), (max(stride[0], n), 1))
    flat = torch.empty(length, n, dtype=t.dtype, device=t.device)
    flat.as_strided(t.shape, (n, *x.stride())).copy_(t)
    return flat
