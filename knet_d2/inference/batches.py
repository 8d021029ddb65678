"""Items in order: read or computed ahead in threads, collected to batches, computed in groups of one kind."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_END = object()


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield ``function(item)`` in the order of the items, computed by threads; at most 2 * workers results wait."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(function, item) for item in islice(iterator, 2 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(iterator, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)  # nothing more is computed for a caller who has stopped


def read_ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """Yield the items, of which up to ``count`` are produced ahead in a thread."""
    iterator = iter(items)
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, iterator, _END) for _ in range(count))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, iterator, _END))
            yield item  # type: ignore[misc]  # not _END
    finally:
        pool.shutdown(cancel_futures=True)  # nothing more is produced for a caller who has stopped


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items, and of the rest."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def in_groups(function: Callable[[list[T]], Iterable[R]], items: Sequence[T], kind: Callable[[T], Hashable]) -> list[R]:
    """Return a result for each item, in order; the function is called once for all items of a kind."""
    groups: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(kind(item), []).append(index)
    results: dict[int, R] = {}
    for indices in groups.values():
        results |= zip(indices, function([items[i] for i in indices]), strict=True)
    return [results[i] for i in range(len(items))]
