"""Several processes that train one program together: which one this is, and what they tell each other.

    torchrun --nproc-per-node 2 -m hqc.cli qat …
    accelerate launch --multi_gpu --num_processes 2 -m hqc.cli qat …

Both start the command so many times and say in the environment which one each is. The processes speak through gloo, on
the CPU, whatever machine they run on. Every one draws the same random numbers and holds the whole batch; each runs the
denoiser on its own rows. The first alone writes and prints.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from hqc.errors import TrainingError
from hqc.wording import first_words

if TYPE_CHECKING:  # the command line asks here who may print, before anything heavy is imported
    from torch import Tensor

__all__ = ["ALONE", "Processes", "is_first", "joined", "quiet_unless_first"]

T = TypeVar("T")
# The names that torchrun and accelerate give them, then those of MPI's launchers.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_MOST = 1024


@dataclass(frozen=True)
class Processes:
    """How many there are, which one this is, and how many of them are on this machine."""

    rank: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's share of a batch.

        Raises:
            TrainingError: if the number of processes does not divide it.
        """
        if batch % self.count:
            found = f"is not divided by {self.count} processes"
            do = f"Give a multiple of {self.count}, for example {max(1, batch // self.count) * self.count}."
            raise TrainingError(f"--batch-size {batch}", found, do)
        share = batch // self.count
        return slice(self.rank * share, (self.rank + 1) * share)

    def summed(self, tensor: "Tensor") -> "Tensor":
        """The sum over all processes, the same to the bit in each."""
        if self.count == 1:
            return tensor
        import torch

        total = tensor.contiguous().clone()
        with _together():
            torch.distributed.all_reduce(total)
        return total

    def add_gradients(self, parameters: "Sequence[Tensor]") -> None:
        """Sums the gradients: losses are sums over samples, and each process has those of its own."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        import torch

        total = self.summed(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(total, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def gathered(self, own: "Tensor") -> "Tensor":
        """The rows of all processes, in their order."""
        if self.count == 1:
            return own
        import torch

        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        with _together():
            torch.distributed.all_gather(parts, own)
        return torch.cat(parts)

    def wait(self) -> None:
        """Until all are here."""
        import torch

        self.summed(torch.zeros(1))

    def in_turn(self, action: Callable[[], T]) -> T:
        """What the first has done before the others do it, and all before anybody goes on."""
        if not self.first:
            self.wait()
        result = action()
        if self.first:
            self.wait()
        self.wait()
        return result

    def require_same(self, what: str, digest: bytes) -> None:
        """Refuses processes that hold different values.

        Raises:
            TrainingError: naming what differs.
        """
        import torch

        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).long()
        if not torch.equal(self.gathered(own[None]), own[None].expand(self.count, -1)):
            do = "Run them on machines that are alike, with as many threads each."
            raise TrainingError(what, f"differs between the {self.count} processes", do)


ALONE = Processes()
"""One process, which tells nobody."""


@contextmanager
def _together() -> Iterator[None]:
    """A call that all processes make.

    Raises:
        TrainingError: if one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        found = f"another process has ended ({first_words(error, 80)})"
        raise TrainingError("training in several processes", found, "See what that one said.") from error


def _from_environment() -> Processes:
    """What the launcher says.

    Raises:
        TrainingError: for numbers that are none, or a launcher that has started one process instead of several.
    """
    rank, count = (_number(names, default) for names, default in ((_RANK, 0), (_COUNT, 1)))
    if not 0 <= rank < count <= _MOST:
        found = f"this is process {rank} of {count}"
        raise TrainingError("RANK and WORLD_SIZE", found, "Start the command with torchrun.")
    if count == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ:
        found = "was asked for several processes and has started one: with --cpu it leaves that to MPI"
        do = "Use `accelerate launch --multi_gpu --num_processes N` (it needs no GPU), or torchrun."
        raise TrainingError("accelerate launch", found, do)
    return Processes(rank, count, _number(("LOCAL_WORLD_SIZE",), count))


def _number(names: Sequence[str], default: int) -> int:
    name = next((name for name in names if name in os.environ), None)
    try:
        return default if name is None else int(os.environ[name])
    except ValueError as error:
        found = f"is {os.environ[name or '']!r}; expected a whole number"
        raise TrainingError(f"environment variable {name}", found, "Start the command with torchrun.") from error


def is_first() -> bool:
    """Whether this process may print; before anything is joined, and without an error."""
    try:
        return _from_environment().first
    except TrainingError:
        return True


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that the launcher has started, which can speak to each other within it; `ALONE` without one.

    Raises:
        TrainingError: if they cannot be joined.
    """
    found = _from_environment()
    if found.count == 1:
        yield found
        return
    import torch

    if torch.distributed.is_initialized():
        yield found
        return
    try:
        torch.distributed.init_process_group("gloo", rank=found.rank, world_size=found.count)
    except (RuntimeError, ValueError) as error:
        said = f"cannot be joined ({first_words(error, 120)})"
        raise TrainingError(f"{found.count} processes", said, "Start the command with torchrun.") from error
    try:
        yield found
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_unless_first() -> Iterator[None]:
    """Nothing is printed within it by any process but the first."""
    if is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
