"""What the ops mean: special cases that are one another, and facts of the methods that can be checked exactly."""

import pytest
import torch
import torch.nn.functional as F

from subquad import ops
from tests.ops.cases import CASES, Shape

SHAPE = Shape(time=50, key=6, value=4)


def draw(name, strength=0.5, seed=0, shape=SHAPE):
    return CASES[name].arguments(shape, strength, seed)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_decay_is_linear_attention():
    q, k, v, slope = draw("lightning_attention")
    close(ops.lightning_attention(q, k, v, 0 * slope)[0], ops.linear_attention(q, k, v)[0])
    gate = torch.zeros_like(q)
    close(ops.gla(q, k, v, gate, scale=1.0)[0], ops.linear_attention(q, k, v)[0])


def test_lightning_equals_the_sum_over_pairs():
    from subquad.ops.lightning.reference import lightning_attention_quadratic

    q, k, v, slope = draw("lightning_attention")
    close(ops.lightning_attention(q, k, v, slope)[0], lightning_attention_quadratic(q, k, v, slope=slope, scale=1.0))


def test_total_forgetting_keeps_only_the_token_itself():
    q, k, v, _ = draw("lightning_attention")
    output, _ = ops.lightning_attention(q, k, v, torch.full((3,), 1e4, dtype=torch.float64))
    close(output, (q * k).sum(-1, keepdim=True) * v)


def test_a_gate_per_head_is_a_gate_per_channel_all_equal():
    q, k, v, gate = draw("simple_gla")
    close(ops.simple_gla(q, k, v, gate)[0], ops.gla(q, k, v, gate[..., None].expand_as(q))[0])


def test_a_constant_gate_is_lightning():
    q, k, v, slope = draw("lightning_attention")
    gate = -slope.expand(*q.shape[:3])
    close(ops.simple_gla(q, k, v, gate, scale=1.0)[0], ops.lightning_attention(q, k, v, slope)[0])


def test_gla_does_not_see_a_scaling_of_channels():
    q, k, v, gate = draw("gla")
    scale = torch.linspace(-2, 2, q.shape[-1], dtype=q.dtype).exp()
    close(ops.gla(q * scale, k / scale, v, gate)[0], ops.gla(q, k, v, gate)[0])


def test_equal_decay_over_values_is_equal_decay_over_keys():
    q, k, v, gate = draw("simple_gla")
    over_values = ops.gla(q, k, v, value_log_decay=gate[..., None].expand_as(v))[0]
    close(over_values, ops.simple_gla(q, k, v, gate)[0])


def test_decay_over_keys_and_values_equals_the_loop():
    q, k, v, gate = draw("gla", strength=3.0)
    value_gate = draw("gla", strength=40.0, seed=1, shape=Shape(time=50, key=4, value=4))[3]
    for options in ({"chunk_size": 16}, {"chunk_size": 64}):
        args = {"value_log_decay": value_gate, "return_state": True}
        expected = ops.gla(q, k, v, gate, backend="reference", **args)
        actual = ops.gla(q, k, v, gate, backend="chunked", **args, **options)
        close(actual, expected)


def test_delta_rule_without_decay_or_with_equal_channels():
    q, k, v, gate, beta = draw("gated_delta_rule")
    close(ops.gated_delta_rule(q, k, v, 0 * gate, beta)[0], ops.delta_rule(q, k, v, beta)[0])
    close(ops.kda(q, k, v, gate[..., None].expand_as(k), beta)[0], ops.gated_delta_rule(q, k, v, gate, beta)[0])


def test_one_update_per_token_is_the_delta_rule_and_a_silent_second_changes_nothing():
    q, k, v, beta = draw("delta_rule")
    single, _ = ops.delta_product(q, k[:, :, None], v[:, :, None], beta[:, :, None])
    close(single, ops.delta_rule(q, k, v, beta)[0])
    two = [torch.stack([x, x.flip(1)], dim=2) for x in (k, v)]
    beta_two = torch.stack([beta, 0 * beta], dim=2)
    close(ops.delta_product(q, *two, beta_two)[0], single)


