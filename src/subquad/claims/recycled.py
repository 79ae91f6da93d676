"""40 Recycled attention: what is read changes with what is written (Xu et al. 2024, sections 3 and 4)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from subquad.claims.contract import Claim, Figures, Term, at_least
from subquad.claims.copying import STEPS, copying_model, held_out, written_accuracy
from subquad.inference.recycled import recycle

ACCURACY = "accuracy"
KEPT = 12  # tokens of the 49 of the prompt that any policy holds


@dataclass(frozen=True)
class Written:
    """The copying model, writing its copies under one policy; no options: with its whole cache."""

    options: Mapping[str, Any] | None
    copies: int = 64
    steps: int = STEPS
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        model, ids = copying_model(seed, self.steps), held_out(self.copies)
        if self.options is None:
            return {ACCURACY: written_accuracy(model, ids)}
        with recycle(model, max_partial=KEPT, **self.options):
            return {ACCURACY: written_accuracy(model, ids)}

    def tiny(self) -> Self:
        return replace(self, copies=2, steps=10)


OURS, SNAPKV, H2O, STREAMING = "recycled, a full step in 4", "SnapKV", "H2O", "streaming"
CLAIM = Claim(
    number=40,
    slug="recycled",
    claim="Reading a few cached tokens that a full step found, and choosing anew every few steps, keeps what a model "
    "can do with its whole cache; policies that drop tokens for good lose it.",
    measured="Copies of 48 distinct symbols written greedily by a two-layer Llama (D 64, 4 heads, 800 steps), 64 "
    f"texts; partial caches of {KEPT} tokens of the prompt's 49.",
    arms={
        OURS: Written({"stride": 4}),
        "recycled, a full step in 8": Written({"stride": 8}),
        "recycled, a full step in 4, no pooling": Written({"stride": 4, "pool": 1}),
        "the whole cache": Written(None),
        SNAPKV: Written({"mode": "snapkv"}),
        H2O: Written({"mode": "h2o"}),
        STREAMING: Written({"mode": "streaming"}),
    },
    rules=(
        at_least(Term(OURS, ACCURACY), plus=0.8),
        *(at_least(Term(OURS, ACCURACY), Term(other, ACCURACY), times=3) for other in (SNAPKV, H2O, STREAMING)),
    ),
    remark="Speed is measured in benchmarks/long_context.py.",
)
