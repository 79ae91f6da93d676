"""Drawn calls of every public op: a result, ValueError or TypeError, and nothing else.

``SUBQUAD_FUZZ_EXAMPLES`` sets how many calls per op (200; ``make fuzz``: 5,000). Sizes stay small or overflow outright:
the allocator's own out-of-memory error is not ours to catch.
"""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subquad import ops

EXAMPLES = int(os.environ.get("SUBQUAD_FUZZ_EXAMPLES", "200"))
DTYPES = [torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
WIDTHS = st.sampled_from([1, 2, 3, 8, 17])
OPS = {
    "softmax_attention": (ops.softmax_attention, ("qk", "qk", "v")),
    "linear_attention": (ops.linear_attention, ("qk", "qk", "v")),
    "exponential_linear_attention": (ops.exponential_linear_attention, ("qk", "qk", "v")),
    "taylor_linear_attention": (ops.taylor_linear_attention, ("qk", "qk", "v")),
    "prefix_linear_attention": (
        lambda *x, **options: ops.prefix_linear_attention(*x, prefix_lengths=torch.tensor([0]), **options),
        ("qk", "qk", "v", "qk", "v"),
    ),
    "flow_attention": (ops.flow_attention, ("amount", "amount", "v")),
    "lightning_attention": (ops.lightning_attention, ("qk", "qk", "v", "slope")),
    "simple_gla": (ops.simple_gla, ("qk", "qk", "v", "head_gate")),
    "gla": (ops.gla, ("qk", "qk", "v", "key_gate")),
    "delta_rule": (ops.delta_rule, ("qk", "qk", "v", "beta")),
    "gated_delta_rule": (ops.gated_delta_rule, ("qk", "qk", "v", "head_gate", "beta")),
    "kda": (ops.kda, ("qk", "qk", "v", "key_gate", "beta")),
    "delta_product": (ops.delta_product, ("qk", "many_k", "many_v", "many_beta", "head_gate")),
    "additive_attention": (ops.additive_attention, ("qk", "qk", "v")),
    "prefix_attention": (ops.prefix_attention, ("beta", "v")),
    "selective_scan": (ops.selective_scan, ("tokens", "steps", "rates", "maps", "maps", "bias")),
    "ssd": (ops.ssd, ("v", "beta", "slope_down", "maps", "maps", "slope")),
    "diagonal_scan": (ops.diagonal_scan, ("tokens", "tokens")),
    "short_convolution": (ops.short_convolution, ("tokens", "weight", "bias")),
    "neural_memory": (
        lambda *x, **options: ops.neural_memory(*x[:6], list(x[6:]), **options),
        ("qk", "qk", "v", "share", "share", "share", "layer_in", "layer_out"),
    ),
}


@st.composite
def calls(draw, roles):
    """Arguments that mostly fit one another, each spoiled now and then."""
    b, t, h, k, v, n = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 3)), draw(WIDTHS), 0, 0
    v, n = draw(WIDTHS), draw(st.integers(1, 2))
    shapes = {
        "qk": (b, t, h, k),
        "amount": (b, t, h, k),
        "v": (b, t, h, v),
        "slope": (h,),
        "slope_down": (h,),
        "head_gate": (b, t, h),
        "key_gate": (b, t, h, k),
        "beta": (b, t, h),
        "many_k": (b, t, n, h, k),
        "many_v": (b, t, n, h, v),
        "many_beta": (b, t, n, h),
        "tokens": (b, t, k),
        "weight": (k, v),
        "bias": (k,),
        "steps": (b, t, k),
        "rates": (k, v),
        "maps": (b, t, v),
        "share": (b, t, h),
        "layer_in": (h, k, n + 1),
        "layer_out": (h, n + 1, v),
    }
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    arguments = []
    for role in roles:
        shape = list(shapes[role])
        spoil = draw(st.integers(0, 19))
        if spoil == 0:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 1, 5]))
        elif spoil == 1:
            shape = shape[1:]
        own = draw(st.sampled_from(DTYPES)) if spoil == 2 else dtype
        x = torch.randn(shape, generator=generator)
        if role in ("head_gate", "key_gate", "rates", "slope_down"):
            x = -x.abs()
        elif role in ("beta", "many_beta", "slope", "steps"):
            x = x.abs().clamp(max=2)
        elif role == "share":
            x = x.abs().clamp(max=1)
        elif role == "amount":
            x = x.abs()
        if spoil == 3 and x.numel():
            x.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
        x = x.to(own)
        if spoil == 4 and x.ndim > 1:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        elif spoil == 5 and 0 not in x.shape:
            x = x[(slice(0, 1), ...)].expand(shape)
        elif spoil == 6:
            others = math.prod([*shape[:1], *shape[2:]])
            if len(shape) > 1 and others:  # elements can be counted, bytes cannot
                x = x.new_zeros(()).expand(*shape[:1], 2**62 // others, *shape[2:])
        elif spoil == 7:
            x = draw(st.sampled_from([None, 3, "q", x.tolist()]))
        arguments.append(x)
    options = {}
    if draw(st.booleans()):
        options["backend"] = draw(st.sampled_from(["auto", "reference", "chunked", "cpu", "gpu", "best"]))
    if draw(st.integers(0, 4)) == 0:
        cuts = draw(st.lists(st.integers(-1, t + 1), min_size=0, max_size=3))
        options["cu_seqlens"] = torch.tensor([0, *cuts, t], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if draw(st.integers(0, 4)) == 0:
        options["initial_state"] = torch.randn(b, h, k, v, generator=generator)
    if draw(st.integers(0, 9)) == 0:
        options["chunk_size"] = draw(st.sampled_from([-1, 0, 1, 16, 64, 2048, 2.5]))
    options["return_state"] = draw(st.booleans())
    return arguments, options


@pytest.mark.parametrize("name", OPS)
@settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call_gives_a_result_or_a_sentence(name, data):
    op, roles = OPS[name]
    arguments, options = data.draw(calls(roles))
    if name in ("softmax_attention", "short_convolution", "prefix_attention", "selective_scan", "diagonal_scan"):
        options.pop("chunk_size", None)
    try:
        output, state = op(*arguments, **options)
    except (ValueError, TypeError):
        return
    assert output.shape[:2] == arguments[0].shape[:2]
    assert (state is not None) == options["return_state"]
