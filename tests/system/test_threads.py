"""Work that overlaps: in order, bounded, and no error lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import pytest
import torch

from svdq_cli.system.threads import (
    NoMemoryAlongside,
    background_writer,
    cores,
    end_if_left,
    in_background,
    map_concurrently,
    prefetch,
    torch_threads,
)


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_made_ahead_comes_in_order_and_not_too_early(threads: int):
    begun: list[int] = []

    def make(item: int) -> int:
        begun.append(item)
        return item * item

    for item, made in prefetch(range(20), make, threads=threads):
        assert made == item * item
        assert max(begun) <= item + threads
    assert sorted(begun) == list(range(20))


def test_what_has_no_room_beside_others_is_made_when_they_are_done():
    begun: list[int] = []
    asked: list[tuple[list[int], int]] = []

    def beside(busy: Sequence[int], following: int) -> bool:
        asked.append((list(busy), following))
        return following != 3

    done: list[int] = []
    for item, _ in prefetch(range(5), begun.append, beside=beside):
        if item < 3:
            assert 3 not in begun
        done.append(item)
    assert done == begun == list(range(5))
    assert asked == [([0], 1), ([1], 2), ([2], 3), ([3], 4)]


def test_side_by_side_each_comes_when_it_is_done():
    slow = threading.Event()

    def make(item: int, alone: bool) -> int:
        if item == 0:
            assert slow.wait(20)
        return item * item

    came: list[int] = []
    for item, made in map_concurrently(range(6), make, threads=2):
        assert made == item * item
        came.append(item)
        if len(came) == 5:
            slow.set()
    assert came == [1, 2, 3, 4, 5, 0]


def test_side_by_side_no_more_is_made_than_threads_and_one():
    begun: list[int] = []
    claimed: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            claimed.append(item)
            yield item

    def make(item: int, alone: bool) -> None:
        begun.append(item)

    for taken, _ in enumerate(map_concurrently(items(), make, threads=3), 1):
        assert len(begun) <= len(claimed) <= taken + 3
    assert sorted(begun) == claimed == list(range(20))


def test_side_by_side_what_has_no_room_waits_for_the_others():
    begun: list[int] = []

    def beside(busy: Sequence[int], following: int) -> bool:
        return sum(busy) + following <= 5

    def make(item: int, alone: bool) -> None:
        begun.append(item)

    for item, _ in map_concurrently([3, 2, 4, 5, 1], make, threads=2, beside=beside):
        if item in (3, 2):
            assert 5 not in begun
    assert begun == [3, 2, 4, 5, 1]


def test_side_by_side_what_finds_no_room_is_made_again_when_the_others_are_gone():
    made: list[int] = []
    taken: list[int] = []
    refused: set[int] = set()

    def make(item: int, alone: bool) -> int:
        if item in (3, 4, 9, 19) and not alone:
            refused.add(item)
            raise NoMemoryAlongside
        if item in refused:
            assert made == sorted(taken), "another one is in memory, or was begun beside it"
        made.append(item)
        made.sort()
        return item * item

    for item, square in map_concurrently(range(20), make, threads=4):
        assert square == item * item
        taken.append(item)
    assert sorted(taken) == made == list(range(20))


def test_side_by_side_what_finds_no_room_alone_is_an_error():
    def make(item: int, alone: bool) -> int:
        raise NoMemoryAlongside if not alone else MemoryError

    with pytest.raises(MemoryError):
        list(map_concurrently(range(5), make, threads=2))


def test_side_by_side_an_error_comes_at_once_and_leaves_no_thread_behind():
    before = threading.active_count()

    def make(item: int, alone: bool) -> int:
        if item == 1:
            raise ValueError("second")
        return item

    with pytest.raises(ValueError, match="second"):
        list(map_concurrently(range(5), make, threads=2))
    assert threading.active_count() == before


def test_an_error_of_the_maker_comes_in_its_place():
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("third")
        return item

    made = prefetch(range(5), make)
    assert [next(made), next(made)] == [(0, 0), (1, 1)]
    with pytest.raises(ValueError, match="third"):
        next(made)


def test_a_caller_that_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    made = prefetch(range(5), lambda item: item)
    next(made)
    made.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_work_behind_is_done_one_at_a_time_and_all_of_it():
    running, done = threading.Lock(), []

    def work(item: int) -> None:
        assert running.acquire(blocking=False), "two at once"
        done.append(item)
        running.release()

    with background_writer() as hand_over:
        for item in range(10):
            hand_over(lambda item=item: work(item))
    assert done == list(range(10))


def test_waiting_for_what_is_behind_frees_it():
    done: list[int] = []
    with background_writer() as hand_over:
        hand_over(lambda: done.append(1))
        hand_over.wait()
        assert done == [1]
        hand_over.wait()  # nothing is left to wait for


def test_an_error_behind_is_raised_by_the_next_piece_or_at_the_end():
    def fail() -> None:
        raise OSError("no space")

    with background_writer() as hand_over:
        hand_over(fail)
        with pytest.raises(OSError, match="no space"):
            hand_over(lambda: pytest.fail("the next piece was done"))
    with pytest.raises(OSError, match="no space"), background_writer() as hand_over:
        hand_over(fail)


def test_the_callers_own_threads_stay_as_they_are():
    before = torch.get_num_threads()
    inside = [count for _, count in prefetch(range(2), lambda _: torch.get_num_threads())]
    assert inside == [1, 1]
    assert torch.get_num_threads() == before


def test_torch_has_its_threads_back_afterwards():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert cores(most=before) == before, "no more than is allowed"
    assert torch.get_num_threads() == before


def test_what_is_made_meanwhile_is_there_in_the_end_and_an_error_of_the_block_stops_it():
    with in_background(lambda stop: 7) as made:
        assert made.result() == 7
    seen: list[bool] = []
    with (
        pytest.raises(ValueError, match="the block's"),
        in_background(lambda stop: seen.append(stop.wait(20))),
    ):
        raise ValueError("the block's own")
    assert seen == [True]


def test_what_nobody_waits_for_any_more_ends_at_its_next_question():
    begun, ended = threading.Event(), threading.Event()

    def make(item: int, alone: bool) -> int:
        if item == 0:
            return item
        begun.set()
        try:
            while True:
                end_if_left()
                time.sleep(0.01)
        except CancelledError:
            ended.set()
            raise

    made = map_concurrently([0, 1], make, threads=2)
    assert next(made) == (0, 0)
    assert begun.wait(10)
    made.close()  # would wait for ever
    assert ended.is_set()
    end_if_left()  # of the caller's own thread nobody asks it
