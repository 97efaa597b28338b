"""Seconds and peak memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Cost:
    """Of one call: the least time of several, and the largest memory above what was held before."""

    seconds: float
    megabytes: float
    result: Any


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * PAGE


class _Peak(threading.Thread):
    """The largest resident size of this process while it runs, every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.start_size = self.peak = _resident()

    def run(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, _resident())


def cost(call: Callable[[], Any], device: torch.device, budget: float = 2.0, most: int = 20) -> Cost:
    """Call once to warm up, then for ``budget`` seconds or ``most`` times; memory is of one call more."""

    def once() -> tuple[float, Any]:
        started = time.perf_counter()
        result = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started, result

    first, result = once()
    times = [first]
    while sum(times) < budget and len(times) < most:
        times.append(once()[0])
    del result
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _, result = once()
        extra = torch.cuda.max_memory_allocated(device) - before
    else:
        thread = _Peak()
        thread.start()
        _, result = once()
        thread.done.set()
        thread.join()
        extra = max(thread.peak, _resident()) - thread.start_size
    return Cost(min(times), extra / 2**20, result)
