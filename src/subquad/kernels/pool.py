"""One pool of threads that drives nogil kernels over a range of work items.

numba's own ``parallel=True`` is not used: its OpenMP layer resets torch's thread count and dies in forked DataLoader
workers. Here the number of threads is ``torch.get_num_threads()``, asked anew at each call, the calling thread takes
part, and a forked child starts with a pool of its own.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count

import torch

#: Ranges handed out per thread: more than one evens out items of unequal length.
RANGES_PER_THREAD = 4


class _Pool:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = 0
        self._executor: ThreadPoolExecutor | None = None

    def submit(self, threads: int, work: Callable[[], None], copies: int) -> list[Future[None]]:
        """Start ``copies`` runs of ``work`` on ``threads - 1`` workers: the caller is the last thread."""
        with self._lock:
            if self._executor is None or self._threads != threads:
                if self._executor is not None:
                    self._executor.shutdown(wait=False)
                self._executor = ThreadPoolExecutor(threads - 1, thread_name_prefix="subquad")
                self._threads = threads
            return [self._executor.submit(work) for _ in range(copies)]


_pool = _Pool()


def _start_afresh() -> None:
    """In a forked child: the parent's threads are gone, and its locks may be held by them."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)


def run_over_items(kernel: Callable[[int, int], object], items: int) -> None:
    """Call ``kernel(first, last)`` for ranges that together cover ``range(items)``, on as many threads as torch uses.

    ``kernel`` must release the GIL to gain from it, and must write to places that belong to its items alone. An
    exception in any range is raised here after all
    threads have ended.
    """
    threads = min(torch.get_num_threads(), items)
    if threads <= 1:
        kernel(0, items)
        return
    ranges = min(items, threads * RANGES_PER_THREAD)
    bounds = [items * i // ranges for i in range(ranges + 1)]
    ticket = count()

    def work() -> None:
        while (i := next(ticket)) < ranges:
            kernel(bounds[i], bounds[i + 1])

    futures = _pool.submit(torch.get_num_threads(), work, threads - 1)
    try:
        work()
    finally:
        wait(futures)
    for future in futures:
        future.result()
