"""Flow attention as a mixer: written out, what it refuses, and that its queries belong together."""

import pytest
import torch

from subquad.mixers.contract import named_leaves
from subquad.mixers.flow import FlowAttention
from subquad.ops import flow_attention
from tests.mixers.cases import make, tokens


@pytest.mark.parametrize("feature_map", ["sigmoid", "relu"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_op_between_projections(feature_map, causal):
    mixer, x = make("flow", feature_map=feature_map, causal=causal, clip=2.0), tokens()
    assert isinstance(mixer, FlowAttention)
    q, k = (p(x).unflatten(-1, (4, 8)) for p in (mixer.q_proj, mixer.k_proj))
    q, k = (y.sigmoid() if feature_map == "sigmoid" else y.relu() + 1e-6 for y in (q, k))
    v = mixer.v_proj(x).unflatten(-1, (4, 8))
    o, _ = flow_attention(q, k, v, causal=causal, clip=2.0, backend="reference")
    torch.testing.assert_close(mixer(x).output, mixer.o_proj(o.flatten(-2)))


def test_queries_of_one_call_belong_together():
    """Sums run over queries too: leaving some out changes the others."""
    mixer, x, context = make("flow", causal=False), tokens(time=6), tokens(time=14, seed=1)
    output = mixer(x, context).output
    assert not torch.allclose(mixer(x[:, :3], context).output, output[:, :3])
    torch.testing.assert_close(mixer(x.flip(1), context).output, output.flip(1))


def test_what_it_does_not_serve():
    with pytest.raises(ValueError, match="does not serve causal cross-attention"):
        make("flow")(tokens(), tokens())
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        make("flow", feature_map="sigmoids")


def test_the_state_is_four_sums_a_number_a_count_and_a_matrix():
    state = make("flow")(tokens(), use_state=True).state
    sizes = {name: leaf[0].numel() for name, leaf in named_leaves(state)}
    sums = dict.fromkeys(("key_sum", "query_sum", "key_flow", "query_flow"), 4 * 8)
    assert sizes == {**sums, "competition": 4, "seen": 1, "state": 4 * 8 * 8}
