"""RWKV-4's average: every backend equals the definition, forward and backward, whole, split and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from subquad import ops
from subquad.kernels.scan.wkv import OPERATORS
from subquad.ops.dynamics import Watch

backends = pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
fast = pytest.mark.parametrize("backend", ["chunked", "cpu"])


def draw(batch=2, time=33, channels=10, *, strength=1.0, rows=None, seed=0):
    """k, v, time_decay, time_first and a state, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = strength * normal(batch, time, channels), normal(batch, time, channels), normal(channels), normal(channels)
    state = [normal(rows or batch, channels) for _ in range(3)]
    return [*inputs, state[0], state[1].abs() + 0.1, state[2]]


def with_gradients(arguments, **options):
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    o, last = ops.wkv(*leaves[:4], initial_state=tuple(leaves[4:]), return_state=True, **options)
    return differentiated(o, last, leaves)


def differentiated(o, last, leaves):
    weight = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o)
    ((weight * o.double()).sum() + sum(x.double().sin().sum() for x in last)).backward()
    return [o.detach(), *(x.detach() for x in last), *(t.grad for t in leaves)]


def assert_equal(actual, expected, bound):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= bound * max(1e-2, float(b.abs().max()))


@settings(deadline=None, max_examples=15)
@given(
    batch=st.integers(1, 3),
    time=st.sampled_from([1, 2, 16, 17, 70]),
    channels=st.sampled_from([1, 7, 64, 520]),
    strength=st.sampled_from([0.0, 1.0, 20.0]),
    backend=st.sampled_from(["chunked", "cpu"]),
)
def test_backends_equal_the_definition(batch, time, channels, strength, backend):
    arguments = [t.float() for t in draw(batch, time, channels, strength=strength)]
    expected = with_gradients([t.double() for t in arguments], backend="reference")
    assert_equal(with_gradients(arguments, backend=backend), expected, 1e-4)
    if backend == "chunked":
        assert_equal(with_gradients([t.double() for t in arguments], backend="chunked"), expected, 1e-10)


@pytest.mark.parametrize("time", [1, 40])
@pytest.mark.parametrize("given_state", [False, True])
def test_it_is_what_transformers_computes(time, given_state):
    """Output, state and gradients of its own loop, beside which it stands in a model."""
    arguments = [t.float() for t in draw(time=time, strength=3.0)][: 7 if given_state else 4]
    leaves = [t.clone().requires_grad_() for t in arguments]
    state = tuple(leaves[4:]) if given_state else None
    o, last = rwkv_linear_attention_cpu(leaves[2], leaves[3], leaves[0], leaves[1], state=state, return_state=True)
    expected = differentiated(o, last, leaves)
    leaves = [t.clone().requires_grad_() for t in arguments]
    state = tuple(leaves[4:]) if given_state else None
    assert_equal(differentiated(*ops.wkv(*leaves[:4], initial_state=state, return_state=True), leaves), expected, 1e-5)


def test_it_is_the_weighted_mean_of_the_paper():
    k, v, time_decay, time_first = draw(time=9)[:4]
    outputs = []
    for t in range(9):
        weights = torch.exp(k[:, : t + 1] - (t - 1 - torch.arange(t + 1.0))[:, None] * time_decay.exp())
        weights[:, t] = torch.exp(time_first + k[:, t])
        outputs.append((weights * v[:, : t + 1]).sum(1) / weights.sum(1))
    torch.testing.assert_close(ops.wkv(k, v, time_decay, time_first)[0], torch.stack(outputs, 1))


@backends
def test_large_keys_do_not_overflow(backend):
    k, v, time_decay, time_first, *_ = (t.float() for t in draw(strength=300.0))
    o, state = ops.wkv(k, v, time_decay, time_first, return_state=True, backend=backend)
    assert o.isfinite().all()
    assert (o.abs() <= v.abs().amax(1, keepdim=True) * (1 + 1e-5)).all()  # a mean of the values
    assert all(x.isfinite().all() for x in state)


@fast
def test_bfloat16_is_as_good_as_its_inputs(backend):
    arguments = draw(time=70)
    arguments = [t.bfloat16() if place < 2 else t.float() for place, t in enumerate(arguments)]
    actual = with_gradients(arguments, backend=backend)
    assert actual[0].dtype == torch.bfloat16
    assert actual[1].dtype == torch.float32
    assert_equal(actual, with_gradients([t.double() for t in arguments], backend="reference"), 4 * 2**-8)


