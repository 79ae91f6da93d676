"""State tracking: answers worked out again another way (sums, Python's own arithmetic, permutation matrices)."""

import itertools

import numpy as np
import pytest

from subquad import tasks


@pytest.mark.parametrize("length", [1, 2, 3, 40, 256])
def test_parity_by_sum(length):
    inputs, labels = tasks.get("parity").batch(20, seed=0, index=0, length=length)
    final = tasks.get("parity", targets="final").batch(20, seed=0, index=0, length=length)
    for row, answers, last in zip(inputs.tolist(), labels.tolist(), final.labels.tolist()):
        assert answers == [sum(row[: t + 1]) % 2 for t in range(length)]
        assert last == [-100] * (length - 1) + [sum(row) % 2]


@pytest.mark.parametrize("name", ["modular_arithmetic", "modular_arithmetic_brackets"])
@pytest.mark.parametrize("modulus", [2, 5, 7])
def test_modular_arithmetic_by_python(name, modulus):
    task = tasks.get(name, modulus=modulus)
    symbols = [*map(str, range(modulus)), "+", "-", "*", "=", "(", ")"]
    seen = set()
    for steps in (0, 1, 2, 9):
        length = task.minimum_length + steps * task.length_step
        for inputs, labels in zip(*(t.tolist() for t in task.batch(100, seed=0, index=steps, length=length))):
            text = "".join(symbols[token] for token in inputs)
            assert text.endswith("=")
            assert labels == [-100] * (length - 1) + [eval(text[:-1]) % modulus]
            seen |= set(text)
    assert seen == set(symbols[: task.vocab_size])


def test_bracketed_trees_take_every_shape():
    """Four numbers have five binary trees."""
    task = tasks.get("modular_arithmetic_brackets", length=14)
    inputs = task.batch(300, seed=0, index=0).inputs.numpy()
    shapes = {tuple(row) for row in np.where(inputs < 5, 0, np.where(inputs < 8, 5, inputs))}
    assert len(shapes) == 5


def test_modular_arithmetic_has_no_favourite_answer():
    """The most frequent of five answers stays within 5 standard deviations (0.028) of a fifth in 5,000 rows."""
    labels = tasks.get("modular_arithmetic", preset="standard").batch(5000, seed=0, index=0).labels[:, -1]
    assert (labels.bincount(minlength=5) / 5000 - 0.2).abs().max() < 0.028


def test_operators_can_be_left_out():
    inputs = tasks.get("modular_arithmetic", operators="+-").batch(100, seed=0, index=0).inputs
    assert set(inputs[:, 1:-1:2].flatten().tolist()) == {5, 6}


@pytest.mark.parametrize(
    ("group", "generators", "alphabet_size"),
    [
        ("S3", "all", 6),
        ("S4", "all", 24),
        ("A5", "all", 60),
        ("S5", "all", 120),
        ("S3", "transpositions", 3),
        ("S5", "transpositions", 10),
        ("S3", "three_cycles", 2),
        ("A5", "three_cycles", 20),
        ("S5", "three_cycles", 20),
    ],
)
def test_group_products_by_permutation_matrices(group, generators, alphabet_size):
    """The matrix of g has a one at (g(x), x): the matrix of a product is the product of the matrices."""
    task = tasks.get("group_word", group=group, generators=generators)
    matrices = np.array([np.eye(len(element))[:, np.argsort(element)].T for element in tasks.group_elements(group)])
    for element, matrix in zip(tasks.group_elements(group), matrices):
        assert all(matrix[image, point] == 1 for point, image in enumerate(element))
    inputs, labels = (tensor.numpy() for tensor in task.batch(20, seed=0, index=0, length=50))
    product = np.eye(matrices.shape[1])
    for t in range(50):
        product = product @ matrices[inputs[:, t]]
        assert (product == matrices[labels[:, t]]).all()
    many = task.batch(500, seed=0, index=1, length=50)
    assert len(many.inputs.unique()) == alphabet_size
    assert len(many.labels.unique()) == round(1 / task.chance)


def test_cyclic_groups_add():
    inputs, labels = tasks.get("group_word", group="Z7").batch(10, seed=0, index=0)
    assert (inputs.cumsum(1) % 7 == labels).all()
    assert len(inputs.unique()) == 7


def test_only_the_final_product():
    every = tasks.get("group_word").batch(5, seed=0, index=0)
    final = tasks.get("group_word", targets="final").batch(5, seed=0, index=0)
    assert (every.inputs == final.inputs).all()
    assert (final.labels[:, :-1] == -100).all()
    assert (every.labels[:, -1] == final.labels[:, -1]).all()


def test_elements_are_the_group():
    assert tasks.group_elements("S4") == tuple(itertools.permutations(range(4)))
    even = tasks.group_elements("A5")
    assert len(even) == 60
    assert all(round(np.linalg.det(np.eye(5)[list(element)])) == 1 for element in even)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"group": "S6"}, "must be one of 'S3', 'S4', 'S5', 'A5'; got 'S6'"),
        ({"group": "Z1"}, "'Z' and a number from 2"),
        ({"group": "A5", "generators": "transpositions"}, "A5 has no transpositions"),
        ({"group": "Z5", "generators": "three_cycles"}, "Z5 has no three cycles"),
        ({"generators": "swaps"}, "generators must be one of 'all', 'transpositions', 'three_cycles'; got 'swaps'"),
        ({"targets": "fnal"}, "did you mean 'final'"),
    ],
)
def test_bad_groups(parameters, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("group_word", **parameters)


@pytest.mark.parametrize("operators", ["", "/", "++"])
def test_bad_operators(operators):
    with pytest.raises(ValueError, match="operators must be some of"):
        tasks.get("modular_arithmetic", operators=operators)
