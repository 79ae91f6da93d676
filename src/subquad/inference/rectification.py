"""The whole way of rectification: sample and score a model's texts, learn their risk, show what avoiding it costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from subquad.evaluation.writing import sample_texts
from subquad.inference.dead_end_value import DeadEndValue, sample_and_score, train_value
from subquad.inference.rectify import RectifyLogits
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.training import TrainingOptions

BATCH, TEST_SHARE = 64, 5  # rows per step; one prompt of so many is kept for the test


@dataclass(frozen=True)
class Strictness:
    """What one epsilon does: see :func:`rectification_curve`.

    Attributes:
        epsilon: None: the model as it is.
        undesired: share of texts whose reward is below -1/2.
        reward: its mean.
        divergence: mean ``KL(q || p)`` of a whole continuation.
    """

    epsilon: float | None
    undesired: float
    reward: float
    divergence: float


def rectification_curve(
    model: Any,
    tokenizer: Any,
    value: DeadEndValue,
    prompts: Sequence[str],
    reward: Callable[[str], float],
    *,
    epsilons: Sequence[float] = (0.0, 0.1, 0.2, 0.3),
    continuations: int = 25,
    max_new_tokens: int = 20,
    seed: int = 0,
) -> list[Strictness]:
    """How many undesired texts a model writes, and how far it strays from itself, by strictness.

    Args:
        model, tokenizer: of transformers; the first row is the model without rectification.
        value: a trained value model of the same vocabulary.
        prompts, reward, continuations, max_new_tokens, seed: as in
            :func:`subquad.inference.dead_end_value.sample_and_score`; take other prompts than it learnt from.
        epsilons: strictnesses in [0, 1).

    Raises:
        ValueError: no prompts, or an epsilon out of range.
    """
    if not prompts or not all(prompts):
        raise ValueError("give at least one prompt, none of them empty")
    rows = []
    for epsilon in (None, *epsilons):
        rewards, divergences = [], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for prompt in prompts:
                rectifiers = [] if epsilon is None else [RectifyLogits(value, epsilon)]
                texts, start = sample_texts(
                    model,
                    tokenizer,
                    prompt,
                    number=continuations,
                    max_new_tokens=max_new_tokens,
                    logits_processors=rectifiers,
                )
                rewards += [float(reward(tokenizer.decode(text, skip_special_tokens=True))) for text in texts]
                for rectifier in rectifiers:
                    steps = torch.stack(rectifier.divergences, 1)
                    written = torch.tensor([len(text) - start for text in texts], device=steps.device)[:, None]
                    inside = torch.arange(steps.shape[1], device=steps.device) < written
                    divergences += (steps * inside).sum(1).tolist()
        undesired = sum(r < -0.5 for r in rewards) / len(rewards)
        far = sum(divergences) / len(divergences) if divergences else 0.0
        rows.append(Strictness(epsilon, undesired, sum(rewards) / len(rewards), far))
    return rows


def learn_and_measure(
    model: Any,
    tokenizer: Any,
    reward: Callable[[str], float],
    prompts: Sequence[str],
    *,
    continuations: int = 25,
    max_new_tokens: int = 20,
    steps: int = 500,
    width: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    console: Console | None = None,
) -> tuple[DeadEndValue, list[Strictness]]:
    """Trains a recurrent value model on texts of a model, and measures on prompts that it did not see.

    Args:
        model, tokenizer: of transformers.
        reward: from a finished text to a number in [-1, 0].
        prompts: at least two; the last fifth, one at least, is for the test.
        continuations, max_new_tokens: see :func:`~subquad.inference.dead_end_value.sample_and_score`.
        steps, learning_rate: of the value model's training.
        width: of the value model, one layer of gated recurrent units.
        seed: of sampling, weights and batches.
        console: where progress goes.

    Returns:
        The value model and the curve of :func:`rectification_curve`.

    Raises:
        ValueError: fewer than two prompts, rewards out of range, or rewards that are all equal.
    """
    if len(prompts) < 2:
        raise ValueError(f"at least two prompts are needed, to learn from and to test on; got {len(prompts)}")
    kept = max(1, len(prompts) // TEST_SHARE)
    sampling = {"continuations": continuations, "max_new_tokens": max_new_tokens}
    texts, rewards = sample_and_score(model, tokenizer, prompts[:-kept], reward, **sampling, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = SubquadConfig(
            vocab_size=model.config.vocab_size,
            hidden_size=width,
            mixers="gru",
            num_hidden_layers=1,
            num_attention_heads=1,
            feedforward=None,
        )
        value = DeadEndValue(SubquadForCausalLM(config))
    options = TrainingOptions(
        steps=steps,
        batch_size=BATCH,
        learning_rate=learning_rate,
        warmup_steps=steps // 10,
        schedule="cosine",
        seed=seed,
    )
    train_value(value, texts, rewards, options, console=console)
    value.eval()
    return value, rectification_curve(model, tokenizer, value, prompts[-kept:], reward, **sampling, seed=seed)
