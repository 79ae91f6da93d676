"""Every backend equals the definition, forward and backward; packed equals separate, split equals whole."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import CASES, STRENGTHS, Shape, assert_equal, cast, initial_state, run_with_gradients, slope_terms

FLOAT32_BOUND = 1e-4
BFLOAT16_BOUND = 4 * 2**-8
SHAPES = st.builds(
    Shape,
    batch=st.integers(1, 2),
    time=st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130]),
    heads=st.integers(1, 3),
    key=st.sampled_from([1, 5, 16, 33]),
    value=st.sampled_from([1, 7, 16, 40]),
    updates=st.integers(1, 3),
)
names = pytest.mark.parametrize("name", CASES)


def definition(case, arguments, state):
    return run_with_gradients(case, tuple(x.double() for x in arguments), state.double(), backend="reference")


@names
@settings(deadline=None, max_examples=12)
@given(shape=SHAPES, strength=st.sampled_from(STRENGTHS), chunk_size=st.sampled_from([1, 16, 32, 64, 256]))
def test_chunked_equals_the_definition(name, shape, strength, chunk_size):
    case = CASES[name]
    arguments, state = case.arguments(shape, strength, 0), initial_state(shape, 0)
    actual = run_with_gradients(case, arguments, state, backend="chunked", chunk_size=chunk_size)
    # float64 throughout: what is left is rounding, growing with the decay summed over a chunk
    expected = definition(case, arguments, state)
    assert_equal(actual, expected, 1e-8, case, slope_terms(case, arguments, state))


@names
@settings(deadline=None, max_examples=20)
@given(shape=SHAPES, strength=st.sampled_from(STRENGTHS), seed=st.integers(0, 3))
def test_cpu_equals_the_definition(name, shape, strength, seed):
    case = CASES[name]
    arguments = cast(case, case.arguments(shape, strength, seed), torch.float32)
    state = initial_state(shape, seed).float()
    actual = run_with_gradients(case, arguments, state, backend="cpu")
    expected = definition(case, arguments, state)
    # identical keys with beta 2: a reflection keeps every size, so the roundings of all steps add up
    bound = FLOAT32_BOUND * (max(1.0, shape.time / 32) if strength == 0 else 1.0)
    assert_equal(actual, expected, bound, case, slope_terms(case, arguments, state))


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@names
def test_bfloat16_is_as_good_as_its_inputs(name, backend):
    case, shape = CASES[name], Shape(time=70, key=16, value=16)
    arguments = cast(case, case.arguments(shape, 0.01, 1), torch.bfloat16)
    state = initial_state(shape, 1).float()
    actual = run_with_gradients(case, arguments, state, backend=backend)
    assert actual[0].dtype == torch.bfloat16
    assert actual[1].dtype == torch.float32
    expected = definition(case, arguments, state)
    assert_equal(actual, expected, BFLOAT16_BOUND, case, slope_terms(case, arguments, state))


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@names
def test_packed_equals_separate(name, backend):
    case, shape = CASES[name], Shape(batch=1, time=90)
    offsets = [0, 1, 1, 40, 57, 90]  # one token, none, and lengths that no chunk divides
    arguments = cast(case, case.arguments(shape, 3.0, 2), torch.float32)
    states = initial_state(shape, 2, rows=5).float()
    packed = torch.tensor(offsets, dtype=torch.int32)
    output, last = case.op(*arguments, initial_state=states, return_state=True, cu_seqlens=packed, backend=backend)
    for n, (start, end) in enumerate(pairwise(offsets)):
        if start == end:
            torch.testing.assert_close(last[n], states[n])
            continue
        pieces = [x if x.ndim == 1 else x[:, start:end] for x in arguments]
        one, one_last = case.op(*pieces, initial_state=states[n : n + 1], return_state=True, backend=backend)
        torch.testing.assert_close(output[:, start:end], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[n : n + 1], one_last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@names
def test_gradients_of_packed_equal_separate(name, backend):
    case, shape = CASES[name], Shape(batch=1, time=75)
    offsets = [0, 33, 34, 75]
    arguments = cast(case, case.arguments(shape, 3.0, 3), torch.float32)
    states = initial_state(shape, 3, rows=3).float()

    def gradients(packed):
        leaves = [x.clone().requires_grad_() for x in arguments]
        start_states = states.clone().requires_grad_()
        if packed:
            cu_seqlens = torch.tensor(offsets)
            o, s = case.op(
                *leaves, initial_state=start_states, return_state=True, cu_seqlens=cu_seqlens, backend=backend
            )
        else:
            parts = []
            for n, (a, b) in enumerate(pairwise(offsets)):
                pieces = [x if x.ndim == 1 else x[:, a:b] for x in leaves]
                own = start_states[n : n + 1]
                parts.append(case.op(*pieces, initial_state=own, return_state=True, backend=backend))
            o, s = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
        (o.cos().sum() + s.sin().sum()).backward()
        return [x.grad for x in (*leaves, start_states)]

    for a, b in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("cut", [1, 64, 2048, 4096])
@names
def test_split_equals_whole_at_4097_tokens(name, cut):
    case, shape = CASES[name], Shape(batch=1, time=4097, heads=1, key=8, value=8)
    arguments = cast(case, case.arguments(shape, 0.01, 4), torch.float32)
    whole, last = case.op(*arguments, return_state=True)
    head, state = case.op(*(x if x.ndim == 1 else x[:, :cut] for x in arguments), return_state=True)
    tail, end = case.op(*(x if x.ndim == 1 else x[:, cut:] for x in arguments), initial_state=state, return_state=True)
    assert_equal([torch.cat([head, tail], 1), end], [whole, last], FLOAT32_BOUND, case)


@names
def test_steps_equal_whole(name):
    case, shape = CASES[name], Shape(time=20)
    arguments = cast(case, case.arguments(shape, 3.0, 5), torch.float32)
    whole, last = case.op(*arguments, return_state=True)
    state, outputs = torch.zeros_like(last), []
    with torch.no_grad():
        for t in range(shape.time):
            pieces = [x if x.ndim == 1 else x[:, t : t + 1] for x in arguments]
            output, state = case.op(*pieces, initial_state=state, return_state=True)
            outputs.append(output)
    assert_equal([torch.cat(outputs, 1), state], [whole, last], FLOAT32_BOUND, case)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@names
def test_gradcheck(name, backend):
    case, shape = CASES[name], Shape(batch=1, time=5, heads=2, key=3, value=2)
    arguments = [x.requires_grad_() for x in case.arguments(shape, 0.5, 6)]
    if name in ("delta_rule", "gated_delta_rule", "kda", "delta_product"):  # away from the ends of beta's range
        arguments[-1 if name != "delta_product" else 3].data.clamp_(0.1, 1.9)
    gates = [i for i in case.gates if bool((arguments[i] <= 0).all()) and arguments[i].ndim > 1]
    for i in gates:
        arguments[i].data.clamp_(max=-0.01)
    state = initial_state(shape, 6).requires_grad_()

    def run(state, *arguments):
        return case.op(*arguments, initial_state=state, return_state=True, chunk_size=3, backend=backend)

    assert torch.autograd.gradcheck(run, (state, *arguments))
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(run, (state, *arguments))


@names
def test_nan_stays_in_its_row(name):
    case, shape = CASES[name], Shape(batch=2, time=40)
    arguments = cast(case, case.arguments(shape, 0.01, 7), torch.float32)
    clean, _ = case.op(*arguments)
    spoiled = [x.clone() for x in arguments]
    spoiled[2][1, 3] = torch.nan
    output, _ = case.op(*spoiled)
    torch.testing.assert_close(output[0], clean[0])
    assert bool(output[1].isnan().any())


@names
def test_second_derivative_of_a_kernel_is_refused_by_name(name):
    case, shape = CASES[name], Shape(time=4)
    arguments = [x.requires_grad_() for x in cast(case, case.arguments(shape, 0.5, 8), torch.float32)]
    output, _ = case.op(*arguments, backend="cpu")
    (first,) = torch.autograd.grad(output.sum(), arguments[2], create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.square().sum(), arguments[0])
