"""What a token task is: a frozen description that makes every batch of every split from a seed, on any machine.

Random numbers come from the raw 64-bit stream of PCG64, which numpy keeps fixed between versions, and are turned into
integers and permutations here; numpy's own ``integers`` and ``permutation`` may change their streams (NEP 19).
"""

import dataclasses
import difflib
import zlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""The label of a position at which nothing is asked (the default ``ignore_index`` of torch's cross entropy)."""

SPLITS = {"train": 0, "valid": 1, "test": 2}


class Batch(NamedTuple):
    """Inputs and labels, both ``(B, T)`` int64.

    ``labels[b, t]`` is the target of the prediction made AT position t, that is of ``logits[b, t]``: do not shift
    again. It is -100 where nothing is asked.
    """

    inputs: Tensor
    labels: Tensor


def exact_match(predictions: Tensor, labels: Tensor) -> Tensor:
    """Whether every labelled position of a row is predicted right: ``(B, T)``, ``(B, T)`` int -> ``(B,)`` bool.

    With teacher-forced argmax predictions this equals exact match of greedy decoding: if the first k answers are right,
    the model reads the same tokens in both. A row without labels is an error.

    Example:
        >>> exact_match(torch.tensor([[7, 1, 2], [7, 1, 3]]), torch.tensor([[-100, 1, 2], [-100, 1, 2]])).tolist()
        [True, False]
    """
    if predictions.shape != labels.shape or labels.ndim != 2:
        raise ValueError(
            "predictions and labels must both be (batch, time); "
            f"they have shapes {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    asked = labels != IGNORE
    if not asked.any(1).all():
        raise ValueError(f"row {int((~asked.any(1)).nonzero()[0])} has no label: nothing is asked there")
    return ((predictions == labels) | ~asked).all(1)


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """``value`` as an int, or an error that says what is needed."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    if value < minimum or (maximum is not None and value > maximum):
        needed = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {needed}; got {value}")
    return int(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``, or an error that names the nearest."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}{hint}")


class Draw:
    """The random numbers of one batch, a pure function of (name, seed, split, index).

    Each of the four is one 32-bit word of the seed sequence, so that two splits, seeds or batches never share a stream.
    """

    def __init__(self, name: str, *, seed: int, split: str, index: int):
        check_choice("split", split, tuple(SPLITS))
        words = [
            check_integer("seed", seed, 0, 2**32 - 1),
            SPLITS[split],
            check_integer("index", index, 0, 2**32 - 1),
            zlib.crc32(name.encode()),
        ]
        self._bits = np.random.PCG64(np.random.SeedSequence(words))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 in [0, 1): the top 53 bits of each raw number."""
        return (self._bits.random_raw(shape) >> np.uint64(11)) * 2.0**-53

    def integers(self, low: int, high: int, *shape: int) -> np.ndarray:
        """int64, uniform over low..high-1 (up to a bias of (high - low) / 2^53)."""
        return low + (self.uniform(*shape) * (high - low)).astype(np.int64)

    def distinct(self, low: int, high: int, rows: int, count: int) -> np.ndarray:
        """``(rows, count)`` int64: in each row different numbers of low..high-1, all choices equally likely."""
        return low + smallest(self.uniform(rows, high - low), count)


def smallest(keys: np.ndarray, count: int) -> np.ndarray:
    """Places of the ``count`` smallest keys of each row, smallest first: ``(rows, n)`` -> ``(rows, count)`` int64."""
    if count < keys.shape[1]:
        places = np.argpartition(keys, count - 1, axis=1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(keys.shape[1]), keys.shape)
    order = np.argsort(np.take_along_axis(keys, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)


class TokenTask(ABC):
    """Base of the token tasks: frozen dataclasses, the fields their parameters, the defaults the tiny preset.

    Attributes:
        name: as in ``tasks.get(name)``.
        vocab_size: tokens are 0..vocab_size-1, in inputs and labels alike.
        length: T of a batch when the call gives none.
        minimum_length, length_step: the valid lengths are minimum_length + i * length_step.
        chance: accuracy of a guess that is uniform over the possible answers and reads nothing.
    """

    name: ClassVar[str]
    standard_parameters: ClassVar[dict[str, Any]]
    length_step: ClassVar[int] = 1
    vocab_size: int
    length: int

    @classmethod
    def tiny(cls, **parameters: Any) -> Self:
        """The size for a few seconds on a CPU, with ``parameters`` changed."""
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for parameter in parameters:
            if parameter not in known:
                nearest = difflib.get_close_matches(parameter, known, n=1, cutoff=0.0)[0]
                raise TypeError(
                    f"{cls.name} has no parameter {parameter!r}; did you mean {nearest!r}? it has: {', '.join(known)}"
                )
        return cls(**parameters)

    @classmethod
    def standard(cls, **parameters: Any) -> Self:
        """The size that papers report, with ``parameters`` changed."""
        return cls.tiny(**{**cls.standard_parameters, **parameters})

    @property
    @abstractmethod
    def minimum_length(self) -> int: ...

    @property
    @abstractmethod
    def chance(self) -> float: ...

    @abstractmethod
    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, ``(batch_size, length)`` int64 each."""

    def batch(
        self, batch_size: int, *, seed: int, index: int, split: str = "train", length: int | None = None
    ) -> Batch:
        """Batch number ``index`` of a split: a pure function of the task and these arguments.

        Args:
            batch_size: rows B.
            seed, index: 0..2^32-1.
            split: "train", "valid" or "test"; splits never share a random stream.
            length: T of this batch, where it differs from the task's: longer tests, a length curriculum.

        Returns:
            ``Batch(inputs, labels)``, ``(B, T)`` int64; ``labels[b, t]`` is the target at position t (no further
            shift), -100 where nothing is asked.

        Raises:
            ValueError, TypeError: an argument out of range, a length that the task cannot fill, an unknown split.
        """
        check_integer("batch_size", batch_size, 1)
        length = self.length if length is None else self.check_length(length)
        draw = Draw(self.name, seed=seed, split=split, index=index)
        inputs, labels = self._draw(draw, batch_size, length, split)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))

    def check_length(self, length: int) -> int:
        """``length`` if the task can fill it, else a ValueError that names the nearest length that it can."""
        check_integer("length", length, 1)
        excess = length - self.minimum_length
        if excess < 0:
            raise ValueError(f"{self.name} needs length >= {self.minimum_length} with these parameters; got {length}")
        if excess % self.length_step:
            raise ValueError(
                f"{self.name} has lengths {self.minimum_length}, {self.minimum_length + self.length_step}, ...; "
                f"got {length}; the nearest below is {length - excess % self.length_step}"
            )
        return length

    def scaled_accuracy(self, accuracy: float) -> float:
        """(accuracy - chance) / (1 - chance): 0 for guessing, 1 for a solved task."""
        return (accuracy - self.chance) / (1 - self.chance)


def no_labels(batch_size: int, length: int) -> np.ndarray:
    """``(batch_size, length)`` int64 of -100, to be filled where something is asked."""
    return np.full((batch_size, length), IGNORE, dtype=np.int64)
