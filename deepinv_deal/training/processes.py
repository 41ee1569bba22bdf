"""Training in several processes, started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from deepinv_deal.training.data import Problems


@dataclass(frozen=True)
class Processes:
    """
    The processes that train together; one, unless torch.distributed is initialised.

    Each works on its part of every batch, and gradients are averaged, so the weights
    are those of one process up to rounding.

    :param int rank: number of this process. The first writes files and keeps the time.
    :param int number: how many there are.
    """

    rank: int = 0
    number: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Returns those of the default process group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, problems: Problems) -> Problems:
        """Returns this process's part of a batch."""
        if self.number == 1:
            return problems
        mine = slice(self.rank, None, self.number)
        # A view would keep, and write to checkpoints, the whole batch.
        parts = (problems.x, problems.y, problems.sigma)
        return Problems(*(part[mine].clone() for part in parts))

    def wrap(self, prior: nn.Module, loss: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the loss as a function whose gradients in the prior are averaged."""
        if self.number == 1:
            return loss
        # Not every model uses all of its parameters.
        return DistributedDataParallel(
            _Loss(prior, loss), find_unused_parameters=True, broadcast_buffers=False
        )

    def agreed(self, value: float, device: torch.device) -> float:
        """Returns the first process's value: all must stop at the same step."""
        if self.number == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        distributed.broadcast(shared, 0)
        return float(shared)

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a scalar over all processes."""
        if self.number > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.number
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Returns the values of all processes in the first one, nothing in others."""
        if self.number == 1:
            return [value]
        values = [None] * self.number if self.first else None
        distributed.gather_object(value, values)
        return values or []


class _Loss(nn.Module):
    """A loss as a module, which is what DistributedDataParallel can wrap."""

    def __init__(self, prior: nn.Module, loss: Callable[..., Any]):
        super().__init__()
        self.prior, self.loss = prior, loss

    def forward(
        self, problems: Problems, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss and where the solver ended."""
        return self.loss(problems, start)


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """
    Joins the processes that torchrun has started, if it has.

    Every process validates, which costs nothing but their time, and the first one
    writes files.

    :param str device: ``"cpu"``, ``"cuda"``, ...; with CUDA each process takes the GPU
        of its local rank.
    :return: the device of this process.
    """
    if not distributed.is_available() or not distributed.is_torchelastic_launched():
        yield device
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"Process {local} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}. Lower --nproc-per-node."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        distributed.destroy_process_group()
