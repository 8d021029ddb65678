"""Frames are read while others are computed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


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
