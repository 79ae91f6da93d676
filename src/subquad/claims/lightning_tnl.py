"""05 TNL: a language model whose speed does not change with the length, and that reads beyond its training length.

Qin et al. 2024, sections 5.1 (speed), 5.2 (quality) and 5.3.
"""

from collections.abc import Callable
from typing import Any

from subquad.bench.constant_speed import Preparation, language_model_preparation
from subquad.bench.trials import TextTrial, Trial, bits_at
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import EXPONENT, Timed, Trained, replace_mixers, tokens_at
from subquad.claims.transnormerllm import SIZE, gated_softmax, transnormer_llm

TRIAL = TextTrial(fields=SIZE, steps=200, batch_size=8, learning_rate=4e-3, test_lengths=(256, 1024, 2048))
SPEED_LENGTHS = (512, 1024, 2048, 4096, 8192)
OURS, EXAMPLE, NO_DECAY, SOFTMAX = "TNL", "TNL, the authors' example", "no decay, LRPE", "softmax, RoPE"
SPEED, SPEED_OF_SOFTMAX = "TNL, D 256", "softmax, D 256"
EXAMPLE_FIELDS = {"mixers": "lightning", "feedforward": "sglu"}
SHORT, LONG = bits_at(256), bits_at(2048)


def _step(fields: dict[str, Any]) -> Callable[[int], Preparation]:
    wide: Trial = TextTrial(
        fields={**SIZE, "hidden_size": 256, "intermediate_size": 512}, steps=8, batch_size=1, learning_rate=1.0
    )
    return lambda seed: language_model_preparation(wide.build(fields, seed), seed)


CLAIM = Claim(
    number=5,
    slug="lightning_tnl",
    claim="TNL trains at the same tokens per second whatever the sequence length, is on par with softmax models of "
    "its size, and keeps its quality beyond the trained length.",
    measured="Bytes of the standard library's sources, 2 layers, D 64, 4 heads, T 256, batch 8, 200 steps, "
    "read in windows of 256 to 2048 bytes; forward and backward of 2 layers of D 256, 8192 tokens a step.",
    arms={
        OURS: Trained(TRIAL, transnormer_llm()),
        EXAMPLE: Trained(TRIAL, EXAMPLE_FIELDS),
        NO_DECAY: Trained(TRIAL, transnormer_llm("none")),
        SOFTMAX: Trained(TRIAL, {"mixers": "softmax"}, replace_mixers(gated_softmax)),
        SPEED: Timed(_step(transnormer_llm()), SPEED_LENGTHS, tokens=8192),
        SPEED_OF_SOFTMAX: Timed(_step({"mixers": "softmax"}), SPEED_LENGTHS, tokens=8192),
    },
    rules=(
        at_most(Term(OURS, SHORT), Term(SOFTMAX, SHORT), plus=0.12),
        at_most(Term(OURS, LONG), Term(OURS, SHORT), plus=0.02),
        at_most(Term(EXAMPLE, LONG), Term(EXAMPLE, SHORT), plus=0.02),
        at_least(Term(NO_DECAY, LONG), Term(NO_DECAY, SHORT), plus=0.15),
        at_least(Term(SOFTMAX, LONG), Term(SOFTMAX, SHORT), plus=0.15),
        at_least(Term(SPEED, tokens_at(8192)), Term(SPEED, tokens_at(512)), times=0.85),
        at_most(Term(SPEED, EXPONENT), plus=0.05),
        at_least(Term(SPEED, EXPONENT), plus=-0.05),
        at_most(Term(SPEED_OF_SOFTMAX, tokens_at(8192)), Term(SPEED_OF_SOFTMAX, tokens_at(512)), times=0.5),
    ),
    remark="TNL is the paper's: TransNormerLLM's blocks with this op. The authors' example (SiLU on v, a low-rank "
    "sigmoid gate, no LRPE) keeps its quality with the length too, but stands 0.08 to 0.15 bits behind softmax here.",
)
