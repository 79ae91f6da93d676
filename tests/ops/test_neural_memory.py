"""The neural memory equals its definition at every chunk size, and reduces to the methods that it contains."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import NeuralMemoryState, delta_rule, neural_memory, neural_memory_read
from subquad.ops.neural_memory import chunked

GATES = ("forget", "momentum", "step")


def draw(batch=2, time=23, heads=2, width=4, hidden=(6,), seed=0, largest_step=0.1):
    """Arguments in float64: unit keys, gates over their whole range but for the step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (batch, time, heads)
    q, k, v = normal(*rows, width), F.normalize(normal(*rows, width), dim=-1), normal(*rows, width)
    forget, momentum, step = torch.rand(3, *rows, generator=generator, dtype=torch.float64)
    widths = [width, *hidden, width]
    weights = [normal(heads, a, b) / a**0.5 for a, b in pairwise(widths)]
    return [q, k, v, 0.3 * forget, 0.8 * momentum, largest_step * step], weights


def drawn_state(arguments, weights, filled, seed=5):
    """A state in the middle of a chunk."""
    size, rows, heads = sum(w[0].numel() for w in weights), len(filled), arguments[0].shape[2]
    parts = torch.randn(3, rows, heads, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return NeuralMemoryState(*(0.5 * part for part in parts), torch.tensor(filled))


def everything(arguments, weights, state=None, **options):
    """Output, state and the gradient of every input, of one scalar of output and state."""
    leaves = [x.detach().clone().requires_grad_() for x in arguments]
    layers = [x.detach().clone().requires_grad_() for x in weights]
    floating = [] if state is None else [x.detach().clone().requires_grad_() for x in state[:3]]
    start = None if state is None else NeuralMemoryState(*floating, state.filled)
    output, last = neural_memory(*leaves, layers, initial_state=start, return_state=True, **options)
    (output.cos().sum() + sum(x.sin().sum() for x in last[:3])).backward()
    sources = [*leaves, *(layers if state is None else floating)]
    return [output, *last, *(torch.zeros_like(x) if x.grad is None else x.grad for x in sources)]


def assert_same(actual, expected, **tolerance):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, **tolerance)


@settings(deadline=None, max_examples=25)
@given(
    time=st.sampled_from([1, 2, 7, 16, 23]),
    hidden=st.sampled_from([(), (6,), (5, 3)]),
    chunk_size=st.sampled_from([1, 2, 5, 16, 32]),
    options=st.sampled_from([{}, {"norm_residual": True}, {"max_grad_norm": 0.7}]),
    filled=st.sampled_from([None, (0, 0), (0, 3), (4, 1)]),
    lengths=st.sampled_from([None, (0, 1), (1, 1), (7, 0)]),
)
def test_chunked_equals_the_definition(time, hidden, chunk_size, options, filled, lengths):
    arguments, weights = draw(time=time, hidden=hidden)
    state = None if filled is None else drawn_state(arguments, weights, [min(f, chunk_size - 1) for f in filled])
    if lengths is not None:
        options = {**options, "lengths": torch.tensor(lengths).clamp(max=time)}
    results = [
        everything(arguments, weights, state, chunk_size=chunk_size, backend=backend, **options)
        for backend in ("chunked", "reference")
    ]
    # a network of three layers trained for 23 steps multiplies rounding by up to 1e4
    assert_same(*results, rtol=1e-9, atol=1e-10)


def test_float32_stays_near_float64():
    arguments, weights = draw(time=150, width=16, hidden=(32,), largest_step=1 / 16)
    exact = everything(arguments, weights, backend="reference")
    rounded = everything([x.float() for x in arguments], [x.float() for x in weights])
    for a, b in zip(rounded, exact):
        assert (a.double() - b.double()).abs().max() <= 1e-4 * b.double().abs().max()