@backends
def test_packed_equals_separate_forward_and_backward(backend):
    offsets = [0, 1, 1, 40, 73, 140]
    arguments = draw(1, 140, rows=5)
    if backend == "cpu":
        arguments = [t.float() for t in arguments]
    packed = with_gradients(arguments, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), backend=backend)
    leaves = [t.clone().requires_grad_() for t in arguments]
    k, v, time_decay, time_first, *state = leaves
    outputs, states = [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = tuple(x[n : n + 1] for x in state)
        if b > a:
            o, own = ops.wkv(
                k[:, a:b], v[:, a:b], time_decay, time_first, initial_state=own, return_state=True, backend=backend
            )
            outputs.append(o)
        states.append(own)
    last = [torch.cat(x) for x in zip(*states)]
    separate = differentiated(torch.cat(outputs, 1), last, leaves)
    assert_equal(packed, separate, 1e-5 if backend == "cpu" else 1e-10)


@backends
def test_pieces_and_steps_equal_whole(backend):
    k, v, time_decay, time_first, *start = (t.float() for t in draw())
    whole, last = ops.wkv(k, v, time_decay, time_first, initial_state=start, return_state=True, backend=backend)
    for sizes in ([13, 20], [1] * 33):
        outputs, state = [], start
        for key, value in zip(k.split(sizes, 1), v.split(sizes, 1)):
            o, state = ops.wkv(
                key, value, time_decay, time_first, initial_state=state, return_state=True, backend=backend
            )
            outputs.append(o)
        torch.testing.assert_close(torch.cat(outputs, 1), whole)
        for a, b in zip(state, last):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    leaves = [t.requires_grad_() for t in draw(1, 4, 2)]

    def run(k, v, time_decay, time_first, *state):
        o, last = ops.wkv(k, v, time_decay, time_first, initial_state=state, return_state=True, backend=backend)
        return o, *last

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivative_of_a_kernel_is_refused_by_name():
    k, v, time_decay, time_first, *_ = (t.float().requires_grad_() for t in draw(time=4))
    o, _ = ops.wkv(k, v, time_decay, time_first, backend="cpu")
    (first,) = torch.autograd.grad(o.square().sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.sum(), v)


def test_operator_passes_opcheck():
    leaves = [t.float().requires_grad_() for t in draw()]
    torch.library.opcheck(OPERATORS["cpu"].registered, (*leaves, None))


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    drawn = [t.float() for t in draw(time=4)]

    def run(k, v, time_decay, time_first, *state):
        o, last = ops.wkv(k, v, time_decay, time_first, initial_state=state, return_state=True)
        return o.sin().sum() + last.numerator.sum() + last.maximum.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in drawn]
        function(*leaves).backward()
        results.append([t.grad for t in leaves if t.grad is not None])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@backends
def test_strides_do_not_matter(backend):
    k, v, time_decay, time_first, *_ = (t.float() for t in draw())
    plain, _ = ops.wkv(k, v, time_decay, time_first, backend=backend)
    both = torch.cat([k, v], -1)
    actual, _ = ops.wkv(both[..., :10], both[..., 10:].mT.contiguous().mT, time_decay, time_first, backend=backend)
    torch.testing.assert_close(actual, plain)
    shared, one = k[:1, :1, :1].expand_as(k), time_decay[:1].expand(10)
    expected, _ = ops.wkv(shared.contiguous(), v, one.contiguous(), time_first, backend=backend)
    torch.testing.assert_close(ops.wkv(shared, v, one, time_first, backend=backend)[0], expected)


@backends
def test_nan_stays_in_its_row_and_channel(backend):
    k, v, time_decay, time_first, *_ = (t.float() for t in draw())
    spoiled = k.clone()
    spoiled[1, 3, 2] = torch.nan
    clean, actual = (ops.wkv(t, v, time_decay, time_first, backend=backend)[0] for t in (k, spoiled))
    assert bool(actual[1, 3:, 2].isnan().all())
    assert torch.equal(actual.isnan().sum(), torch.tensor(30))
    torch.testing.assert_close(actual[0], clean[0])


@pytest.mark.parametrize("strength", [1.0, 20.0])
def test_it_is_a_linear_system_of_its_values(strength):
    k, v, time_decay, time_first, *_ = draw(time=12, strength=strength)
    with Watch() as watch:
        rebuilt, _ = ops.wkv(k, v, time_decay, time_first)
    torch.testing.assert_close(rebuilt, ops.wkv(k, v, time_decay, time_first)[0])
    (system,) = watch.systems
    weights = system.weights()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, "k must have 3 axes"),
        (0, lambda x: x[..., :0], ValueError, "empty"),
        (0, lambda x: x.long(), TypeError, "floating point"),
        (1, lambda x: x[:, :3], ValueError, "v must be"),
        (1, lambda x: x.float(), TypeError, "share dtype"),
        (2, lambda x: x[:3], ValueError, "time_decay must be"),
        (3, lambda x: x[None], ValueError, "time_first must have 1 axes"),
    ],
)
def test_wrong_arguments_get_a_sentence(place, change, error, message):
    arguments = draw()[:4]
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        ops.wkv(*arguments)


def test_wrong_states_and_backends_get_a_sentence():
    k, v, time_decay, time_first, *state = draw()
    with pytest.raises(ValueError, match="numerator must be"):
        ops.wkv(k, v, time_decay, time_first, initial_state=(state[0][:1], *state[1:]))
    with pytest.raises(TypeError, match="three tensors"):
        ops.wkv(k, v, time_decay, time_first, initial_state=state[0])
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        ops.wkv(k, v, time_decay, time_first, backend="cpuu")
