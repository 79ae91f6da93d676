"""What the claims about conversion share: small teachers of transformers, trained here, and arms that convert them."""

import copy
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from subquad import tasks, training
from subquad.bench.trials import WARMUP_SHARE, bits_per_token
from subquad.claims.contract import Figures
from subquad.convert.recipes import RECIPES, Adapt
from subquad.convert.sites import FAMILIES
from subquad.convert.stages import LayerTransfer, NextTokens, TrainedPart, add_adapters, core_parameters, trainable
from subquad.convert.swapping import swap
from subquad.training.data import IGNORED

TEACHER, SWAPPED, TRANSFERRED, FINAL, ADDED = "teacher", "swapped", "after transfer", "at the end", "added parameters"
KEYS, VALUES, PAIRS, QUERIES = 24, 8, 16, 48


class Source(Protocol):
    """A teacher and its task: the data of a seed, and the score of a model on it."""

    def teacher(self, seed: int) -> Any: ...
    def data(self, seed: int, batch_size: int) -> training.Data: ...
    def score(self, model: Any) -> float: ...
    def tiny(self) -> Self: ...


@dataclass(frozen=True)
class PairRecall:
    """Recall at a distance: 16 tokens, each a pair of a key and a value, then 48 that ask for keys; the label is the
    value, at the question's place.

    Attributes:
        steps, batch_size, learning_rate: of the teacher's training.
        test_batches: of 64 rows.
    """

    steps: int = 450
    batch_size: int = 32
    learning_rate: float = 4e-3
    test_batches: int = 8

    def teacher(self, seed: int) -> Any:
        return _teacher(self, KEYS * VALUES + KEYS, PAIRS + QUERIES, seed)

    def data(self, seed: int, batch_size: int) -> training.Data:
        return PairBatches(seed, batch_size)

    @torch.no_grad()
    def score(self, model: Any) -> float:
        right, held_out = [], PairBatches(1_000_003, 64)
        for index in range(self.test_batches):
            batch = held_out.batch(index)
            predicted = model(input_ids=batch.inputs, use_cache=False).logits.argmax(-1)
            right.append((predicted == batch.labels)[batch.labels != IGNORED])
        return float(torch.cat(right).double().mean())

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=2, batch_size=4, test_batches=1)


class PairBatches(NamedTuple):
    """The batches of :class:`PairRecall`."""

    seed: int
    batch_size: int

    def batch(self, index: int) -> training.Batch:
        draw = np.random.default_rng((self.seed, index))
        keys = draw.permuted(np.tile(np.arange(KEYS), (self.batch_size, 1)), axis=1)[:, :PAIRS]
        values = draw.integers(VALUES, size=(self.batch_size, PAIRS))
        asked = draw.integers(PAIRS, size=(self.batch_size, QUERIES))
        inputs = np.concatenate([keys * VALUES + values, KEYS * VALUES + np.take_along_axis(keys, asked, 1)], axis=1)
        labels = np.full_like(inputs, IGNORED)
        labels[:, PAIRS:] = np.take_along_axis(values, asked, 1)
        return training.Batch(torch.from_numpy(inputs), torch.from_numpy(labels))


@dataclass(frozen=True)
class SourceText:
    """A byte language model of Python's own sources, in windows of 128; the second half of each is scored."""

    steps: int = 500
    batch_size: int = 8
    learning_rate: float = 4e-3
    length: int = 128
    size: str = "standard"
    windows: int = 512

    def teacher(self, seed: int) -> Any:
        return _teacher(self, 256, self.length, seed)

    def data(self, seed: int, batch_size: int) -> training.Data:
        return training.from_text(tasks.source_text(self.size), self.length, batch_size, seed)

    @torch.no_grad()
    def score(self, model: Any) -> float:
        held_out = tasks.source_text(self.size).eval_windows("test", self.length, self.windows, batch_size=32)
        return bits_per_token(_Scored(model), (_second_half(batch) for batch in held_out))

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=2, batch_size=2, length=32, size="tiny", windows=8)


