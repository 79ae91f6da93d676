"""The diagonal scan: every backend equals the definition, forward and backward, whole, split and packed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from subquad.kernels.scan import diagonal
from subquad.ops import diagonal_scan, selective_scan

backends = pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
fast = pytest.mark.parametrize("backend", ["chunked", "cpu"])


def draw(batch=2, time=33, channels=10, *, low=0.0, high=1.0, rows=None, seed=0):
    """decay in ``[low, high)``, x and initial state, float64."""
    generator = torch.Generator().manual_seed(seed)
    decay = low + (high - low) * torch.rand(batch, time, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, time, channels, generator=generator, dtype=torch.float64)
    return [decay, x, torch.randn(rows or batch, channels, generator=generator, dtype=torch.float64)]


def with_gradients(arguments, **options):
    decay, x, state = leaves = [t.detach().clone().requires_grad_() for t in arguments]
    h, last = diagonal_scan(decay, x, initial_state=state, return_state=True, **options)
    weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view_as(h)
    ((weight * h.double()).sum() + last.double().sin().sum()).backward()
    return [h.detach(), last.detach(), *(t.grad for t in leaves)]


def assert_equal(actual, expected, bound):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= bound * max(1e-2, float(b.abs().max()))


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    time=st.sampled_from([1, 2, 3, 16, 17, 130]),
    channels=st.sampled_from([1, 7, 64, 1030]),
    ends=st.sampled_from([(0.0, 1.0), (0.999, 1.0), (-1.0, 1.0), (0.0, 0.0)]),
    backend=st.sampled_from(["chunked", "cpu"]),
)
def test_backends_equal_the_definition(batch, time, channels, ends, backend):
    arguments = [t.float() for t in draw(batch, time, channels, low=ends[0], high=ends[1])]
    expected = with_gradients([t.double() for t in arguments], backend="reference")
    assert_equal(with_gradients(arguments, backend=backend), expected, 1e-4)
    if backend == "chunked":
        assert_equal(with_gradients([t.double() for t in arguments], backend="chunked"), expected, 1e-10)


@fast
def test_bfloat16_is_as_good_as_its_inputs(backend):
    decay, x, state = draw(time=70)
    arguments = [decay.float(), x.bfloat16(), state.float()]
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
    decay, x, state = leaves = [t.clone().requires_grad_() for t in arguments]
    outputs, states = [], []
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = state[n : n + 1]
        if b > a:
            h, own = diagonal_scan(decay[:, a:b], x[:, a:b], initial_state=own, return_state=True, backend=backend)
            outputs.append(h)
        states.append(own)
    h, last = torch.cat(outputs, 1), torch.cat(states)
    weight = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).view_as(h)
    ((weight * h.double()).sum() + last.double().sin().sum()).backward()
    separate = [t.double() for t in (h.detach(), last.detach(), *(t.grad for t in leaves))]
    assert_equal(packed, separate, 1e-5 if backend == "cpu" else 1e-10)


@backends
def test_pieces_and_steps_equal_whole(backend):
    decay, x, start = (t.float() for t in draw())
    whole, last = diagonal_scan(decay, x, initial_state=start, return_state=True, backend=backend)
    for sizes in ([13, 20], [1] * 33):
        outputs, state = [], start
        for a, piece in zip(decay.split(sizes, 1), x.split(sizes, 1)):
            h, state = diagonal_scan(a, piece, initial_state=state, return_state=True, backend=backend)
            outputs.append(h)
        torch.testing.assert_close(torch.cat(outputs, 1), whole)
        torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    leaves = [t.requires_grad_() for t in draw(1, 6, 2)]

    def run(decay, x, state):
        return diagonal_scan(decay, x, initial_state=state, return_state=True, backend=backend)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_second_derivative_of_a_kernel_is_refused_by_name():
    decay, x, _ = (t.float().requires_grad_() for t in draw(time=4))
    h, _ = diagonal_scan(decay, x, backend="cpu")
    (first,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.sum(), decay)


def test_operator_passes_opcheck():
    leaves = [t.float().requires_grad_() for t in draw()]
    torch.library.opcheck(diagonal.OPERATORS["cpu"].registered, (*leaves, None))


@fast
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()
    drawn = [t.float() for t in draw(time=9)]

    def run(decay, x, state):
        h, last = diagonal_scan(decay, x, initial_state=state, return_state=True, backend=backend)
        return h.sin().sum() + last.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in drawn]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


@backends
def test_strides_do_not_matter(backend):
    decay, x, state = (t.float() for t in draw())
    plain, _ = diagonal_scan(decay, x, initial_state=state, backend=backend)
    both = torch.cat([decay, x], -1)
    actual, _ = diagonal_scan(both[..., :10], both[..., 10:].mT.contiguous().mT, initial_state=state, backend=backend)
    torch.testing.assert_close(actual, plain)
    shared = decay[:1, :1, :1].expand_as(decay)
    expected, _ = diagonal_scan(shared.contiguous(), x, backend=backend)
    torch.testing.assert_close(diagonal_scan(shared, x, backend=backend)[0], expected)


def test_a_decay_of_one_sums_and_of_zero_copies():
    _, x, _ = draw()
    torch.testing.assert_close(diagonal_scan(torch.ones_like(x), x)[0], x.cumsum(1))
    assert torch.equal(diagonal_scan(torch.zeros_like(x), x)[0], x)


def test_it_is_the_selective_scan_of_one_state():
    _, u, _ = draw()
    delta = torch.rand(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A, one = -torch.rand(10, 1, dtype=torch.float64), torch.ones(2, 33, 1, dtype=torch.float64)
    expected, _ = selective_scan(u, delta, A, one, one)
    torch.testing.assert_close(diagonal_scan(torch.exp(delta * A[:, 0]), delta * u)[0], expected)


@backends
def test_nan_stays_in_its_row_and_channel(backend):
    decay, x, _ = (t.float() for t in draw())
    spoiled = x.clone()
    spoiled[1, 3, 2] = torch.nan
    clean, actual = (diagonal_scan(decay, t, backend=backend)[0] for t in (x, spoiled))
    assert bool(actual[1, 3:, 2].isnan().all())
    assert torch.equal(actual.isnan().sum(), torch.tensor(30))
    torch.testing.assert_close(actual[0], clean[0])


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[:, :3], ValueError, "decay must be"),
        (0, lambda x: x.long(), TypeError, "floating point"),
        (1, lambda x: x[0], ValueError, "x must have 3 axes"),
        (1, lambda x: x[..., :0], ValueError, "empty"),
        (2, lambda x: x[:1], ValueError, "initial_state must be"),
    ],
)
def test_wrong_arguments_get_a_sentence(place, change, error, message):
    arguments = draw()
    arguments[place] = change(arguments[place])
    with pytest.raises(error, match=message):
        diagonal_scan(arguments[0], arguments[1], initial_state=arguments[2])
    decay, x, _ = draw()
    with pytest.raises(ValueError, match="did you mean 'cpu'"):
        diagonal_scan(decay, x, backend="cpuu")


@pytest.mark.parametrize("time", [1, 40])
@pytest.mark.parametrize("given_state", [False, True])
def test_it_is_the_scan_of_recurrent_gemma(time, given_state):
    """RG-LRU: a gate is closed where a document begins (``reset``), so the scan is one of gates alone."""
    config = RecurrentGemmaConfig(hidden_size=16, lru_width=10, num_attention_heads=2, num_hidden_layers=1)
    rglru = RecurrentGemmaRglru(config)
    gate, x, state = (t.float() for t in draw(time=time))
    reset = (torch.arange(time) % 17 == 5).expand(2, -1)[..., None]
    start = state if given_state else None

    def theirs(gate, x, start):
        return rglru._rnn_scan(hidden_states=x, recurrent_gate=gate, reset=reset, recurrent_states=start)

    def ours(gate, x, start):
        return diagonal_scan(gate * ~reset, x, initial_state=start, return_state=True)

    results = []
    for scan in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in ((gate, x, state) if given_state else (gate, x))]
        h, last = scan(leaves[0], leaves[1], leaves[2] if given_state else None)
        (h.cos().sum() + last.sin().sum()).backward()
        results.append([h, last, *(t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    half, _ = diagonal_scan(gate * ~reset, x.bfloat16(), initial_state=start)
    expected, _ = theirs(gate, x.bfloat16(), start)
    torch.testing.assert_close(half, expected, rtol=2**-7, atol=1e-6)  # each rounds once more
