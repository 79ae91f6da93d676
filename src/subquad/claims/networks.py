"""Small networks over sequences of numbers (series, pixels), and the arm that trains one: for claims beyond language.

A network is the library's own block around any mixer, between two linear layers; a recurrent baseline takes its place
whole. The recipe is that of :mod:`subquad.bench.trials`: AdamW under a one-cycle schedule, three tenths a warm-up.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from subquad import feedforward, training
from subquad.bench.trials import WARMUP_SHARE
from subquad.blocks import Block
from subquad.claims.contract import Figures
from subquad.layers.norms import build_norm
from subquad.mixers import Mixer
from subquad.training.data import IGNORED, Batch

READOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda x: x[:, -1],
    "mean": lambda x: x.mean(1),
    "every": lambda x: x,
}
ACCURACY, ERROR, MILLISECONDS = "accuracy", "squared error", "ms"


class SequenceNetwork(nn.Module):
    """``(B, T, channels)`` -> ``(B, outputs)`` or, with ``readout="every"``, ``(B, T, outputs)``.

    Args:
        channels, outputs: of the data.
        mixers: one per layer; each gets a pre-norm block with a feed-forward layer of four times its width.
        feedforward_name, norm: of the blocks.
        positions: length of a table of learnt positions; None: none.
        readout: ``"last"``, ``"mean"`` or ``"every"``.
        grid: how the tokens are laid out, for mixers that ask.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        mixers: Sequence[Mixer],
        *,
        positions: int | None = None,
        readout: str = "last",
        grid: tuple[int, ...] | None = None,
        feedforward_name: str = "gelu",
        norm: str = "layer",
    ) -> None:
        super().__init__()
        dim = mixers[0].dim
        self.embed = nn.Linear(channels, dim)
        self.positions = None if positions is None else nn.Parameter(0.02 * torch.randn(positions, dim))
        self.blocks = nn.ModuleList(
            Block(mixer, feedforward.build(feedforward_name, dim, 4 * dim), norm=norm) for mixer in mixers
        )
        self.norm = build_norm(norm, dim)
        self.read = READOUTS[readout]
        self.head = nn.Linear(dim, outputs)
        self.grid = grid

    def tokens(self, x: Tensor) -> Tensor:
        """What the first block reads, ``(B, T, D)``."""
        hidden: Tensor = self.embed(x)
        return hidden if self.positions is None else hidden + self.positions[: x.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x)
        for block in self.blocks:
            hidden = block(hidden, **({} if self.grid is None else {"grid": self.grid})).output
        output: Tensor = self.head(self.read(self.norm(hidden)))
        return output


class RecurrentNetwork(nn.Module):
    """A recurrent layer of torch between two linear ones, read at the last step or at every one."""

    def __init__(self, layer: nn.RNNBase, outputs: int, *, readout: str = "last") -> None:
        super().__init__()
        self.layer, self.read = layer, READOUTS[readout]
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.read(self.layer(x)[0]))
        return output


class MixerNetwork(nn.Module):
    """A mixer over the channels themselves and a linear readout: the recurrent networks as they were first."""

    def __init__(self, mixer: Mixer, outputs: int, *, readout: str = "last") -> None:
        super().__init__()
        self.mixer, self.read = mixer, READOUTS[readout]
        self.head = nn.Linear(mixer.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.read(self.mixer(x).output))
        return output


class SequenceTask(Protocol):
    """Batches to train on, and one batch to test with. Labels are classes (int64) or numbers."""

    def train(self, batch_size: int, seed: int) -> training.Data: ...

    def test(self) -> Batch: ...


@dataclass(frozen=True)
class Arrays:
    """A fixed set of examples, in a new random order every epoch.

    Attributes:
        load: called once with ``"train"`` and once with ``"test"``: inputs and labels.
    """

    load: Callable[[str], tuple[Tensor, Tensor]]

    def train(self, batch_size: int, seed: int) -> training.Data:
        return _Epochs(*self._examples, batch_size, seed)

    def test(self) -> Batch:
        return Batch(*self.load("test"))

    @cached_property
    def _examples(self) -> tuple[Tensor, Tensor]:
        return self.load("train")


@dataclass(frozen=True)
class _Epochs:
    inputs: Tensor
    labels: Tensor
    batch_size: int
    seed: int

    def batch(self, index: int) -> Batch:
        per_epoch = len(self.labels) // self.batch_size
        epoch, place = divmod(index, per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        return Batch(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Generated:
    """Examples without end: ``draw(rows, generator) -> inputs, labels``; the test batch is the same for every seed."""

    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    test_rows: int = 2000

    def train(self, batch_size: int, seed: int) -> training.Data:
        return _Stream(self.draw, batch_size, seed)

    def test(self) -> Batch:
        return Batch(*self.draw(self.test_rows, torch.Generator().manual_seed(2**31 - 1)))


@dataclass(frozen=True)
class _Stream:
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    batch_size: int
    seed: int

    def batch(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return Batch(*self.draw(self.batch_size, generator))


@dataclass(frozen=True)
class TrainedNetwork:
    """A network that is trained on a task and scored on its test batch: accuracy for classes, else squared error.

    Attributes:
        task: the data, which the arms of a comparison share.
        build: the untrained network.
        steps, batch_size, learning_rate, weight_decay: of the training; ``learning_rate`` is the peak.
        final_learning_rate: if given, the rate falls to it from the peak along a cosine, without a warm-up.
        betas: of AdamW.
    """

    task: SequenceTask
    build: Callable[[], nn.Module]
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    final_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
        one_cycle = self.final_learning_rate is None
        options = training.TrainingOptions(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule="one_cycle" if one_cycle else "cosine",
            warmup_steps=max(2, round(WARMUP_SHARE * self.steps)) if one_cycle else 0,
            final_learning_rate=self.final_learning_rate or 0.0,
            betas=self.betas,
            seed=seed,
        )
        data = self.task.train(self.batch_size, seed)
        training.train(network, data, options, out=None, objective=mean_loss, console=Console(quiet=True))
        return score(network.eval(), self.task.test())

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=4, batch_size=4)


@dataclass(frozen=True)
class TimedNetwork:
    """Processor time of one training step, forward and backward, in milliseconds: the median of ``repeats``."""

    task: SequenceTask
    build: Callable[[], nn.Module]
    batch_size: int
    repeats: int = 15
    timed: bool = field(default=True, init=False)

    def measure(self, seed: int) -> Figures:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.build()
        batch = self.task.train(self.batch_size, seed).batch(0)
        seconds = []
        for _ in range(self.repeats + 1):
            started = time.process_time()
            mean_loss(network, batch)[0].backward()
            seconds.append(time.process_time() - started)
        return {MILLISECONDS: 1e3 * statistics.median(seconds[1:])}  # the first compiles

    def tiny(self) -> Self:
        return dataclasses.replace(self, batch_size=2, repeats=1)


def mean_loss(network: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Cross-entropy of classes ``(B,)`` or ``(B, T)`` (-100: not asked), mean squared error of numbers."""
    output, labels = network(batch.inputs), batch.labels
    if labels.is_floating_point():
        return F.mse_loss(output, labels), {}
    return F.cross_entropy(output.flatten(0, -2), labels.flatten()), {}


@torch.no_grad()
def score(network: nn.Module, batch: Batch) -> dict[str, float]:
    """``accuracy`` or ``squared error`` of one batch."""
    output, labels = network(batch.inputs), batch.labels
    if labels.is_floating_point():
        return {ERROR: float(F.mse_loss(output, labels))}
    asked = labels != IGNORED
    return {ACCURACY: float((output.argmax(-1) == labels)[asked].double().mean())}
