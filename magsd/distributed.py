"""One process or many under ``torchrun``: the same code, the same command.

A batch is the images of one step over ALL processes: process r takes every world_size-th of them,
so the number of processes changes the speed and not the optimisation (but for the batch-norm
statistics and the normalization of class weights, which each process takes over its own share).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from magsd_runtime.errors import BackendUnavailableError, UsageError


@dataclass(frozen=True)
class Processes:
    """Who this process is among the processes of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def average_(self, tensors: list[torch.Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)
                tensor /= self.world_size


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is CUDA where there is one; ``cuda`` asked for and missing is an error.

    Raises
    ------
    BackendUnavailableError
        If ``cuda`` was asked for and torch cannot use it.
    UsageError
        For a name that is no device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UsageError(f"--device is {name!r}: expected auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none (a CPU build)"
        raise BackendUnavailableError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device (built for CUDA {built}); "
            "use --device cpu, or see `magsd doctor`"
        )
    number = int(index) if index else local_rank
    if number >= torch.cuda.device_count():
        raise BackendUnavailableError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", number)


@contextmanager
def processes(device_name: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, or be the only one; leave the group at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(device_name, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        yield Processes(rank, world_size, device)
    finally:
        # DistributedDataParallel sits in reference cycles and keeps the group, and with it gloo's worker
        # threads, alive; a worker that still runs when the interpreter shuts down aborts the process
        gc.collect()
        dist.destroy_process_group()
