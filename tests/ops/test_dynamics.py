"""Ops as linear systems: each is rebuilt from its own, and the lemmas that say when two of them are the same hold."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from subquad import ops
from subquad.ops.dynamics import RecurrentSystem, Watch, matrix_system
from tests.mixers.cases import CAUSAL, make, tokens

#: Mixers whose output is not linear in what they write, or that mix tokens by no op: they must say so.
NO_SYSTEMS = {
    "base_conv",  # a convolution alone
    *("echo_state", "elman", "gru", "jordan", "lstm"),  # gates or activations read the state
    *("neural_memory", "titans_mac", "titans_mag", "titans_mal"),  # learns from its own answers
    *("diag_attention", "flow", "mom"),  # built on calls with states, masks or packed pieces
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def systems_of(op, *arguments, **options):
    with Watch() as watch:
        op(*arguments, **options)
    return watch.systems


@pytest.mark.parametrize("name", CAUSAL)
def test_a_mixer_is_rebuilt_from_its_systems_or_says_that_it_has_none(name):
    mixer, x = make(name), tokens()
    if name in NO_SYSTEMS:
        with pytest.raises(ValueError, match=r"no linear system|by no op|on whole sequences"):
            mixer.dynamics(x)
        return
    found = mixer.dynamics(x)
    torch.testing.assert_close(found.output, mixer(x).output, rtol=1e-9, atol=1e-9)
    for system in found.systems:
        values = system.values.flatten(1, 2).transpose(1, 2)
        skip = getattr(system, "skip", None)
        expected = system.run().transpose(1, 2)
        torch.testing.assert_close(system.weights() @ values.double(), expected, rtol=1e-9, atol=1e-9)
        assert skip is None or system.values.shape[2] == 1


def test_weights_of_softmax_and_of_normalised_linear_attention_sum_to_one():
    q, k, v = draw(2, 12, 3, 4), draw(2, 12, 3, 4, seed=1), draw(2, 12, 3, 5, seed=2)
    (softmax,) = systems_of(ops.softmax_attention, q, k, v, window_size=5, num_sinks=1)
    (linear,) = systems_of(ops.linear_attention, q.exp(), k.exp(), v, normalize=True, eps=0.0)
    for system in (softmax, linear):
        torch.testing.assert_close(system.weights().sum(-1), torch.ones(2, 3, 12, dtype=torch.float64))
    assert softmax.state_size(1000) == 6 * 9
    assert linear.state_size(1000) == linear.state_size(1) == 4 * 5


def test_several_updates_per_token_unroll_in_their_order():
    k, v = F.normalize(draw(1, 6, 2, 3, 4), dim=-1), draw(1, 6, 2, 3, 5, seed=1)
    beta, q = torch.rand(1, 6, 2, 3, dtype=torch.float64), draw(1, 6, 3, 4, seed=2)
    (system,) = systems_of(ops.delta_product, q, k, v, beta)
    output = system.weights() @ v.flatten(1, 2).transpose(1, 2)
    torch.testing.assert_close(output.transpose(1, 2), ops.delta_product(q, k, v, beta)[0])
    (single,) = systems_of(ops.delta_rule, q, k[:, :, 0], v[:, :, 0], beta[:, :, 0])
    expected = ops.delta_attention_matrix(q, k[:, :, 0], beta[:, :, 0])
    torch.testing.assert_close(single.weights(), expected)


def test_a_divided_attention_with_the_sum_as_its_divisor_is_linear_attention():
    """Sieber et al. 2024, lemma 1: normalised attention holds linear attention."""
    q, k, v = draw(1, 9, 2, 4).exp(), draw(1, 9, 2, 4, seed=1).exp(), draw(1, 9, 2, 3, seed=2)
    total = torch.einsum("bthk,bthk->bth", q, k.cumsum(1))
    (divided,) = systems_of(ops.linear_attention, q / total[..., None], k, v)
    (linear,) = systems_of(ops.linear_attention, q, k, v, normalize=True, eps=0.0)
    torch.testing.assert_close(divided.weights(), linear.weights())


def test_a_scan_with_one_decay_per_head_is_scalar_decay_attention():
    """Sieber et al. 2024, lemma 2; without decay it is unnormalised linear attention."""
    u, B, C = draw(1, 9, 3), draw(1, 9, 4, seed=1), draw(1, 9, 4, seed=2)
    step = draw(1, 9, 1, seed=3).exp()
    for rate in (-0.7, 0.0):
        A = torch.full((3, 4), rate, dtype=torch.float64)
        (scan,) = systems_of(ops.selective_scan, u, step.expand(-1, -1, 3), A, B, C)
        k = (step * B)[:, :, None]
        if rate:
            (attention,) = systems_of(ops.simple_gla, C[:, :, None], k, u[:, :, None], rate * step, scale=1.0)
        else:
            (attention,) = systems_of(ops.linear_attention, C[:, :, None], k, u[:, :, None])
        torch.testing.assert_close(scan.weights(), attention.weights().expand(-1, 3, -1, -1))


def test_a_reversed_gate_with_a_tied_write_is_a_scan_with_one_state():
    """Sieber et al. 2024, lemmas 3 and 5: ``e^{-softplus(z) a} = sigmoid(-z)^a``."""
    z, u, b = draw(1, 9, 3), draw(1, 9, 3, seed=1), draw(1, 9, 3, seed=2)
    exponent = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    step = F.softplus(z)
    torch.testing.assert_close((-step * exponent).exp(), torch.sigmoid(-z) ** exponent)
    h, _ = ops.diagonal_scan(torch.sigmoid(-z) ** exponent, step * b * u)
    y, _ = ops.selective_scan(u, step, -exponent[:, None], b[..., None], torch.ones_like(b)[..., None])
    torch.testing.assert_close(h, y)


def test_taylor_features_of_rising_order_approach_softmax():
    q, k, v = F.normalize(draw(1, 9, 1, 3), dim=-1), F.normalize(draw(1, 9, 1, 3, seed=1), dim=-1), draw(1, 9, 1, 2)
    (softmax,) = systems_of(ops.softmax_attention, q, k, v, scale=1.0)
    errors = []
    for order in range(4):
        powers_q, powers_k = ([x.new_ones(*x.shape[:3], 1)] for x in (q, k))
        for m in range(1, order + 1):
            powers_q.append((powers_q[-1][..., None] * q[..., None, :]).flatten(-2) / m**0.5)
            powers_k.append((powers_k[-1][..., None] * k[..., None, :]).flatten(-2) / m**0.5)
        features = (torch.cat(powers_q, -1), torch.cat(powers_k, -1))
        (system,) = systems_of(ops.linear_attention, *features, v, normalize=True, eps=0.0)
        errors.append(float((system.weights() - softmax.weights()).abs().max()))
    assert all(later < 0.6 * earlier for earlier, later in pairwise(errors))


def test_another_scale_of_the_state_is_the_same_map():
    q, k, v = draw(2, 9, 2, 4), draw(2, 9, 2, 4, seed=1), draw(2, 9, 2, 3, seed=2)
    system = matrix_system("gla", q, k, v, scale=1.0, log_decay=-draw(2, 9, 2, 4, seed=3).abs())
    other = system.normal_form()
    assert isinstance(other, RecurrentSystem)
    torch.testing.assert_close(other.read.norm(dim=-1), torch.ones(2, 9, 2, dtype=torch.float64))
    torch.testing.assert_close(other.weights(), system.weights())
    assert float((other.write - system.write).abs().max()) > 0.1


def test_transitions_are_named_for_what_they_are():
    q, k, v, gate = draw(1, 5, 2, 4), F.normalize(draw(1, 5, 2, 4), dim=-1), draw(1, 5, 2, 3), -draw(1, 5, 2, 4).abs()
    beta = torch.rand(1, 5, 2, dtype=torch.float64)
    found = [
        systems_of(ops.linear_attention, q, k, v),
        systems_of(ops.lightning_attention, q, k, v, torch.tensor([0.1, 0.2])),
        systems_of(ops.gla, q, k, v, gate),
        systems_of(ops.delta_rule, q, k, v, beta),
        systems_of(ops.kda, q, k, v, gate, beta),
        systems_of(ops.softmax_attention, q, k, v),
    ]
    assert [system.transition for (system,) in found] == [
        "identity",
        "scalar",
        "diagonal",
        "identity and low rank",
        "diagonal and low rank",
        "keeps every token",
    ]


def test_what_is_no_whole_sequence_is_refused():
    q = draw(1, 5, 2, 4)
    with Watch(), pytest.raises(ValueError, match="whole sequences"):
        ops.linear_attention(q, q, q, return_state=True)
    with Watch(), pytest.raises(ValueError, match="decay over values"):
        ops.gla(q, q, q, value_log_decay=-q.abs())
    long = torch.zeros(1, 1025, 1, 1)
    with pytest.raises(ValueError, match="at most 1024"):
        systems_of(ops.linear_attention, long, long, long)[0].weights()
    with pytest.raises(ValueError, match="erases"):
        systems_of(ops.delta_rule, q, q, q, torch.ones(1, 5, 2))[0].normal_form()


def test_a_watch_ends_with_its_block():
    q = draw(1, 5, 2, 4)
    with Watch() as watch:
        ops.linear_attention(q, q, q)
    ops.linear_attention(q, q, q, return_state=True)
    assert len(watch.systems) == 1
