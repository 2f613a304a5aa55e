"""What comes next is made in a thread while the devices compute."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], start: int, ahead: int = 2) -> Iterator[tuple[int, T]]:
    """(number, make(number)) from `start` on, without end; a thread makes the next `ahead` of them meanwhile.

    What goes wrong in the thread is raised here, at the number that it concerns. Close the iterator, or leave it to
    the garbage collector, to end the thread.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        pending = collections.deque(executor.submit(make, start + i) for i in range(ahead))
        for number in itertools.count(start):
            pending.append(executor.submit(make, number + ahead))
            yield number, pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
