"""Additive attention equals softmax means over prefixes and gated linear attention, on every backend."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import ops
from subquad.ops import AdditiveState, additive_attention, additive_gates, additive_weights
from tests.ops.test_prefix_attention import FLOOR

FAST = ("chunked", "cpu")


def draw(batch=2, time=33, heads=3, key=5, value=7, strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = (batch, time, heads)
    q, k = (torch.randn(*rows, key, generator=generator, dtype=torch.float64) for _ in range(2))
    return q, strength * k, torch.randn(*rows, value, generator=generator, dtype=torch.float64)


def start(rows=2, heads=3, key=5, value=7):
    generator = torch.Generator().manual_seed(9)
    return AdditiveState(
        torch.randn(rows, heads, key, value, generator=generator, dtype=torch.float64),
        torch.randn(rows, heads, key, generator=generator, dtype=torch.float64),
    )


def run_with_gradients(q, k, v, state, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *state)]
    first = AdditiveState(*leaves[3:])
    output, last = additive_attention(*leaves[:3], initial_state=first, return_state=True, **options)
    # exact in every dtype: what comes back from the loss is an input too
    weight = torch.linspace(-1, 1, output.numel()).bfloat16().to(output.dtype).view_as(output)
    ((weight * output).sum() + sum(x.sin().sum() for x in last)).backward()
    return [output.detach(), *(x.detach() for x in last), *(x.grad for x in leaves)]


def assert_equal(actual, expected, bound):
    """Per tensor and head, with the floor of tests/ops/cases.py."""
    floor = FLOOR * max(1.0, *(float(b.abs().max()) for b in expected))
    for a, b, axis in zip(actual, expected, (2, 1, 1, 2, 2, 2, 1, 1)):
        others = [i for i in range(b.ndim) if i != axis]
        error, size = (a.double() - b.double()).abs().amax(others), b.double().abs().amax(others)
        assert bool((error <= bound * size.clamp(min=floor)).all()), (error.tolist(), size.tolist())


def prefix_means(k, v):
    """``(B, T, H, K, V)``: at each token the means of v under ``softmax_{j<=t}(k_jc)``, all at once."""
    visible = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).tril()[None, :, :, None, None]
    weights = k[:, None].masked_fill(~visible, -torch.inf).softmax(2)
    return torch.einsum("bijhk,bjhv->bihkv", weights, v)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_state_is_a_softmax_mean_of_the_past(backend):
    q, k, v = draw(strength=3.0)
    output, last = additive_attention(q, k, v, return_state=True, backend=backend)
    means = prefix_means(k, v)
    torch.testing.assert_close(output, torch.einsum("bihk,bihkv->bihv", q, means), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last.state, means[:, -1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last.log_mass, k.logsumexp(1), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=15)
@given(
    time=st.sampled_from([1, 2, 15, 64, 65, 130]),
    key=st.sampled_from([1, 5, 33]),
    value=st.sampled_from([1, 7, 16]),
    strength=st.sampled_from([0.1, 3.0, 30.0]),
    backend=st.sampled_from(FAST),
)
def test_fast_forms_equal_the_definition(time, key, value, strength, backend):
    dtype, bound = (torch.float64, 1e-8) if backend == "chunked" else (torch.float32, 1e-4)
    drawn = [x.to(dtype) for x in draw(2, time, 3, key, value, strength)]
    state = [x.to(dtype) for x in start(2, 3, key, value)]
    actual = run_with_gradients(*drawn, state, backend=backend)
    expected = run_with_gradients(*(x.double() for x in drawn), [x.double() for x in state], backend="reference")
    assert_equal(actual, expected, bound)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_is_as_good_as_its_inputs(backend):
    drawn, state = [x.bfloat16() for x in draw(time=70)], [x.float() for x in start()]
    actual = run_with_gradients(*drawn, state, backend=backend)
    assert actual[0].dtype == torch.bfloat16
    assert actual[2].dtype == torch.float32
    expected = run_with_gradients(*(x.double() for x in drawn), [x.double() for x in state], backend="reference")
    assert_equal(actual, expected, 4 * 2**-8)


def test_gates_make_it_gated_linear_attention_token_by_token():
    q, k, v = draw()
    gates = additive_gates(k, backend="chunked")
    expected, _ = ops.gla(q, gates.key, v, gates.log_decay, scale=1.0, backend="reference")
    torch.testing.assert_close(additive_attention(q, k, v)[0], expected, rtol=1e-10, atol=1e-10)
    # the mass that is kept and the mass that is written are the whole
    torch.testing.assert_close((gates.log_decay.exp() + gates.key)[:, 1:], torch.ones_like(k[:, 1:]))


def test_simple_cases():
    q, k, v = draw()
    torch.testing.assert_close(
        additive_attention(q[:, :1], k[:, :1], v[:, :1])[0], q[:, :1].sum(-1, keepdim=True) * v[:, :1]
    )
    running = v.cumsum(1) / torch.arange(1, 34)[:, None, None]
    constant, _ = additive_attention(q, torch.full_like(k, 2.0), v)
    torch.testing.assert_close(constant, q.sum(-1, keepdim=True) * running)
    shift = torch.randn(1, 1, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(additive_attention(q, k + shift, v)[0], additive_attention(q, k, v)[0])
    ones, _ = additive_attention(q, k, torch.ones_like(v))
    torch.testing.assert_close(ones, q.sum(-1, keepdim=True).expand_as(v))


def test_a_mass_of_one_at_the_start_is_a_first_token_of_value_zero():
    q, k, v = draw()
    padded = [torch.cat([torch.zeros_like(x[:, :1]), x], 1) for x in (q, k, v)]
    expected = additive_attention(*padded)[0][:, 1:]
    torch.testing.assert_close(additive_attention(q, k, v, initial_mass=1)[0], expected)
    torch.testing.assert_close(additive_attention(q, k, v, initial_mass=1, backend="reference")[0], expected)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_non_causal_reads_the_last_causal_state_with_every_query(backend):
    q, k, v = draw()
    _, last = additive_attention(q, k, v, return_state=True)
    output, none = additive_attention(q, k, v, causal=False, backend=backend)
    assert none is None
    torch.testing.assert_close(output, torch.einsum("bihk,bhkv->bihv", q, last.state))
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    moved, _ = additive_attention(q[:, order], k[:, order], v[:, order], causal=False, backend=backend)
    torch.testing.assert_close(moved, output[:, order])
    cross, _ = additive_attention(q[:, :4], k, v, causal=False, backend=backend)
    torch.testing.assert_close(cross, output[:, :4])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_packed_equals_separate(backend):
    offsets = [0, 1, 1, 40, 57, 90]
    q, k, v = draw(batch=1, time=90)
    states = start(rows=5)
    states.log_mass[2] = -torch.inf  # an empty past
    states.state[2] = 0
    if backend == "cpu":
        q, k, v = (x.float() for x in (q, k, v))
    cu_seqlens = torch.tensor(offsets)
    output, last = additive_attention(
        q, k, v, initial_state=states, return_state=True, cu_seqlens=cu_seqlens, backend=backend
    )
    full, _ = additive_attention(q, k, v, causal=False, cu_seqlens=cu_seqlens, backend=backend)
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = AdditiveState(*(x[n : n + 1] for x in states))
        if a == b:
            torch.testing.assert_close(last.state[n : n + 1].double(), own.state, rtol=1e-6, atol=1e-6)
            continue
        pieces = [x[:, a:b] for x in (q, k, v)]
        one, one_last = additive_attention(*pieces, initial_state=own, return_state=True)
        torch.testing.assert_close(output[:, a:b], one, rtol=1e-4, atol=1e-5)
        for x, y in zip(last, one_last):
            torch.testing.assert_close(x[n : n + 1], y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(full[:, a:b], additive_attention(*pieces, causal=False)[0], rtol=1e-4, atol=1e-5)


def test_gradients_of_packed_equal_separate_on_the_kernel():
    offsets = torch.tensor([0, 1, 1, 40, 75])
    q, k, v = (x.float() for x in draw(batch=1, time=75))
    states = [x.float() for x in start(rows=4)]
    actual = run_with_gradients(q, k, v, states, cu_seqlens=offsets, backend="cpu")
    doubled = [x.double() for x in (q, k, v)]
    expected = run_with_gradients(*doubled, [x.double() for x in states], cu_seqlens=offsets, backend="reference")
    assert_equal(actual, expected, 1e-4)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_pieces_and_steps_equal_whole(backend):
    q, k, v = draw(time=40, strength=3.0)
    if backend == "cpu":
        q, k, v = (x.float() for x in (q, k, v))
    whole, last = additive_attention(q, k, v, return_state=True, backend=backend)
    for sizes in ([1] * 40, [13, 27], [38, 2]):
        outputs, past = [], None
        for pieces in zip(*(x.split(sizes, 1) for x in (q, k, v))):
            output, past = additive_attention(*pieces, initial_state=past, return_state=True, backend=backend)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(past.state, last.state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_keys_of_three_hundred_stay_finite(backend):
    q, k, v = (x.float() for x in draw(time=70, strength=1.0))
    k = k.sign() * 300 + k
    state = [x.float() for x in start()]
    actual = run_with_gradients(q, k, v, state, backend=backend)
    expected = run_with_gradients(*(x.double() for x in (q, k, v)), [x.double() for x in state], backend="reference")
    assert all(bool(x.isfinite().all()) for x in actual)
    # z is rounded to 2^-15 at 300, so that a weight e^{k - z} may be wrong by as much of itself
    assert_equal(actual, expected, 1e-4 + 2 * 2**-15)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_absent_keys_write_nothing_and_leave_no_nan(backend):
    q, k, v = (x.float() if backend == "cpu" else x for x in draw())
    present = torch.rand(2, 33, generator=torch.Generator().manual_seed(0)) > 0.4
    present[:, :3] = False
    hidden = k.masked_fill(~present[..., None, None], -torch.inf).requires_grad_()
    output, last = additive_attention(q, hidden, v, return_state=True, backend=backend)
    assert bool((output[:, :3] == 0).all())
    for row in range(2):
        own = present[row]
        kept, kept_last = additive_attention(
            *(x[row : row + 1, own] for x in (q, k, v)), return_state=True, backend=backend
        )
        torch.testing.assert_close(output[row, own], kept[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last.state[row], kept_last.state[0], rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(output.sum(), hidden)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[~present] == 0).all())
    gone = additive_weights(torch.full_like(k, -torch.inf))
    assert bool((gone == 0).all())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    q, k, v = draw(batch=1, time=5, heads=2, key=3, value=2)
    leaves = [x.requires_grad_() for x in (q, k, v, *start(1, 2, 3, 2))]

    def run(q, k, v, state, log_mass):
        first = AdditiveState(state, log_mass)
        output, last = additive_attention(
            q, k, v, initial_state=first, return_state=True, chunk_size=3, backend=backend
        )
        return output, *last

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradcheck(lambda q, k, v: additive_attention(q, k, v, causal=False)[0], leaves[:3])


def test_operator_passes_opcheck_and_compiles_as_one_graph():
    q, k, v = (x.float().requires_grad_() for x in draw(time=9))
    flat, first = k.detach().flatten(2).requires_grad_(), torch.zeros(2, 15, requires_grad=True)
    additive_attention(q, k, v, backend="cpu")
    torch.library.opcheck(torch.ops.subquad.log_mass.default, (flat, first, None))

    def run(q, k, v):
        output, last = additive_attention(q, k, v, return_state=True)
        return output.sin().sum() + last.state.sum()

    torch._dynamo.reset()
    actual, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), run(q, k, v)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, (q, k, v)), torch.autograd.grad(expected, (q, k, v))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"initial_mass": 2.0}, ValueError, "initial_mass must be 0"),
        ({"initial_state": torch.zeros(2, 1, 2, 4)}, TypeError, "AdditiveState"),
        ({"initial_state": (torch.zeros(1, 1), torch.zeros(1, 1))}, ValueError, "must have 4 axes"),
        ({"causal": False, "return_state": True}, ValueError, "belong to causal=True"),
        ({"scale": float("inf")}, ValueError, "finite"),
        ({"chunk_size": 0}, ValueError, "between 1 and 1024"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
    ],
)
def test_bad_input_gets_a_sentence(options, error, message):
    q = torch.zeros(2, 3, 1, 2)
    with pytest.raises(error, match=message):
        additive_attention(q, q, torch.zeros(2, 3, 1, 4), **options)