def test_half_precision_keeps_its_state_in_float32():
    arguments, weights = draw()
    half = [x.bfloat16() for x in arguments[:3]] + [x.float() for x in arguments[3:]]
    expected, _ = neural_memory(*(x.double() for x in half), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = neural_memory(*half, [w.float() for w in weights], return_state=True)
    assert (output.dtype, state.weights.dtype) == (torch.bfloat16, torch.float32)
    # one rounding of the output: the products inside are taken in float32, under autocast too
    assert (output.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_split_at_every_point_equals_whole(backend):
    (*arguments,), weights = draw()
    options = {"chunk_size": 5, "return_state": True, "backend": backend}
    whole, last = neural_memory(*arguments, weights, **options)
    for cut in range(1, 23):
        head, state = neural_memory(*(x[:, :cut] for x in arguments), weights, **options)
        assert state.filled.tolist() == [cut % 5] * 2
        tail, end = neural_memory(*(x[:, cut:] for x in arguments), weights, initial_state=state, **options)
        torch.testing.assert_close(torch.cat([head, tail], 1), whole)
        assert_same(end, last)
    state, outputs = None, []
    for t in range(23):
        output, state = neural_memory(*(x[:, t : t + 1] for x in arguments), weights, initial_state=state, **options)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    assert_same(state, last)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_packed_equals_separate(backend):
    arguments, weights = draw(batch=1, time=40)
    offsets = [0, 1, 1, 17, 26, 40]
    states = drawn_state(arguments, weights, [0, 2, 4, 0, 1])
    options = {"chunk_size": 5, "return_state": True, "backend": backend}
    output, last = neural_memory(*arguments, weights, initial_state=states, cu_seqlens=torch.tensor(offsets), **options)
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = NeuralMemoryState(*(x[n : n + 1] for x in states))
        if a == b:
            assert_same(NeuralMemoryState(*(x[n : n + 1] for x in last)), own)
            continue
        one, end = neural_memory(*(x[:, a:b] for x in arguments), weights, initial_state=own, **options)
        torch.testing.assert_close(output[:, a:b], one)
        assert_same(NeuralMemoryState(*(x[n : n + 1] for x in last)), end)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_outer_gradient(backend):
    arguments, weights = draw(batch=1, time=5, heads=1, width=2, hidden=(3,))
    leaves = [x.requires_grad_() for x in (*arguments, *weights)]

    def run(*leaves):
        output, state = neural_memory(*leaves[:6], list(leaves[6:]), chunk_size=3, return_state=True, backend=backend)
        return output, *state[:3]

    assert torch.autograd.gradcheck(run, leaves)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_chunks_computed_again_in_the_backward_give_the_same_gradients(monkeypatch):
    arguments, weights = draw(time=90)
    kept = everything(arguments, weights, chunk_size=4)
    monkeypatch.setattr(chunked, "LARGEST_TAPE", 0)
    assert_same(everything(arguments, weights, chunk_size=4), kept)


def test_a_linear_memory_of_single_steps_is_the_delta_rule():
    (q, k, v, *_), weights = draw(hidden=())
    beta = 2 * torch.rand(q.shape[:3], dtype=torch.float64)
    zero = torch.zeros_like(beta)
    memory, state = neural_memory(q, k, v, zero, zero, beta / 2, weights, chunk_size=1, return_state=True)
    first = weights[0].expand(2, -1, -1, -1)
    expected, last = delta_rule(q, k, v, beta, scale=1.0, initial_state=first, return_state=True)
    torch.testing.assert_close(memory, expected)
    torch.testing.assert_close(state.weights.view_as(last), last)


def test_a_linear_memory_that_forgets_is_the_pair_recurrence():
    (q, k, v, forget, _, step), weights = draw(hidden=(), batch=1)
    zero, outputs = torch.zeros_like(step), []
    memory, _ = neural_memory(q, k, v, forget, zero, step, weights, chunk_size=1)
    state = weights[0]
    for t in range(q.shape[1]):  # S <- (1 - a) S - b k (k^T S) + b k v^T with b = 2 th
        b = 2 * step[0, t, :, None, None]
        key, value = k[0, t, :, :, None], v[0, t, :, None]
        state = (1 - forget[0, t, :, None, None]) * state + b * key * (value - key.mT @ state)
        outputs.append((q[0, t, :, None] @ state)[:, 0])
    torch.testing.assert_close(memory[0], torch.stack(outputs))


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_without_steps_only_forgetting_is_left(hidden):
    (q, k, v, forget, momentum, step), weights = draw(hidden=hidden)
    output, _ = neural_memory(q, k, v, forget, momentum, torch.zeros_like(step), weights)
    for t in range(q.shape[1]):
        left = (1 - forget[:, : t + 1]).prod(1)[..., None, None]
        flat = torch.cat([(left * w).flatten(2) for w in weights], dim=-1)
        read, _ = neural_memory_read(q[:, t : t + 1], flat, [4, *hidden, 4])
        torch.testing.assert_close(output[:, t : t + 1], read)


def test_full_forgetting_leaves_the_last_surprise():
    (q, k, v, forget, momentum, step), weights = draw()
    _, state = neural_memory(q, k, v, torch.ones_like(forget), momentum, step, weights, return_state=True)
    torch.testing.assert_close(state.weights, state.surprise)
    _, plain = neural_memory(q, k, v, forget, torch.zeros_like(momentum), step, weights, return_state=True)
    assert bool(torch.isfinite(plain.weights).all())


def test_what_is_told_again_and_again_is_returned():
    """A linear memory with one pair and a fixed step: the error falls by 1 - 2 th at every token."""
    k = F.normalize(torch.ones(1, 30, 1, 4, dtype=torch.float64), dim=-1)
    v = torch.arange(4.0, dtype=torch.float64).expand(1, 30, 1, 4)
    gate = torch.zeros(1, 30, 1, dtype=torch.float64)
    output, _ = neural_memory(k, k, v, gate, gate, gate + 0.1, [torch.zeros(1, 4, 4).double()], chunk_size=1)
    expected = v * (1 - 0.8 ** torch.arange(1, 31, dtype=torch.float64))[:, None, None]
    torch.testing.assert_close(output, expected)
    deep, _ = neural_memory(k, k, v, gate, gate, gate + 0.1, draw(heads=1, width=4, hidden=(8,))[1], chunk_size=1)
    error = (deep - v).abs().amax(-1).flatten()
    assert error[-1] < 0.02 * error[0]


def test_a_shortened_gradient_moves_the_weights_by_its_bound():
    (q, k, v, forget, _, step), weights = draw(time=1)
    zero = torch.zeros_like(forget)
    _, before = neural_memory(q, k, v, zero, zero, zero, weights, return_state=True)
    _, after = neural_memory(q, k, 100 * v, zero, zero, step, weights, max_grad_norm=0.5, return_state=True)
    moved = torch.linalg.vector_norm(after.weights - before.weights, dim=-1)
    torch.testing.assert_close(moved, 0.5 * step[:, 0])


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    arguments, weights = draw(time=5)

    def run(*leaves):
        output, state = neural_memory(*leaves[:6], list(leaves[6:]), chunk_size=3, return_state=True)
        return output.sin().sum() + state.weights.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (*arguments, *weights)]
        value = function(*leaves)
        value.backward()
        results.append([value, *(x.grad for x in leaves)])
    assert_same(*results)


def test_strides_do_not_matter():
    arguments, weights = draw()
    plain, _ = neural_memory(*arguments, weights)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in arguments]
    torch.testing.assert_close(neural_memory(*strided, weights)[0], plain)
    expanded = [x[:1].expand_as(x) for x in arguments]
    torch.testing.assert_close(neural_memory(*expanded, weights)[0][1], plain[0])


