"""Work that overlaps with other work: a thread reads what comes next, or writes what is done. torch, hashing and files
leave Python's lock alone while they work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def made_ahead(
    items: Iterable[Item], make: Callable[[Item], Made], *, threads: int = 1
) -> Iterator[tuple[Item, Made]]:
    """Every item with what `make` makes of it, in their order. While the caller is busy with one, threads make the
    next: no more than `threads` + 1 are in memory. What `make` raises is raised where its item would have come."""
    maker = _threads(threads, "ahead")
    coming: list[tuple[Item, Future[Made]]] = []
    try:
        for item in items:
            coming.append((item, maker.submit(make, item)))
            if len(coming) > threads:
                first, made = coming.pop(0)
                yield first, made.result()
        for first, made in coming:
            yield first, made.result()
    finally:
        maker.shutdown(wait=True, cancel_futures=True)


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch has one core each: with as many as the caller's, they would wait for one another and burn
    time while they wait."""
    import torch

    torch.get_num_threads()  # settles the caller's own, which a thread without any would take from the last one set
    return ThreadPoolExecutor(count, name, torch.set_num_threads, (1,))


@contextmanager
def done_behind() -> Generator[Callable[[Callable[[], object]], None], None, None]:
    """Yields a function that takes work off the caller's hands: a thread does it while the caller goes on. One piece at
    a time: the next waits for it. All is done when the block is left; what a piece raises is raised by the next one, or
    there."""
    worker = _threads(1, "behind")
    pending: list[Future[object]] = []

    def finish() -> None:
        if pending:
            pending.pop().result()

    def hand_over(work: Callable[[], object]) -> None:
        finish()
        pending.append(worker.submit(work))

    try:
        yield hand_over
        finish()
    finally:
        worker.shutdown(wait=True)
