"""State tracking: parity, modular arithmetic and words of finite groups, which no diagonal positive recurrence can
follow.

Grazzi et al. 2025, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (parity, modular arithmetic
as in Deletang et al. 2023); Merrill et al. 2024, "The Illusion of State in State-Space Models" (group words). Every
task takes ``length`` in the batch call, for a curriculum in training and for tests beyond the trained length.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .contract import Draw, TokenTask, check_choice, check_integer, no_labels

_TARGETS = ("every", "final")


def _with_targets(answers: np.ndarray, targets: str) -> np.ndarray:
    if targets == "every":
        return answers
    labels = no_labels(*answers.shape)
    labels[:, -1] = answers[:, -1]
    return labels


@dataclass(frozen=True)
class Parity(TokenTask):
    """Uniform bits; the label at t is the parity of bits 1..t (``targets="every"``), or only the last is asked
    ("final").

    The paper trains on lengths 3..40 and tests on 40..256, target at the end; targets at every position are far easier.

    Example:
        >>> inputs, labels = Parity(length=6).batch(1, seed=0, index=0)
        >>> bool((inputs.cumsum(1) % 2 == labels).all())
        True
    """

    name: ClassVar[str] = "parity"
    standard_parameters: ClassVar = {"targets": "final"}
    length: int = 40
    targets: str = "every"

    def __post_init__(self) -> None:
        check_choice("targets", self.targets, _TARGETS)
        self.check_length(self.length)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 2

    @property
    def minimum_length(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        return 0.5

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        bits = draw.integers(0, 2, batch_size, length)
        return bits, _with_targets(bits.cumsum(axis=1) % 2, self.targets)


_OPERATORS = "+-*"


def _apply(operator: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.where(operator == 0, left + right, np.where(operator == 1, left - right, left * right))


@dataclass(frozen=True)
class ModularArithmetic(TokenTask):
    """``n_1 op n_2 op ... n_m =``, the label at ``=`` the value modulo p, with ``*`` before ``+`` and ``-``; T = 2m.

    Tokens: 0..p-1 the numbers, then ``+ - *``, then ``=``, whatever ``operators`` are in use. Without ``*`` it is much
    easier: say which when you report it. The paper trains on lengths 3..40 and tests on 40..256, p = 5.
    """

    name: ClassVar[str] = "modular_arithmetic"
    standard_parameters: ClassVar = {"length": 40}
    length_step: ClassVar[int] = 2
    length: int = 20
    modulus: int = 5
    operators: str = _OPERATORS

    def __post_init__(self) -> None:
        check_integer("modulus", self.modulus, 2)
        used = set(self.operators)
        if not used or used - set(_OPERATORS) or len(used) < len(self.operators):
            raise ValueError(f"operators must be some of {_OPERATORS!r}, each once; got {self.operators!r}")
        self.check_length(self.length)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.modulus + 4

    @property
    def minimum_length(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def _draw_operators(self, draw: Draw, *shape: int) -> np.ndarray:
        """Indices into "+-*"."""
        used = np.array([_OPERATORS.index(operator) for operator in self.operators])
        return used[draw.integers(0, len(used), *shape)]

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        count = length // 2
        numbers = draw.integers(0, self.modulus, batch_size, count)
        operators = self._draw_operators(draw, batch_size, count - 1)
        total, term = np.zeros(batch_size, dtype=np.int64), numbers[:, 0]
        for operator, number in zip(operators.T, numbers.T[1:], strict=True):
            product = operator == 2
            total = np.where(product, total, total + term) % self.modulus
            term = np.where(product, term * number, np.where(operator == 1, -number, number)) % self.modulus

        inputs = np.empty((batch_size, length), dtype=np.int64)
        inputs[:, 0::2] = numbers
        inputs[:, 1:-1:2] = self.modulus + operators
        inputs[:, -1] = self.modulus + 3
        labels = no_labels(batch_size, length)
        labels[:, -1] = (total + term) % self.modulus
        return inputs, labels


@dataclass(frozen=True)
class ModularArithmeticBrackets(ModularArithmetic):
    """As :class:`ModularArithmetic`, but each operation stands in brackets: ``((1+4)*(2-3))=``.

    With m numbers T = 4m - 2. The tree is random: of m numbers, 1..m-1 (uniform) go left. Two more tokens, ``(`` and
    ``)``.
    """

    name: ClassVar[str] = "modular_arithmetic_brackets"
    standard_parameters: ClassVar = {"length": 42}
    length_step: ClassVar[int] = 4
    length: int = 22

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.modulus + 6

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        # All rows are written token by token. `waiting` is each row's stack of what is still to come: an entry >= 0 is
        # a token, an entry -m a subtree of m numbers. `values` and `operators` are the stacks of its evaluation.
        count, modulus = (length + 2) // 4, self.modulus
        opening, closing = modulus + 4, modulus + 5
        rows = np.arange(batch_size)
        waiting = np.zeros((batch_size, 4 * count + 4), dtype=np.int64)
        waiting[:, 0] = -count
        depth = np.ones(batch_size, dtype=np.int64)
        values = np.zeros((batch_size, count + 1), dtype=np.int64)
        operators = np.zeros((batch_size, count + 1), dtype=np.int64)
        num_values, num_operators = np.zeros_like(depth), np.zeros_like(depth)

        inputs = np.empty((batch_size, length), dtype=np.int64)
        for place in range(length - 1):
            number = draw.integers(0, modulus, batch_size)
            operator = self._draw_operators(draw, batch_size)
            cut = draw.uniform(batch_size)

            depth -= 1
            entry = waiting[rows, depth]
            split_rows = rows[entry < -1]
            size = -entry[split_rows]
            left = 1 + (cut[split_rows] * (size - 1)).astype(np.int64)
            top = depth[split_rows]
            waiting[split_rows, top] = closing
            waiting[split_rows, top + 1] = left - size
            waiting[split_rows, top + 2] = modulus + operator[split_rows]
            waiting[split_rows, top + 3] = -left
            depth[split_rows] += 4
            inputs[:, place] = np.where(entry < -1, opening, np.where(entry == -1, number, entry))

            leaf_rows = rows[entry == -1]
            values[leaf_rows, num_values[leaf_rows]] = number[leaf_rows]
            num_values[leaf_rows] += 1
            operator_rows = rows[(entry >= modulus) & (entry < modulus + 3)]
            operators[operator_rows, num_operators[operator_rows]] = entry[operator_rows] - modulus
            num_operators[operator_rows] += 1
            done = rows[entry == closing]
            num_values[done] -= 1
            num_operators[done] -= 1
            last = num_values[done]
            result = _apply(operators[done, num_operators[done]], values[done, last - 1], values[done, last])
            values[done, last - 1] = result % modulus

        inputs[:, -1] = modulus + 3
        labels = no_labels(batch_size, length)
        labels[:, -1] = values[:, 0]
        return inputs, labels


@dataclass(frozen=True)
class GroupWord(TokenTask):
    """Group elements g_1 .. g_T, uniform over an alphabet; the label at t is the product g_1 g_2 ... g_t.

    Args:
        group: "S3", "S4", "S5", "A5", or "Z" and a number ("Z7": addition modulo 7).
        generators: the alphabet: "all" elements, or for permutations only the "transpositions" or the "three_cycles".
        targets: "every" position, or only the "final" one (which makes short training look like failure).

    A token is the element's place in :func:`group_elements`. Products of permutations compose from the right,
    (g h)(x) = g(h(x)). With transpositions the parity of the product is that of t, which ``chance`` does not count;
    three cycles reach the even permutations only, which it does. The literature trains at T 32 or 128 and tests at
    four times that.
    """

    name: ClassVar[str] = "group_word"
    standard_parameters: ClassVar = {"group": "S5", "length": 128}
    group: str = "S3"
    length: int = 32
    generators: str = "all"
    targets: str = "every"

    def __post_init__(self) -> None:
        check_choice("generators", self.generators, ("all", "transpositions", "three_cycles"))
        check_choice("targets", self.targets, _TARGETS)
        if not len(self._alphabet()):
            raise ValueError(
                f"{self.group} has no {self.generators.replace('_', ' ')}; use generators='all' or another group"
            )
        self.check_length(self.length)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return len(group_elements(self.group))

    @property
    def minimum_length(self) -> int:
        return 1

    @property
    def chance(self) -> float:
        symmetric = self.group.startswith("S")
        return (2 if symmetric and self.generators == "three_cycles" else 1) / self.vocab_size

    def _alphabet(self) -> np.ndarray:
        elements = group_elements(self.group)
        if self.generators == "all":
            return np.arange(len(elements))
        moved = {"transpositions": 2, "three_cycles": 3}[self.generators]
        return np.array(
            [
                token
                for token, element in enumerate(elements)
                if len(element) > 1 and sum(image != point for point, image in enumerate(element)) == moved
            ],
            dtype=np.int64,
        )

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        alphabet, table = self._alphabet(), _multiplication_table(self.group)
        inputs = alphabet[draw.integers(0, len(alphabet), batch_size, length)]
        products = inputs.copy()
        for t in range(1, length):
            products[:, t] = table[products[:, t - 1], inputs[:, t]]
        return inputs, _with_targets(products, self.targets)


@functools.cache
def group_elements(group: str) -> tuple[tuple[int, ...], ...]:
    """The elements in token order: permutations (x -> element[x]) in lexicographic order, (i,) for i of Z_m.

    Example:
        >>> group_elements("S3")[:3]
        ((0, 1, 2), (0, 2, 1), (1, 0, 2))
        >>> len(group_elements("A5")), group_elements("Z2")
        (60, ((0,), (1,)))
    """
    if not isinstance(group, str):
        raise TypeError(f"group must be a string; got {group!r}")
    cyclic = re.fullmatch(r"Z([1-9]\d*)", group)
    if cyclic and int(cyclic[1]) > 1:
        return tuple((i,) for i in range(int(cyclic[1])))
    check_choice("group (or 'Z' and a number from 2)", group, ("S3", "S4", "S5", "A5"))
    permutations = itertools.permutations(range(int(group[1])))
    return tuple(p for p in permutations if group[0] == "S" or _is_even(p))


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


@functools.cache
def _multiplication_table(group: str) -> np.ndarray:
    """``table[g, h]`` is the token of the product g h."""
    elements = np.array(group_elements(group))
    if group.startswith("Z"):
        return (elements + elements.T) % len(elements)
    codes = len(elements[0]) ** np.arange(len(elements[0]))[::-1]  # lexicographic order is numeric order
    products = elements[:, elements]  # [g, h, x] = g(h(x))
    return np.searchsorted(elements @ codes, products @ codes).astype(np.int64)
