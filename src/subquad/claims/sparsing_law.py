"""33 Sparsing Law: the active share of ReLU and SiLU models as they train (Luo et al. 2024, section 4.1)."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from rich.console import Console
from torch import Tensor, nn

from subquad import tasks, training
from subquad.bench.trials import TextTrial
from subquad.claims.contract import Claim, Figures, Term, at_least
from subquad.claims.experiment import SMALL_MODEL
from subquad.evaluation import sparsity

TRIAL = TextTrial(
    fields={**SMALL_MODEL, "mixers": "softmax", "intermediate_size": 160},
    steps=600,
    batch_size=16,
    learning_rate=4e-3,
    length=128,
)
EVERY, WINDOWS, WARMUP, PERCENT = 75, 16, 30, 1.0
RELU, SILU = "ReLU", "SiLU"
LOSS = "nats per byte"


def ratio_at(step: int) -> str:
    """The name of the measure "activation ratio at this step"."""
    return f"ratio at {step}"


def held_out_windows(trial: TextTrial, number: int) -> list[Tensor]:
    """Windows of the validation split, spread evenly over it, in batches of 16."""
    text = tasks.source_text(trial.size)
    return [batch.inputs for batch in text.eval_windows("valid", trial.length, number, batch_size=16)]


@dataclass(frozen=True)
class RatioOverTraining:
    """A language model whose activation ratio at 1% more perplexity is taken again and again while it trains.

    Attributes:
        trial, fields: as in :class:`subquad.claims.experiment.Trained`; the learning rate stays constant after its
            warm-up, so that every step is a checkpoint of the same run.
        every: steps between measurements.
        windows: of the held-out text to measure on.
    """

    trial: TextTrial
    fields: Mapping[str, object]
    every: int = EVERY
    windows: int = WINDOWS
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        trial, windows = self.trial, held_out_windows(self.trial, self.windows)
        model = trial.build(self.fields, seed)
        figures: dict[str, float] = {}

        def look(network: nn.Module) -> dict[str, float]:
            found = sparsity.perplexity_sparsity(network, windows, PERCENT)
            figures[ratio_at(EVERY * (len(figures) + 1))] = found.measure.ratio
            return {LOSS: found.measure.dense_loss}

        options = training.TrainingOptions(
            steps=trial.steps,
            batch_size=trial.batch_size,
            learning_rate=trial.learning_rate,
            weight_decay=trial.weight_decay,
            schedule="constant",
            warmup_steps=min(WARMUP, trial.steps // 2),
            eval_every=self.every,
            seed=seed,
        )
        data = trial.data(seed)
        result = training.train(model, data, options, out=None, evaluate=look, console=Console(quiet=True))
        return {**figures, LOSS: float(result.history[-1][f"evaluation/{LOSS}"])}

    def tiny(self) -> Self:
        """The names of the figures stay those of the full run."""
        trial = self.trial.tiny()
        return dataclasses.replace(self, trial=trial, every=trial.steps * EVERY // TRIAL.steps, windows=2)


FIRST, LAST = ratio_at(EVERY), ratio_at(TRIAL.steps)
CLAIM = Claim(
    number=33,
    slug="sparsing_law",
    claim="At equal quality a ReLU model needs far fewer of its neurons than a SiLU model; with training data the "
    "share falls for ReLU and rises for SiLU.",
    measured="Bytes of the standard library's sources, gated feed-forward layers of 160, D 64, 2 layers, T 128, batch "
    f"16, constant learning rate; the share of neurons at {PERCENT:g}% more perplexity on {WINDOWS} held-out windows.",
    arms={
        RELU: RatioOverTraining(TRIAL, {"feedforward": "reglu"}),
        SILU: RatioOverTraining(TRIAL, {"feedforward": "swiglu"}),
    },
    rules=(
        at_least(Term(SILU, LAST), Term(RELU, LAST), times=1.5),
        at_least(Term(SILU, LAST), Term(SILU, FIRST)),
    ),
    remark="The fall of ReLU's share belongs to later training than this minute of it, in which it rises too; it is "
    "shown, not judged.",
)
