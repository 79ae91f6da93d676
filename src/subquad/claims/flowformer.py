"""53 Flowformer: competition and allocation repair linear attention's even weights (Wu et al. 2022, section 4).

The baselines are the same layer with the same sigmoid features: plain normalised linear attention, and flow attention
with one of its two gates left out.
"""

import torch
from torch import Tensor

from subquad.bench.constant_speed import Preparation, Step
from subquad.bench.trials import BITS, TextTrial
from subquad.claims.contract import Claim, Term, at_most
from subquad.claims.experiment import (
    SMALL_MODEL,
    Timed,
    Trained,
    milliseconds_at,
    op_forward,
    random_heads,
    replace_mixers,
)
from subquad.kernels.flow.gates import FlowOptions, causal_gates
from subquad.mixers.contract import Request
from subquad.mixers.flow import FlowAttention
from subquad.ops import FlowState, flow_attention, linear_attention

TRIAL = TextTrial(
    fields={**SMALL_MODEL, "positions": "learned", "use_cache": False},
    steps=150,
    batch_size=16,
    learning_rate=4e-3,
    length=128,
    test_lengths=(128,),
)
LENGTHS = (2048, 4096, 16_384)
OURS, PLAIN, SOFTMAX, SPEED = "flow attention", "plain linear", "softmax", "the op"
OPTIONS = FlowOptions(eps=1e-6, clip=10.0, temperature=1.0)


class GatedFlow(FlowAttention):
    """Causal flow attention with or without each of its gates; without both it is normalised linear attention.

    Keeps no state: for training and for windows that are read whole.
    """

    compete = allocate = False

    def recur(self, x: Tensor, lengths: Tensor | None, request: Request) -> tuple[Tensor, FlowState]:
        q, k, v = self._project(x, x)
        rows, heads, width = q.shape[0], q.shape[2], q.shape[3]
        empty = q.new_zeros(rows, heads, 4, width), q.new_zeros(rows, heads), q.new_zeros(rows)
        allocation, competition, _, _ = causal_gates(q, k, None, *empty, OPTIONS)
        incoming = ((q + OPTIONS.eps) * (k.cumsum(1) + OPTIONS.eps)).sum(-1)
        read = allocation if self.allocate else 1 / incoming
        values = competition[..., None] * v if self.compete else v
        o = read[..., None] * linear_attention(q, k, values)[0]
        return self.o_proj(o.flatten(-2)), self.init_state(rows, x.dtype, x.device)


class NoCompetition(GatedFlow):
    allocate = True


class NoAllocation(GatedFlow):
    compete = True


def _instead(kind: type[FlowAttention]) -> Trained:
    edit = replace_mixers(
        lambda mixer: kind(mixer.dim, mixer.num_heads, layer_index=mixer.layer_index, num_layers=mixer.num_layers)
    )
    return Trained(TRIAL, {"mixers": "flow"}, edit)


def _op(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        q, k, v = random_heads(batch, length, 4, 64, seed)
        q, k = torch.sigmoid(q), torch.sigmoid(k)
        return op_forward(lambda: flow_attention(q, k, v))

    return prepare


CLAIM = Claim(
    number=53,
    slug="flowformer",
    claim="Competition among keys and allocation to queries make linear attention as good as softmax attention, in "
    "linear time.",
    measured="Bytes of the standard library's sources, 2 layers, D 64, 4 heads, learned positions, T 128, batch 16, "
    "150 steps; the op's forward time, 4 heads of 64.",
    arms={
        OURS: Trained(TRIAL, {"mixers": "flow"}),
        "flow attention, clip 1": Trained(TRIAL, {"mixers": {"name": "flow", "clip": 1.0}}),
        PLAIN: _instead(GatedFlow),
        "without competition": _instead(NoCompetition),
        "without allocation": _instead(NoAllocation),
        SOFTMAX: Trained(TRIAL, {"mixers": "softmax"}),
        SPEED: Timed(_op, LENGTHS, tokens=None),
    },
    rules=(
        at_most(Term(OURS, BITS), Term(PLAIN, BITS), plus=-0.04),
        at_most(Term(OURS, BITS), Term(SOFTMAX, BITS), plus=0.05),
        at_most(Term(SPEED, milliseconds_at(16_384)), Term(SPEED, milliseconds_at(4096)), times=5),
    ),
)
