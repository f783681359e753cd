"""Work that overlaps with other work: a thread reads what comes next, or writes what is done. torch, hashing and files
leave Python's lock alone while they work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")
_OWN = threading.local()  # of a thread that makes something: the event that ends it


def prefetch(
    items: Iterable[Item],
    make: Callable[[Item], Made],
    *,
    threads: int = 1,
    beside: Callable[[Sequence[Item], Item], bool] = lambda busy, following: True,
) -> Generator[tuple[Item, Made], None, None]:
    """Every item with what `make` makes of it, in their order. While the caller is busy with one, threads make the
    next: no more than `threads` + 1 are in memory. Where `beside(busy, following)` finds no room for one more, it is
    made once the caller is done with all before it. What `make` raises is raised where its item would have come."""
    maker = _threads(threads, "ahead")
    coming: list[tuple[Item, Future[Made]]] = []
    try:
        for item in items:
            if coming and not beside([each for each, _ in coming], item):
                while coming:
                    yield _first(coming)
            coming.append((item, maker.submit(make, item)))
            if len(coming) > threads:
                yield _first(coming)
        while coming:
            yield _first(coming)
    finally:
        maker.shutdown(wait=True, cancel_futures=True)


class NoMemoryAlongside(Exception):
    """Raised by work of `map_concurrently` that does not fit while others are in memory; it is repeated when they are
    gone."""


def map_concurrently(
    items: Iterable[Item],
    make: Callable[[Item, bool], Made],
    *,
    threads: int,
    beside: Callable[[Sequence[Item], Item], bool] = lambda busy, following: True,
) -> Generator[tuple[Item, Made], None, None]:
    """Every item with what `make(item, alone)` makes of it, as they are done. One is taken from `items` when no more
    than `threads` are being made or wait for the caller. Where `beside(busy, following)` finds no room for one more, it
    waits until enough of the others are taken; where `make` finds none, which was not `alone` when it was started and
    raises NoMemoryAlongside, until all of them are, and nothing is started next to it then. What else `make` raises is
    raised here. Where the caller leaves before the end, what is still being made ends at its next `end_if_left`."""
    left = threading.Event()
    maker = _threads(threads, "beside", left)
    busy: dict[Future[Made], Item] = {}
    crowded: list[Item] = []
    coming = iter(items)
    try:
        while True:
            while len(busy) > threads or (busy and crowded):
                yield from _some_done(busy, crowded)
            if crowded:  # and nothing next to it, for which there was no room
                item = crowded.pop(0)
                busy[maker.submit(make, item, True)] = item
                yield from _some_done(busy, crowded)
                continue
            try:
                item = next(coming)
            except StopIteration:
                if not busy:
                    return
                yield from _some_done(busy, crowded)
                continue
            while busy and not beside(tuple(busy.values()), item):
                yield from _some_done(busy, crowded)
            busy[maker.submit(make, item, not busy)] = item
    finally:
        left.set()
        maker.shutdown(wait=True, cancel_futures=True)


def cores(most: int) -> int:
    """How many threads to give to work whose pieces need one core each: torch's, but no more than `most`."""
    import torch

    return min(most, torch.get_num_threads())


@contextmanager
def torch_threads(count: int) -> Generator[None, None, None]:
    """torch with this many cores, for the calling thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def in_background(make: Callable[[threading.Event], Made]) -> Generator[Future[Made], None, None]:
    """A thread makes something while the block is busy with something else; the future waits for it, and raises what
    `make` raised. When an error leaves the block, the event is set, on which `make` is to end soon."""
    stop = threading.Event()
    with _threads(1, "meanwhile") as maker:
        try:
            yield maker.submit(make, stop)
        except BaseException:
            stop.set()
            raise


def _first(coming: list[tuple[Item, Future[Made]]]) -> tuple[Item, Made]:
    """Taken out. A function of its own, so that nothing here holds what the caller has let go of."""
    item, made = coming.pop(0)
    return item, made.result()


def _some_done(
    busy: dict[Future[Made], Item], crowded: list[Item]
) -> Generator[tuple[Item, Made], None, None]:
    """Taken out: of those that are done the one that was started first. What found no room is `crowded` instead."""
    wait(busy, return_when=FIRST_COMPLETED)
    future = next(each for each in busy if each.done())
    item = busy.pop(future)
    if isinstance(future.exception(), NoMemoryAlongside):
        crowded.append(item)
    else:
        yield item, future.result()


def end_if_left() -> None:
    """CancelledError in a thread whose work no one waits for any more. Work of minutes asks now and then, because only
    the main thread is told of an interruption."""
    left = getattr(_OWN, "left", None)
    if left is not None and left.is_set():
        raise CancelledError


def _threads(count: int, name: str, left: threading.Event | None = None) -> ThreadPoolExecutor:
    """Threads in which torch has one core each: with as many as the caller's, they would wait for one another and burn
    time while they wait."""
    import torch

    torch.get_num_threads()  # settles the caller's own, which a thread without any would take from the last one set

    def begin() -> None:
        torch.set_num_threads(1)
        _OWN.left = left

    return ThreadPoolExecutor(count, name, begin)


class BackgroundWriter:
    """Takes work off the caller's hands, one piece at a time, each done by a thread while the caller continues."""

    def __init__(self, worker: ThreadPoolExecutor) -> None:
        self._worker = worker
        self._pending: Future[object] | None = None
        self._one_at_a_time = threading.RLock()  # of those who hand over or wait

    def __call__(self, work: Callable[[], object]) -> None:
        """Waits for the piece before and hands over the next. What the piece before raised is raised here."""
        with self._one_at_a_time:
            self.wait()
            self._pending = self._worker.submit(work)

    def wait(self) -> None:
        """Wait until all work is done, and no memory is held for it. Raises what the work raised. Any thread may
        wait."""
        with self._one_at_a_time:
            pending, self._pending = self._pending, None
            if pending is not None:
                pending.result()


@contextmanager
def background_writer() -> Generator[BackgroundWriter, None, None]:
    """All that is handed over is done when the block is left; what the last piece raised is raised there."""
    worker = _threads(1, "behind")
    writer = BackgroundWriter(worker)
    try:
        yield writer
        writer.wait()
    finally:
        worker.shutdown(wait=True)
