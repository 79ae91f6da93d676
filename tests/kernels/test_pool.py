"""The pool of kernel threads: every item once, on as many threads as torch uses, and BLAS given back as found."""

import threading

import pytest
import torch

from subquad.kernels import pool


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("items", [0, 1, 2, 5, 100])
def test_every_item_is_worked_on_once(three_threads, items):
    seen = []
    pool.run_over_items(lambda first, last: seen.extend(range(first, last)), items)
    assert sorted(seen) == list(range(items))


def test_as_many_threads_as_torch_has_work_at_the_same_time(three_threads):
    meeting = threading.Barrier(3, timeout=30)
    pool.run_over_items(lambda first, last: meeting.wait() if first < 3 else None, 12)


def test_one_thread_works_in_the_calling_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        threads = []
        pool.run_over_items(lambda first, last: threads.append((threading.get_ident(), first, last)), 7)
    finally:
        torch.set_num_threads(before)
    assert threads == [(threading.get_ident(), 0, 7)]


def test_an_error_in_any_thread_reaches_the_caller_after_the_rest_has_run(three_threads):
    seen = []

    def kernel(first, last):
        if first == 5:
            raise RuntimeError("item 5")
        seen.append(first)

    with pytest.raises(RuntimeError, match="item 5"):
        pool.run_over_items(kernel, 12)
    assert set(range(12)) - set(seen) <= {5, *range(5, 12)}
    pool.run_over_items(lambda first, last: seen.append("again"), 1)
    assert seen[-1] == "again"
