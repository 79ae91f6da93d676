"""The selective scan: every backend equals the definition, forward and backward; its pieces; its special cases."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels.scan import dispatch
from subquad.ops import selective_scan, simple_gla
from subquad.ops.selective_scan import gated_selective_scan

NAMES = ("y", "state", "u", "delta", "A", "B", "C", "D", "delta_bias", "gate", "initial_state")
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-4, 4 * 2**-8
backends = pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
fast = pytest.mark.parametrize("backend", ["chunked", "cpu"])


def draw(batch=2, time=33, channels=10, states=4, groups=1, *, gated=False, strength=1.0, rows=None, seed=0):
    """In float64: u, delta, A, B, C, D, then bias and gate (None unless ``gated``), then the initial state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = (batch, time, channels)
    delta = 2 * normal(*tokens) if gated else torch.rand(tokens, generator=generator, dtype=torch.float64)
    A = -strength * torch.rand(channels, states, generator=generator, dtype=torch.float64)
    return [
        *(normal(*tokens), delta, A, normal(batch, time, groups, states), normal(batch, time, groups, states)),
        *(normal(channels), normal(channels) if gated else None, normal(*tokens) if gated else None),
        normal(rows or batch, channels, states),
    ]


def cast(arguments, dtype):
    """Tokens in ``dtype``; delta, A, D, bias and state in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return [
        None if x is None else x.to(wide if name in ("delta", "A", "D", "delta_bias", "initial_state") else dtype)
        for name, x in zip(NAMES[2:], arguments)
    ]


def call(arguments, **options):
    u, delta, A, B, C, D, bias, gate, state = arguments
    if gate is None:
        return selective_scan(u, delta, A, B, C, D, initial_state=state, return_state=True, **options)
    return gated_selective_scan(u, delta, A, B, C, D, bias, gate, initial_state=state, return_state=True, **options)


def with_gradients(arguments, **options):
    """By name: the output, the last state, and the gradient of each argument, of one scalar of both."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in arguments]
    y, state = call(leaves, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    ((weight * y.double()).sum() + state.double().sin().sum()).backward()
    values = [y.detach(), state.detach(), *(None if x is None else x.grad for x in leaves)]
    return {name: x for name, x in zip(NAMES, values) if x is not None}


def definition(arguments, **options):
    return with_gradients([None if x is None else x.double() for x in arguments], backend="reference", **options)


def assert_equal(actual, expected, bound):
    """``max|a - b| <= bound max|b|`` per tensor, sizes below 1e-2 of the largest of all counting as that."""
    floor = 1e-2 * max(1.0, *(float(b.abs().max()) for b in expected.values()))
    assert actual.keys() == expected.keys()
    for name, b in expected.items():
        a = actual[name]
        assert a.shape == b.shape
        error, size = float((a.double() - b).abs().max()), max(floor, float(b.abs().max()))
        assert error <= bound * size, f"{name}: error {error} for size {size}"


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 130]),
    width=st.sampled_from([1, 3, 32, 65]),
    states=st.sampled_from([1, 3, 16]),
    groups=st.integers(1, 2),
    gated=st.booleans(),
    strength=st.sampled_from([0.0, 1e-3, 1.0, 20.0, 200.0]),
    seed=st.integers(0, 3),
)
def test_cpu_equals_the_definition(batch, time, width, states, groups, gated, strength, seed):
    arguments = cast(
        draw(batch, time, width * groups, states, groups, gated=gated, strength=strength, seed=seed), torch.float32
    )
    assert_equal(with_gradients(arguments, backend="cpu"), definition(arguments), FLOAT32_BOUND)


@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 200.0])
@pytest.mark.parametrize("time", [1, 2, 7, 100])
@pytest.mark.parametrize("gated", [False, True])
def test_chunked_equals_the_definition(time, strength, gated, monkeypatch):
    monkeypatch.setattr("subquad.kernels.scan.chunked.LARGEST_PIECE", 2000)  # several pieces
    arguments = draw(time=time, groups=2, gated=gated, strength=strength)
    assert_equal(with_gradients(arguments, backend="chunked"), definition(arguments), 1e-10)


