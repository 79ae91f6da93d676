"""What is particular to one mixer: presets of the papers, options, and facts that its method promises."""

import pytest
import torch

from subquad import mixers
from subquad.layers.norms import SimpleRMSNorm
from subquad.positions.lrpe import LRPE
from subquad.positions.rope import apply_rope
from tests.mixers.cases import make, tokens


def test_negative_eigenvalues_double_beta_and_change_nothing_else():
    narrow, wide = make("delta_net", eigenvalues=(0, 1)), make("delta_net", eigenvalues=(-1, 1))
    wide.load_state_dict(narrow.state_dict())
    assert (narrow.largest_beta, wide.largest_beta) == (1.0, 2.0)
    assert not torch.equal(narrow(tokens()).output, wide(tokens()).output)
    with pytest.raises(ValueError, match="eigenvalues"):
        make("delta_net", eigenvalues=(-1, 0))


def test_one_householder_is_delta_net():
    plain = make("delta_net", eigenvalues=(-1, 1))
    product = make("delta_product", num_householder=1, gated=False)
    weights = plain.state_dict()
    assert set(weights) == set(product.state_dict())
    product.load_state_dict(weights)
    torch.testing.assert_close(product(tokens()).output, plain(tokens()).output)


def test_gated_delta_net_without_decay_is_delta_net():
    gated = make("gated_delta_net", expand_k=1.0, expand_v=1.0, output_gate=False)
    plain = make("delta_net", eigenvalues=(0, 1))
    gated.load_state_dict(plain.state_dict(), strict=False)
    gated.gate.A_log.data.fill_(-torch.inf)
    torch.testing.assert_close(gated(tokens()).output, plain(tokens()).output)


def test_the_rule_of_2021_has_features_that_sum_to_one():
    mixer = make("delta_net", qk_activation="elu+1", qk_norm="sum", eigenvalues=(0, 1))
    k = mixer.normalize(mixer.activation(torch.randn(5, 8, dtype=torch.float64)))
    torch.testing.assert_close(k.sum(-1), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="relu or"):
        make("delta_net", qk_norm="sum")


