"""09 Based: what a linear attention recalls is set by its feature map (Arora et al. 2024, sections 3 and 5).

Every arm is one gated convolution and one mixer. The baselines have the same projections, or the window that Based
combines with it, alone.
"""

import torch
from torch import Tensor

from subquad import tasks
from subquad.bench.constant_speed import Preparation, Step, op_step
from subquad.bench.trials import TaskTrial
from subquad.claims.contract import Claim, Term, at_least, at_most
from subquad.claims.experiment import SMALL_MODEL, Timed, Trained, milliseconds_at
from subquad.models import SubquadConfig, SubquadForCausalLM
from subquad.models.cache import SubquadCache

TRIAL = TaskTrial(
    fields={**SMALL_MODEL, "num_attention_heads": 2, "feedforward": None, "initializer_range": 0.125},
    task=tasks.get("mqar", vocab_size=128, length=64, num_pairs=16),
    steps=300,
    batch_size=48,
    learning_rate=1e-2,  # with 3e-3, or a start from 0.06, no arm learns in these steps
    test_batches=8,
)
ACCURACY = "accuracy"
OURS, SMALL, PLAIN, WINDOW = "Taylor, d 16", "Taylor, d 4", "elu + 1, d 16", "window of 16"
STEP, STEP_OF_SOFTMAX = "a step of Based", "a step of softmax"
CONTEXTS = (128, 8192)
STEPS_TIMED = 32


def _beside_convolution(mixer: dict[str, object]) -> Trained:
    return Trained(TRIAL, {"mixers": ["base_conv", mixer]})


def _decoding(mixers: list[dict[str, object] | str]) -> Timed:
    """Milliseconds for 32 tokens after a context, whose state is made once."""

    def prepare_seed(seed: int) -> Preparation:
        torch.manual_seed(seed)
        fields = {**SMALL_MODEL, "hidden_size": 256, "num_hidden_layers": len(mixers)}
        model = SubquadForCausalLM(SubquadConfig(mixers=mixers, vocab_size=256, **fields)).eval()

        def prepare(batch: int, length: int) -> Step:
            tokens = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                start = [layer.state for layer in model(tokens, use_cache=True, logits_to_keep=1).cache.states]

            def decode() -> Tensor:
                cache = SubquadCache(len(mixers))
                for layer, state in zip(cache.states, start):
                    layer.store(state, length)
                for _ in range(STEPS_TIMED):
                    output = model(tokens[:, :1], cache=cache, use_cache=True)
                return output.logits

            return op_step(decode, [], backward=False)

        return prepare

    return Timed(prepare_seed, CONTEXTS, tokens=None)


BASED = ["base_conv", "taylor_linear", {"name": "sliding_window", "window_size": 65}, "base_conv"]
CLAIM = Claim(
    number=9,
    slug="based",
    claim="Linear attention on the Taylor features of softmax recalls as attention does, the more the larger its "
    "features; linear attention on other features or a small window alone does not. A token costs the same anywhere.",
    measured="Associative recall (128 tokens, T 64, 16 pairs), a gated convolution and one mixer, D 64, 2 heads, batch "
    "48, 300 steps; 32 tokens of decoding after 128 and 8,192, 4 layers, D 256; chance is 0.02.",
    arms={
        OURS: _beside_convolution({"name": "taylor_linear", "feature_dim": 16}),
        SMALL: _beside_convolution({"name": "taylor_linear", "feature_dim": 4}),
        PLAIN: _beside_convolution({"name": "linear", "feature_map": "elu+1", "feature_dim": 16}),
        WINDOW: _beside_convolution({"name": "sliding_window", "window_size": 16}),
        STEP: _decoding(BASED),
        STEP_OF_SOFTMAX: _decoding(["softmax"] * 4),
    },
    rules=(
        at_least(Term(OURS, ACCURACY), plus=0.95),
        at_most(Term(SMALL, ACCURACY), Term(OURS, ACCURACY)),
        at_least(Term(SMALL, ACCURACY), Term(PLAIN, ACCURACY)),
        at_most(Term(PLAIN, ACCURACY), plus=0.5),
        at_most(Term(WINDOW, ACCURACY), plus=0.1),
        at_most(Term(STEP, milliseconds_at(8192)), Term(STEP, milliseconds_at(128)), times=1.3),
        at_least(Term(STEP_OF_SOFTMAX, milliseconds_at(8192)), Term(STEP_OF_SOFTMAX, milliseconds_at(128)), times=1.3),
    ),
)
