"""The common token of two lists: there is exactly one, in either order, also where the input comes twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import tasks


def lists_of(row, short, long):
    """The two lists of one pass over the input, whichever comes first."""
    assert row[0] == 1
    assert row[-1] == 3
    middle = row.index(2)
    first, second = row[1:middle], row[middle + 1 : -1]
    assert {len(first), len(second)} == {short, long}
    return first, second


@settings(deadline=None, max_examples=30)
@given(
    short=st.integers(1, 5),
    more=st.integers(0, 8),
    repeats=st.integers(1, 3),
    order=st.sampled_from(["short first", "long first", "both"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_answer_is_the_only_common_token(short, more, repeats, order, seed):
    task = tasks.SetIntersection(short=short, long=short + more, repeats=repeats, order=order)
    batch = task.batch(8, seed=seed, index=0)
    for row, labels in zip(batch.inputs.tolist(), batch.labels.tolist()):
        once = len(row) // repeats
        assert all(row[i * once : (i + 1) * once] == row[:once] for i in range(repeats))
        first, second = lists_of(row[:once], short, short + more)
        assert len(set(first)) == len(first)
        assert len(set(second)) == len(second)
        assert set(first) & set(second) == {labels[-1]}
        assert labels[:-1] == [-100] * (len(row) - 1)
        assert all(4 <= token < 28 for token in first + second)
        if order != "both" and more:
            assert (len(first) == short) == (order == "short first")


def test_both_orders_are_drawn_and_tests_may_be_longer():
    task = tasks.get("set_intersection")
    rows = task.batch(200, seed=0, index=0).inputs.tolist()
    short_first = sum(row.index(2) == 4 for row in rows)
    assert 70 < short_first < 130
    longer = task.batch(2, seed=0, index=0, split="test", length=20)
    assert longer.inputs.shape == (2, 20)
    with pytest.raises(ValueError, match="needs 26 different tokens"):
        task.batch(2, seed=0, index=0, length=30)
    with pytest.raises(ValueError, match="order"):
        tasks.SetIntersection(order="short")
