"""Mamba-2's scan: every backend equals the definition, forward and backward; its special cases; wrong arguments."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import selective_scan, ssd
from subquad.ops.dynamics import Watch

NAMES = ("y", "state", "x", "delta", "A", "B", "C", "D", "initial_state")
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 4 * 2**-8
backends = pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
fast = pytest.mark.parametrize("backend", ["chunked", "cpu"])


def draw(batch=2, time=33, heads=4, width=5, states=3, groups=2, *, strength=1.0, rows=None, seed=0):
    """In float64: x, delta, A, B, C, D and the initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    delta = torch.rand(batch, time, heads, generator=generator, dtype=torch.float64)
    A = -strength * torch.rand(heads, generator=generator, dtype=torch.float64)
    maps = (batch, time, groups, states)
    return [
        *(normal(batch, time, heads, width), delta, A, normal(*maps), normal(*maps), normal(heads)),
        normal(rows or batch, heads, width, states),
    ]


def cast(arguments, dtype):
    """Tokens in ``dtype``; delta, A, D and the state in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(dtype if name in "xBC" else wide) for name, x in zip(NAMES[2:], arguments)]


def with_gradients(arguments, **options):
    """By name: the output, the last state, and the gradient of each argument, of one scalar of both."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    y, state = ssd(*leaves[:6], initial_state=leaves[6], return_state=True, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    ((weight * y.double()).sum() + state.double().sin().sum()).backward()
    return dict(zip(NAMES, [y.detach(), state.detach(), *(x.grad for x in leaves)]))


def definition(arguments, **options):
    return with_gradients([x.double() for x in arguments], backend="reference", **options)


def assert_equal(actual, expected, bound):
    """``max|a - b| <= bound max|b|`` per tensor, sizes below 1e-2 of the largest of all counting as that."""
    floor = 1e-2 * max(1.0, *(float(b.abs().max()) for b in expected.values()))
    for name, b in expected.items():
        a = actual[name]
        assert a.shape == b.shape
        error, size = float((a.double() - b).abs().max()), max(floor, float(b.abs().max()))
        assert error <= bound * size, f"{name}: error {error} for size {size}"


@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 31, 33, 65, 130]),
    heads=st.sampled_from([2, 4]),
    states=st.sampled_from([1, 3, 16]),
    groups=st.integers(1, 2),
    strength=st.sampled_from([0.0, 1e-3, 1.0, 60.0]),
    backend=st.sampled_from(["chunked", "cpu"]),
)
def test_fast_forms_equal_the_definition(batch, time, heads, states, groups, strength, backend):
    arguments = cast(draw(batch, time, heads, 5, states, groups, strength=strength), torch.float32)
    assert_equal(with_gradients(arguments, backend=backend), definition(arguments), FLOAT32_BOUND)


@fast
def test_bfloat16_is_as_good_as_its_inputs(backend):
    arguments = cast(draw(time=70, width=16, states=16, strength=8.0), torch.bfloat16)
    actual = with_gradients(arguments, backend=backend)
    assert (actual["y"].dtype, actual["state"].dtype) == (torch.bfloat16, torch.float32)
    assert_equal(actual, definition(arguments), BFLOAT16_BOUND)


@backends
def test_packed_equals_separate(backend):
    offsets = [0, 1, 1, 40, 73, 140]
    x, delta, A, B, C, D, state = cast(draw(1, 140, rows=5), torch.float32)
    y, last = ssd(
        x, delta, A, B, C, D, initial_state=state, return_state=True, cu_seqlens=torch.tensor(offsets), backend=backend
    )
    for n, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            assert torch.equal(last[n], state[n])
            continue
        at, own = slice(start, end), state[n : n + 1]
        expected, end_state = ssd(
            x[:, at], delta[:, at], A, B[:, at], C[:, at], D, initial_state=own, return_state=True, backend=backend
        )
        torch.testing.assert_close(y[:, at], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(last[n : n + 1], end_state, rtol=1e-5, atol=1e-5)


@backends
@torch.no_grad()
def test_pieces_and_steps_equal_the_whole(backend):
    x, delta, A, B, C, D, state = cast(draw(time=40), torch.float32)
    whole, last = ssd(x, delta, A, B, C, D, initial_state=state, return_state=True, backend=backend)
    outputs = []
    for start, end in pairwise((0, 1, 2, 30, 40)):
        at = slice(start, end)
        y, state = ssd(
            x[:, at], delta[:, at], A, B[:, at], C[:, at], D, initial_state=state, return_state=True, backend=backend
        )
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_it_is_the_selective_scan_with_one_rate_and_step_per_head():
    x, delta, A, B, C, D, state = draw()
    y, last = ssd(x, delta, A, B, C, D, initial_state=state, return_state=True)
    channels = [part.repeat_interleave(5, dim=-1) for part in (delta, A, D)]
    expected, end = selective_scan(
        x.flatten(2), channels[0], channels[1][:, None].expand(-1, 3), B, C, channels[2],
        initial_state=state.flatten(1, 2), return_state=True,
    )  # fmt: skip
    torch.testing.assert_close(y.flatten(2), expected)
    torch.testing.assert_close(last.flatten(1, 2), end)


def test_gradcheck():
    leaves = [x.requires_grad_() for x in draw(1, 5, 2, 2, 2, 1)]

    def run(*inputs):
        return ssd(*inputs[:6], initial_state=inputs[6], return_state=True, backend="chunked")

    leaves = [leaves[0], leaves[1].detach().add(0.1).requires_grad_(), leaves[2].detach().sub(0.1).requires_grad_(),
              *leaves[3:]]  # fmt: skip
    assert torch.autograd.gradcheck(run, leaves)


def test_it_is_rebuilt_from_its_system():
    x, delta, A, B, C, D, _ = draw()
    with Watch() as watch:
        y, _ = ssd(x, delta, A, B, C, D)
    torch.testing.assert_close(y, ssd(x, delta, A, B, C, D, backend="reference")[0])
    assert watch.systems[0].transition == "scalar"


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    drawn = cast(draw(time=9), torch.float32)
    graph = torch.compile(lambda *x: ssd(*x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(*drawn[:6]), ssd(*drawn[:6])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, "x must have 4 axes"),
        (0, lambda x: x[:, :0], ValueError, "empty"),
        (0, lambda x: x.long(), TypeError, "floating point"),
        (1, lambda x: x[:, :3], ValueError, "delta must be"),
        (1, lambda x: -x, ValueError, "delta must not be negative"),
        (2, lambda x: x[:3], ValueError, "A must be"),
        (2, lambda x: x[:, None].expand(-1, 3), ValueError, "belongs to selective_scan"),
        (2, lambda x: -x, ValueError, "A must be at most 0"),
        (3, lambda x: x[:, :3], ValueError, "B must be"),
        (3, lambda x: x.bfloat16(), TypeError, "share dtype"),
        (4, lambda x: x[:, :, :1].expand(-1, -1, 3, -1), ValueError, "C has 3 groups, which must divide"),
        (4, lambda x: x[..., :2], ValueError, "as many groups and states"),
        (5, lambda x: x[:2], ValueError, "D must be"),
        (6, lambda x: x[:1], ValueError, "initial_state must be"),
    ],
)
def test_wrong_arguments_get_a_sentence(place, change, error, message):
    arguments = cast(draw(), torch.float32)
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        ssd(*arguments[:6], initial_state=arguments[6])
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        ssd(*cast(draw(), torch.float32)[:6], backend="cpuu")
