"""10 DeltaNet: erasing what is written under a key before writing again (Yang et al. 2024b; Schlag et al. 2021)."""

from dataclasses import replace

import torch
from torch import Tensor

from subquad import tasks
from subquad.bench.constant_speed import Preparation, Step
from subquad.bench.trials import Edit, TaskTrial
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import (
    SMALL_MODEL,
    Timed,
    Trained,
    milliseconds_at,
    op_forward,
    random_heads,
    replace_mixers,
)
from subquad.layers.norms import l2_normalize
from subquad.mixers.contract import Request
from subquad.mixers.delta_net import DeltaNet
from subquad.ops import delta_rule, linear_attention

TRIAL = TaskTrial(
    fields={**SMALL_MODEL, "num_attention_heads": 2},
    task=tasks.get("overwriting"),
    steps=300,
    batch_size=32,
    learning_rate=5e-3,
    test_batches=16,
)
SHALLOW = replace(TRIAL, fields={**TRIAL.fields, "num_hidden_layers": 1})
ACCURACY = "accuracy"
OURS, ADDITIVE, WEIGHTED, SPEED = "DeltaNet", "additive", "additive, learnt write strength", "the op"


class AdditiveLinearAttention(DeltaNet):
    """DeltaNet that only adds, ``S_t = S_{t-1} + k v^T``: the same block and keys, neither erasure nor strength."""

    def _update(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, lengths: Tensor | None, request: Request
    ) -> tuple[Tensor, Tensor]:
        return linear_attention(  # type: ignore[return-value]
            q,
            k,
            v,
            initial_state=None if request.state is None else request.state.state,
            return_state=request.use_state,
            cu_seqlens=request.cu_seqlens,
        )


class WeightedLinearAttention(AdditiveLinearAttention):
    """The same with DeltaNet's write strength, ``S_t = S_{t-1} + beta k v^T``."""

    def _update(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, lengths: Tensor | None, request: Request
    ) -> tuple[Tensor, Tensor]:
        return super()._update(x, q, k, v * beta[..., None].to(v.dtype), beta, lengths, request)


def _instead(kind: type[DeltaNet]) -> Edit:
    return replace_mixers(
        lambda mixer: kind(mixer.dim, mixer.num_heads, layer_index=mixer.layer_index, num_layers=mixer.num_layers)
    )


def _op(seed: int) -> Preparation:
    def prepare(batch: int, length: int) -> Step:
        q, k, v = random_heads(batch, length, 8, 64, seed)
        beta = torch.rand(batch, length, 8, generator=torch.Generator().manual_seed(seed + 1))
        unit = l2_normalize(k)
        return op_forward(lambda: delta_rule(q, unit, v, beta))

    return prepare


CLAIM = Claim(
    number=10,
    slug="deltanet",
    claim="The delta rule replaces what the state holds under a key, where additive linear attention only adds to it; "
    "its time grows linearly with the length.",
    measured="Overwriting: 8 keys, 16 values, 24 writes, then the newest value of every key is asked; 2 layers, D 64, "
    "2 heads, short convolutions, batch 32, 300 steps, one block for all; chance is 0.06.",
    arms={
        OURS: Trained(TRIAL, {"mixers": "delta_net"}),
        ADDITIVE: Trained(TRIAL, {"mixers": "delta_net"}, _instead(AdditiveLinearAttention)),
        WEIGHTED: Trained(TRIAL, {"mixers": "delta_net"}, _instead(WeightedLinearAttention)),
        f"{OURS}, one layer": Trained(SHALLOW, {"mixers": "delta_net"}),
        f"{ADDITIVE}, one layer": Trained(SHALLOW, {"mixers": "delta_net"}, _instead(AdditiveLinearAttention)),
        "GLA": Trained(TRIAL, {"mixers": {"name": "gla", "conv_size": 4}}),
        SPEED: Timed(_op, (512, 2048, 8192), tokens=None),
    },
    rules=(
        at_least(Term(OURS, ACCURACY), plus=0.95),
        at_most(Term(ADDITIVE, ACCURACY), plus=0.75),
        at_most(Term(SPEED, milliseconds_at(8192)), Term(SPEED, milliseconds_at(2048)), times=5.5),
    ),
    remark="Two additive layers, well initialised, come far, presumably by letting what they write grow with the "
    "position; one layer cannot. With more channels than keys GLA's channel gates can erase too.",
)
