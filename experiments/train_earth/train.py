"""A training loop that can be interrupted at any step, for all of the networks here.

A step draws what it needs from a generator seeded by (seed, step): a run that was resumed sees the very batches of
one that was not. The moving average of the weights is what is exported.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    """What a run is; stored in its checkpoint, and compared on resuming."""

    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: int = 100
    ema_decay: float = 0.999
    seed: int = 0


def learning_rate(step: int, s: Settings) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    return s.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - s.warmup) / (s.steps - s.warmup)))


class Run:
    """A network, its optimiser and its moving average, with their checkpoint in ``folder``.

    Args:
        network: What is trained.
        settings: How.
        folder: Of the checkpoint; a run found there goes on.

    Raises:
        ValueError: The folder holds a run of other settings.
    """

    def __init__(self, network: nn.Module, settings: Settings, folder: Path) -> None:
        self.network, self.settings, self.folder = network, settings, folder
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0.01)
        self.ema = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.step, self.seconds = 0, 0.0
        if (folder / "state.json").exists():
            self._resume()

    def _resume(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{self.folder} holds a run with settings {state['settings']}, expected {asdict(self.settings)}; "
                "give the same settings to go on with it, or another --work folder"
            )
        tensors = load_file(self.folder / state["tensors"])
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(tensors[f"net.{name}"])
                self.ema[name] = tensors[f"ema.{name}"]
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"m1.{name}"],
                    "exp_avg_sq": tensors[f"m2.{name}"],
                }

    def save(self) -> None:
        """Write the checkpoint. Two files of tensors in turn: state.json always names one that is complete."""
        tensors = {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.network.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors |= {f"net.{name}": parameter.detach()}
            tensors |= {f"m1.{name}": moments["exp_avg"], f"m2.{name}": moments["exp_avg_sq"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / "state.json"
        names = [f"tensors-{i}.safetensors" for i in (0, 1)]
        name = names[state.exists() and json.loads(state.read_text())["tensors"] == names[0]]
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f".{name}")
        os.replace(self.folder / f".{name}", self.folder / name)
        record = {"settings": asdict(self.settings), "step": self.step, "seconds": self.seconds, "tensors": name}
        (self.folder / ".state.json").write_text(json.dumps(record))
        os.replace(self.folder / ".state.json", state)

    def train(self, loss_of: Callable[[int, Generator], Tensor], *, save_every_s: float = 120.0) -> None:
        """Minimise ``loss_of(step, generator)``."""
        s, network = self.settings, self.network.train()
        begun = saved = time.monotonic() - self.seconds
        bar = tqdm(range(self.step, s.steps), initial=self.step, total=s.steps, mininterval=10)
        smooth = None
        for step in bar:
            generator = Generator().manual_seed(s.seed * 1_000_003 + step)
            loss = loss_of(step, generator)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            self.optimizer.param_groups[0]["lr"] = learning_rate(step, s)
            self.optimizer.step()
            self.step = step + 1
            decay = min(s.ema_decay, self.step / (self.step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), list(network.parameters()), 1 - decay)
            smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            now = time.monotonic()
            if now - saved > save_every_s or self.step == s.steps:
                self.seconds, saved = now - begun, now
                self.save()


def averaged(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """The moving average of the weights, and the record, of the newest complete checkpoint in ``folder``."""
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / state["tensors"])
    return {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}, state
