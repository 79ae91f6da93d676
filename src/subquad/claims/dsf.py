"""12 DSF: attention divided by a function of the token recalls what linear attention does not (Sieber et al. 2024).

Both arms keep the same state and have the same convolution before them; the baseline divides by the sum of its weights.
"""

from dataclasses import replace

from subquad.claims.based import TRIAL as RECALL
from subquad.claims.contract import Claim, Term, at_least
from subquad.claims.experiment import Trained

TRIAL = replace(RECALL, fields={**RECALL.fields, "num_attention_heads": 1})
ACCURACY = "accuracy"
OURS, BASELINE = "normalised attention", "linear attention, elu + 1"


def _beside_convolution(mixer: dict[str, object]) -> Trained:
    return Trained(TRIAL, {"mixers": ["base_conv", mixer]})


CLAIM = Claim(
    number=12,
    slug="dsf",
    claim="Attention whose weights are divided by an exponential of the token recalls far better than linear attention "
    "with a state of the same size.",
    measured="Associative recall (128 tokens, T 64, 16 pairs), a gated convolution and one mixer, D 64, one head of 32 "
    "for queries and keys, batch 48, 300 steps; chance is 0.02.",
    arms={
        OURS: _beside_convolution({"name": "normalized_attention", "head_dim": 32}),
        BASELINE: _beside_convolution({"name": "linear", "feature_map": "elu+1", "feature_dim": 32}),
    },
    rules=(
        at_least(Term(OURS, ACCURACY), plus=0.9),
        at_least(Term(OURS, ACCURACY), Term(BASELINE, ACCURACY), plus=0.4),
    ),
    remark="The recipe is that of claim 09 (peak learning rate 1e-2, first weights of deviation 0.125), not swept "
    "for these arms. The paper's other improvement, the reversed gate of the quasi-LSTM, is built and not measured.",
)
