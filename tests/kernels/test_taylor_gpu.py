"""Ops that stand on the shared Triton recurrence, through Triton's interpreter: equal to their definitions."""

import pytest
import torch

from subquad.ops import exponential_linear_attention, flow_attention, prefix_linear_attention, taylor_linear_attention

pytest.importorskip("triton")


def draw(*widths, time=20):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, time, 2, width, generator=generator) for width in widths]


def assert_backends_agree(op, tensors, **options):
    results = []
    for backend, dtype in (("reference", torch.float64), ("gpu", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        output, _ = op(*leaves, backend=backend, **options)
        results.append([output.detach(), *torch.autograd.grad(output.cos().sum(), leaves)])
    for exact, actual in zip(*results):
        assert (actual.double() - exact).abs().max() <= 1e-4 * max(1e-2, float(exact.abs().max()))


def test_taylor():
    q, k, v = draw(3, 3, 5)
    assert_backends_agree(taylor_linear_attention, (q, k, v))
    assert_backends_agree(taylor_linear_attention, (q, k, v), cu_seqlens=torch.tensor([0, 7, 20]))


def test_prefix():
    assert_backends_agree(prefix_linear_attention, draw(3, 3, 5, 3, 5), prefix_lengths=torch.tensor([9]))


def test_exponential():
    assert_backends_agree(exponential_linear_attention, draw(4, 4, 5))


def test_flow():
    q, k, v = draw(4, 4, 5)
    assert_backends_agree(flow_attention, (q.sigmoid(), k.sigmoid(), v))
