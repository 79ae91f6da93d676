"""xLSTM's matrix memory: every backend equals the definition, forward and backward, whole, split and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMBackend

from subquad import ops
from subquad.ops.dynamics import Watch
from subquad.ops.mlstm.api import running_maxima
from tests.ops.cases import FLOOR

backends = pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
fast = pytest.mark.parametrize("backend", ["chunked", "cpu"])


def draw(batch=2, time=33, heads=3, key=5, value=7, *, strength=1.0, rows=None, seed=0):
    """q, k, v, both gates and a state, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [normal(batch, time, heads, width) for width in (key, key, value)]
    gates = [strength * normal(batch, time, heads) for _ in range(2)]
    rows = rows or batch
    return [*inputs, *gates, normal(rows, heads, key, value), normal(rows, heads, key), normal(rows, heads)]


def run(*leaves, **options):
    state = tuple(leaves[5:]) or None
    return ops.mlstm(*leaves[:5], initial_state=state, return_state=True, **options)


def with_gradients(function, arguments, **options):
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    return differentiated(*function(*leaves, **options), leaves)


def differentiated(o, last, leaves):
    weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)
    ((weight * o.double()).sum() + sum(x.double().sin().sum() for x in last)).backward()
    return [o.detach(), *(x.detach() for x in last), *(t.grad for t in leaves)]


def assert_equal(actual, expected, bound):
    """As in ``cases.assert_equal``: what is small beside the largest of all tensors carries their rounding."""
    floor = FLOOR * max(1.0, *(float(b.abs().max()) for b in expected))
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= bound * max(floor, float(b.abs().max()))


def same_sign(arguments):
    """q, k and the normaliser positive: where n . q cancels, a quotient of small sums has only their rounding."""
    return [t.abs() if place in (0, 1, 6) else t for place, t in enumerate(arguments)]


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 16, 17, 70]),
    heads=st.integers(1, 3),
    widths=st.sampled_from([(1, 1), (5, 7), (16, 8)]),
    strength=st.sampled_from([0.0, 1.0, 8.0]),
    backend=st.sampled_from(["chunked", "cpu"]),
)
def test_backends_equal_the_definition(batch, time, heads, widths, strength, backend):
    arguments = [t.float() for t in same_sign(draw(batch, time, heads, *widths, strength=strength))]
    wide = [t.double() for t in arguments]
    expected = with_gradients(run, wide, backend="reference")
    assert_equal(with_gradients(run, arguments, backend=backend), expected, 1e-4)
    if backend == "chunked":
        assert_equal(with_gradients(run, wide, backend="chunked"), expected, 1e-9)


@pytest.mark.parametrize("time", [1, 64, 150])
@pytest.mark.parametrize("given_state", [False, True])
def test_it_is_what_transformers_computes(time, given_state):
    """Output, state and gradients of its own backend: chunks of 64, then a loop over what is left."""
    backend = xLSTMBackend(xLSTMConfig(hidden_size=16, num_heads=2, num_hidden_layers=1, vocab_size=8))

    def theirs(q, k, v, input_gate, forget_gate, *state):
        first = (*state[:2], state[2][..., None]) if state else (None, None, None)
        turned = dict(zip(("query", "key", "value"), (x.transpose(1, 2) for x in (q, k, v))))
        gates = {"igate": input_gate.transpose(1, 2), "fgate": forget_gate.transpose(1, 2)}
        before = dict(zip(("c_initial", "n_initial", "m_initial"), first))
        h, last = backend._inference_fn(**turned, **gates, **before, return_last_states=True)
        return h.transpose(1, 2), (*last[:2], last[2][..., 0])

    arguments = [t.float() for t in same_sign(draw(time=time))][: 8 if given_state else 5]
    assert_equal(with_gradients(run, arguments), with_gradients(theirs, arguments), 1e-4)


def test_it_is_gated_linear_attention_under_its_divisor():
    """Written out: exponential weights of the past, summed, over the larger of their sum's size and 1."""
    q, k, v, input_gate, forget_gate = draw(1, 9, 1)[:5]
    reach = torch.nn.functional.logsigmoid(forget_gate)[0, :, 0].cumsum(0)
    weights = torch.exp(reach[:, None] - reach + input_gate[0, :, 0]).tril() * (q[0, :, 0] @ k[0, :, 0].T) * 5**-0.5
    h = weights @ v[0, :, 0] / weights.sum(1, keepdim=True).abs().clamp(min=1)
    torch.testing.assert_close(ops.mlstm(q, k, v, input_gate, forget_gate, eps=0.0)[0][0, :, 0], h)


@backends
def test_large_gates_do_not_overflow(backend):
    q, k, v, input_gate, forget_gate, *_ = (t.float() for t in draw(strength=200.0))
    h, state = ops.mlstm(q, k, v, input_gate, forget_gate, return_state=True, backend=backend)
    assert h.isfinite().all()
    assert all(x.isfinite().all() for x in state)
    closed = forget_gate.clone()
    closed[:, 20] = -torch.inf  # nothing of the past gets through
    cut, _ = ops.mlstm(q, k, v, input_gate, closed, backend=backend)
    alone, _ = ops.mlstm(*(x[:, 20:] for x in (q, k, v, input_gate, closed)), backend=backend)
    torch.testing.assert_close(cut[:, 20:], alone, rtol=1e-4, atol=1e-5)


@fast
def test_bfloat16_is_as_good_as_its_inputs(backend):
    arguments = draw(time=70)
    arguments = [t.bfloat16() if place < 3 else t.float() for place, t in enumerate(arguments)]
    h, state = run(*arguments, backend=backend)
    assert h.dtype == torch.bfloat16
    assert state.state.dtype == torch.float32
    exact, _ = run(*(t.double() for t in arguments), backend="reference")
    assert (h.double() - exact).abs().max() <= 4 * 2**-8 * exact.abs().max()