def test_lightning_equals_the_quadratic_layer_written_out():
    mixer, x = make("lightning", lrpe=False), tokens()
    q, k, v = (torch.nn.functional.silu(p(x)).unflatten(-1, (4, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    step = torch.arange(23)
    decay = torch.exp(-mixer.slope[:, None, None] * (step[:, None] - step)).tril()
    o = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v).flatten(-2)
    expected = mixer.o_proj(mixer.o_norm(o) * mixer.gate_proj(x))
    torch.testing.assert_close(mixer(x).output, expected)


def test_slopes_are_kept_with_the_weights():
    deep = mixers.build("lightning", 32, num_heads=4, layer_index=1, num_layers=3)
    moved = mixers.build("lightning", 32, num_heads=4)
    moved.load_state_dict(deep.state_dict())
    assert torch.equal(moved.slope, deep.slope)
    with pytest.raises(ValueError, match="one per head"):
        mixers.build("lightning", 32, num_heads=4, slopes=[0.1])
    with pytest.raises(ValueError, match="did you mean"):
        mixers.build("lightning", 32, num_heads=4, slopes="alibis")


def test_lrpe_scores_depend_on_distance_only():
    lrpe = LRPE(2, 4).double()
    lrpe.theta.data.copy_(torch.linspace(0.1, 2, 8).view(2, 4))
    q, k = torch.randn(2, 1, 5, 2, 4, dtype=torch.float64)
    places = torch.arange(5)[None]
    score = torch.einsum("bihk,bjhk->bhij", lrpe(q, places), lrpe(k, places))
    shifted = torch.einsum("bihk,bjhk->bhij", lrpe(q, places + 100), lrpe(k, places + 100))
    torch.testing.assert_close(shifted, score)
    lrpe.theta.data.zero_()
    torch.testing.assert_close(lrpe(q, places)[..., :4], q)
    assert torch.autograd.gradcheck(lambda t: torch.func.functional_call(lrpe, {"theta": t}, (q, places)), lrpe.theta)


def test_rope_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 5, 2, 6, dtype=torch.float64)
    places = torch.arange(5)[None]
    scores = [torch.einsum("bihk,bjhk->bhij", apply_rope(q, p), apply_rope(k, p)) for p in (places, places + 77)]
    torch.testing.assert_close(scores[0], scores[1])
    with pytest.raises(ValueError, match="even"):
        apply_rope(q[..., :5], places)


def test_simple_rms_norm():
    norm, x = SimpleRMSNorm(eps=0.0), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (8,), eps=0.0))
    torch.testing.assert_close(norm(7 * x), norm(x))
    (gradient,) = torch.autograd.grad((norm(x) * torch.randn_like(x)).sum(), x)
    torch.testing.assert_close((gradient * x).sum(-1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.isfinite(SimpleRMSNorm()(torch.zeros(2, 4))).all()


def test_norm_attention_does_not_see_the_size_of_its_features():
    mixer, x = make("norm_attention", bias=False), tokens()
    expected = mixer(x).output
    mixer.v_proj.weight.data *= 7
    torch.testing.assert_close(mixer(x).output, expected, rtol=1e-4, atol=1e-4)  # up to the norm's eps


def test_block_attention_never_crosses_a_border():
    mixer, x = make("diag_attention", block_size=6), tokens()
    changed = x.clone()
    changed[:, 7] += 1
    difference = (mixer(changed).output - mixer(x).output).abs().sum(-1)[0]
    assert bool((difference[:7] == 0).all())
    assert bool((difference[7:12] > 0).all())
    assert bool((difference[12:] == 0).all())


@pytest.mark.parametrize("weights", ["softmax", "relu"])
def test_one_block_over_all_tokens_is_full_attention(weights):
    mixer, x = make("diag_attention", block_size=64, weights=weights), tokens()
    q, k, v = (p(x).unflatten(-1, (4, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * 8**-0.5
    hidden = torch.ones(23, 23, dtype=torch.bool).triu(1)
    p = (
        scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if weights == "softmax"
        else scores.relu().masked_fill(hidden, 0)
    )
    o = torch.einsum("bhij,bjhv->bihv", p, v).flatten(-2)
    torch.testing.assert_close(mixer(x).output, mixer.o_proj(mixer.o_norm(o)))


def test_retention_and_gla_with_one_constant_gate_agree():
    """Retention is gated linear attention whose gate is a constant per head."""
    from subquad.ops import gla, lightning_attention, retention_slopes

    q, k, v = torch.randn(3, 1, 30, 4, 8, dtype=torch.float64)
    slope = retention_slopes(4).double()
    gate = -slope[:, None].expand(1, 30, 4, 8)
    retention, _ = lightning_attention(q, k, v, slope, scale=8**-0.5)
    torch.testing.assert_close(gla(q, k, v, gate)[0], retention)


def test_grouped_heads_share_keys():
    mixer = make("softmax", num_key_value_heads=1)
    assert mixer.k_proj.out_features == 8
    with pytest.raises(ValueError, match="divide num_heads"):
        make("softmax", num_key_value_heads=3)


@pytest.mark.parametrize("name", ["delta_net", "softmax", "gla"])
def test_a_layer_learns_to_recall_what_it_was_told(name):
    """Each of four keys is written once with a random value, then asked: 200 steps of Adam solve it."""
    torch.manual_seed(0)
    mixer = mixers.build(name, 32, num_heads=2)
    embed, read = torch.nn.Embedding(12, 32), torch.nn.Linear(32, 8)
    parameters = [*mixer.parameters(), *embed.parameters(), *read.parameters()]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(200):
        values = torch.randint(0, 8, (32, 4))
        keys = torch.stack([torch.randperm(4) for _ in range(32)])
        asked = torch.randint(0, 4, (32, 1))
        told = embed(8 + keys) + embed(values)
        x = torch.cat([told, embed(8 + asked)], dim=1)
        logits = read(x + mixer(x).output)[:, -1]
        answer = values.gather(1, (keys == asked).int().argmax(1, keepdim=True)).flatten()
        loss = torch.nn.functional.cross_entropy(logits, answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == answer).float().mean() > 0.8
