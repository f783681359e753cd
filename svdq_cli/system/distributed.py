"""Several processes at one conversion: who does what, and what happens when one of them dies.

Processes meet in torch.distributed's key-value store, which torchrun (or MASTER_ADDR, MASTER_PORT, WORLD_SIZE and
RANK) names. Only small messages go through it: which layers are left, who takes the next, who is still alive. Tensors
go through the work folder, which all processes see. There is no collective operation, so nothing hangs when a process
dies, nothing is summed in an order that depends on timing, and a GPU's process is coordinated exactly as a CPU's.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from svdq_cli.errors import EnvironmentLacksError, InterruptedRunError

if TYPE_CHECKING:
    from torch.distributed import Store

Item = TypeVar("Item")

BEAT_SECONDS = 2.0
LOST_AFTER = 60.0  # seconds without a beat; a process beats from a thread of its own, however busy it is
POLL_SECONDS = 0.1
MEET_WITHIN = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run as one of them sees it. The base is a run of one process, which waits for no other."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """The first process plans, merges, writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item, for work whose items cost the same."""
        return items[self.rank :: self.size]

    def claims(self, topic: str, items: Sequence[Item]) -> Iterator[Item]:
        """Items for this process, each taken when it is ready for it. Together the processes take each item once, in
        order: with the longest first, all of them end at about the same time."""
        return iter(items)

    def broadcast(self, topic: str, value: Mapping[str, object]) -> None:
        """Send JSON values from the first process to all others."""

    def receive(self, topic: str) -> dict[str, object]:
        """What the first process told. Waits for it."""
        raise RuntimeError("a process alone hears nothing")

    def done(self, topic: str) -> None:
        """This process has finished its part of something."""

    def gather(self, topic: str) -> None:
        """Waits until every process has said `done`. Raises InterruptedRunError if one of them is lost."""


ALONE = Team()


@dataclass(frozen=True, slots=True)
class JoinedTeam(Team):
    """A process among others."""

    store: Store = field(kw_only=True)
    lost_after: float = LOST_AFTER  # seconds
    _beats: dict[int, tuple[bytes, float]] = field(default_factory=dict)  # rank -> (last beat, seen at)

    def claims(self, topic: str, items: Sequence[Item]) -> Iterator[Item]:
        while (index := self.store.add(f"claim/{topic}", 1) - 1) < len(items):
            self._require_all_alive()
            yield items[index]

    def broadcast(self, topic: str, value: Mapping[str, object]) -> None:
        self.store.set(f"told/{topic}", json.dumps(value))

    def receive(self, topic: str) -> dict[str, object]:
        self._wait_for([f"told/{topic}"])
        return json.loads(self.store.get(f"told/{topic}"))

    def done(self, topic: str) -> None:
        self.store.set(f"done/{topic}/{self.rank}", "")

    def gather(self, topic: str) -> None:
        self.done(topic)
        self._wait_for([f"done/{topic}/{rank}" for rank in range(self.size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self.store.check(keys):
            self._require_all_alive()
            time.sleep(POLL_SECONDS)

    def _require_all_alive(self) -> None:
        now = time.monotonic()
        for rank in range(self.size):
            if rank == self.rank or self.store.check([f"left/{rank}"]):
                continue
            if self.store.check([f"failed/{rank}"]):
                said = self.store.get(f"failed/{rank}").decode()
                raise _lost(f"process {rank} of {self.size} failed: {said}")
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            last, seen = self._beats.setdefault(rank, (beat, now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif now - seen > self.lost_after:
                where = beat.decode().rpartition(" ")[0] or "it never started"
                raise _lost(
                    f"process {rank} of {self.size} ({where}) has not responded for {self.lost_after:.0f} s"
                )


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The number of this process among those of its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def joined() -> Iterator[Team]:
    """The team that the launcher's environment names; a process alone where there is none.

    Raises EnvironmentLacksError where the others can't be reached, InterruptedRunError where one is lost.
    """
    if not launched():
        yield ALONE
        return
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEET_WITHIN))
    except (ValueError, RuntimeError) as error:
        raise EnvironmentLacksError(
            f"can't meet the other processes of this run: {error}",
            hint="start them with torchrun, or set MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK",
        ) from error
    team = JoinedTeam(rank, size, store=dist.PrefixStore("svdq", store))
    with _beating(team):
        try:
            yield team
        except dist.DistNetworkError as error:
            raise _lost(f"process 0 of {size}, which coordinates the run, is gone") from error
        except BaseException as error:
            _leave(team, "failed", str(error) or type(error).__name__)
            raise
        _leave(team, "left", "")


def _leave(team: JoinedTeam, how: str, why: str) -> None:
    import torch.distributed as dist

    try:
        team.store.set(f"{how}/{team.rank}", why)
    except dist.DistNetworkError:  # the first process, with the store, may have ended before
        return


@contextmanager
def _beating(team: JoinedTeam) -> Iterator[None]:
    """A thread that says every few seconds that this process lives, and where."""
    import torch.distributed as dist

    stop = threading.Event()
    who = f"{socket.gethostname()}, process id {os.getpid()}"

    def beat() -> None:
        count = 0
        while not stop.is_set():
            try:
                team.store.set(f"beat/{team.rank}", f"{who} {count}")
            except dist.DistNetworkError:
                return
            count += 1
            stop.wait(BEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _lost(message: str) -> InterruptedRunError:
    return InterruptedRunError(
        message, hint="finished work is kept; start all processes again", kind="process-lost"
    )
