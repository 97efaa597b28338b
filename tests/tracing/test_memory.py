"""Free memory goes back to the system where it is more than a step takes again."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor

from bayesdiff.tracing import memory
from bayesdiff.tracing.dual import DualNumbers

MB = 2**20
pytestmark = pytest.mark.skipif(memory._trim() is None, reason="not Linux with glibc")


def freed(number: int) -> list[Tensor]:
    """So many blocks of 8 MB are filled and freed; what lies between them is in use, so the C library may keep their pages."""
    blocks, between = [], []
    for _ in range(number):
        blocks.append(torch.ones(8 * MB, dtype=torch.uint8))
        between.append(torch.ones(MB // 2, dtype=torch.uint8))
    return between


def measured(number: int, kept: bool) -> None:
    """What the test says, in a process of its own: blocks that earlier tests left would be taken again."""
    DualNumbers()  # from here on the library keeps such blocks
    memory.give_back(memory.LARGE, held=0)
    before = memory._resident()
    between = freed(number)
    held = memory._resident()
    assert held - before > 6 * number * MB
    memory.give_back(memory.LARGE - 1)  # small tangents
    assert abs(memory._resident() - held) < 4 * MB
    memory.give_back(memory.LARGE)
    assert (memory._resident() > held - 4 * MB) == kept
    memory.give_back(memory.LARGE, held=0)
    assert memory._resident() - before < 2 * number * MB
    del between


@pytest.mark.parametrize(("number", "kept"), [(24, False), (6, True)])
def test_what_a_step_takes_again_is_kept_and_more_is_given_back(number: int, kept: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=measured, args=(number, kept))
    process.start()
    process.join()
    assert process.exitcode == 0


def collected(every: bool) -> None:
    """A long run keeps a little of each call between what the call freed."""
    memory.CALLS = memory.CALLS if every else 10**9
    before, kept = memory._resident(), []
    for call in range(1000):
        some = [torch.ones(n * 1024, dtype=torch.uint8) for n in (700 + call % 7 * 31, 300 + call % 5 * 17, 900)]
        kept.append(torch.ones(16 * 1024, dtype=torch.uint8))
        del some
        memory.tidy(call)
    assert (memory._resident() - before < 64 * MB) == every
    del kept


@pytest.mark.parametrize("every", [True, False])
def test_a_long_run_of_small_tensors_is_tidied(every: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=collected, args=(every,))
    process.start()
    process.join()
    assert process.exitcode == 0
