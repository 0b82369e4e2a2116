"""What both training scripts share: the loop, checkpoints, averaged weights, the learning-rate schedule, optimizers."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def set_threads(count: int) -> None:
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)


class Schedule:
    """Constant after a warm-up, with a linear decay at the end of a time or step budget.

    Args:
        warmup: steps over which the rate rises from zero.
        seconds: time budget of this process; infinity for none.
        decay_seconds: how long before the end of the time budget the rate starts to fall to zero.
        steps: the step at which to stop whatever the time.
    """

    def __init__(self, warmup: int, seconds: float, decay_seconds: float, steps: int) -> None:
        self.warmup, self.seconds, self.decay_seconds, self.steps = warmup, seconds, decay_seconds, steps
        self.started = time.monotonic()
        self.interrupted = False

    def stop_on_signals(self) -> None:
        """Let Ctrl-C and SIGTERM end the loop after the step in flight, so that the run is saved."""

        def stop(*_: Any) -> None:
            self.interrupted = True

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    def finished(self, step: int) -> bool:
        return self.interrupted or step >= self.steps or time.monotonic() - self.started >= self.seconds

    def factor(self, step: int) -> float:
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = self.seconds - (time.monotonic() - self.started)
        fall = min(1.0, max(0.0, left / self.decay_seconds)) if self.decay_seconds > 0 else 1.0
        return rise * fall


def build_optimizers(model: nn.Module, lr: float, muon_lr: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside transformer blocks and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if muon_lr > 0 and p.ndim == 2 and ".blocks." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class RunFolder:
    """A resumable run: ``checkpoint.pt`` (written beside and renamed) and ``log.jsonl``.

    The averaged weights live in ``self.average``; they are what evaluation and the built model use.
    """

    def __init__(self, path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], ema: float) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path, self.model, self.optimizers, self.ema = path, model, optimizers, ema
        self.seconds = 0.0
        self.average: dict[str, Tensor] = {n: p.detach().clone() for n, p in model.state_dict().items()}

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Move the averages towards the weights; early on the window is a tenth of the steps so far."""
        keep = min(self.ema, 1 - 10 / (step + 10))
        current = self.model.state_dict()
        average = [v for v in self.average.values() if v.is_floating_point()]
        weights = [current[n] for n, v in self.average.items() if v.is_floating_point()]
        torch._foreach_lerp_(average, weights, 1 - keep)

    def save(self, step: int, elapsed: float) -> None:
        state: dict[str, Any] = {
            "step": step,
            "seconds": self.seconds + elapsed,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        partial = self.path / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.path / "checkpoint.pt")

    def resume(self, device: str = "cpu") -> int:
        """Load the checkpoint where there is one; the step to go on from."""
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            base = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            # The command line, not the checkpoint, decides the rate.
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["base_lr"] = lr
        self.seconds = state["seconds"]
        return int(state["step"])

    def log(self, row: dict[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def train(
    args: argparse.Namespace,
    model: nn.Module,
    folder: RunFolder,
    loss_at: Callable[[torch.Generator], Tensor],
) -> None:
    """Train until the schedule or a signal ends it, logging every 50 steps; the run folder holds the result.

    Args:
        args: the script's options: seed, warmup, minutes, decay_minutes, steps, device, bf16, save_every.
        loss_at: the loss of one step; all its randomness comes from the generator, so that a resumed run is the same.
    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    step = folder.resume(args.device)
    schedule = Schedule(args.warmup, args.minutes * 60, args.decay_minutes * 60, args.steps)
    schedule.stop_on_signals()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, from step {step}", flush=True)
    window: list[float] = []
    saved = shown = time.monotonic()
    while not schedule.finished(step):
        generator = torch.Generator().manual_seed(args.seed * 10**9 + step)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            loss = loss_at(generator)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = schedule.factor(step)
        for optimizer in folder.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        folder.update_ema(step)
        window.append(loss.item())
        if step % 50 == 0:
            row = {
                "step": step,
                "loss": sum(window) / len(window),
                "lr": factor,
                "ms": 1000 * (time.monotonic() - shown) / len(window),
                "seconds": folder.seconds + time.monotonic() - schedule.started,
            }
            folder.log(row)
            print(json.dumps(row), flush=True)
            window, shown = [], time.monotonic()
        if time.monotonic() - saved > args.save_every:
            folder.save(step, time.monotonic() - schedule.started)
            saved = time.monotonic()
    folder.save(step, time.monotonic() - schedule.started)