@fast
@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_is_as_good_as_its_inputs(backend, gated):
    arguments = cast(draw(time=70, channels=48, states=16, gated=gated, strength=8.0), torch.bfloat16)
    actual = with_gradients(arguments, backend=backend)
    assert actual["y"].dtype == torch.bfloat16
    assert actual["state"].dtype == torch.float32
    assert_equal(actual, definition(arguments), BFLOAT16_BOUND)


@backends
@pytest.mark.parametrize("gated", [False, True])
def test_packed_equals_separate_forward_and_backward(backend, gated):
    offsets = [0, 1, 1, 40, 73, 140]  # one token, none, and lengths that no chunk divides
    arguments = cast(draw(1, 140, groups=2, gated=gated, rows=5), torch.float32)
    packed = with_gradients(arguments, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), backend=backend)
    leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(offsets)):
        own = leaves[8][n : n + 1]
        if start == end:
            states.append(own)
            continue
        u, delta, A, B, C, D, bias, gate, _ = leaves
        pieces = [None if x is None else x[:, start:end] for x in (u, delta, B, C, gate)]
        y, state = call(
            [pieces[0], pieces[1], A, pieces[2], pieces[3], D, bias, pieces[4], own], backend=backend
        )  # fmt: skip
        outputs.append(y)
        states.append(state)
    y, state = torch.cat(outputs, 1), torch.cat(states)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    ((weight * y.double()).sum() + state.double().sin().sum()).backward()
    values = [y.detach(), state.detach(), *(None if x is None else x.grad for x in leaves)]
    separate = {name: x.double() for name, x in zip(NAMES, values) if x is not None}
    assert_equal(packed, separate, 1e-5)