@backends
def test_packed_equals_separate_forward_and_backward(backend):
    offsets = [0, 1, 1, 40, 73, 140]
    arguments = same_sign(draw(1, 140, rows=5))
    if backend == "cpu":
        arguments = [t.float() for t in arguments]
    packed = with_gradients(run, arguments, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), backend=backend)
    leaves = [t.clone().requires_grad_() for t in arguments]
    outputs, states = [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = [x[n : n + 1] for x in leaves[5:]]
        if b > a:
            h, own = run(*(x[:, a:b] for x in leaves[:5]), *own, backend=backend)
            outputs.append(h)
        states.append(own)
    separate = differentiated(torch.cat(outputs, 1), [torch.cat(x) for x in zip(*states)], leaves)
    assert_equal(packed, separate, 1e-4 if backend == "cpu" else 1e-10)


@backends
def test_pieces_and_steps_equal_whole(backend):
    inputs, start = (x := same_sign(draw()))[:5], x[5:]
    whole, last = run(*inputs, *start, backend="reference")
    if backend == "cpu":
        inputs, start = [t.float() for t in inputs], [t.float() for t in start]
    for sizes in ([13, 20], [1] * 33):
        outputs, state = [], start
        for pieces in zip(*(t.split(sizes, 1) for t in inputs)):
            h, state = run(*pieces, *state, backend=backend)
            outputs.append(h)
        close = {"rtol": 1e-4, "atol": 1e-4} if backend == "cpu" else {"rtol": 1e-9, "atol": 1e-9}
        torch.testing.assert_close(torch.cat(outputs, 1).double(), whole, **close)
        for a, b in zip(state, last):
            torch.testing.assert_close(a.double(), b, **close)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    leaves = [t.requires_grad_() for t in draw(1, 4, 1, 2, 2)]

    def flat(*arguments):
        h, last = run(*arguments, backend=backend)
        return h, *last

    assert torch.autograd.gradcheck(flat, leaves)


def test_maxima_by_doubling_are_those_of_the_loop():
    *_, input_gate, forget, _, _, first = draw(time=37, strength=3.0)
    forget, m, expected = -forget.abs(), first, []
    for i_t, f_t in zip(input_gate.unbind(1), forget.unbind(1)):
        m = torch.maximum(f_t + m, i_t)
        expected.append(m)
    begin = torch.full_like(forget, torch.nan)
    begin[:, 0] = first
    torch.testing.assert_close(running_maxima(forget, input_gate, begin), torch.stack(expected, 1))


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    drawn = [t.float() for t in draw(time=9)]

    def total(*leaves):
        h, last = run(*leaves)
        return h.sin().sum() + last.state.sum() + last.maximum.sum()

    results = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in drawn]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@backends
def test_strides_do_not_matter(backend):
    q, k, v, *gates = draw()[:5]
    if backend == "cpu":
        q, k, v, *gates = (t.float() for t in (q, k, v, *gates))
    plain, _ = ops.mlstm(q, k, v, *gates, backend=backend)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, *gates)]
    torch.testing.assert_close(ops.mlstm(*turned, backend=backend)[0], plain)
    shared = gates[0][:1, :1, :1].expand_as(gates[0])
    expected, _ = ops.mlstm(q, k, v, shared.contiguous(), gates[1], backend=backend)
    torch.testing.assert_close(ops.mlstm(q, k, v, shared, gates[1], backend=backend)[0], expected)


@backends
def test_nan_stays_in_its_row_and_head(backend):
    q, k, v, *gates = (t.float() for t in draw()[:5])
    spoiled = k.clone()
    spoiled[1, 3, 2] = torch.nan
    clean, actual = (ops.mlstm(q, x, v, *gates, backend=backend)[0] for x in (k, spoiled))
    assert bool(actual[1, 3:, 2].isnan().all())
    torch.testing.assert_close(actual[0], clean[0])
    torch.testing.assert_close(actual[1, :, :2], clean[1, :, :2])


def test_under_a_watch_it_is_rebuilt_from_a_linear_system():
    arguments = draw(time=12)[:5]
    with Watch() as watch:
        rebuilt, _ = ops.mlstm(*arguments)
    torch.testing.assert_close(rebuilt, ops.mlstm(*arguments)[0])
    assert len(watch.systems) == 1


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda x: x[0], "q must have 4 axes"),
        (1, lambda x: x[..., :2], "q and k must have one shape"),
        (2, lambda x: x[:, :0], "same batch, time and heads"),
        (3, lambda x: x[..., None], "input_gate must have 3 axes"),
        (4, lambda x: x[:, :3], "forget_gate must be"),
    ],
)
def test_wrong_arguments_get_a_sentence(place, change, message):
    arguments = draw()[:5]
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        ops.mlstm(*arguments)


def test_wrong_states_and_options_get_a_sentence():
    *arguments, state, normalizer, maximum = draw()
    with pytest.raises(ValueError, match="normalizer must be"):
        ops.mlstm(*arguments, initial_state=(state, normalizer[..., :2], maximum))
    with pytest.raises(TypeError, match="three tensors"):
        ops.mlstm(*arguments, initial_state=state)
    with pytest.raises(ValueError, match="eps must be a number"):
        ops.mlstm(*arguments, eps=-1.0)
    with pytest.raises(ValueError, match="chunk_size"):
        ops.mlstm(*arguments, chunk_size=0)