def test_updates_of_a_product_are_steps_of_the_delta_rule():
    q, k, v, beta, gate = draw("delta_product")
    steps = [x.flatten(1, 2) for x in (k, v, beta)]
    silent = torch.stack([gate, 0 * gate], dim=2).flatten(1, 2)
    wide_q = torch.stack([0 * q, q], dim=2).flatten(1, 2)
    slow, last = ops.gated_delta_rule(wide_q, steps[0], steps[1], silent, steps[2], return_state=True)
    fast, fast_last = ops.delta_product(q, k, v, beta, gate, return_state=True)
    close(fast, slow[:, 1::2])
    close(fast_last, last)


def test_writing_with_full_strength_stores_exactly():
    q, k, v, beta = draw("delta_rule")
    _, state = ops.delta_rule(q, k, v, torch.ones_like(beta), return_state=True)
    close(torch.einsum("bhkv,bhk->bhv", state, k[:, -1]), v[:, -1])


def test_orthonormal_keys_need_no_erasure():
    q, _, v, beta = draw("delta_rule", shape=Shape(time=6, key=6, value=4))
    k = torch.eye(6, dtype=torch.float64)[None, :, None].expand(2, 6, 3, 6)
    close(ops.delta_rule(q, k, v, torch.ones_like(beta), scale=1.0)[0], ops.linear_attention(q, k, v)[0])


def test_a_second_write_replaces_the_first_where_linear_attention_adds():
    k = F.normalize(torch.ones(1, 2, 1, 4), dim=-1).double()
    v = torch.tensor([1.0, 5.0]).view(1, 2, 1, 1).double()
    ones = torch.ones(1, 2, 1).double()
    assert ops.delta_rule(k, k, v, ones, scale=1.0)[0][0, 1].item() == pytest.approx(5.0)
    assert ops.linear_attention(k, k, v)[0][0, 1].item() == pytest.approx(6.0)


def test_attention_matrix_reproduces_the_output_and_forgets_overwritten_tokens():
    q, k, v, beta = draw("delta_rule")
    matrix = ops.delta_attention_matrix(q, k, beta)
    close(torch.einsum("bhij,bjhv->bihv", matrix, v), ops.delta_rule(q, k, v, beta)[0])
    same = k[:, :1].expand_as(k)
    matrix = ops.delta_attention_matrix(same, same, torch.ones_like(beta))
    close(matrix, (matrix * torch.eye(matrix.shape[-1], dtype=matrix.dtype)))


def test_the_state_never_grows_without_input():
    q, k, v, beta = draw("delta_rule")
    start = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    size = float(start.norm())
    for length in (1, 7, 50):
        _, state = ops.delta_rule(
            q[:, :length], k[:, :length], 0 * v[:, :length], beta[:, :length], initial_state=start, return_state=True
        )
        assert float(state.norm()) <= size + 1e-9
        size = float(state.norm())


def test_beta_two_counts_parity_for_ten_thousand_steps():
    bits = torch.randint(0, 2, (10_000,), generator=torch.Generator().manual_seed(0))
    k = torch.tensor([1.0, 0.0]).expand(1, 10_000, 1, 2)
    beta = 2.0 * bits.view(1, -1, 1).float()
    start = torch.tensor([[1.0], [0.0]]).view(1, 1, 2, 1)
    output, _ = ops.delta_rule(k, k, torch.zeros(1, 10_000, 1, 1), beta, scale=1.0, initial_state=start)
    assert torch.equal(output.flatten(), (1 - 2 * (bits.cumsum(0) % 2)).float())


