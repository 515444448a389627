"""Metrics of a run: sums of losses on the device, metrics.jsonl, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from .._files import replacing


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    file = folder / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Meter:
    """Sums of the losses and their first bad step, on the device until they are read."""

    NEVER = 2**62

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.bad = torch.full((len(names),), self.NEVER, device=device)
        self.count = 0

    def add(self, losses: Tensor, step: int) -> None:
        """Takes one batch's losses, [terms]."""
        self.sums += losses
        self.bad = torch.where(losses.isfinite(), self.bad, self.bad.clamp(max=step))
        self.count += 1

    def is_bad(self) -> bool:
        """Whether a loss of this rank was NaN or Inf."""
        return bool((self.bad < self.NEVER).any())

    def forget(self) -> None:
        """As if every loss had been finite."""
        self.bad.fill_(self.NEVER)

    def first_bad(self) -> tuple[int, str] | None:
        """The first step of any rank with a loss that is NaN or Inf, and that loss's name."""
        if dist.is_initialized():
            dist.all_reduce(self.bad, dist.ReduceOp.MIN)
        step, name = min(zip(self.bad.tolist(), self.names, strict=True))
        return None if step == self.NEVER else (step, name)

    def state(self) -> tuple[list[float], int]:
        """The sums since the last reset, a mean over the ranks, and how many batches they hold."""
        sums = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        return sums.tolist(), self.count

    def reset(self, sums: list[float] | None = None, count: int = 0) -> None:
        """Sets the sums to zero, or to what `state` returned."""
        self.sums.copy_(torch.tensor(sums or [0.0] * len(self.names)))
        self.count = count

    def means(self) -> dict[str, float]:
        """The mean of each loss over batches and ranks since the last call."""
        sums, count = self.state()
        self.reset()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}


class MetricLogger:
    """Writes metrics.jsonl and TensorBoard, and prints; does nothing where `folder` is None.

    Args:
        folder: of metrics.jsonl and tensorboard/.
        title: in front of the bar and of each line.
        total: the run's steps.
        step: of the resumed run; rows of later steps are removed.
    """

    def __init__(self, folder: Path | None, title: str, total: int, step: int = 0) -> None:
        self.folder = folder
        self.title = title
        self.start = time.monotonic(), step
        self.total = total
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read(folder) if row["step"] <= step]
        with replacing(folder / "metrics.jsonl") as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(folder / "metrics.jsonl", "a")
        self._scalars = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._console = Console()
        self._bar = Progress(
            TextColumn(f"{title}:"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=step, text="")
        self._bar.start()

    def __enter__(self) -> MetricLogger:
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self._bar.stop()
            self._scalars.close()
            self._file.close()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        if self.folder is not None and not self._bar.disable:
            self._bar.update(self._task, completed=step)

    def write(self, kind: str, step: int, row: Mapping[str, float | str]) -> None:
        """Writes the row {kind, step, ...} to file, TensorBoard and terminal."""
        if self.folder is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            add: Any = (
                self._scalars.add_text if isinstance(value, str) else self._scalars.add_scalar
            )
            add(f"{kind}/{name}", value, step)
        shown = {k: x if isinstance(x, str) else f"{x:.4g}" for k, x in row.items()}
        text = "  ".join(f"{name} {value}" for name, value in shown.items() if name != "epoch")
        if self._bar.disable:
            began, first = self.start
            left = (time.monotonic() - began) / max(step - first, 1) * (self.total - step)
            self.say(f"{kind:5} step {step}/{self.total}  {text}  {left:.0f} s left")
        elif kind == "train":
            self._bar.update(self._task, text=text)
        else:
            self.say(f"{kind} step {step}  {text}")

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.folder is not None:
            self._console.print(
                f"{self.title}: {text}", markup=False, highlight=False, soft_wrap=True
            )
