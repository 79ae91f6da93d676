"""06 GLA: gates computed from the token against decays that are fixed (Yang et al. 2024, sections 4 and 5).

The baselines are the same block with another forget gate, so that nothing else differs: constants per head (windows of
4 to 256 tokens, which suit bytes; RetNet's own; none), and one gate per head computed from the token.
"""

import torch
from torch import Tensor, nn

from subquad.bench.constant_speed import Preparation, Step, attention_preparation
from subquad.bench.trials import BITS, TextTrial
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import (
    SMALL_MODEL,
    Timed,
    Trained,
    milliseconds_at,
    op_forward,
    random_heads,
    replace_submodules,
)
from subquad.mixers.gla import GatedLinearAttention
from subquad.ops import gla, retention_slopes, window_slopes

TRIAL = TextTrial(
    fields=SMALL_MODEL, steps=300, batch_size=8, learning_rate=8e-3
)  # the best of 4, 8, 16e-3 for GLA and for fixed decays
LENGTHS = (512, 2048, 8192)
HEADS, WIDTH = 8, 64
OURS = "GLA"
TUNED = "fixed decay, windows 4..256"
RETNET = "RetNet's decay"
SPEED, SPEED_OF_SOFTMAX = "the op", "torch's attention"


class ConstantGate(nn.Module):
    """In the place of GLA's gate projection: the same forget gate for every token, given as a decay per head."""

    logit: Tensor

    def __init__(self, mixer: GatedLinearAttention, slopes: Tensor) -> None:
        super().__init__()
        # GLA's log decay is logsigmoid(.) / temperature, which is -slope at the logit of exp(-slope temperature)
        logit = -torch.log(torch.expm1(slopes.double() * mixer.gate_temperature))
        self.register_buffer("logit", logit.float().repeat_interleave(mixer.head_k_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.logit.expand(*x.shape[:-1], -1)


class ScalarGate(nn.Module):
    """In the place of GLA's gate projection: one gate per head, computed from the token, for all its channels."""

    def __init__(self, mixer: GatedLinearAttention) -> None:
        super().__init__()
        rank = mixer.gk_proj[0].out_features
        self.proj = nn.Sequential(nn.Linear(mixer.dim, rank, bias=False), nn.Linear(rank, mixer.num_heads))
        self.head_k_dim = mixer.head_k_dim

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).repeat_interleave(self.head_k_dim, dim=-1)


def _fixed(slopes: Tensor) -> Trained:
    return Trained(TRIAL, {"mixers": "gla"}, replace_submodules("gk_proj", lambda mixer: ConstantGate(mixer, slopes)))


def _op(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        q, k, v = random_heads(batch, length, HEADS, WIDTH, seed)
        gates = torch.randn(k.shape, generator=torch.Generator().manual_seed(seed + 1))
        log_decay = nn.functional.logsigmoid(gates) / 16
        return op_forward(lambda: gla(q, k, v, log_decay))

    return prepare


CLAIM = Claim(
    number=6,
    slug="gla",
    claim="Gates computed from the token make linear attention clearly better than fixed decays, as RetNet's, "
    "and its time grows linearly with the length.",
    measured="Bytes of the standard library's sources, 2 layers, D 64, 4 heads, T 256, batch 8, 300 steps, "
    "one block for all; the op's forward time, 8 heads of 64, beside torch's attention.",
    arms={
        OURS: Trained(TRIAL, {"mixers": "gla"}),
        TUNED: _fixed(window_slopes(4, shortest=4, longest=256)),
        RETNET: _fixed(retention_slopes(4)),
        "no decay": _fixed(torch.zeros(4)),
        "one gate per head": Trained(TRIAL, {"mixers": "gla"}, replace_submodules("gk_proj", ScalarGate)),
        "softmax without positions": Trained(TRIAL, {"mixers": "softmax"}),
        SPEED: Timed(_op, LENGTHS, tokens=None),
        SPEED_OF_SOFTMAX: Timed(lambda seed: attention_preparation(HEADS, WIDTH, False, seed), LENGTHS, tokens=None),
    },
    rules=(
        at_most(Term(OURS, BITS), Term(TUNED, BITS), plus=-0.05),
        at_most(Term(OURS, BITS), Term(RETNET, BITS), plus=-0.2),
        at_most(Term(SPEED, milliseconds_at(8192)), Term(SPEED, milliseconds_at(2048)), times=5.5),
        at_least(Term(SPEED_OF_SOFTMAX, milliseconds_at(8192)), Term(SPEED, milliseconds_at(8192)), times=8),
    ),
    remark="RetNet's own decays are far too slow for bytes, hence the tuned row. At this size one gate per head does "
    "better than one per channel.",
)
