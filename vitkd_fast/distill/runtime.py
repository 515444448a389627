"""Device and precision of a process, and its rank among those of torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .._timing import warn_of_threads
from . import threads
from .config import Config, ConfigError


@dataclass(frozen=True)
class Runtime:
    """Device, precision and memory format of a process, and its rank."""

    device: torch.device
    student_dtype: torch.dtype = torch.float32  # of autocast
    teacher_dtype: torch.dtype = torch.float32  # of its weights
    memory_format: torch.memory_format = torch.contiguous_format  # of both models
    rank: int = 0
    ranks: int = 1
    threads: tuple[int, ...] = ()  # to choose from while steps are taken; none: as they are

    @classmethod
    def of(cls, config: Config) -> Runtime:
        """This process's; joins the others where there are any."""
        run = config.run
        if run.threads:
            warn_of_threads("run.threads", run.threads)
            torch.set_num_threads(run.threads)
        name = run.device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"run.device: expected cpu, as torch sees no GPU, got {name}")
        rank, ranks = 0, 1
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.is_initialized():
            rank, ranks = dist.get_rank(), dist.get_world_size()
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            elif ranks > 1:
                raise ConfigError(f"run.device: expected cuda for {ranks} processes, got {name}")
            torch.cuda.set_device(device)
        if run.precision != "auto":
            student = teacher = getattr(torch, run.precision)
        elif device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            student = torch.bfloat16 if native else torch.float16
            teacher = student
        else:
            # depthwise convolutions in bfloat16 are slower on a CPU, a transformer's GEMMs faster
            can = cpu_capabilities()
            fast = can.get("avx512_bf16") or can.get("amx_bf16")
            student, teacher = torch.float32, torch.bfloat16 if fast else torch.float32
        layout = torch.channels_last if run.channels_last else torch.contiguous_format
        # compiled code is of one number of threads, and ranks would wait for each other's trials
        fixed = device.type != "cpu" or run.compile or ranks > 1
        counts = () if fixed else threads.candidates(run.threads)
        return cls(device, student, teacher, layout, rank, ranks, counts)

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The student's and the teacher's."""
        return self.student_dtype, self.teacher_dtype

    def autocast(self) -> torch.autocast:
        """For the student: nothing in float32."""
        enabled = self.student_dtype != torch.float32
        return torch.autocast(self.device.type, self.student_dtype, enabled)


def cpu_capabilities() -> dict[str, Any]:
    """torch.cpu.get_capabilities(), or {} where torch does not have it."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known
