"""07 Hedgehog: feature maps trained to mimic softmax convert a trained model (Zhang et al. 2024, sections 4 and 5).

A recall model with softmax attention is the teacher. Its softmax layer becomes linear attention with the same
projections; first only the feature maps are trained, towards the teacher's weights, then everything, on the task.
"""

import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from rich.console import Console

from subquad import tasks, training
from subquad.bench.trials import TaskTrial
from subquad.claims.contract import Claim, Figures, Term, at_least, at_most
from subquad.claims.experiment import SMALL_MODEL, replace_mixers
from subquad.layers.mimicry import measure_weights
from subquad.mixers import Mixer
from subquad.mixers.linear import LinearAttention
from subquad.mixers.softmax import SoftmaxAttention
from subquad.models import SubquadForCausalLM
from subquad.training.data import IGNORED
from subquad.training.mimicry import Mimicry

TEACHER = TaskTrial(
    fields={**SMALL_MODEL, "num_attention_heads": 2, "feedforward": None, "initializer_range": 0.125},
    task=tasks.get("mqar", vocab_size=128, length=64, num_pairs=8),
    steps=260,
    batch_size=48,
    learning_rate=1e-2,  # with 3e-3 the teacher does not solve the task in these steps
    test_batches=8,
)
FIELDS = {"mixers": ["base_conv", "softmax"]}
MIMIC = replace(TEACHER, steps=150, batch_size=32, learning_rate=1e-2, weight_decay=0.0)
FINETUNE = replace(TEACHER, steps=60, batch_size=32, learning_rate=1e-3)
SWAPPED, MAPS_ALONE, ALL = "accuracy as swapped", "accuracy after the maps", "accuracy after all"
ENTROPY, TEACHERS, TEACHERS_ACCURACY = "entropy", "the teacher's entropy", "the teacher's accuracy"


@functools.cache
def _teacher(seed: int, tiny: bool) -> SubquadForCausalLM:
    """One teacher for all arms of a seed."""
    return (TEACHER.tiny() if tiny else TEACHER).fit(FIELDS, seed)


def linear_copy(teacher: SubquadForCausalLM, feature_map: str) -> SubquadForCausalLM:
    """The model with linear attention in the place of softmax, everything else as it is."""

    def swap(mixer: Mixer) -> Mixer:
        if not isinstance(mixer, SoftmaxAttention):
            return mixer
        return LinearAttention(
            mixer.dim,
            mixer.num_heads,
            feature_map=feature_map,
            layer_index=mixer.layer_index,
            num_layers=mixer.num_layers,
        )

    student = copy.deepcopy(teacher)
    replace_mixers(swap)(student)
    missing, _ = student.load_state_dict(teacher.state_dict(), strict=False)
    assert all(".phi." in name for name in missing)
    return student


@dataclass(frozen=True)
class Converted:
    """The teacher with one feature map in the place of softmax, before and after each stage of training."""

    feature_map: str
    small: bool = False
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        teacher, stages = _teacher(seed, self.small), (MIMIC, FINETUNE)
        if self.small:
            stages = tuple(stage.tiny() for stage in stages)  # type: ignore[assignment]
        student = linear_copy(teacher, self.feature_map)
        figures = {
            TEACHERS_ACCURACY: stages[0].score(teacher)["accuracy"],
            SWAPPED: stages[0].score(student)["accuracy"],
        }
        maps = [p for name, p in student.named_parameters() if ".phi." in name]
        if maps:  # a map without weights has nothing to learn from the teacher
            student.requires_grad_(False)
            for parameter in maps:
                parameter.requires_grad_(True)
            _train(student, stages[0], seed, Mimicry(teacher))
            student.requires_grad_(True)
        figures[MAPS_ALONE] = stages[0].score(student)["accuracy"]
        figures[ENTROPY], figures[TEACHERS] = self._entropies(teacher, student)
        _train(student, stages[1], seed + 1000, training.next_token)
        figures[ALL] = stages[1].score(student)["accuracy"]
        return figures

    @staticmethod
    def _entropies(teacher: SubquadForCausalLM, student: SubquadForCausalLM) -> tuple[float, float]:
        """Of the queries that are asked something: what the others look at the task leaves open."""
        batch = TEACHER.task.batch(48, seed=0, index=0, split="test")
        layer, x = next(iter(Mimicry(teacher).read(batch.inputs).items()))
        mixer = student.model.mixers()[layer]
        assert isinstance(mixer, LinearAttention)
        with torch.no_grad():
            q, k, _ = mixer.project(x, x)
            measures = measure_weights(mixer.phi, q, k, queries=batch.labels != IGNORED, first_row=0)
        return float(measures.entropy.mean()), float(measures.softmax_entropy.mean())

    def tiny(self) -> Self:
        return replace(self, small=True)


def _train(model: SubquadForCausalLM, trial: TaskTrial, seed: int, objective: training.Objective) -> None:
    options = training.TrainingOptions(
        steps=trial.steps,
        batch_size=trial.batch_size,
        learning_rate=trial.learning_rate,
        weight_decay=trial.weight_decay,
        schedule="one_cycle",
        warmup_steps=max(2, round(0.3 * trial.steps)),
        seed=seed,
    )
    training.train(model, trial.data(seed), options, objective=objective, out=None, console=Console(quiet=True))
    model.eval()


OURS, JOINT, EXP, T2R, PLAIN = "Hedgehog", "Hedgehog, joint softmax", "Hedgehog, exp", "T2R", "elu + 1"
CLAIM = Claim(
    number=7,
    slug="hedgehog",
    claim="A feature map trained to mimic softmax's weights makes them as spiky, and converts a trained model to "
    "linear attention with its quality; earlier maps do not.",
    measured="Associative recall (128 tokens, T 64, 8 pairs), a gated convolution and softmax attention, D 64, 2 "
    "heads, 260 steps; softmax then swapped for linear attention: the maps alone for 150 steps of mimicry, all weights "
    "for 60 of the task; entropy of the weights of the questions after the first; chance is 0.02.",
    arms={
        OURS: Converted("hedgehog_softmax"),
        JOINT: Converted("hedgehog_joint"),
        EXP: Converted("hedgehog_exp"),
        T2R: Converted("t2r"),
        PLAIN: Converted("elu+1"),
    },
    rules=(
        at_least(Term(OURS, MAPS_ALONE), Term(T2R, MAPS_ALONE), plus=0.15),
        at_least(Term(OURS, MAPS_ALONE), plus=0.85),
        at_most(Term(OURS, ENTROPY), Term(T2R, ENTROPY), times=0.6),
        at_most(Term(PLAIN, ALL), plus=0.85),
    ),
    remark="elu + 1 has no weights to train in the first stage.",
)
