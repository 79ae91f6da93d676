"""Feature maps of linear attention: Hedgehog's forms, what they promise, and the mimicry of softmax."""

import math

import pytest
import torch

from subquad import SubquadConfig, SubquadForCausalLM, mixers
from subquad.layers.feature_attention import LAYERS, ExponentialHedgehog, Hedgehog, Performer, build_feature_map
from subquad.layers.feature_maps import FEATURE_MAPS
from subquad.layers.mimicry import measure_weights, mimicry_loss
from subquad.training import Batch, Mimicry
from tests.mixers.cases import make, tokens, wide_state

MAPS = sorted({*FEATURE_MAPS, *LAYERS} - {"identity", "silu", "elu"})  # those that are never negative
HEDGEHOGS = ["hedgehog_exp", "hedgehog_joint", "hedgehog_softmax"]
maps = pytest.mark.parametrize("name", MAPS)


def heads(time=20, batch=2, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, time, 4, width, generator=generator, dtype=torch.float64)


def built(name, width=6):
    """A map whose linear parts are not the identity any more."""
    torch.manual_seed(0)
    phi = build_feature_map(name, 4, width).double()
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return phi


def written_out(phi, q, k, v, causal):
    weights = phi.weights(q, k)
    weights = weights.tril() if causal else weights
    return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)


@maps
@pytest.mark.parametrize("causal", [True, False])
def test_every_map_attends_by_its_weights(name, causal):
    phi, (q, k, v) = built(name), heads()
    assert phi.non_negative
    assert bool((phi.weights(q, k) >= 0).all())
    if name == "t2r":  # ReLU may leave a query without any weight
        q, k = q.abs() + 0.5, k.abs() + 0.5
    if name in ("relu", "dpfp"):
        q, k = q + 3, k + 3
    # the ops' own eps, 1e-6 of a denominator of order one
    torch.testing.assert_close(
        phi.attend(q, k, v, causal=causal)[0], written_out(phi, q, k, v, causal), rtol=1e-4, atol=1e-4
    )
    ones, _ = phi.attend(q, k, torch.ones_like(v), causal=causal)
    torch.testing.assert_close(ones, torch.ones_like(v), rtol=1e-4, atol=1e-4)


@maps
def test_every_map_serves_the_mixer(name):
    """Splits, steps and padding, as the contract's tests ask of the default map."""
    mixer, x = make("linear", feature_map=name), tokens()
    whole = mixer(x, use_state=True)
    state = wide_state(mixer, 2)
    head = mixer(x[:, :9], state=state, use_state=True)
    outputs, state = [head.output], head.state
    for t in range(9, 23):
        step = mixer(x[:, t : t + 1], state=state, use_state=True)
        outputs.append(step.output)
        state = step.state
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output, rtol=1e-5, atol=1e-6)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, 4:9] = False
    padded = mixer(x, mask=mask).output
    torch.testing.assert_close(padded[1, mask[1]], mixer(x[1:, mask[1]]).output[0], rtol=1e-5, atol=1e-6)
    packed = mixer(x[:1], cu_seqlens=torch.tensor([0, 7, 7, 23])).output
    torch.testing.assert_close(packed[:, 7:], mixer(x[:1, 7:]).output, rtol=1e-5, atol=1e-6)


def test_the_last_causal_row_is_the_non_causal_one():
    phi, (q, k, v) = built("hedgehog_softmax"), heads()
    causal, full = (phi.attend(q, k, v, causal=causal)[0] for causal in (True, False))
    torch.testing.assert_close(causal[:, -1], full[:, -1])


def test_one_channel_is_a_hyperbolic_cosine():
    phi, (q, k, _) = ExponentialHedgehog(4, 1).double(), heads(width=1)
    weights = phi.query(q)[:, :, None] * phi.key(k)[:, None]
    torch.testing.assert_close(weights.sum(-1), 2 * torch.cosh(q[:, :, None] + k[:, None]).squeeze(-1))


def test_the_forms_are_different_maps():
    """Joint features are exponentials of twice y over one sum per token: on queries it cancels, on keys it does not."""
    q, k, v = heads()
    exponential, joint = ExponentialHedgehog(4, 6).double(), Hedgehog(4, 6, form="joint").double()
    with torch.no_grad():
        for linear in (exponential.q_map, exponential.k_map):
            linear.weight *= 2
    key = exponential.key(k)

    def read(query, key):
        weights = torch.einsum("bthf,bshf->bhts", query, key).tril()
        return torch.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdim=True), v)

    torch.testing.assert_close(read(joint.query(q), key), read(exponential.query(q), key))
    assert not torch.allclose(read(exponential.query(q), joint.key(k)), read(exponential.query(q), key), rtol=1e-2)
    outputs = [build_feature_map(name, 4, 6).double().attend(q, k, v)[0] for name in HEDGEHOGS]
    assert all(not torch.allclose(a, b, rtol=1e-2) for a, b in [outputs[:2], outputs[1:], outputs[::2]])
    with pytest.raises(ValueError, match="form of Hedgehog"):
        Hedgehog(4, 6, form="exp")


@pytest.mark.parametrize("name", HEDGEHOGS)
def test_larger_weights_are_spikier_and_none_are_even(name):
    x = torch.nn.functional.one_hot(torch.arange(60) % 6, 6).double().view(1, 60, 1, 6)
    phi, entropies = build_feature_map(name, 1, 6).double(), []
    for size in (0.0, 0.5, 1.0, 2.0, 4.0):
        with torch.no_grad():
            for linear in (phi.q_map, phi.k_map):
                linear.weight.copy_(size * torch.eye(6, dtype=torch.float64))
        entropies.append(float(measure_weights(phi, x, x, causal=False).entropy))
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] == pytest.approx(math.log(60), abs=1e-3)
    assert entropies[-1] < entropies[0] - 0.3  # the softmax form keeps the even half of its negative features
    with torch.no_grad():
        phi.k_map.weight.zero_()
    v = torch.randn(1, 60, 1, 3, dtype=torch.float64)
    mean = v.cumsum(1) / torch.arange(1, 61).view(1, 60, 1, 1)
    torch.testing.assert_close(phi.attend(x, x, v)[0], mean, rtol=1e-5, atol=1e-5)


