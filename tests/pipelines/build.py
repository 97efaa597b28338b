"""The table of pipelines, and ``python -m tests.pipelines.build``, which runs them all."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import Case, build_more, build_transformer, build_unet

CASES: tuple[Case, ...] = (*build_unet.CASES, *build_transformer.CASES, *build_more.CASES)


def run(case: Case, pipe: Any, **kwargs: Any) -> Any:
    """What the pipeline returns under the name ``case.output``, as a tensor if it is an array."""
    out = getattr(pipe(**{**case.call(pipe, torch.Generator().manual_seed(0)), **kwargs}), case.output)
    return torch.from_numpy(out) if isinstance(out, np.ndarray) else out


def main(*names: str) -> None:
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        try:
            pipe = case.make()
            first = run(case, pipe)
            start = time.process_time()  # others may share the machine
            second = run(case, pipe)
            seconds = time.process_time() - start
            torch.randn(1)  # nothing hangs on the global generator
            third = run(case, case.make())
        except Exception as error:
            print(f"{case.name:24} {error!r:.200}", flush=True)
            continue
        assert isinstance(first, Tensor), type(first)
        same = torch.equal(first, second) and torch.equal(first, third)
        clamped = ((first == 0) | (first == 1)).float().mean()
        notes = "" if first.isfinite().all() else "NOT FINITE"
        for kind in case.output_types:
            try:
                run(case, pipe, output_type=kind)
            except Exception as error:
                notes += f" {kind}: {error!r:.100}"
        print(
            f"{case.name:24} {seconds:5.2f} s  {tuple(first.shape)!s:20} repeatable {'yes' if same else 'NO'}  "
            f"std {first.std():.3f}, clamped {clamped:.0%} {notes}",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
