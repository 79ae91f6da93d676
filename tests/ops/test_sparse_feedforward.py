"""Sparse feed-forward layers equal dense ones with the same neurons set to zero, and do not read their weights."""

import pytest
import torch
from torch.nn import functional as F

from subquad import ops


def draw(tokens=1, width=33, hidden=71, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    gate, up = torch.randn(2, hidden, width, generator=generator, dtype=torch.float64) / width**0.5
    down = torch.randn(hidden, width, generator=generator, dtype=torch.float64).mT / hidden**0.5
    return [tensor.to(dtype) for tensor in (x, gate, up, down)]


def dense(x, gate, up, down, gate_threshold=0.0, output_threshold=None):
    s = F.relu(F.linear(x, gate))
    s = s * (s >= gate_threshold)
    h = s * F.linear(x, up)
    if output_threshold is not None:
        h = h * (h.abs() >= output_threshold)
    return F.linear(h, down)


@pytest.mark.parametrize("tokens", range(1, 6))
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_dense_layer(tokens, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, *weights = draw(tokens, hidden=301)
        output_threshold = torch.full((301,), 0.05)
        for options in ({}, {"gate_threshold": 0.4}, {"gate_threshold": 0.4, "output_threshold": output_threshold}):
            expected = dense(x, *weights, **options)
            for backend in ("auto", "cpu", "chunked", "reference"):
                found = ops.sparse_gated_feedforward(x, *weights, backend=backend, **options)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [-50.0, 50.0], ids=["none active", "all active"])
def test_nothing_and_everything_active(bias):
    x, gate, up, down = draw()
    gate = gate + bias * x / x.square().sum()
    found = ops.sparse_gated_feedforward(x, gate, up, down, backend="cpu")
    torch.testing.assert_close(found, dense(x, gate, up, down), atol=1e-3, rtol=1e-5)


def test_one_active_neuron():
    x, gate, up, down = draw()
    gate = -x.expand_as(gate).contiguous()
    gate[7] = x[0]
    found = ops.sparse_gated_feedforward(x, gate, up, down)
    s = x[0] @ x[0]
    torch.testing.assert_close(found[0], s * (up[7] @ x[0]) * down[:, 7], atol=1e-4, rtol=1e-5)


def test_weights_of_inactive_neurons_are_not_read():
    x, gate, up, down = draw(2, hidden=200)
    s = F.linear(x, gate)
    threshold = float(s.max(0).values.sort().values[-40])
    idle = (s < threshold).all(0)
    expected = ops.sparse_gated_feedforward(x, gate, up, down, gate_threshold=threshold)
    up[idle], down[:, idle] = torch.nan, torch.nan
    found = ops.sparse_gated_feedforward(x, gate, up, down, gate_threshold=threshold)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert 0 < idle.sum() < 200


def test_the_last_projection_alone_reads_active_columns():
    _, _, _, down = draw(hidden=200)
    h = torch.zeros(1, 200)
    h[0, [3, 50, 199]] = torch.tensor([1.0, -2.0, 1e-3])
    threshold = torch.full((200,), 1e-2)
    expected = down[:, 3] - 2 * down[:, 50]
    down[:, 4] = torch.nan
    for backend in ("auto", "cpu"):
        found = ops.sparse_down_projection(h, down, threshold=threshold, backend=backend)
        torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_run_as_matrix_products(dtype):
    arguments = draw(3, dtype=dtype)
    expected = dense(*(tensor.double() for tensor in arguments))
    found = ops.sparse_gated_feedforward(*arguments)
    assert found.dtype == dtype
    bound = 4 * 2**-8 if dtype == torch.bfloat16 else 1e-2 if dtype == torch.float16 else 1e-12
    assert (found.double() - expected).abs().max() <= bound * expected.abs().max()


def test_gradients_are_those_of_the_dense_layer():
    leaves = [tensor.requires_grad_() for tensor in draw(2, dtype=torch.float64)]
    found = torch.autograd.grad(ops.sparse_gated_feedforward(*leaves, gate_threshold=0.1).sum(), leaves)
    expected = torch.autograd.grad(dense(*leaves, gate_threshold=0.1).sum(), leaves)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_smooth_activations_and_leading_axes():
    x, gate, up, down = draw(4)
    x = x.view(2, 2, -1)
    threshold = torch.full((71,), 0.3)
    s, h = F.silu(F.linear(x, gate)), None
    h = s * F.linear(x, up)
    expected = F.linear(h * (h.abs() >= threshold), down)
    found = ops.sparse_gated_feedforward(x, gate, up, down, activation="silu", output_threshold=threshold)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_compiles_as_a_whole():
    arguments = draw()
    compiled = torch.compile(ops.sparse_gated_feedforward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), dense(*arguments), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"gate_weight": torch.randn(70, 33)}, ValueError, "one shape"),
        ({"up_weight": torch.randn(71, 32)}, ValueError, "33 columns"),
        ({"down_weight": torch.randn(33, 70)}, ValueError, "71 columns"),
        ({"down_weight": torch.randn(33, 71, dtype=torch.float64)}, TypeError, "float32"),
        ({"x": torch.randn(0, 33)}, ValueError, "empty"),
        ({"x": torch.ones(1, 33, dtype=torch.int64)}, TypeError, "floating point"),
        ({"activation": "swish"}, ValueError, "'silu'"),
        ({"gate_threshold": -1.0}, ValueError, "negative"),
        ({"gate_threshold": "0.1"}, TypeError, "number"),
        ({"output_threshold": torch.ones(70)}, ValueError, "71"),
        ({"output_threshold": torch.full((71,), torch.nan)}, ValueError, "negative"),
        ({"backend": "gpu"}, ValueError, "no GPU kernel"),
        ({"backend": "cpu", "down_weight": torch.randn(33, 71)}, ValueError, "contiguous"),
    ],
)
def test_bad_input_is_refused(change, error, match):
    arguments = dict(zip(("x", "gate_weight", "up_weight", "down_weight"), draw()))
    with pytest.raises(error, match=match):
        ops.sparse_gated_feedforward(**{**arguments, **change})


def test_the_kernel_has_no_gradient():
    x, *weights = draw()
    with pytest.raises(ValueError, match="no gradient"):
        ops.sparse_gated_feedforward(x.requires_grad_(), *weights, backend="cpu")
