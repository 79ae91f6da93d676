"""Injective linear attention: pair by pair, by covariance, in parts, packed; and the convolution beside it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from subquad import ops
from subquad.ops.injective.reference import injective_weights
from tests.mixers.cases import tokens

Q, K, V = (2, 9, 3, 4), (2, 14, 3, 4), (2, 14, 3, 5)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(dtype=torch.float64):
    return draw(*Q, dtype=dtype), draw(*K, seed=1, dtype=dtype), draw(*V, seed=2, dtype=dtype)


def attend(*args, **options):
    return ops.injective_linear_attention(*args, **options)[0]


def loss(*args, **options):
    leaves = [x.detach().requires_grad_() for x in args]
    output, state = ops.injective_linear_attention(*leaves, return_state=True, **options)
    (output.cos().sum() + sum(x.sin().sum() for x in state)).backward()
    return [output.detach(), *(x.detach() for x in state), *(x.grad for x in leaves)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_covariance_equals_the_pairs_forward_and_backward(scale, padded, backend):
    mask = torch.arange(14) < torch.tensor([[14], [6]]) if padded else None
    for a, b in zip(
        loss(*operands(), scale=scale, mask=mask, backend="chunked" if backend == "auto" else backend),
        loss(*operands(), scale=scale, mask=mask, backend="reference"),
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    single = attend(*operands(torch.float32), scale=scale, mask=mask, backend=backend)
    exact = attend(*operands(), scale=scale, mask=mask, backend="reference")
    assert (single.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_gradients_of_second_order():
    arguments = [x.requires_grad_() for x in (draw(1, 3, 2, 2), draw(1, 4, 2, 2, seed=1), draw(1, 4, 2, 2, seed=2))]
    assert torch.autograd.gradcheck(attend, arguments)
    assert torch.autograd.gradgradcheck(attend, arguments)


def test_weights_sum_to_one_and_may_be_negative():
    q, k, _ = operands()
    weights = injective_weights(q, k, scale=1.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert bool((weights < 0).any())


def test_what_shifts_and_constants_do():
    q, k, v = operands()
    o, shift = attend(q, k, v), draw(1, 1, 3, 5, seed=5)
    torch.testing.assert_close(attend(q, k + 7 * draw(1, 1, 3, 4, seed=4), v), o)
    torch.testing.assert_close(attend(q, k, v + shift), o + shift)
    torch.testing.assert_close(attend(q, k, shift.expand_as(v)), shift.expand_as(o))
    torch.testing.assert_close(attend(torch.zeros_like(q), k, v), v.mean(1, keepdim=True).expand_as(o))


def test_centring_does_not_cancel():
    """Keys far from zero: products of the raw ones would lose four of float32's seven digits."""
    q, k, v = (x.float() for x in operands())
    far = attend(q, k + 1e3, v)
    exact = attend(q.double(), (k + 1e3).double(), v.double(), backend="reference")
    assert (far.double() - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_queries_on_a_ray_are_told_apart_and_a_pair_collides_with_few_keys():
    q, k = draw(1, 1, 1, 4).abs(), draw(1, 30, 1, 4, seed=1).abs()
    linear = [torch.einsum("bihk,bjhk->bhij", x, k) for x in (q, 2 * q)]
    once, twice = (x / x.sum(-1, keepdim=True) for x in linear)
    assert torch.equal(once, twice)
    assert not torch.allclose(*(injective_weights(x, k, scale=1.0) for x in (q, 2 * q)), rtol=0, atol=1e-3)
    assert torch.linalg.matrix_rank((k - k.mean(1))[0, :, 0]) == 4
    few = k[:, :4]  # centred, four keys span three dimensions
    unseen = torch.linalg.svd((few - few.mean(1))[0, :, 0])[2][-1]
    torch.testing.assert_close(*(injective_weights(x, few, scale=1.0) for x in (q, q + unseen)))


def test_parts_of_the_keys_merge_to_the_whole():
    q, k, v = operands()
    whole, state = ops.injective_linear_attention(q, k, v, return_state=True)
    parts = [ops.injective_state(k[:, a:b], v[:, a:b]) for a, b in ((0, 1), (1, 6), (6, 14))]
    merged = ops.combine_injective(ops.combine_injective(parts[0], parts[1]), parts[2])
    for a, b in zip(merged, state):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ops.injective_read(q, merged), whole)
    for backend in ("reference", "chunked"):
        rest = attend(q, k[:, 6:], v[:, 6:], initial_state=ops.combine_injective(*parts[:2]), backend=backend)
        torch.testing.assert_close(rest, whole)
    empty = type(state)(*(torch.zeros_like(x) for x in state))
    for a, b in zip(ops.combine_injective(empty, state), state):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_packed_equals_separate(backend):
    q, k, v = draw(1, 12, 2, 4), draw(1, 15, 2, 4, seed=1), draw(1, 15, 2, 3, seed=2)
    ends, ends_k = [0, 1, 1, 6, 12], [0, 4, 5, 11, 15]
    packed, state = ops.injective_linear_attention(
        q,
        k,
        v,
        cu_seqlens=torch.tensor(ends),
        cu_seqlens_k=torch.tensor(ends_k, dtype=torch.int32),
        return_state=True,
        backend=backend,
    )
    for n, ((a, b), (c, d)) in enumerate(zip(pairwise(ends), pairwise(ends_k))):
        one = ops.injective_state(k[:, c:d], v[:, c:d])
        for packed_leaf, leaf in zip(state, one):
            torch.testing.assert_close(packed_leaf[n], leaf[0])
        if b > a:
            torch.testing.assert_close(packed[:, a:b], attend(q[:, a:b], k[:, c:d], v[:, c:d]))
            read = ops.injective_read(q, state, cu_seqlens=torch.tensor(ends))
            torch.testing.assert_close(read[:, a:b], packed[:, a:b])
    own = attend(k, k, v, cu_seqlens=torch.tensor(ends_k), backend=backend)
    torch.testing.assert_close(own[:, 5:11], attend(k[:, 5:11], k[:, 5:11], v[:, 5:11]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(dtype):
    half = operands(dtype)
    o, state = ops.injective_linear_attention(*half, return_state=True)
    assert o.dtype == dtype
    assert {x.dtype for x in state} == {torch.float32}
    exact = attend(*(x.double() for x in half))
    assert (o.double() - exact).abs().max() <= 2**-8 * exact.abs().max()  # one rounding, of the output


def test_layouts_and_compilation():
    q, k, v = (x.float() for x in operands())
    expected = attend(q, k, v)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(attend(*strided), expected)
    one = k[:, :1].expand_as(k)
    torch.testing.assert_close(attend(q, one, v), attend(q, one.contiguous(), v))
    whole = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(q, k, v), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": draw(2, 14, 3, 5)}, "share batch, heads and key width"),
        ({"v": draw(2, 13, 3, 5)}, "same batch, time and heads"),
        ({"q": draw(2, 0, 3, 4)}, "empty"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, r"mask must be bool \(batch, keys\)"),
        ({"mask": torch.ones(2, 14)}, "mask must be bool"),
        ({"cu_seqlens_k": torch.tensor([0, 14])}, "needs cu_seqlens"),
        ({"scale": float("nan")}, "scale must be a finite number"),
        (
            {"initial_state": ops.InjectiveState(*map(torch.zeros, ((2,), (2, 3, 9), (2, 3, 5), (2, 3, 4, 5))))},
            "key_mean",
        ),
    ],
)
def test_bad_input_gets_a_sentence(change, message):
    arguments = dict(zip("qkv", operands()))
    options = {**arguments, **change}
    with pytest.raises(ValueError, match=message):
        ops.injective_linear_attention(options.pop("q"), options.pop("k"), options.pop("v"), **options)