def test_nan_stays_in_its_row():
    arguments, weights = draw()
    clean, _ = neural_memory(*arguments, weights)
    arguments[2][1, 3] = torch.nan
    output, _ = neural_memory(*arguments, weights)
    torch.testing.assert_close(output[0], clean[0])
    assert bool(output[1].isnan().any())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"forget": lambda x: x + 1}, ValueError, r"forget must lie in \[0, 1\]"),
        ({"momentum": lambda x: x - 1}, ValueError, r"momentum must lie in \[0, 1\]"),
        ({"step": lambda x: -x}, ValueError, "step must be at least 0"),
        ({"step": lambda x: x[..., None]}, ValueError, "step must have 3 axes"),
        ({"weights": lambda w: w[0]}, TypeError, "weights must be a list"),
        ({"weights": lambda w: []}, TypeError, "weights must be a list of one or more"),
        ({"weights": lambda w: w[::-1]}, ValueError, r"weights\[0\] must be"),
        ({"weights": lambda w: w[:1]}, ValueError, r"weights\[0\] must be"),
        ({"chunk_size": 0}, ValueError, "between 1 and 1024"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be positive"),
        ({"lengths": torch.tensor([1])}, ValueError, "lengths must be"),
        ({"lengths": torch.tensor([1.0, 2.0])}, TypeError, "integer"),
        ({"backend": "cpu"}, ValueError, "use 'chunked'"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, TypeError, "NeuralMemoryState"),
        ({"cu_seqlens": torch.tensor([0, 23])}, ValueError, "batch of 1"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, message):
    arguments, weights = draw()
    options = {key: value for key, value in change.items() if key not in (*GATES, "weights")}
    for place, name in enumerate(GATES, 3):
        if name in change:
            arguments[place] = change[name](arguments[place])
    weights = change["weights"](weights) if "weights" in change else weights
    with pytest.raises(error, match=message):
        neural_memory(*arguments, weights, **options)


def test_a_state_belongs_to_its_chunk_size():
    arguments, weights = draw(time=9)
    _, state = neural_memory(*arguments, weights, chunk_size=16, return_state=True)
    with pytest.raises(ValueError, match="chunk size that made it"):
        neural_memory(*arguments, weights, initial_state=state, chunk_size=4)
    with pytest.raises(ValueError, match=r"initial_state.weights must be"):
        neural_memory(*arguments, weights, initial_state=state._replace(weights=state.weights[:1]))


def test_residual_needs_one_width():
    (q, k, v, *gates), weights = draw()
    with pytest.raises(ValueError, match="K must equal V"):
        neural_memory(q, k, v[..., :3], *gates, [weights[0], weights[1][..., :3]], norm_residual=True)
    with pytest.raises(ValueError, match="widths must be two or more"):
        neural_memory_read(q, torch.zeros(2, 2, 8), (5, 2))
