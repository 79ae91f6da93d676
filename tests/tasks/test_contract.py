"""What every token task promises: pure batches, splits that share nothing, valid labels, and errors that teach."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import tasks
from subquad.tasks.contract import Draw, smallest

# SHA-256 of the first training batch of four rows, tiny preset, seed 0. Without needle: its filler is this Python's.
FIRST_BATCH = {
    "copy": "3bc116ecae6220af",
    "group_word": "ae3f67211f4ddddb",
    "induction": "09e017edbeb1e37e",
    "modular_arithmetic": "7f9f2886db467120",
    "modular_arithmetic_brackets": "1911de9e95b9d4f6",
    "mqar": "f92123464e65f916",
    "overwriting": "7b92245195b727b8",
    "parity": "89f8671dea69f394",
    "reverse": "c603b535fa4ab85c",
    "selective_copy": "2816ecd06410a89c",
    "set_intersection": "2c08f422cde189a2",
}

every_task = pytest.mark.parametrize("name", tasks.available())


@pytest.mark.parametrize("name", sorted(set(tasks.available()) - {"needle"}))
def test_first_batch_is_the_same_on_every_machine(name):
    batch = tasks.get(name).batch(4, seed=0, index=0)
    content = b"".join(tensor.numpy().astype("<i8").tobytes() for tensor in batch)
    assert hashlib.sha256(content).hexdigest()[:16] == FIRST_BATCH[name]


@every_task
@pytest.mark.parametrize("preset", ["tiny", "standard"])
def test_shapes_dtypes_and_vocabulary(name, preset):
    task = tasks.get(name, preset=preset)
    inputs, labels = task.batch(3, seed=1, index=2, split="valid")
    assert inputs.shape == labels.shape == (3, task.length)
    assert inputs.dtype == labels.dtype == torch.int64
    assert 0 <= int(inputs.min()) <= int(inputs.max()) < task.vocab_size
    asked = labels != -100
    assert asked.any(1).all()
    assert 0 <= int(labels[asked].min()) <= int(labels[asked].max()) < task.vocab_size
    assert 0 < task.chance < 1


@every_task
def test_a_batch_depends_on_its_arguments_alone(name):
    task = tasks.get(name)
    first = task.batch(4, seed=3, index=5)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    task.batch(4, seed=3, index=6)
    again = task.batch(4, seed=3, index=5)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.labels, again.labels)
    for change in ({"seed": 4}, {"index": 6}, {"split": "test"}):
        other = task.batch(4, **{"seed": 3, "index": 5, **change})
        assert not torch.equal(first.inputs, other.inputs)


def test_no_two_streams_overlap():
    """Any shared number among 24 streams of 2,000 raw 64-bit numbers would have probability 1e-10 by accident."""
    seeds, indices = (0, 1, 2**32 - 1), (0, 1)
    raw = [
        Draw(name, seed=seed, split=split, index=index)._bits.random_raw(2000)
        for name, seed, split, index in itertools.product(("mqar", "copy"), seeds, ("train", "test"), indices)
    ]
    assert len(np.unique(np.concatenate(raw))) == 24 * 2000


@every_task
def test_rows_of_train_and_test_differ(name):
    task = tasks.get(name)
    rows = {
        split: {
            bytes(row.numpy()) for index in range(5) for row in task.batch(100, seed=0, index=index, split=split).inputs
        }
        for split in ("train", "valid", "test")
    }
    assert len(rows["train"]) == 500
    for one, other in itertools.combinations(rows.values(), 2):
        assert not one & other


@every_task
def test_length_is_an_argument_of_the_batch(name):
    task = tasks.get(name)
    for steps in (0, 1, 7):
        length = task.minimum_length + steps * task.length_step
        inputs, labels = task.batch(2, seed=0, index=0, length=length)
        assert inputs.shape == (2, length)
        assert (labels != -100).any(1).all()
    with pytest.raises(ValueError, match=f"length.*got {max(task.minimum_length - 1, 0)}"):
        task.batch(2, seed=0, index=0, length=task.minimum_length - 1)
    if task.length_step > 1:
        with pytest.raises(ValueError, match=f"nearest below is {task.minimum_length}"):
            task.batch(2, seed=0, index=0, length=task.minimum_length + 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an integer"),
        ({"seed": -1}, ValueError, "seed must be between 0 and"),
        ({"seed": 2**32}, ValueError, "seed must be between 0 and"),
        ({"seed": True}, TypeError, "seed must be an integer"),
        ({"index": 1.5}, TypeError, "index must be an integer"),
        ({"split": "tset"}, ValueError, "did you mean 'test'"),
        ({"length": "40"}, TypeError, "length must be an integer"),
    ],
)
def test_bad_batch_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tasks.get("parity").batch(**{"batch_size": 2, "seed": 0, "index": 0, **arguments})


def test_names():
    assert tasks.available() == sorted(tasks.TASKS)
    for name in tasks.available():
        assert tasks.get(name).name == name
    assert tasks.get("mqar", preset="standard", length=512) == tasks.Mqar.standard(length=512)
    assert tasks.get("mqar") == tasks.Mqar.tiny() == tasks.Mqar()
    for name in tasks.__all__:
        assert getattr(tasks, name) is not None
        assert name in dir(tasks)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tasks.get("mquar"), ValueError, "did you mean 'mqar'.*available: copy, group_word"),
        (lambda: tasks.get("prose_text"), ValueError, r"call subquad.tasks.prose_text\("),
        (lambda: tasks.get("mqar", preset="small"), ValueError, "preset must be 'tiny' or 'standard'; got 'small'"),
        (lambda: tasks.get("mqar", lenght=3), TypeError, "no parameter 'lenght'; did you mean 'length'"),
        (lambda: tasks.Mqarr, AttributeError, "did you mean 'Mqar'"),
    ],
)
def test_unknown_names_get_the_nearest(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_import_is_light():
    program = (
        "import sys, subquad.tasks as tasks; tasks.get('mqar').batch(1, seed=0, index=0); "
        "print([name for name in ('transformers', 'datasets', 'tokenizers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 5), low=st.integers(-3, 3), size=st.integers(1, 30), data=st.data())
def test_distinct_numbers_are_distinct_and_in_range(rows, low, size, data):
    count = data.draw(st.integers(1, size))
    drawn = Draw("test", seed=size, split="train", index=rows).distinct(low, low + size, rows, count)
    assert drawn.shape == (rows, count)
    assert low <= drawn.min() <= drawn.max() < low + size
    assert all(len(set(row)) == count for row in drawn.tolist())


def test_ordered_choices_are_equally_likely():
    """Chi-squared with 11 degrees of freedom exceeds 31.3 once in a thousand seeds; the seed is fixed."""
    drawn = Draw("test", seed=0, split="train", index=0).distinct(0, 4, 12_000, 2)
    _, counts = np.unique(drawn[:, 0] * 4 + drawn[:, 1], return_counts=True)
    assert len(counts) == 12
    assert ((counts - 1000) ** 2 / 1000).sum() < 31.3


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 40), st.data())
def test_smallest_is_the_head_of_a_sort(rows, width, data):
    count = data.draw(st.integers(1, width))
    keys = np.random.default_rng(width).permuted(np.tile(np.arange(width) / 7, (rows, 1)), axis=1)
    assert (smallest(keys, count) == np.argsort(keys, axis=1)[:, :count]).all()


def test_exact_match_needs_all_labels_and_some():
    labels = torch.tensor([[-100, 3, -100, 4], [-100, -100, 1, 2]])
    predictions = torch.tensor([[9, 3, 9, 4], [0, 0, 1, 3]])
    assert tasks.exact_match(predictions, labels).tolist() == [True, False]
    with pytest.raises(ValueError, match="row 1 has no label"):
        tasks.exact_match(predictions, torch.tensor([[1, 1, 1, 1], [-100, -100, -100, -100]]))
    with pytest.raises(ValueError, match=r"both be \(batch, time\)"):
        tasks.exact_match(predictions[:, 1:], labels)


def test_scaled_accuracy():
    task = tasks.get("group_word", group="S3")
    assert task.scaled_accuracy(1.0) == 1.0
    assert task.scaled_accuracy(1 / 6) == 0.0
    assert task.scaled_accuracy(0.0) == pytest.approx(-0.2)