def test_bad_packing_gets_a_sentence():
    q, k = draw(1, 6, 2, 4), draw(1, 8, 2, 4)
    with pytest.raises(ValueError, match="cu_seqlens_k must be given"):
        attend(q, k, k, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="equally many"):
        attend(q, k, k, cu_seqlens=torch.tensor([0, 6]), cu_seqlens_k=torch.tensor([0, 3, 8]))
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        attend(q, k, k, cu_seqlens_k=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="not both"):
        attend(k, k, k, mask=torch.ones(1, 8, dtype=torch.bool), cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(TypeError, match="InjectiveState"):
        attend(q, k, k, initial_state=k)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_dynamic_convolution_is_one_depthwise_convolution_per_sample(backend):
    v, r = draw(3, 20, 6, dtype=torch.float32).requires_grad_(), draw(3, 6, 3, 3, seed=1, dtype=torch.float32)
    r = r.requires_grad_()
    rows = [F.conv2d(v[b].T.reshape(1, 6, 4, 5), r[b][:, None], padding=1, groups=6).flatten(2)[0].T for b in range(3)]
    expected = torch.stack(rows)
    output = ops.dynamic_depthwise_conv(v, r, (4, 5), backend=backend)
    torch.testing.assert_close(output, expected)
    for a, b in zip(*(torch.autograd.grad(x.cos().sum(), (v, r)) for x in (output, expected))):
        torch.testing.assert_close(a, b)


def test_a_kernel_of_the_centre_alone_copies_and_zeros_leave_nothing():
    v, r = tokens(time=6), torch.zeros(2, 32, 3, 3, dtype=torch.float64)
    assert not ops.dynamic_depthwise_conv(v, r, (2, 3)).any()
    r[..., 1, 1] = 1
    torch.testing.assert_close(ops.dynamic_depthwise_conv(v, r, (2, 3)), v)
    half = ops.dynamic_depthwise_conv(v.bfloat16(), r.bfloat16(), (2, 3))
    assert torch.equal(half, v.bfloat16())


@pytest.mark.parametrize(
    ("v", "r", "grid", "message"),
    [
        (draw(1, 6, 4), draw(1, 4, 3, 3), (2, 4), "holds 8 tokens; there are 6"),
        (draw(1, 6, 4), draw(1, 4, 3, 3), (6,), r"grid must be \(height, width\)"),
        (draw(1, 6, 4), draw(1, 4, 9), (2, 3), "r must have 4 axes"),
        (draw(1, 6, 4), draw(1, 4, 5, 5), (2, 3), r"r must be \(batch, channels, 3, 3\)"),
        (draw(1, 0, 4), draw(1, 4, 3, 3), (2, 3), "empty"),
    ],
)
def test_bad_input_of_the_convolution_gets_a_sentence(v, r, grid, message):
    with pytest.raises(ValueError, match=message):
        ops.dynamic_depthwise_conv(v, r, grid)
    with pytest.raises(TypeError, match="share a dtype"):
        ops.dynamic_depthwise_conv(draw(1, 6, 4), draw(1, 4, 3, 3, dtype=torch.float32), (2, 3))
