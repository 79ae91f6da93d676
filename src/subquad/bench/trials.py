"""One small, seeded run: a language model built from configuration fields, trained by one recipe, and scored.

The recipe is the same for every method that is compared: AdamW under a one-cycle schedule (Smith and Topin 2018), the
first three tenths of the steps a warm-up. A trial is data; ``dataclasses.replace`` makes another.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from rich.console import Console
from torch import Tensor

from subquad import tasks, training
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.training.data import IGNORED

Fields = Mapping[str, Any]
Edit = Callable[[SubquadForCausalLM], None]
WARMUP_SHARE = 0.3
EVALUATION_SEED = 1_000_003  # of the batches that score a task: the same for every seed and method


@dataclass(frozen=True, kw_only=True)
class Trial(ABC):
    """The recipe of a run.

    Attributes:
        fields: of :class:`SubquadConfig`, shared by all methods of a comparison; a method adds its own.
        steps, batch_size, learning_rate, weight_decay: of the training; ``learning_rate`` is the peak.
    """

    fields: Fields = dataclasses.field(default_factory=dict)
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @abstractmethod
    def data(self, seed: int) -> training.Data:
        """The training batches of a seed."""

    @abstractmethod
    def score(self, model: SubquadForCausalLM) -> dict[str, float]:
        """The measures of a trained model, by name."""

    @abstractmethod
    def tiny(self) -> Self:
        """The same path at a size of a few steps: whether it runs, nothing about its figures."""

    def build(self, fields: Fields, seed: int, edit: Edit | None = None) -> SubquadForCausalLM:
        """The untrained model of a method: the trial's fields, then the method's, then ``edit`` on the model."""
        config = SubquadConfig(**{"vocab_size": self.vocab_size, **self.fields, **fields})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SubquadForCausalLM(config)
            if edit is not None:
                edit(model)
        return model

    def fit(self, fields: Fields, seed: int, edit: Edit | None = None) -> SubquadForCausalLM:
        """The trained model of a method, in evaluation mode. ``seed`` decides the weights and the batches."""
        model = self.build(fields, seed, edit)
        options = training.TrainingOptions(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule="one_cycle",
            warmup_steps=max(2, round(WARMUP_SHARE * self.steps)),
            seed=seed,
        )
        training.train(model, self.data(seed), options, out=None, console=Console(quiet=True))
        return model.eval()

    def run(self, fields: Fields, seed: int, edit: Edit | None = None) -> dict[str, float]:
        """Trains and scores."""
        return self.score(self.fit(fields, seed, edit))


@dataclass(frozen=True, kw_only=True)
class TextTrial(Trial):
    """A byte language model on the Python standard library's sources; scored in bits per byte of the test split.

    Attributes:
        length: T of the training windows.
        test_lengths: window lengths of the evaluation; the same text is read at each.
        size: of :func:`subquad.tasks.source_text`.
        test_bytes: how much of the test split is read, in windows spread evenly over it; None: all.
    """

    length: int = 256
    test_lengths: tuple[int, ...] = (256,)
    size: str = "standard"
    test_bytes: int | None = None

    @property
    def vocab_size(self) -> int:
        return tasks.source_text(self.size).vocab_size

    def data(self, seed: int) -> training.Data:
        return training.from_text(tasks.source_text(self.size), self.length, self.batch_size, seed)

    def score(self, model: SubquadForCausalLM) -> dict[str, float]:
        names = [bits_at(length) if len(self.test_lengths) > 1 else BITS for length in self.test_lengths]
        return dict(zip(names, [self._bits(model, length) for length in self.test_lengths]))

    def _bits(self, model: SubquadForCausalLM, length: int) -> float:
        text = tasks.source_text(self.size)
        limit = None if self.test_bytes is None else max(1, self.test_bytes // length)
        batches = text.eval_windows("test", length, limit, batch_size=max(1, 4096 // length))
        return bits_per_token(model, batches)

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=8, batch_size=2, length=32, size="tiny", test_bytes=2048)


BITS = "bits per byte"


def bits_at(length: int) -> str:
    """The name of the measure "bits per byte in windows of ``length``"."""
    return f"{BITS} at {length}"


@dataclass(frozen=True, kw_only=True)
class TaskTrial(Trial):
    """A sequence task; scored by accuracy, also at lengths that were never trained.

    Attributes:
        task: a token task, see :func:`subquad.tasks.get`.
        length: T of training; None: the task's own.
        growing: whether the length grows from the task's shortest to ``length`` over the first half of the steps.
        test_lengths: T of the evaluation; None: the task's own.
        test_batches: batches of ``batch_size`` rows per length.
    """

    task: tasks.TokenTask
    length: int | None = None
    growing: bool = False
    test_lengths: tuple[int, ...] | None = None
    test_batches: int = 4

    @property
    def vocab_size(self) -> int:
        return self.task.vocab_size

    def data(self, seed: int) -> training.Data:
        if not self.growing:
            return training.from_task(self.task, self.batch_size, seed, length=self.length)
        return GrowingLength(self.task, self.batch_size, seed, self.length or self.task.length, self.steps // 2)

    def score(self, model: SubquadForCausalLM) -> dict[str, float]:
        """``accuracy`` over all labels and ``last accuracy`` at each row's last one, with `` at T`` where T varies."""
        scores = {}
        for length in self.test_lengths or (self.task.length,):
            place = "" if self.test_lengths is None else f" at {length}"
            scores[f"accuracy{place}"], scores[f"last accuracy{place}"] = self._accuracy(model, length)
        return scores

    @torch.no_grad()
    def _accuracy(self, model: SubquadForCausalLM, length: int) -> tuple[float, float]:
        right: list[Tensor] = []
        last: list[Tensor] = []
        for index in range(self.test_batches):
            batch = self.task.batch(self.batch_size, seed=EVALUATION_SEED, index=index, split="test", length=length)
            predicted = model(input_ids=batch.inputs.to(model.device)).logits.argmax(-1).cpu()
            asked = batch.labels != IGNORED
            hit = predicted == batch.labels
            right.append(hit[asked])
            places = asked * torch.arange(length)
            last.append(hit.gather(1, places.argmax(1, keepdim=True)).flatten())
        return float(torch.cat(right).double().mean()), float(torch.cat(last).double().mean())

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=8, batch_size=4, test_batches=1)


@dataclass(frozen=True)
class GrowingLength:
    """Training batches whose length grows linearly from the task's shortest to ``length`` over ``batches`` batches."""

    task: tasks.TokenTask
    batch_size: int
    seed: int
    length: int
    batches: int

    def batch(self, index: int) -> training.Batch:
        shortest, step = self.task.minimum_length, self.task.length_step
        share = min(1.0, (index + 1) / max(1, self.batches))
        grown = shortest + int((self.length - shortest) * share) // step * step
        inputs, labels = self.task.batch(self.batch_size, seed=self.seed, index=index, length=grown)
        return training.Batch(inputs, labels)


@torch.no_grad()
def bits_per_token(model: SubquadForCausalLM, batches: Iterable[tasks.Batch]) -> float:
    """Mean of ``-log2 p`` over all labels of the batches; bits per byte where tokens are bytes."""
    nats, count = 0.0, 0
    for batch in batches:
        inputs, labels = batch.inputs.to(model.device), batch.labels.to(model.device)
        tokens = int((labels != IGNORED).sum())
        nats += float(model.loss_from_labels(inputs, labels)) * tokens
        count += tokens
    if not count:
        raise ValueError("there is no label in these batches: nothing to average")
    return nats / count / math.log(2)
