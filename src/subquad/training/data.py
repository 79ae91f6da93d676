"""What the training loop asks of its data: batch ``i`` is a pure function of (seed, i).

The loop never holds an iterator, so a resumed run asks for exactly the batches that the killed one would have had.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

IGNORED = -100


class Batch(NamedTuple):
    """Inputs, and labels aligned with the outputs: ``labels[b, t]`` is the target of position t; -100 is no target."""

    inputs: Any
    labels: Tensor


class BatchLike(Protocol):
    """Anything with ``inputs`` and ``labels`` whose tensors have the rows as dimension 0."""

    @property
    def inputs(self) -> Any: ...
    @property
    def labels(self) -> Tensor: ...


class Data(Protocol):
    """Batches by number."""

    def batch(self, index: int) -> BatchLike:
        """Batch ``index`` = 0, 1, ...: the same on every call, on every process and in a resumed run."""
        ...


@dataclass(frozen=True)
class TaskData:
    """The batches of a task generator, see :func:`from_task`."""

    task: Any
    batch_size: int
    seed: int
    split: str
    length: int | None

    def batch(self, index: int) -> BatchLike:
        batch: BatchLike = self.task.batch(
            self.batch_size, seed=self.seed, index=index, split=self.split, length=self.length
        )
        return batch


@dataclass(frozen=True)
class TextData:
    """Windows of a text, see :func:`from_text`."""

    text: Any
    length: int
    batch_size: int
    seed: int
    split: str

    def batch(self, index: int) -> BatchLike:
        batch: BatchLike = self.text.windows(self.split, self.length, self.batch_size, seed=self.seed, index=index)
        return batch


def from_task(task: Any, batch_size: int, seed: int, *, split: str = "train", length: int | None = None) -> TaskData:
    """Training data from an object with ``batch(batch_size, *, seed, index, split, length) -> Batch``.

    Example:
        >>> import torch
        >>> class Constant:
        ...     def batch(self, batch_size, *, seed, index, split, length):
        ...         return Batch(torch.full((batch_size, length), index), torch.full((batch_size, length), seed))
        >>> from_task(Constant(), batch_size=2, seed=1, length=3).batch(7)
        Batch(inputs=tensor([[7, 7, 7],
                [7, 7, 7]]), labels=tensor([[1, 1, 1],
                [1, 1, 1]]))
    """
    return TaskData(task, batch_size, seed, split, length)


def from_text(text: Any, length: int, batch_size: int, seed: int, *, split: str = "train") -> TextData:
    """Training data from an object with ``windows(split, length, batch_size, *, seed, index) -> Batch``."""
    return TextData(text, length, batch_size, seed, split)


def count_targets(labels: Tensor) -> int:
    """How many targets a batch's mean loss is a mean over: integer labels other than -100, or the rows of real ones."""
    if labels.is_floating_point():
        return labels.shape[0]
    return int((labels != IGNORED).sum())


def check_batch(batch: Any, index: int, batch_size: int) -> None:
    """Raises TypeError or ValueError where ``data.batch(index)`` returned something that the loop cannot train on."""
    if not hasattr(batch, "inputs") or not hasattr(batch, "labels"):
        raise TypeError(f"data.batch({index}) must return an object with inputs and labels; got {type(batch).__name__}")
    if not isinstance(batch.labels, Tensor):
        raise TypeError(f"the labels of data.batch({index}) must be a tensor; got {type(batch.labels).__name__}")
    if batch.labels.ndim == 0 or batch.labels.shape[0] != batch_size:
        raise ValueError(
            f"data.batch({index}) must have batch_size = {batch_size} rows; "
            f"its labels have shape {tuple(batch.labels.shape)}"
        )
    if isinstance(batch.inputs, Tensor) and batch.inputs.shape[:1] != batch.labels.shape[:1]:
        raise ValueError(
            f"inputs and labels of data.batch({index}) must have the same rows; "
            f"got {tuple(batch.inputs.shape)} and {tuple(batch.labels.shape)}"
        )