def test_two_reflections_per_token_count_modulo_three():
    angle = torch.tensor(torch.pi / 3)
    mirrors = torch.stack([torch.tensor([1.0, 0.0]), torch.stack([angle.cos(), angle.sin()])])
    steps = torch.randint(0, 2, (1000,), generator=torch.Generator().manual_seed(1))
    k = mirrors.view(1, 1, 2, 1, 2).expand(1, 1000, 2, 1, 2)
    beta = 2.0 * steps.view(1, -1, 1, 1).float().expand(1, 1000, 2, 1)
    start = torch.eye(2).view(1, 1, 2, 2)
    q = torch.tensor([1.0, 0.0]).expand(1, 1000, 1, 2)
    output, _ = ops.delta_product(q, k, torch.zeros(1, 1000, 2, 1, 2), beta, scale=1.0, initial_state=start)
    turned = steps.cumsum(0) % 3
    turn = 2 * torch.pi / 3 * turned  # a mirror, then one at 60 degrees to it: a rotation by 120 degrees
    expected = torch.stack([turn.cos(), -turn.sin()], dim=-1)
    assert (output[0, :, 0] - expected).abs().max() < 1e-3


def test_slopes():
    assert ops.lightning_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = ops.lightning_slopes(12)
    assert twelve[:8].tolist() == ops.lightning_slopes(8).tolist()
    torch.testing.assert_close(twelve[8:], 2.0 ** -torch.tensor([0.5, 1.5, 2.5, 3.5]))
    last, first = ops.lightning_slopes(8, 23, 24), ops.lightning_slopes(8, 0, 24)
    torch.testing.assert_close(last, 1e-5 * ops.lightning_slopes(8))
    torch.testing.assert_close(first, (1 + 1e-5) * ops.lightning_slopes(8))


def test_linear_attention_forms():
    q, k, v = draw("linear_attention")
    _, last = ops.linear_attention(q, k, v, return_state=True)
    full, state = ops.linear_attention(q, k, v, causal=False, return_state=True)
    close(state, last)
    close(full, torch.einsum("bthk,bhkv->bthv", q, last))
    cross, _ = ops.linear_attention(q, k[:, :20], v[:, :20], causal=False)
    close(cross, ops.linear_attention(q, k[:, :20], v[:, :20], causal=False, backend="reference")[0])


@pytest.mark.parametrize("causal", [True, False])
def test_normalised_weights_sum_to_one(causal):
    q, k, v = (x.abs() + 0.1 for x in draw("linear_attention"))
    output, _ = ops.linear_attention(q, k, torch.ones_like(v), causal=causal, normalize=True, eps=0.0)
    close(output, torch.ones_like(v))


def test_normalised_split_equals_whole():
    q, k, v = (x.abs() for x in draw("linear_attention"))
    whole, last = ops.linear_attention(q, k, v, normalize=True, return_state=True)
    head, state = ops.linear_attention(q[:, :17], k[:, :17], v[:, :17], normalize=True, return_state=True)
    tail, end = ops.linear_attention(
        q[:, 17:], k[:, 17:], v[:, 17:], normalize=True, initial_state=state, return_state=True
    )
    close(torch.cat([head, tail], 1), whole)
    close(end.state, last.state)
    close(end.normalizer, last.normalizer)


def test_full_packed_equals_separate():
    q, k, v = (x[:1].abs() for x in draw("linear_attention"))
    cu_seqlens = torch.tensor([0, 3, 3, 30, 50])
    for normalize in (False, True):
        packed, _ = ops.linear_attention(q, k, v, causal=False, normalize=normalize, cu_seqlens=cu_seqlens)
        for a, b in ((0, 3), (3, 30), (30, 50)):
            one, _ = ops.linear_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=False, normalize=normalize)
            close(packed[:, a:b], one)


def test_a_hundred_thousand_slow_steps_do_not_drift():
    length = 100_000
    ones = torch.ones(1, length, 1, 1)
    _, state = ops.gla(ones, ones, ones, torch.full_like(ones, -1e-4), return_state=True)
    decay = torch.tensor(-1e-4, dtype=torch.float64)
    expected = -torch.expm1(length * decay) / -torch.expm1(decay)
    assert abs(state.item() / expected.item() - 1) < 1e-4