class _Scored:
    """A causal language model of transformers as :func:`bits_per_token` reads one."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss_from_labels(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _second_half(batch: tasks.Batch) -> tasks.Batch:
    labels = batch.labels.clone()
    labels[:, : labels.shape[1] // 2] = IGNORED
    return tasks.Batch(batch.inputs, labels)


@functools.cache
def _teacher(source: Any, vocab_size: int, length: int, seed: int) -> Any:
    """One teacher for all arms of a seed: a Llama of 2 layers, D 64, 2 heads, with rotary positions and SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    groups = [(list(model.parameters()), source.learning_rate)]
    fit(NextTokens(model), source.data(seed, source.batch_size), groups, source.steps, seed, weight_decay=0.01)
    return model.eval()


def fit(
    objective: training.Objective,
    data: training.Data,
    groups: list[tuple[list[nn.Parameter], float]],
    steps: int,
    seed: int,
    *,
    weight_decay: float = 0.0,
) -> None:
    """AdamW on groups of parameters, each with its own peak under one cycle; the loop of training has one for all."""
    given = [{"params": parameters, "lr": rate} for parameters, rate in groups if parameters]
    rates = [group["lr"] for group in given]
    optimizer = AdamW(given, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = OneCycleLR(optimizer, rates, total_steps=steps, pct_start=WARMUP_SHARE, cycle_momentum=False)
    parameters = [parameter for group in given for parameter in group["params"]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(steps):
            loss, _ = objective(None, data.batch(step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()


class Stage(NamedTuple):
    """Steps and the peak of the learning rate."""

    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Converted:
    """A teacher converted by a recipe, scored before and after each stage.

    Attributes:
        source: the teacher and its task.
        recipe, options: what its attention becomes.
        transfer: the layer-wise stage; None: left out.
        adapt: the stage on the task, by additions of rank 8 and alpha 16; None: left out.
        projections: those that are adapted.
        core_rate: peak at which the cores' parameters are trained with them; None: they stand still.
        batch_size: of both stages.
    """

    source: Source
    recipe: str
    options: Mapping[str, Any]
    transfer: Stage | None
    adapt: Stage | None
    projections: tuple[str, ...] = ("q", "k", "v", "o")
    core_rate: float | None = None
    batch_size: int = 32
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        teacher = self.source.teacher(seed)
        figures = {TEACHER: self.source.score(teacher)}
        model = swap(copy.deepcopy(teacher), RECIPES[self.recipe], seed=seed, **self.options)
        figures[ADDED] = float(sum(parameter.numel() for _, parameter in core_parameters(model)))
        figures[SWAPPED] = self.source.score(model)
        data = self.source.data(seed + 1000, self.batch_size)
        if self.transfer is not None:
            loss = RECIPES[self.recipe].transfer
            assert loss is not None
            part = TrainedPart(core_parameters(model))
            groups = [(list(part.parameters()), self.transfer.learning_rate)]
            fit(LayerTransfer(model, loss.loss), data, groups, self.transfer.steps, seed)
            figures[TRANSFERRED] = self.source.score(model)
        if self.adapt is not None:
            stage = Adapt(self.projections, 8, 16, self.adapt.learning_rate, train_cores=self.core_rate is not None)
            adapter = add_adapters(model, stage, FAMILIES["llama"], seed)
            groups = [
                ([p for name, p in trainable(model) if "lora_" in name], self.adapt.learning_rate),
                ([p for name, p in trainable(model) if "lora_" not in name], self.core_rate or 0.0),
            ]
            fit(NextTokens(model), self.source.data(seed + 2000, self.batch_size), groups, self.adapt.steps, seed)
            model = adapter.merge_and_unload().eval()
            figures[FINAL] = self.source.score(model)
        return figures

    def tiny(self) -> Self:
        def shorter(stage: Stage | None) -> Stage | None:
            return None if stage is None else stage._replace(steps=2)

        return dataclasses.replace(
            self,
            source=self.source.tiny(),
            transfer=shorter(self.transfer),
            adapt=shorter(self.adapt),
            batch_size=min(self.batch_size, 4),
        )
