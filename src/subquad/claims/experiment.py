"""The arms that claims are made of: a model trained by a trial, a step timed over lengths, an exact computation."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from subquad.bench.constant_speed import Preparation, Step, constant_speed, op_step
from subquad.bench.trials import Edit, Trial
from subquad.claims.contract import Figures
from subquad.mixers import Mixer
from subquad.models import SubquadForCausalLM

SMALL_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "positions": "none",
    "tie_word_embeddings": False,
    "scale_embeddings": True,
    "initializer_range": 0.06,
}
"""What the small models of the claims share. The library's initial 0.02 is for wide models: at D 64 a byte model learns
0.1 bits more in 150 steps from 0.06 with scaled embeddings and an untied head."""


@dataclass(frozen=True)
class Trained:
    """A method that is trained by a trial and scored.

    Attributes:
        trial: the recipe, which the arms of a comparison share.
        fields: the method's own fields of the configuration.
        edit: what is changed on the built model, for baselines that are no option of the library.
        look: more figures of the trained model, besides the trial's score.
    """

    trial: Trial
    fields: Mapping[str, Any]
    edit: Edit | None = None
    look: Callable[[SubquadForCausalLM], dict[str, float]] | None = None
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        model = self.trial.fit(self.fields, seed, self.edit)
        figures = self.trial.score(model)
        return figures if self.look is None else {**figures, **self.look(model)}

    def tiny(self) -> Self:
        return dataclasses.replace(self, trial=self.trial.tiny())


@dataclass(frozen=True)
class Timed:
    """A step timed at several lengths.

    Attributes:
        prepare: from a seed to steps by batch and length.
        lengths: T, shortest first.
        tokens: per step, the same at every length; figures are then tokens per second. None: one row of each length;
            figures are then milliseconds.
        repeats: measurements per length, of which the median counts.
        memory: also bytes held per token.
    """

    prepare: Callable[[int], Preparation]
    lengths: tuple[int, ...]
    tokens: int | None
    repeats: int = 5
    memory: bool = False
    timed: bool = field(default=True, init=False)

    def measure(self, seed: int) -> Figures:
        speeds = constant_speed(
            self.prepare(seed), self.lengths, tokens=self.tokens, repeats=self.repeats, memory=self.memory
        )
        figures = {}
        for row in speeds.rows:
            if self.tokens is None:
                figures[milliseconds_at(row.length)] = 1e3 * row.seconds
            else:
                figures[tokens_at(row.length)] = row.tokens_per_second
            if row.bytes_per_token is not None:
                figures[bytes_at(row.length)] = row.bytes_per_token
        return {**figures, EXPONENT: speeds.exponent}

    def tiny(self) -> Self:
        """The names of the figures stay those of the full lengths."""
        return dataclasses.replace(self, prepare=lambda seed: _shortened(self.prepare(seed)), repeats=1)


EXPONENT = "exponent"
TINY_DIVISOR = 64


def milliseconds_at(length: int) -> str:
    """The name of the measure "milliseconds of a step at this length"."""
    return f"ms at {length}"


def tokens_at(length: int) -> str:
    """The name of the measure "tokens per second at this length"."""
    return f"tokens/s at {length}"


def bytes_at(length: int) -> str:
    """The name of the measure "bytes per token at this length"."""
    return f"bytes/token at {length}"


def _shortened(prepare: Preparation) -> Preparation:
    return lambda batch, length: prepare(1, max(2, length // TINY_DIVISOR))


@dataclass(frozen=True)
class Computed:
    """Figures that need no training: ``compute(seed)``."""

    compute: Callable[[int], dict[str, float]]
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        return self.compute(seed)

    def tiny(self) -> Self:
        return self


def random_heads(batch: int, length: int, num_heads: int, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k, v ``(B, T, H, K)`` for timing an op."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, length, num_heads, head_dim, generator=generator)
    return q.contiguous(), k.contiguous(), v.contiguous()


def op_forward(op: Callable[[], tuple[Tensor, Any]]) -> Step:
    """The step that calls an op of the library, without gradient."""
    return op_step(lambda: op()[0], [], backward=False)


def replace_submodules(name: str, make: Callable[[Mixer], nn.Module]) -> Edit:
    """An edit that puts ``make(mixer)`` in the place of every mixer's submodule ``name``, initialised as the model."""

    def edit(model: SubquadForCausalLM) -> None:
        for mixer in model.model.mixers():
            if not hasattr(mixer, name):
                raise ValueError(f"{type(mixer).__name__} has no submodule {name!r} to replace")
            setattr(mixer, name, make(mixer).apply(model._init_weights))

    return edit


def replace_mixers(make: Callable[[Mixer], Mixer]) -> Edit:
    """An edit that puts ``make(mixer)`` in the place of every mixer, initialised as the model."""

    def edit(model: SubquadForCausalLM) -> None:
        for block in model.model.layers:
            block.mixer = make(block.mixer).apply(model._init_weights)

    return edit
