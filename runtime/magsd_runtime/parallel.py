"""Films side by side: threads that share one network, results in the order of the films or as they come.

Threads, not processes: decoding, resizing and the network let go of Python's lock, and a second process would hold the
network a second time (measured: docs/folders.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

AHEAD = 8
"""Items for each thread that may be begun before a result is taken: one slow film does not hold up the others, and the
memory does not grow with their number."""


def side_by_side(
    work: Callable[[Item], Iterator[Outcome]], items: Iterable[Item], jobs: int, *, ordered: bool = True
) -> Iterator[Outcome]:
    """What ``work(item)`` gives first, for each item, ``jobs`` at a time; ``ordered``: in the order of the items, else
    as it comes.

    ``work(item)`` gives one outcome and may then go on, in its thread, while that is taken: it is through when the last
    outcome has been taken and the iterator ends. What it raises is raised here: before its outcome by that item, after
    it as soon as the next is asked for. Nothing else is then begun, and what had begun has ended; the same where the
    caller stops early or is interrupted.
    """
    executor = ThreadPoolExecutor(jobs, "magsd-film")
    begun: deque[Future[Outcome]] = deque()
    failed: list[BaseException] = []
    left = iter(items)

    def begin(item: Item) -> Future[Outcome]:
        outcome: Future[Outcome] = Future()
        executor.submit(_do, work, item, outcome, failed)
        return outcome

    try:
        while not failed:
            begun.extend(map(begin, islice(left, AHEAD * jobs - len(begun))))
            if not begun:
                break
            if not ordered:
                done = wait(begun, return_when=FIRST_COMPLETED).done
                first = next(future for future in begun if future in done)
                begun.remove(first)
            else:
                first = begun.popleft()
            yield first.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    if failed:
        raise failed[0]


def _do(
    work: Callable[[Item], Iterator[Outcome]], item: Item, outcome: Future[Outcome], failed: list[BaseException]
) -> None:
    try:
        steps = work(item)
        outcome.set_result(next(steps))
    except BaseException as error:
        outcome.set_exception(error)
        return
    try:
        for _ in steps:
            raise AssertionError("an item has one outcome")
    except BaseException as error:
        failed.append(error)
