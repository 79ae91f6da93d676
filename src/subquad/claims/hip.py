"""42 HiP: a tree search finds the keys that matter in a trained model (Lee et al. 2024, sections 3 and 5)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from subquad.claims.contract import Claim, Figures, Term, at_least, at_most
from subquad.claims.copying import STEPS, copying_model, forced_accuracy, held_out
from subquad.inference.hip_attention import hip

ACCURACY = "accuracy"
WINDOW, SINKS, BUDGET = 8, 2, 8


def streaming(time: int) -> Tensor:
    """Sinks and a window of as many keys as HiP reads, ``(T, T)`` bool."""
    key, query = torch.arange(time), torch.arange(time)[:, None]
    return (key <= query) & ((key > query - WINDOW - BUDGET) | (key < SINKS))


def random_keys(time: int) -> Tensor:
    """Sinks, the window, and as many of the keys before it as HiP chooses, drawn for each query."""
    key, query = torch.arange(time), torch.arange(time)[:, None]
    before = key <= query - WINDOW
    score = torch.rand(time, time, generator=torch.Generator().manual_seed(0)).masked_fill(~before, -1.0)
    drawn = torch.zeros(time, time, dtype=torch.bool).scatter(1, score.topk(min(BUDGET, time), 1).indices, 1)
    return (drawn & before) | ((key <= query) & ((key > query - WINDOW) | (key < SINKS)))


@dataclass(frozen=True)
class Searched:
    """The copying model, whose queries read the blocks of HiP in all layers."""

    block_q: int
    copies: int = 64
    steps: int = STEPS
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        model = copying_model(seed, self.steps)
        options = {"window": WINDOW, "sinks": SINKS, "budget": BUDGET, "block_k": 1, "query_stride": 1}
        with hip(model, **options, block_q=self.block_q, dense_layers=()):
            return {ACCURACY: forced_accuracy(model, held_out(self.copies))}

    def tiny(self) -> Self:
        return replace(self, copies=2, steps=10)


@dataclass(frozen=True)
class Masked:
    """The copying model under a mask that does not depend on what is read; None: its own attention."""

    visible: Callable[[int], Tensor] | None
    copies: int = 64
    steps: int = STEPS
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        model, ids = copying_model(seed, self.steps), held_out(self.copies)
        mask = None if self.visible is None else self.visible(ids.shape[1] - 1)
        return {ACCURACY: forced_accuracy(model, ids, mask)}

    def tiny(self) -> Self:
        return replace(self, copies=2, steps=10)


OURS, STREAMING, RANDOM = "HiP, each query its own keys", "streaming", "random keys"
CLAIM = Claim(
    number=42,
    slug="hip",
    claim="A tree search over the keys finds what a trained model's queries look at, without any training; a window of "
    "as many keys does not reach it.",
    measured="Copies of 48 distinct symbols, each predicted after the true ones, by a two-layer Llama (D 64, 4 heads, "
    f"800 steps), 64 texts of 97 tokens; window {WINDOW}, {SINKS} sinks, {BUDGET} keys chosen in every layer.",
    arms={
        OURS: Searched(1),
        "HiP, blocks of 4 queries": Searched(4),
        "HiP, blocks of 8 queries": Searched(8),
        "its own attention": Masked(None),
        STREAMING: Masked(streaming),
        RANDOM: Masked(random_keys),
    },
    rules=(
        at_least(Term(OURS, ACCURACY), plus=0.85),
        at_most(Term(STREAMING, ACCURACY), plus=0.25),
        at_most(Term(RANDOM, ACCURACY), plus=0.25),
    ),
    remark="Perplexity and time at 8,192 tokens are measured in benchmarks/long_context.py.",
)
