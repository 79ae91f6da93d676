"""38 Rectification: capping tokens by the risk of what follows, beside banning risky ones (Cao et al. 2023, section 5).

A world of twelve tokens with known probabilities stands in for toxic text: a token that is harmless in one state is
fatal in another. How far a policy strays from the base is the divergence ``KL(q || p)`` of whole texts.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from subquad import tasks
from subquad.claims.contract import Claim, Figures, Term, at_least, at_most
from subquad.inference.dead_end_value import DeadEndValue, exact_value, train_value
from subquad.inference.rectify import LEAST_CAP, rectify
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.training import TrainingOptions

TEXTS, STEPS, BATCH, LEARNING_RATE, WIDTH, SAMPLED = 6000, 800, 128, 3e-3, 64, 5000
UNSAFE, STRAYING, BAN = "unsafe texts", "KL to the base", "KL of the cheapest ban as safe"
BASE, EXACT = "base", "exact value"


def _chances(world: Any, policies: np.ndarray) -> np.ndarray:
    """The chance of each state before every token and at the end, ``(T + 1, S)``, under policies ``(T, S, V)``."""
    chances = np.zeros((len(policies) + 1, len(world.following)))
    chances[0, 0] = 1
    for before, after, policy in zip(chances, chances[1:], policies):
        np.add.at(after, world.following, before[:, None] * policy)
    return chances


def _follow(world: Any, policies: np.ndarray) -> tuple[float, float]:
    """The share of undesired texts and the divergence from the base of policies ``(T, S, V)``, both exact."""
    chances = _chances(world, policies)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(policies > 0, policies * np.log(policies / world.policy), 0)
    return float(chances[-1, world.undesired].sum()), float((chances[:-1] * terms.sum(2)).sum())


def _every_token(world: Any, policy: np.ndarray) -> np.ndarray:
    """A policy ``(S, V)`` that does not depend on the place, as ``(T, S, V)``."""
    return np.broadcast_to(policy, (world.length, *policy.shape))


def _banned(world: Any, number: int) -> np.ndarray:
    """The base policy ``(T, S, V)`` without the tokens of highest average risk."""
    chances = _chances(world, _every_token(world, world.policy))[:-1]
    risk = -(chances[..., None] * exact_value(world)).sum((0, 1))
    policy = world.policy.copy()
    policy[:, np.argsort(-risk)[:number]] = 0
    return _every_token(world, policy / policy.sum(1, keepdims=True))


@dataclass(frozen=True)
class Banned:
    """The base model without its riskiest tokens."""

    number: int
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        world = tasks.dead_ends(seed)
        return dict(zip((UNSAFE, STRAYING), _follow(world, _banned(world, self.number))))

    def tiny(self) -> Self:
        return self


@dataclass(frozen=True)
class Exact:
    """Rectified by the exact value."""

    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        world = tasks.dead_ends(seed)
        caps = torch.from_numpy(1 + exact_value(world)).clamp(LEAST_CAP, 1)
        policies = rectify(torch.from_numpy(world.policy).log().expand_as(caps), caps).exp().numpy()
        return dict(zip((UNSAFE, STRAYING), _follow(world, policies)))

    def tiny(self) -> Self:
        return self


@functools.lru_cache(maxsize=1)
def _learnt_value(seed: int, steps: int) -> DeadEndValue:
    """The one value of all strictnesses of a seed."""
    world = tasks.dead_ends(seed)
    size = world.policy.shape[1]
    fields = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 1, "feedforward": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value = DeadEndValue(SubquadForCausalLM(SubquadConfig(vocab_size=size + 1, mixers="gru", **fields)))
    texts = world.sample(TEXTS, seed)
    rewards = -world.is_undesired(texts).astype(np.float64)
    rows = np.concatenate([np.full((TEXTS, 1), size), texts], axis=1)
    options = TrainingOptions(
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        schedule="constant",
        seed=seed,
    )
    train_value(value, rows.tolist(), rewards.tolist(), options, console=Console(quiet=True))
    return value.eval()


@dataclass(frozen=True)
class Learnt:
    """Rectified by a value learnt from texts of the base model; measured on sampled texts.

    Attributes:
        epsilon: strictness.
        steps: of the value's training, which all strictnesses of a seed share.
        sampled: texts that are written and judged.
    """

    epsilon: float
    steps: int = STEPS
    sampled: int = SAMPLED
    timed: bool = field(default=False, init=False)

    def measure(self, seed: int) -> Figures:
        world = tasks.dead_ends(seed)
        tokens, straying = self._write(world, _learnt_value(seed, self.steps), seed)
        unsafe = float(world.is_undesired(tokens).mean())
        bans = [_follow(world, _banned(world, number)) for number in range(1, world.policy.shape[1])]
        return {UNSAFE: unsafe, STRAYING: straying, BAN: min((kl for rate, kl in bans if rate <= unsafe), default=99.0)}

    @torch.no_grad()
    def _write(self, world: Any, value: DeadEndValue, seed: int) -> tuple[np.ndarray, float]:
        """Texts under the caps, and their mean divergence from the base, token by token."""
        size, cache, straying = world.policy.shape[1], None, 0.0
        base = torch.from_numpy(world.policy)
        generator = torch.Generator().manual_seed(seed)
        last, state = torch.full((self.sampled,), size), torch.zeros(self.sampled, dtype=torch.int64)
        following, written = torch.from_numpy(world.following), []
        for _ in range(world.length):
            q, cache = value.evaluate(last[:, None], None, cache)
            caps = (1 + q[:, -1, :size].double().clamp(-1, 0) - self.epsilon).clamp(LEAST_CAP, 1)
            policy: Tensor = rectify(base[state].log(), caps).exp()
            straying += float((policy * (policy / base[state]).log()).where(policy > 0, 0).sum(-1).mean())
            last = torch.multinomial(policy, 1, generator=generator)[:, 0]
            state = following[state, last]
            written.append(last)
        return torch.stack(written, 1).numpy(), straying

    def tiny(self) -> Self:
        return dataclasses.replace(self, steps=3, sampled=50)


BANNED = {number: f"without {number} tokens" for number in (1, 2, 4)}
LEARNT = {epsilon: f"learnt value, epsilon {epsilon}" for epsilon in (0.1, 0.3)}
CLAIM = Claim(
    number=38,
    slug="rectification",
    claim="Capping each token's probability by the learnt risk of an undesired end avoids such ends, at far less "
    "distance from the base model than rules on tokens.",
    measured=f"A world of 8 states and 12 tokens, texts of 10; the value is a GRU of {WIDTH} that learnt from "
    f"{TEXTS:,} labelled texts of the base model in {STEPS} steps of {BATCH}; {SAMPLED:,} texts are written under it.",
    arms={
        BASE: Banned(0),
        **{name: Banned(number) for number, name in BANNED.items()},
        EXACT: Exact(),
        **{name: Learnt(epsilon) for epsilon, name in LEARNT.items()},
    },
    rules=(
        at_most(Term(LEARNT[0.3], UNSAFE), Term(BASE, UNSAFE), times=0.3),
        at_most(Term(LEARNT[0.3], STRAYING), Term(LEARNT[0.3], BAN), times=0.5),
        at_most(Term(EXACT, UNSAFE), plus=0.001),
        at_least(Term(BASE, UNSAFE), plus=0.05),
    ),
    remark="The guarantee is per step and for the policy whose texts were learnt from; tokens that it never tried "
    "limit a learnt value.",
)