@backends
@pytest.mark.parametrize("cut", [1, 31, 32, 33, 64])
def test_split_equals_whole(backend, cut):
    arguments = cast(draw(time=65, gated=True), torch.float32)
    u, delta, A, B, C, D, bias, gate, state = arguments
    whole, last = call(arguments, backend=backend)
    outputs = []
    for at in (slice(0, cut), slice(cut, None)):
        pieces = [u[:, at], delta[:, at], A, B[:, at], C[:, at], D, bias, gate[:, at], state]
        y, state = call(pieces, backend=backend)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_steps_equal_whole(gated):
    u, delta, A, B, C, D, bias, gate, state = arguments = cast(draw(time=20, groups=2, gated=gated), torch.float32)
    whole, last = call(arguments)
    for t in range(20):
        at = slice(t, t + 1)
        pieces = [u[:, at], delta[:, at], A, B[:, at], C[:, at], D, bias, None if gate is None else gate[:, at], state]
        before = state.clone()
        y, after = call(pieces)
        assert torch.equal(state, before)  # a step writes a state of its own
        state = after
        torch.testing.assert_close(y, whole[:, at], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    u, delta, A, B, C, D, _, _, state = draw(1, 5, 4, 2, 2, gated=True)
    leaves = [x.requires_grad_() for x in (u, delta.abs() + 0.1, A - 0.1, B, C, D, state)]

    def run(u, delta, A, B, C, D, state):
        return selective_scan(u, delta, A, B, C, D, initial_state=state, return_state=True, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivative_of_a_kernel_is_refused_by_name():
    leaves = [None if x is None else x.requires_grad_() for x in cast(draw(time=4), torch.float32)]
    y, _ = call(leaves, backend="cpu")
    (first,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.square().sum(), leaves[1])


@pytest.mark.parametrize("gated", [False, True])
def test_operator_passes_opcheck(gated):
    drawn = cast(draw(time=35, groups=2, gated=gated), torch.float32)
    leaves = [None if x is None else x.requires_grad_() for x in drawn]
    torch.library.opcheck(dispatch.OPERATORS["cpu"].registered, (*leaves, None, True))


@fast
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    drawn = cast(draw(time=9, gated=True), torch.float32)

    def run(*tensors):
        y, state = call(tensors, backend=backend)
        return y.sin().sum() + state.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in drawn]
        function(*leaves).backward()
        results.append([x.grad for x in leaves])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@backends
@torch.no_grad()
def test_strides_do_not_matter(backend):
    u, delta, A, B, C, D, bias, gate, state = cast(draw(channels=16, gated=True), torch.float32)
    plain, _ = call([u, delta, A, B, C, D, bias, gate, state], backend=backend)
    both = torch.cat([u, gate], -1)
    maps = torch.cat([B, C], -1)
    strided = [both[..., :16], delta.mT.contiguous().mT, A.T.contiguous().T, maps[..., :4], maps[..., 4:]]
    actual, _ = call([*strided, D, bias, both[..., 16:], state], backend=backend)
    torch.testing.assert_close(actual, plain)
    one = [x[:1].expand_as(x) for x in (u, delta, B, C, gate)]
    actual, _ = call([one[0], one[1], A, one[2], one[3], D, bias, one[4], state], backend=backend)
    torch.testing.assert_close(actual[0], plain[0])
    flat = [u[:, :1].expand_as(u), delta[:, :1].expand_as(delta), A[:1].expand_as(A), B, C]
    actual, _ = call([*flat, D, bias, gate, state], backend=backend)
    expected, _ = call([*(x.contiguous() for x in flat), D, bias, gate, state], backend=backend)
    torch.testing.assert_close(actual, expected)


@fast
def test_time_invariant_maps_make_a_convolution(backend):
    """Constant delta, B, C: ``y = u * K`` with ``K_l = delta sum_n C_n B_n e^{delta A_n l}``, by FFT."""
    u, _, A, B, C, *_ = draw(time=50, states=3)
    B, C, delta = B[:1, :1].expand_as(B), C[:1, :1].expand_as(C), torch.full_like(u, 0.3)
    y, _ = selective_scan(u, delta, A, B, C, backend=backend if backend == "chunked" else "chunked")
    lag = torch.arange(50, dtype=torch.float64)
    kernel = 0.3 * torch.einsum("n,n,dnl->ld", C[0, 0, 0], B[0, 0, 0], torch.exp(0.3 * A[..., None] * lag))
    spectrum = torch.fft.rfft(u, 100, dim=1) * torch.fft.rfft(kernel, 100, dim=0)
    expected = torch.fft.irfft(spectrum, 100, dim=1)[:, :50]
    torch.testing.assert_close(y, expected)
    narrow = [x.float() for x in (u, delta, A, B, C)]
    torch.testing.assert_close(selective_scan(*narrow, backend="cpu")[0], expected.float(), rtol=1e-4, atol=1e-4)


def head_shared(heads=3, width=4, states=5):
    """A scan whose A and delta are one number per head: Mamba-2's form."""
    u, delta, A, B, C, _, _, _, state = draw(channels=heads * width, states=states)
    A = A[::width, :1].repeat_interleave(width, 0).expand(-1, states)
    delta = delta[..., ::width].repeat_interleave(width, -1)
    return u, delta, A, B, C, state


def test_a_rate_and_step_per_head_make_simple_gla():
    heads, width = 3, 4
    u, delta, A, B, C, state = head_shared(heads, width)
    y, last = selective_scan(u, delta, A, B, C, initial_state=state, return_state=True)
    q, k = (x.expand(-1, -1, heads, -1) for x in (C, B))
    v = (delta * u).unflatten(-1, (heads, width))
    log_decay = delta[..., ::width] * A[::width, 0]
    start = state.unflatten(1, (heads, width)).mT
    o, end = simple_gla(q, k, v, log_decay, scale=1.0, initial_state=start, return_state=True)
    torch.testing.assert_close(y, o.flatten(-2))
    torch.testing.assert_close(last, end.mT.flatten(1, 2))


def test_one_state_of_rate_one_is_gated_by_a_sigmoid():
    """The paper's theorem 1: N = 1, A = -1, B = 1 forget by ``sigmoid(-logit)``."""
    generator = torch.Generator().manual_seed(0)
    u, logit = torch.randn(2, 1, 12, 1, generator=generator, dtype=torch.float64)
    one = torch.ones(1, 12, 1, dtype=torch.float64)
    y, _ = selective_scan(u, F.softplus(logit), torch.tensor([[-1.0]], dtype=torch.float64), one, one)
    h, expected = 0.0, []
    for t in range(12):
        h = torch.sigmoid(-logit[0, t, 0]) * h + F.softplus(logit[0, t, 0]) * u[0, t, 0]
        expected.append(h)
    torch.testing.assert_close(y.flatten(), torch.stack(expected))


@backends
def test_a_step_of_zero_keeps_and_a_long_one_forgets(backend):
    u, delta, A, B, C, D, _, _, state = cast(draw(time=6), torch.float32)
    y, last = selective_scan(
        u, 0 * delta, A, B, C, D, initial_state=state, return_state=True, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(y, torch.einsum("btn,bdn->btd", C[:, :, 0], state) + D * u, rtol=1e-5, atol=1e-5)
    _, last = selective_scan(
        u, torch.full_like(u, 30.0), A - 4, B, C, D, initial_state=state, return_state=True, backend=backend
    )
    torch.testing.assert_close(last, 30 * u[:, -1, :, None] * B[:, -1])


@backends
def test_logits_of_minus_infinity_are_steps_of_zero(backend):
    u, delta, A, B, C, D, bias, gate, state = cast(draw(time=40, gated=True), torch.float32)
    delta[:, 25:] = -math.inf
    leaves = [x.requires_grad_() for x in (u, A, bias)]
    y, last = call([u, delta, A, B, C, D, bias, gate, state], backend=backend)
    _, expected = call(
        [u[:, :25], delta[:, :25], A, B[:, :25], C[:, :25], D, bias, gate[:, :25], state], backend=backend
    )
    torch.testing.assert_close(last, expected)
    gradients = torch.autograd.grad(y[:, :25].sum() + last.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert not gradients[0][:, 25:].any()


@backends
def test_nan_stays_in_its_row(backend):
    arguments = cast(draw(time=40, channels=40), torch.float32)
    clean, _ = call(arguments, backend=backend)
    for place in (0, 1, 3):
        spoiled = list(arguments)
        spoiled[place] = arguments[place].clone()
        spoiled[place][1, 3] = torch.nan
        y, _ = call(spoiled, backend=backend)
        torch.testing.assert_close(y[0], clean[0])
        assert bool(y[1, 3:].isnan().any())


@backends
def test_a_slow_decay_lasts_as_long_as_it_says(backend):
    """Thousands of decays of 1 - 1e-6: an error of one rounding each, all of one sign, would show."""
    time, rate = 4000, 1e-6
    u, one = torch.zeros(1, time, 1), torch.ones(1, time, 1)
    A, state = torch.tensor([[-rate]]), torch.ones(1, 1, 1)
    if backend == "reference":
        A, state, u, one = (x.double() for x in (A, state, u, one))
    _, last = selective_scan(u, one, A, one, one, initial_state=state, return_state=True, backend=backend)
    # a float32 decay is a multiple of 2^-24 = 6e-8, off by up to half of that at every step
    assert abs(float(last) - math.exp(-rate * time)) <= time * 2**-25


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, "u must have 3 axes"),
        (0, lambda x: x[:, :0], ValueError, "empty"),
        (0, lambda x: x.long(), TypeError, "floating point"),
        (1, lambda x: x[:, :3], ValueError, "delta must be"),
        (1, lambda x: -x, ValueError, "delta must not be negative"),
        (2, lambda x: x[:3], ValueError, "A must be"),
        (2, lambda x: -x, ValueError, "A must be at most 0"),
        (2, lambda x: x.to(torch.complex64), TypeError, "S4D"),
        (3, lambda x: x[..., :2], ValueError, "B must be"),
        (3, lambda x: x.bfloat16(), TypeError, "share dtype"),
        (4, lambda x: x.expand(-1, -1, 3, -1), ValueError, "C has 3 groups, which must divide"),
        (4, lambda x: x.expand(-1, -1, 2, -1), ValueError, "as many groups"),
        (5, lambda x: x[:2], ValueError, "D must be"),
        (8, lambda x: x[:1], ValueError, "initial_state must be"),
    ],
)
@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_wrong_arguments_get_a_sentence(place, change, error, message, backend):
    arguments = cast(draw(), torch.float32)
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        call(arguments, backend=backend)


def test_wrong_options_get_a_sentence():
    arguments = cast(draw(), torch.float32)
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        call(arguments, backend="cpuu")
    with pytest.raises(ValueError, match="batch of 1"):
        call(arguments, cu_seqlens=torch.tensor([0, 33]))
    gated = cast(draw(gated=True), torch.float32)
    with pytest.raises(ValueError, match="gate must be"):
        call([*gated[:7], gated[7][:, :3], gated[8]])
    with pytest.raises(ValueError, match="delta_bias must be"):
        call([*gated[:6], gated[6][:3], *gated[7:]])
