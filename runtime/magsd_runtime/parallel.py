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
    work: Callable[[Item], Outcome], items: Iterable[Item], jobs: int, *, ordered: bool = True
) -> Iterator[Outcome]:
    """``work(item)`` of each item, ``jobs`` at a time; ``ordered``: in the order of the items, else as they are done.

    What ``work`` raises is raised here, by the first item in that order; nothing else is then begun, and what had
    begun has ended. The same where the caller stops early or is interrupted.
    """
    executor = ThreadPoolExecutor(jobs, "magsd-film")
    begun: deque[Future[Outcome]] = deque()
    left = iter(items)
    try:
        while True:
            begun.extend(executor.submit(work, item) for item in islice(left, AHEAD * jobs - len(begun)))
            if not begun:
                return
            if not ordered:
                done = wait(begun, return_when=FIRST_COMPLETED).done
                first = next(future for future in begun if future in done)
                begun.remove(first)
            else:
                first = begun.popleft()
            yield first.result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
