"""Several processes that train together, as `torchrun` starts them; one alone is a team of one.

Everything goes through `torch.distributed`: gloo between CPUs, NCCL between GPUs. The process of
rank 0 leads: it prepares, prints and writes, while all read, encode, train and validate a share.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from device import choose_device
from utils import UserError, interpreter, program

T = TypeVar("T")
OBJECT_TIMEOUT = timedelta(days=2)  # of those who wait for a download, or for another's photos

LOST = (
    "another process of this training has ended: what it said stands above. Checkpoints are whole; "
    "go on with --resume_checkpoint_path, or let torchrun do it with --max-restarts"
)


@dataclass(frozen=True)
class Team:
    """The processes of one training, seen from the one of this `rank`."""

    rank: int = 0
    size: int = 1
    job: str = ""  # what torchrun calls it
    objects: dist.ProcessGroup | None = None  # for Python objects, between CPUs

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`: every so-manieth, so that neighbours are spread."""
        return items[self.rank :: self.size]

    def gather(self, part: Sequence[T]) -> list[T]:
        """All parts of what `share` cut, in the order before; each process gets all of it."""
        parts = self.all_gather(part)
        whole: list[Any] = [None] * sum(map(len, parts))
        for rank, items in enumerate(parts):
            whole[rank :: self.size] = items
        return whole

    def all_gather(self, item: T) -> list[T]:
        """Each process's item, by rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.objects)
        return items

    def on_rank0(self, work: Callable[[], T]) -> T:
        """What `work` gives in the leading process, or its UserError; the others wait for it."""
        if self.size == 1:
            return work()
        found: list[Any] = [None]
        if self.leads:
            try:
                found = [work()]
            except UserError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0, group=self.objects)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def all_reduce(self, figures: Tensor) -> Tensor:
        """The sum of all processes' figures, in place."""
        if self.size > 1:
            dist.all_reduce(figures)
        return figures

    def command(self) -> list[str]:
        """How a script is started as this one was."""
        if self.size == 1:
            return [interpreter()]
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = [f"--nnodes={self.size // local}"] if local < self.size else []
        return [program("torchrun"), *nodes, f"--nproc_per_node={local}"]

    def device(self, name: str) -> torch.device:
        """The device named, or the best one here; of GPUs each process has its own."""
        device = choose_device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"torchrun starts {os.environ['LOCAL_WORLD_SIZE']} processes here, but there are "
                f"{count} CUDA GPUs: lower --nproc_per_node, or use --device cpu"
            )
        return torch.device("cuda", local)


ALONE = Team()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that torchrun started this process in, to work on the device named.

    Only the leader's `print` is heard. What several processes have to complain of, one does, and
    the others leave with code 1.
    """
    team = ALONE
    if "TORCHELASTIC_RUN_ID" in os.environ:
        team = Team(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _job())
    if team.size == 1:
        yield team
        return
    store, *_ = next(dist.rendezvous("env://"))
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun's store outlives its processes, and would lead to ones that are gone (PyTorch
        # issue 135712). Machines don't count restarts alike: docs/training.md says what helps.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    with contextlib.ExitStack() as stack:
        if not team.leads:
            nowhere = stack.enter_context(open(os.devnull, "w", errors="replace"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            own, backend = team.device(device), "gloo"
            if own.type == "cuda":
                torch.cuda.set_device(own)
                backend = "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=team.rank, world_size=team.size)
            yield replace(team, objects=dist.new_group(backend="gloo", timeout=OBJECT_TIMEOUT))
            dist.destroy_process_group()
        except (UserError, RuntimeError) as error:
            lost = isinstance(error, RuntimeError)
            # torch's own for NCCL and the store, a plain one for gloo
            if lost and not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            kind = "lost" if lost else "mistake"  # of which each tells its own part
            with contextlib.suppress(dist.DistError):  # the store goes with the process it is in
                if store.add(f"said/{kind}", 1) > 1:
                    raise SystemExit(1) from None
            raise UserError(LOST if lost else str(error)) from error


def _job() -> str:
    """What torchrun calls this job; one that nobody named is called after its torchrun."""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    if name != "none":
        return name
    agent, started = os.getppid(), ""
    with contextlib.suppress(OSError):  # elsewhere than on Linux the process alone has to do
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"none of {os.uname().nodename} {agent} {started}"


class StopSignal:
    """Ctrl-C, SIGTERM or a closed terminal: finish the step and save. A second one stops at once.

    Not so of a closed terminal, of which several may tell, nor under torchrun, which passes on
    what the process may have got already, and stops it after a while in any case.
    """

    def __init__(self, team: Team) -> None:
        self.asked = False
        self.team = team
        self.waits = True  # for the step under way

    def __enter__(self) -> StopSignal:
        # Of threads only the main one is told, and may ask to be.
        main = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, signal.SIGTERM] if main else []
        if main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and not self.team.job and number != signal.SIGHUP:
            raise KeyboardInterrupt
        self.asked = True
        if self.team.leads:
            again = "" if self.team.job else "; once more stops at once"
            # Whole, as it may come in the midst of another line; see `Output.write`.
            sys.stderr.write(f"\nstopping{' after this step' * self.waits}{again}\n")
        if not self.waits:
            self.waits = True
            raise KeyboardInterrupt

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """What `work` gives that may take minutes; None if asked to stop before it has ended.

        In a team, whose processes wait for each other in it, it comes to its end.
        """
        if self.team.size > 1:
            return work()
        if self.asked:
            return None
        try:
            self.waits = False
            return work()
        except KeyboardInterrupt:
            if not self.asked:
                raise
            return None
        finally:
            self.waits = True


class SharedGradients(nn.Module):
    """Lets DistributedDataParallel average the gradients of any work done with a model.

    The work is not the model's `forward`, but a loss, and in the self-critical stage a search
    before it, so that is what is wrapped.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # Never used, so that DistributedDataParallel's search for such finds one and is content.
        self.idle = nn.Parameter(torch.zeros(()))
        self.no_sync = contextlib.nullcontext  # as DistributedDataParallel has it

    def forward(self, work: Callable[..., T], *arguments: Any) -> T:
        return work(*arguments)


def share_gradients(model: nn.Module, team: Team) -> nn.Module:
    """A module whose call `(work, *arguments)` is `work(*arguments)`, after which `backward`
    averages the model's gradients over the team, but for work done within its `no_sync()`.

    `DistributedDataParallel` sends a bucket of gradients while the backward pass computes the
    next. Without its search for unused parameters it would sort the buckets anew after the first
    step, and so add in another order than a run that resumes: not the same to the bit.
    """
    shared = SharedGradients(model).to(next(model.parameters()).device)
    return DistributedDataParallel(shared, find_unused_parameters=True) if team.size > 1 else shared
