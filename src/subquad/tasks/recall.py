"""Recall and copying: what a model must find again in its own context.

``mqar``: Arora et al. 2023, "Zoology", section 4 and its generator. ``copy``: Jelassi et al. 2024, "Repeat After Me"
(teacher forced). ``selective_copy`` and ``induction``: Gu and Dao 2023, "Mamba", section 4.1. ``overwriting``: keys
that are written several times, after the argument of Schlag et al. 2021 for the delta rule.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .contract import Draw, TokenTask, check_integer, no_labels, smallest


@dataclass(frozen=True)
class Mqar(TokenTask):
    """Multi-query associative recall: n pairs k1 v1 k2 v2 ..., then every key once more; the label there is its value.

    Keys are different tokens of 1..V/2-1, values different tokens of V/2..V-1. The pairs fill the first 2n places;
    each key returns at an even offset 2g after them, the gaps g = 0, 1, ... drawn without replacement with
    p(g) ~ (g + 1)^(power - 1): most queries come early. All other places hold a uniform token of the vocabulary
    (``random_filler``) or 0; a random filler may be a key, and the answer is always the value that followed the key
    among the pairs.

    The paper trains one model on (T, n) = (64, 4), (128, 8), (256, 16), (256, 32), (256, 64) and tests n 4..256 at T
    64..1024; ``standard()`` is the last of these.
    """

    name: ClassVar[str] = "mqar"
    standard_parameters: ClassVar = {"vocab_size": 8192, "length": 256, "num_pairs": 64}
    vocab_size: int = 256
    length: int = 64
    num_pairs: int = 8
    power: float = 0.01
    random_filler: bool = True

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, 4)
        check_integer("num_pairs", self.num_pairs, 1)
        if self.num_pairs > self.vocab_size // 2 - 1:
            raise ValueError(
                f"num_pairs must be at most vocab_size / 2 - 1 = {self.vocab_size // 2 - 1} (keys are distinct); "
                f"got {self.num_pairs}"
            )
        if not self.power > 0:
            raise ValueError(f"power must be positive; got {self.power}")
        self.check_length(self.length)

    @property
    def minimum_length(self) -> int:
        return 4 * self.num_pairs

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        half, context = self.vocab_size // 2, 2 * self.num_pairs
        keys = draw.distinct(1, half, batch_size, self.num_pairs)
        values = draw.distinct(half, self.vocab_size, batch_size, self.num_pairs)
        num_gaps = (length - context) // 2
        # The n first arrivals of independent exponential clocks with rates p(g) are a draw without replacement.
        rates = np.arange(1, num_gaps + 1, dtype=np.float64) ** (self.power - 1)
        arrivals = -np.log1p(-draw.uniform(batch_size, num_gaps)) / rates
        places = context + 2 * smallest(arrivals, self.num_pairs)

        if self.random_filler:
            inputs = draw.integers(0, self.vocab_size, batch_size, length)
        else:
            inputs = np.zeros((batch_size, length), dtype=np.int64)
        inputs[:, 0:context:2] = keys
        inputs[:, 1:context:2] = values
        labels = no_labels(batch_size, length)
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(labels, places, values, axis=1)
        return inputs, labels


@dataclass(frozen=True)
class Copy(TokenTask):
    """s_1 .. s_n, the separator 0, then s_1 .. s_{n-1}: from the separator on, the label is the next symbol of the
    copy.

    T = 2n; symbols are uniform over 1..V-1. The copy is teacher forced, as in a language model.
    """

    name: ClassVar[str] = "copy"
    standard_parameters: ClassVar = {"vocab_size": 32, "length": 512}
    length_step: ClassVar[int] = 2
    vocab_size: int = 16
    length: int = 64

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, 3)
        self.check_length(self.length)

    @property
    def minimum_length(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        count = length // 2
        symbols = draw.integers(1, self.vocab_size, batch_size, count)
        answer = self._answer(symbols)
        inputs = np.zeros((batch_size, length), dtype=np.int64)
        inputs[:, :count] = symbols
        inputs[:, count + 1 :] = answer[:, :-1]
        labels = no_labels(batch_size, length)
        labels[:, count:] = answer
        return inputs, labels

    def _answer(self, symbols: np.ndarray) -> np.ndarray:
        return symbols


@dataclass(frozen=True)
class Reverse(Copy):
    """As :class:`Copy`, but the symbols are asked from the last to the first."""

    name: ClassVar[str] = "reverse"

    def _answer(self, symbols: np.ndarray) -> np.ndarray:
        return symbols[:, ::-1]


@dataclass(frozen=True)
class SelectiveCopy(TokenTask):
    """n symbols scattered among noise (token 0), then n markers (token 1); at the i-th marker the label is the i-th
    symbol.

    Symbols are uniform over 2..V-1, their places uniform in the first T - n. The standard preset scatters 16 symbols
    among 4096 places.
    """

    name: ClassVar[str] = "selective_copy"
    standard_parameters: ClassVar = {"length": 4096 + 16, "num_symbols": 16}
    vocab_size: int = 16
    length: int = 64
    num_symbols: int = 8

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, 4)
        check_integer("num_symbols", self.num_symbols, 1)
        self.check_length(self.length)

    @property
    def minimum_length(self) -> int:
        return 2 * self.num_symbols

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 2)

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        context = length - self.num_symbols
        places = np.sort(draw.distinct(0, context, batch_size, self.num_symbols), axis=1)
        symbols = draw.integers(2, self.vocab_size, batch_size, self.num_symbols)
        inputs = np.zeros((batch_size, length), dtype=np.int64)
        np.put_along_axis(inputs, places, symbols, axis=1)
        inputs[:, context:] = 1
        labels = no_labels(batch_size, length)
        labels[:, context:] = symbols
        return inputs, labels


@dataclass(frozen=True)
class Induction(TokenTask):
    """The special token 0 appears twice: somewhere, and last; the label at the last place is what followed the first.

    All other tokens are uniform over 1..V-1. The paper trains at T 256 and tests at 64..2^20.
    """

    name: ClassVar[str] = "induction"
    standard_parameters: ClassVar = {"length": 256}
    vocab_size: int = 16
    length: int = 64

    def __post_init__(self) -> None:
        check_integer("vocab_size", self.vocab_size, 3)
        self.check_length(self.length)

    @property
    def minimum_length(self) -> int:
        return 3

    @property
    def chance(self) -> float:
        return 1 / (self.vocab_size - 1)

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        inputs = draw.integers(1, self.vocab_size, batch_size, length)
        first = draw.integers(0, length - 2, batch_size)
        rows = np.arange(batch_size)
        inputs[rows, first] = 0
        inputs[:, -1] = 0
        labels = no_labels(batch_size, length)
        labels[:, -1] = inputs[rows, first + 1]
        return inputs, labels


@dataclass(frozen=True)
class Overwriting(TokenTask):
    """Writes (key, value), every key at least once and most several times; then each key is asked: its newest value.

    Tokens: 0 the question mark, 1..num_keys the keys, then num_values values. The writes come in random order, the
    questions (0, key) in another; the label is at the key's place. T = 2 (num_writes + num_keys): ``length`` in a
    batch call changes the number of writes. A state that only adds cannot forget the older values of a key; one that
    erases can.
    """

    name: ClassVar[str] = "overwriting"
    standard_parameters: ClassVar = {"num_keys": 32, "num_values": 64, "num_writes": 96}
    length_step: ClassVar[int] = 2
    num_keys: int = 8
    num_values: int = 16
    num_writes: int = 24

    def __post_init__(self) -> None:
        check_integer("num_keys", self.num_keys, 1)
        check_integer("num_values", self.num_values, 2)
        check_integer("num_writes", self.num_writes, 1)
        if self.num_writes < self.num_keys:
            raise ValueError(
                f"num_writes must be at least num_keys = {self.num_keys} (every key is written); got {self.num_writes}"
            )

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + self.num_keys + self.num_values

    @property
    def length(self) -> int:  # type: ignore[override]
        return 2 * (self.num_writes + self.num_keys)

    @property
    def minimum_length(self) -> int:
        return 4 * self.num_keys

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        num_keys, num_writes = self.num_keys, length // 2 - self.num_keys
        keys = draw.integers(1, num_keys + 1, batch_size, num_writes)
        keys[:, :num_keys] = np.arange(1, num_keys + 1)
        keys = np.take_along_axis(keys, draw.distinct(0, num_writes, batch_size, num_writes), axis=1)
        values = draw.integers(num_keys + 1, self.vocab_size, batch_size, num_writes)
        asked = draw.distinct(1, num_keys + 1, batch_size, num_keys)

        newest = np.zeros((batch_size, num_keys + 1), dtype=np.int64)
        np.put_along_axis(newest, keys, values, axis=1)  # where a key repeats, the last write stays

        written = 2 * num_writes
        inputs = np.zeros((batch_size, length), dtype=np.int64)
        inputs[:, 0:written:2] = keys
        inputs[:, 1:written:2] = values
        inputs[:, written + 1 :: 2] = asked
        labels = no_labels(batch_size, length)
        labels[:, written + 1 :: 2] = np.take_along_axis(newest, asked, axis=1)
        return inputs, labels
