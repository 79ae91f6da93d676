"""28 TransNormerLLM: decay against dilution, and distance to softmax (Qin et al. 2023, section 4)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from subquad.bench.trials import BITS, TextTrial
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import SMALL_MODEL, Trained, replace_mixers
from subquad.mixers import Mixer, MixerOutput
from subquad.mixers.contract import Request
from subquad.mixers.softmax import SoftmaxAttention

SIZE = {**SMALL_MODEL, "intermediate_size": 128}
TRIAL = TextTrial(fields=SIZE, steps=200, batch_size=8, learning_rate=4e-3)
OURS, NO_DECAY, NO_DECAY_LRPE = "TransNormerLLM", "no decay", "no decay, LRPE in every layer"
SOFTMAX, SWIGLU, RMS_NORM = "softmax", "SwiGLU for SGLU", "RMSNorm for SRMSNorm"


class GatedSoftmaxAttention(SoftmaxAttention):
    """Softmax attention with the output gate of the other arms, ``y = W_o (o * SiLU(W_u x))``."""

    def __init__(self, dim: int, num_heads: int, *, layer_index: int, num_layers: int) -> None:
        super().__init__(dim, num_heads, layer_index=layer_index, num_layers=num_layers)
        self.u_proj, self.gated_proj = nn.Linear(dim, dim, bias=False), self.o_proj
        self.o_proj = nn.Identity()

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        mixed = super().mix(x, context, request)
        return mixed._replace(output=self.gated_proj(mixed.output * F.silu(self.u_proj(x))))


def gated_softmax(mixer: Mixer) -> Mixer:
    """Gated softmax attention of another mixer's size and place, with rotary positions."""
    return GatedSoftmaxAttention(mixer.dim, mixer.num_heads, layer_index=mixer.layer_index, num_layers=mixer.num_layers)


def transnormer_llm(slopes: str = "alibi", *, lrpe_everywhere: bool = False, **fields: Any) -> dict[str, Any]:
    """The fields of TransNormerLLM's blocks; ``slopes`` is its decay."""
    mixer = {
        "name": "lightning",
        "gate": "linear",
        "norm": "simple_rms",
        "value_activation": "identity",
        "slopes": slopes,
    }
    first = {**mixer, "lrpe": True}
    mixers = {"first": first, "rest": first if lrpe_everywhere else mixer}
    return {"mixers": mixers, "feedforward": "sglu", "norm": "simple_rms", **fields}


CLAIM = Claim(
    number=28,
    slug="transnormerllm",
    claim="Exponential decay with LRPE in the first layer removes the dilution of linear attention, so that a model "
    "without any softmax stands beside softmax Transformers; a norm without parameters and gates without "
    "activation cost nothing.",
    measured="Bytes of the standard library's sources, 2 layers, D 64, 4 heads, feed-forward 128, T 256, "
    "batch 8, 200 steps; softmax has RoPE, SwiGLU and a SiLU gate, 123 thousand parameters as the others.",
    arms={
        OURS: Trained(TRIAL, transnormer_llm()),
        NO_DECAY: Trained(TRIAL, transnormer_llm("none")),
        NO_DECAY_LRPE: Trained(TRIAL, transnormer_llm("none", lrpe_everywhere=True)),
        SOFTMAX: Trained(TRIAL, {"mixers": "softmax"}, replace_mixers(gated_softmax)),
        SWIGLU: Trained(TRIAL, transnormer_llm(feedforward="swiglu")),
        RMS_NORM: Trained(TRIAL, transnormer_llm(norm="rms")),
    },
    rules=(
        at_most(Term(OURS, BITS), Term(NO_DECAY, BITS), plus=-0.15),
        at_most(Term(OURS, BITS), Term(NO_DECAY_LRPE, BITS), plus=-0.15),
        at_most(Term(OURS, BITS), Term(SOFTMAX, BITS), plus=0.12),
        at_most(Term(OURS, BITS), Term(SWIGLU, BITS), plus=0.05),
        at_least(Term(OURS, BITS), Term(SWIGLU, BITS), plus=-0.05),
        at_most(Term(OURS, BITS), Term(RMS_NORM, BITS), plus=0.05),
        at_least(Term(OURS, BITS), Term(RMS_NORM, BITS), plus=-0.05),
    ),
    remark="At this size it is level with softmax or slightly ahead, also at twice the learning rate; whether it is "
    "better, as the paper says, is not tested.",
)