def test_performer_estimates_softmax():
    torch.manual_seed(0)
    (q, k, v), estimates = heads(width=16) / 2, []
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    for _ in range(200):
        phi = Performer(4, 16).double()
        estimates.append(phi.weights(q, k).tril())
    weights = torch.stack([w / w.sum(-1, keepdim=True) for w in estimates]).mean(0)
    o = torch.einsum("bhts,bshv->bthv", weights, v)
    assert (o - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_a_shared_map_has_half_the_weights_and_no_decay():
    shared, own = Hedgehog(2, 4, shared=True), Hedgehog(2, 4)
    assert sum(p.numel() for p in own.parameters()) == 2 * sum(p.numel() for p in shared.parameters())
    assert all(p._no_weight_decay for p in own.parameters())


def test_hedgehog_is_linear_attention_with_its_map():
    mixer, x = make("hedgehog"), tokens()
    assert type(mixer) is mixers.mixer_class("linear")
    q, k, v = mixer.project(x, x)
    expected = mixer.o_proj(written_out(mixer.phi, q, k, v, True).flatten(-2))
    torch.testing.assert_close(mixer(x).output, expected, rtol=1e-5, atol=1e-6)


def test_bad_maps_get_a_sentence():
    with pytest.raises(ValueError, match="did you mean 'hedgehog_"):
        make("linear", feature_map="hedgehog")
    with pytest.raises(ValueError, match="must not be negative"):
        make("linear", feature_map="silu")
    with pytest.raises(ValueError, match="normalize=True"):
        make("linear", feature_map="hedgehog_exp", normalize=False)(tokens())
    with pytest.raises(ValueError, match="feature_dim"):
        make("linear", feature_dim=0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_loss_is_at_least_the_entropy_and_equals_it_at_the_same_weights(causal):
    q, k, _ = heads(40)
    phi = built("hedgehog_softmax")
    whole = mimicry_loss(phi, q, k, causal=causal)
    torch.testing.assert_close(mimicry_loss(phi, q, k, causal=causal, block_size=7), whole)
    softmax_entropy = measure_weights(phi, q, k, causal=causal, first_row=0).softmax_entropy
    assert bool((whole > softmax_entropy).all())

    class Same(type(phi)):
        def weights(self, q, k):
            return (torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5).exp()

    phi.__class__ = Same
    same = mimicry_loss(phi, q, k, causal=causal)
    torch.testing.assert_close(same, softmax_entropy, rtol=1e-3, atol=1e-3)  # a floor of 1e-6 under 40 weights a row


def test_the_loss_leaves_padding_out():
    q, k, _ = heads(20)
    phi, mask = built("hedgehog_softmax"), torch.ones(2, 20, dtype=torch.bool)
    mask[:, 12:] = False
    expected = mimicry_loss(phi, q[:, :12], k[:, :12])
    k[:, 12:] = 100
    torch.testing.assert_close(mimicry_loss(phi, q, k, mask=mask), expected)
    front = torch.cat([torch.ones_like(q[:, :3]), q[:, :12]], 1), torch.cat([torch.ones_like(k[:, :3]), k[:, :12]], 1)
    mask = torch.arange(15).expand(2, -1) >= 3
    torch.testing.assert_close(mimicry_loss(phi, *front, mask=mask), expected)


def test_measures_of_softmax_weights():
    q, k, _ = heads(40)

    class Softmax(Hedgehog):
        def weights(self, q, k):
            return (torch.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5).exp()

    measures = measure_weights(Softmax(4, 6), q, k)
    torch.testing.assert_close(measures.entropy, measures.softmax_entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measures.monotonicity, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(measures.divergence, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-3)
    plain = measure_weights(build_feature_map("elu+1", 4, 6), q, k)
    assert bool((plain.monotonicity < 0.95).all())
    assert bool((plain.divergence > 0.01).all())
    with pytest.raises(ValueError, match="no query is left"):
        measure_weights(Softmax(4, 6), q, k, first_row=40)


def test_mimicry_trains_the_maps_alone():
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 20,
        "positions": "none",
    }
    torch.manual_seed(0)
    teacher = SubquadForCausalLM(SubquadConfig(mixers="softmax", initializer_range=0.3, **fields)).eval()
    student = SubquadForCausalLM(SubquadConfig(mixers="hedgehog", **fields))
    student.load_state_dict(teacher.state_dict(), strict=False)
    ids = torch.randint(20, (4, 24), generator=torch.Generator().manual_seed(0))
    before = teacher(ids).logits
    objective, optimizer = Mimicry(teacher), torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss, _ = objective(student, Batch(ids, ids))
        optimizer.zero_grad()
        loss.backward()
        trained = {name for name, p in student.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in student.named_parameters() if ".phi." in name}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(teacher(ids).logits, before)
    with pytest.raises(ValueError, match="no softmax attention"):
        Mimicry(student)
    with pytest.raises(ValueError, match="must be LinearAttention"):
        objective(teacher, Batch(ids, ids))
    rotary = SubquadForCausalLM(SubquadConfig(mixers="softmax", **{**fields, "positions": "rope"}))
    with pytest.raises(ValueError, match="positions"):
        Mimicry(rotary)
