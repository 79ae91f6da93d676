"""03 Lightning Attention-2: constant speed and memory per token (Qin et al. 2024b, section 4.1)."""

import torch
from torch import Tensor

from subquad.bench.constant_speed import Preparation, Step, attention_preparation, op_step
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import Timed, bytes_at, random_heads, tokens_at
from subquad.ops import lightning_attention, lightning_slopes

HEADS, WIDTH = 8, 64
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
OURS, SOFTMAX, CUMULATIVE = "lightning", "torch's attention", "cumulative sum"


def cumulative_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention by a cumulative sum of ``k v^T``: the form whose memory the paper's tiling avoids."""
    states = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(dim=1)
    return torch.einsum("bthk,bthkv->bthv", q, states)


def _lightning(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        inputs = [x.requires_grad_() for x in random_heads(batch, length, HEADS, WIDTH, seed)]
        slope = lightning_slopes(HEADS)
        q, k, v = inputs
        return op_step(lambda: lightning_attention(q, k, v, slope)[0], inputs, backward=True)

    return prepare


def _cumulative(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        inputs = [x.requires_grad_() for x in random_heads(batch, length, HEADS, WIDTH, seed)]
        return op_step(lambda: cumulative_attention(*inputs), inputs, backward=True)

    return prepare


CLAIM = Claim(
    number=3,
    slug="lightning2",
    claim="Causal linear attention in tiles keeps tokens per second and memory per token constant as sequences grow.",
    measured="Forward and backward of the op, 8 heads of 64, 16,384 tokens a step in rows of 1,024 to 16,384, beside "
    "torch's attention; the cumulative-sum form on one row of 1,024 and 4,096.",
    arms={
        OURS: Timed(_lightning, LENGTHS, tokens=16_384, memory=True),
        SOFTMAX: Timed(lambda seed: attention_preparation(HEADS, WIDTH, True, seed), LENGTHS, tokens=16_384, repeats=3),
        CUMULATIVE: Timed(_cumulative, (1024, 4096), tokens=None, repeats=1, memory=True),
    },
    rules=(
        at_least(Term(OURS, tokens_at(16_384)), Term(OURS, tokens_at(1024)), times=0.85),
        at_most(Term(OURS, bytes_at(16_384)), Term(OURS, bytes_at(1024)), times=1.1),
        at_least(Term(OURS, bytes_at(16_384)), Term(OURS, bytes_at(1024)), times=0.9),
        at_most(Term(SOFTMAX, tokens_at(16_384)), Term(SOFTMAX, tokens_at(1024)), times=0.2),
        at_least(Term(CUMULATIVE, bytes_at(4096)), Term(OURS, bytes_at(4096)), times=20),
    ),
)
