"""Recall tasks: every question can be answered from its context, by the rule that the task states."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import tasks


@settings(deadline=None, max_examples=40)
@given(
    num_pairs=st.integers(1, 20),
    extra=st.integers(0, 40),
    vocab_size=st.integers(42, 301),
    random_filler=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_mqar_queries_are_answerable(num_pairs, extra, vocab_size, random_filler, seed):
    task = tasks.Mqar(
        vocab_size=vocab_size, length=4 * num_pairs + extra, num_pairs=num_pairs, random_filler=random_filler
    )
    half = vocab_size // 2
    for inputs, labels in zip(*(tensor.tolist() for tensor in task.batch(4, seed=seed, index=0))):
        keys, values = inputs[0 : 2 * num_pairs : 2], inputs[1 : 2 * num_pairs : 2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert all(1 <= key < half <= value < vocab_size for key, value in zip(keys, values))
        table = dict(zip(keys, values))
        asked = [t for t, label in enumerate(labels) if label != -100]
        assert sorted(inputs[t] for t in asked) == sorted(keys)
        assert all(t >= 2 * num_pairs and t % 2 == 0 for t in asked)
        assert all(labels[t] == table[inputs[t]] for t in asked)
        if not random_filler:
            assert all(inputs[t] == 0 for t in range(2 * num_pairs, task.length) if t not in asked)


def test_mqar_first_gap_follows_the_power_law():
    """One pair: the query's place 2 + 2g has p(g) ~ (g + 1)^(a - 1). Chi-squared, 7 degrees: 24.3 once in 1,000."""
    rows = 20_000
    task = tasks.Mqar(vocab_size=16, length=18, num_pairs=1, power=0.3)
    labels = task.batch(rows, seed=0, index=0).labels.numpy()
    counts = (labels[:, 2::2] != -100).sum(axis=0)
    expected = np.arange(1, 9) ** (0.3 - 1)
    expected *= rows / expected.sum()
    assert counts.sum() == rows
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_mqar_pairs_of_gaps_are_drawn_without_replacement():
    """Two pairs, three gaps: P(first key at i, second at j) = p_i p_j / (1 - p_i). Chi-squared, 5 degrees: 20.5."""
    rows = 20_000
    task = tasks.Mqar(vocab_size=16, length=10, num_pairs=2, power=0.01)
    inputs, labels = (tensor.numpy() for tensor in task.batch(rows, seed=1, index=0))
    asked = labels[:, 4::2] != -100
    place = [((inputs[:, 4::2] == inputs[:, 2 * pair, None]) & asked).argmax(axis=1) for pair in (0, 1)]
    p = np.arange(1, 4) ** (0.01 - 1)
    p /= p.sum()
    statistic = 0.0
    for i in range(3):
        for j in range(3):
            count = ((place[0] == i) & (place[1] == j)).sum()
            if i == j:
                assert count == 0
            else:
                expected = rows * p[i] * p[j] / (1 - p[i])
                statistic += (count - expected) ** 2 / expected
    assert statistic < 20.5


@pytest.mark.parametrize(("name", "step"), [("copy", 1), ("reverse", -1)])
def test_copy_and_reverse(name, step):
    inputs, labels = (tensor.numpy() for tensor in tasks.get(name, length=20).batch(50, seed=0, index=0))
    source = inputs[:, :10]
    assert source.min() == 1
    assert source.max() == 15
    assert (inputs[:, 10] == 0).all()
    assert (labels[:, :10] == -100).all()
    assert (labels[:, 10:] == source[:, ::step]).all()
    assert (inputs[:, 11:] == labels[:, 10:-1]).all()


@settings(deadline=None, max_examples=30)
@given(num_symbols=st.integers(1, 12), extra=st.integers(0, 50), seed=st.integers(0, 1000))
def test_selective_copy_keeps_the_order(num_symbols, extra, seed):
    task = tasks.SelectiveCopy(length=2 * num_symbols + extra, num_symbols=num_symbols)
    inputs, labels = (tensor.numpy() for tensor in task.batch(5, seed=seed, index=0))
    context = task.length - num_symbols
    assert (inputs[:, context:] == 1).all()
    assert (labels[:, :context] == -100).all()
    for row, answer in zip(inputs[:, :context], labels[:, context:]):
        assert (row[row != 0] == answer).all()
        assert answer.min() >= 2


def test_selective_copy_scatters_evenly():
    """Each of 20 context places holds one of 5 symbols in a quarter of 4,000 rows: 5 standard deviations are 137."""
    inputs = tasks.SelectiveCopy(length=25, num_symbols=5).batch(4000, seed=0, index=0).inputs[:, :20]
    assert ((inputs != 0).sum(0) - 1000).abs().max() < 137


def test_induction():
    task = tasks.Induction(length=12)
    first_places = set()
    for inputs, labels in zip(*(tensor.tolist() for tensor in task.batch(500, seed=0, index=0))):
        first, last = (t for t, token in enumerate(inputs) if token == 0)
        assert last == 11
        assert labels == [-100] * 11 + [inputs[first + 1]]
        assert labels[-1] != 0
        first_places.add(first)
    assert first_places == set(range(10))


@settings(deadline=None, max_examples=30)
@given(
    num_keys=st.integers(1, 10),
    num_values=st.integers(2, 20),
    more_writes=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_overwriting_asks_the_newest_value_of_every_key(num_keys, num_values, more_writes, seed):
    task = tasks.Overwriting(num_keys=num_keys, num_values=num_values, num_writes=num_keys + more_writes)
    for inputs, labels in zip(*(tensor.tolist() for tensor in task.batch(4, seed=seed, index=0))):
        written = 2 * task.num_writes
        newest = {}
        for key, value in zip(inputs[0:written:2], inputs[1:written:2]):
            assert 1 <= key <= num_keys < value < task.vocab_size
            newest[key] = value
        assert set(inputs[written::2]) == {0}
        assert sorted(inputs[written + 1 :: 2]) == list(range(1, num_keys + 1)) == sorted(newest)
        assert labels[written + 1 :: 2] == [newest[key] for key in inputs[written + 1 :: 2]]
        assert set(labels[:written] + labels[written::2]) == {-100}


def test_overwriting_as_the_delta_rule_claim_needs_it():
    task = tasks.get("overwriting")
    assert (task.length, task.vocab_size, task.chance) == (64, 25, 1 / 16)
    inputs = task.batch(200, seed=0, index=0).inputs.numpy()
    orders = {tuple(row) for row in inputs[:, 49::2]}
    assert len(orders) > 190  # the questions' order is drawn for each row
    longer = task.batch(2, seed=0, index=0, length=128)
    assert longer.inputs.shape == (2, 128)
    assert (longer.labels != -100).sum(1).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.Mqar(length=31, num_pairs=8), "mqar needs length >= 32 with these parameters; got 31"),
        (lambda: tasks.Mqar(vocab_size=16, num_pairs=8), "at most vocab_size / 2 - 1 = 7.*got 8"),
        (lambda: tasks.Mqar(power=0.0), "power must be positive"),
        (lambda: tasks.Copy(length=7), "nearest below is 6"),
        (lambda: tasks.Copy(vocab_size=2), "vocab_size must be at least 3"),
        (lambda: tasks.SelectiveCopy(length=15), "selective_copy needs length >= 16"),
        (lambda: tasks.Induction(length=2), "induction needs length >= 3"),
        (lambda: tasks.Overwriting(num_writes=7), "num_writes must be at least num_keys = 8"),
    ],
)
def test_impossible_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()
