"""Attention with one query over every prefix equals masked softmax and the gated recurrence, on every backend."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import ops
from subquad.kernels.prefix import dispatch
from subquad.ops import PrefixState, combine_prefix, prefix_attention

FLOOR = 1e-2
FAST = ("chunked", "cpu")


def draw(batch=2, time=33, heads=3, width=7, strength=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = strength * torch.randn(batch, time, heads, generator=generator, dtype=torch.float64)
    return scores, torch.randn(batch, time, heads, width, generator=generator, dtype=torch.float64)


def state(rows=2, heads=3, width=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    maximum, numerator = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rows, heads), (rows, heads, width))
    )
    return PrefixState(maximum, 0.5 + torch.rand(rows, heads, generator=generator, dtype=torch.float64), numerator)


def masked_softmax(scores, values):
    """``(B, H, T, T)`` weights of one query over every prefix, all at once."""
    time = scores.shape[1]
    rows = scores.mT[:, :, None].expand(-1, -1, time, -1)
    visible = torch.ones(time, time, dtype=torch.bool).tril()
    return torch.einsum("bhij,bjhv->bihv", rows.masked_fill(~visible, -torch.inf).softmax(-1), values)


def run_with_gradients(scores, values, first, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (scores, values, *first)]
    output, last = prefix_attention(*leaves[:2], initial_state=PrefixState(*leaves[2:]), return_state=True, **options)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((weight * output).sum() + sum(x.sin().sum() for x in last)).backward()
    return [output.detach(), *(x.detach() for x in last), *(x.grad for x in leaves)]


def assert_equal(actual, expected, bound):
    """Per tensor and head, with the floor of tests/ops/cases.py: sums cancel, their terms' rounding does not."""
    floor = FLOOR * max(1.0, *(float(b.abs().max()) for b in expected))
    for a, b, axis in zip(actual, expected, (2, 1, 1, 1, 2, 2, 1, 1, 1)):
        others = [i for i in range(b.ndim) if i != axis]
        error, size = (a.double() - b.double()).abs().amax(others), b.double().abs().amax(others)
        assert bool((error <= bound * size.clamp(min=floor)).all()), (error.tolist(), size.tolist())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["wide", "equal", "rising", "falling"])
def test_equals_masked_softmax(kind, backend):
    scores, values = draw(strength=50.0, time=70)
    if kind == "equal":
        scores = torch.full_like(scores, 3.0)
    elif kind != "wide":
        scores = scores.sort(dim=1, descending=kind == "falling").values
    output, _ = prefix_attention(scores, values, backend=backend)
    torch.testing.assert_close(output, masked_softmax(scores, values), rtol=1e-12, atol=1e-12)
    if kind == "equal":
        mean = values.cumsum(1) / torch.arange(1, 71)[:, None, None]
        torch.testing.assert_close(output, mean, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(
    time=st.sampled_from([1, 2, 15, 63, 64, 65, 130]),
    width=st.sampled_from([1, 7, 16, 40]),
    heads=st.integers(1, 3),
    strength=st.sampled_from([0.1, 3.0, 50.0]),
    backend=st.sampled_from(FAST),
)
def test_fast_forms_equal_the_definition(time, width, heads, strength, backend):
    dtype, bound = (torch.float64, 1e-8) if backend == "chunked" else (torch.float32, 1e-4)
    drawn = [*draw(2, time, heads, width, strength), *state(2, heads, width)]
    drawn = [x.to(dtype) for x in drawn]
    actual = run_with_gradients(*drawn[:2], drawn[2:], backend=backend)
    expected = run_with_gradients(
        *(x.double() for x in drawn[:2]), [x.double() for x in drawn[2:]], backend="reference"
    )
    assert_equal(actual, expected, bound)


@pytest.mark.parametrize("backend", FAST)
def test_bfloat16_is_as_good_as_its_inputs(backend):
    scores, values = draw(time=70)
    scores, values, first = scores.float(), values.bfloat16(), [x.float() for x in state()]
    actual = run_with_gradients(scores, values, first, backend=backend)
    assert actual[0].dtype == actual[5].dtype == torch.bfloat16
    expected = run_with_gradients(scores.double(), values.double(), [x.double() for x in first], backend="reference")
    assert_equal(actual, expected, 4 * 2**-8)


def test_equals_the_gated_recurrence():
    """With L = log sum e^s, g = e^{s - L}: o_t = (1 - g_t) o_{t-1} + g_t v_t. As simple_gla it has keys of width 1."""
    scores, values = draw(time=41)
    total = scores.logcumsumexp(1)
    gate = (scores - total).exp()
    log_decay = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1] - total[:, 1:]], 1)
    k = gate[..., None]
    expected, _ = ops.simple_gla(torch.ones_like(k), k, values, log_decay, scale=1.0)
    torch.testing.assert_close(prefix_attention(scores, values)[0], expected, rtol=1e-12, atol=1e-12)
    outputs = [values[:, 0]]
    for t in range(1, 41):
        outputs.append((1 - k[:, t]) * outputs[-1] + k[:, t] * values[:, t])
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=1e-12, atol=1e-12)


def test_states_combine_in_any_grouping_and_order():
    scores, values = draw(time=24)
    pieces = []
    for a, b in pairwise([0, 1, 5, 6, 17, 24]):
        pieces.append(prefix_attention(scores[:, a:b], values[:, a:b], return_state=True)[1])
    whole = prefix_attention(scores, values, return_state=True)[1]
    empty = PrefixState(torch.full((2, 3), -torch.inf), torch.zeros(2, 3), torch.zeros(2, 3, 7))
    left = right = empty
    for piece in pieces:
        left = combine_prefix(left, piece)
    for piece in reversed(pieces):
        right = combine_prefix(piece, right)
    middle = combine_prefix(combine_prefix(pieces[3], pieces[1]), combine_prefix(pieces[4], pieces[0]))
    middle = combine_prefix(combine_prefix(empty, empty), combine_prefix(middle, pieces[2]))
    for combined in (left, right, middle):
        for a, b in zip(combined, whole):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 7, 33])
def test_blocks_reduced_by_ordinary_attention_combine_to_the_last_output(size):
    """The paper's update in blocks of b keys: memory of b, the result that of all keys."""
    scores, values = draw()
    total = None
    for s, v in zip(scores.split(size, 1), values.split(size, 1)):
        m = s.amax(1)
        weights = (s - m[:, None]).exp()
        block = PrefixState(m, weights.sum(1), torch.einsum("bth,bthv->bhv", weights, v))
        total = block if total is None else combine_prefix(total, block)
    expected = prefix_attention(scores, values)[0][:, -1]
    torch.testing.assert_close(total.numerator / total.denominator[..., None], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_masked_tokens_repeat_the_output_and_an_empty_past_is_zero(backend):
    scores, values = draw()
    if backend == "cpu":
        scores, values = scores.float(), values.float()
    scores[:, :4] = scores[:, 10:13] = -torch.inf
    scores.requires_grad_()
    output, last = prefix_attention(scores, values, return_state=True, backend=backend)
    assert bool((output[:, :4] == 0).all())
    torch.testing.assert_close(output[:, 10:13], output[:, 9:10].expand(-1, 3, -1, -1))
    keep = torch.tensor([t for t in range(33) if t not in (0, 1, 2, 3, 10, 11, 12)])
    kept, _ = prefix_attention(scores[:, keep], values[:, keep], backend=backend)
    torch.testing.assert_close(output[:, keep], kept, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(output.sum() + last.numerator.sum(), scores)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[:, :4] == 0).all())


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_packed_equals_separate(backend):
    offsets = [0, 1, 1, 40, 57, 90]
    scores, values = draw(batch=1, time=90)
    states = state(rows=5)
    if backend == "cpu":
        scores, values, states = scores.float(), values.float(), PrefixState(*(x.float() for x in states))
    packed = run_with_gradients(scores, values, states, cu_seqlens=torch.tensor(offsets), backend=backend)
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = PrefixState(*(x[n : n + 1] for x in states))
        if a == b:
            for last, first in zip(packed[1:4], own):
                torch.testing.assert_close(last[n : n + 1], first)
            continue
        output, last = prefix_attention(scores[:, a:b], values[:, a:b], initial_state=own, return_state=True)
        torch.testing.assert_close(packed[0][:, a:b], output, rtol=1e-4, atol=1e-5)
        for x, y in zip(packed[1:4], last):
            torch.testing.assert_close(x[n : n + 1], y, rtol=1e-4, atol=1e-5)
    if backend != "reference":
        doubled = [x.double() for x in (scores, values, *states)]
        expected = run_with_gradients(*doubled[:2], doubled[2:], cu_seqlens=torch.tensor(offsets), backend="reference")
        assert_equal(packed, expected, 1e-4)


def test_steps_and_pieces_equal_whole():
    scores, values = (x.float() for x in draw(time=40, strength=5.0))
    whole, last = prefix_attention(scores, values, return_state=True)
    for sizes in ([1] * 40, [13, 27], [39, 1]):
        outputs, past = [], None
        with torch.no_grad():
            for s, v in zip(scores.split(sizes, 1), values.split(sizes, 1)):
                output, past = prefix_attention(s, v, initial_state=past, return_state=True)
                outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-6)
        for a, b in zip(past, last):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_constant_and_the_order_of_the_past_change_nothing():
    scores, values = draw()
    output, _ = prefix_attention(scores, values)
    torch.testing.assert_close(prefix_attention(scores + 77.0, values)[0], output, rtol=1e-12, atol=1e-12)
    order = torch.cat([torch.randperm(20, generator=torch.Generator().manual_seed(0)), torch.arange(20, 33)])
    moved, _ = prefix_attention(scores[:, order], values[:, order])
    torch.testing.assert_close(moved[:, 19:], output[:, 19:], rtol=1e-12, atol=1e-12)


def test_a_hundred_thousand_even_tokens_keep_the_running_mean():
    values = torch.randn(1, 100_000, 1, 4, generator=torch.Generator().manual_seed(0))
    output, last = prefix_attention(torch.zeros(1, 100_000, 1), values, return_state=True)
    assert last.denominator.item() == 100_000
    mean = values.double().cumsum(1) / torch.arange(1, 100_001)[:, None, None]
    # 1e5 additions into sums of size at most 1e3: each may be wrong by 2^-24 of it, the mean by 6e-8 x 1e3
    torch.testing.assert_close(output.double(), mean, rtol=0, atol=6e-5)
    assert sum(x.numel() for x in last) == 6


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    scores, values = draw(batch=1, time=5, heads=2, width=3)
    leaves = [x.requires_grad_() for x in (scores, values, *state(1, 2, 3))]

    def run(scores, values, *first):
        output, last = prefix_attention(
            scores, values, initial_state=PrefixState(*first), return_state=True, backend=backend
        )
        return output, *last

    assert torch.autograd.gradcheck(run, leaves)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_operator_passes_opcheck_and_compiles_as_one_graph():
    scores, values = (x.float() for x in draw(time=9))
    first = [x.float() for x in state()]
    leaves = tuple(x.requires_grad_() for x in (scores, values, *first))
    torch.library.opcheck(torch.ops.subquad.prefix_cpu.default, (*leaves, None, True))

    def run(scores, values, *first):
        output, last = prefix_attention(scores, values, initial_state=PrefixState(*first), return_state=True)
        return output.sin().sum() + last.numerator.sum()

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, actual = run(*leaves), compiled(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, leaves[:2]), torch.autograd.grad(expected, leaves[:2])):
        torch.testing.assert_close(a, b)


def test_strides_and_nan_stay_where_they_are():
    scores, values = (x.float() for x in draw())
    output, _ = prefix_attention(scores, values)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in (scores, values)]
    torch.testing.assert_close(prefix_attention(*strided)[0], output)
    expanded = prefix_attention(scores[:1].expand(2, -1, -1), values[:1].expand(2, -1, -1, -1))[0]
    torch.testing.assert_close(expanded[1], output[0])
    for backend in FAST:
        spoiled = scores.clone()
        spoiled[1, 3] = torch.nan
        touched, _ = prefix_attention(spoiled, values, backend=backend)
        torch.testing.assert_close(touched[0], output[0])
        assert bool(touched[1, 3:].isnan().all())


def test_second_derivative_of_the_kernel_is_refused_by_name():
    scores, values = (x.float().requires_grad_() for x in draw(time=4))
    output, _ = prefix_attention(scores, values, backend="cpu")
    (first,) = torch.autograd.grad(output.sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.square().sum(), values)


def test_an_equal_maximum_passes_its_gradient_to_the_first_that_has_it():
    scores = torch.tensor([[[1.0], [3.0], [3.0]]])
    on_scores, on_first = dispatch.route_maximum(
        torch.tensor([[2.0]]), scores, torch.tensor([[0.5]]), torch.tensor([[3.0]]), None
    )
    assert on_scores.flatten().tolist() == [0.0, 2.0, 0.0]
    assert on_first.item() == 0.0
    on_scores, on_first = dispatch.route_maximum(
        torch.tensor([[2.0]]), scores, torch.tensor([[3.0]]), torch.tensor([[3.0]]), None
    )
    assert on_scores.abs().sum() == 0
    assert on_first.item() == 2.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 3, 1)}, ValueError, "values must have 4 axes"),
        ({"scores": torch.zeros(2, 3, 2)}, ValueError, r"scores must be \(batch, time, heads\)"),
        ({"scores": torch.zeros(2, 3, 1).double()}, TypeError, "float64 scores need float64 values"),
        ({"values": torch.zeros(2, 0, 1, 4)}, ValueError, "empty"),
        ({"initial_state": torch.zeros(2, 1)}, TypeError, "PrefixState"),
        ({"initial_state": (torch.zeros(1, 1),) * 3}, ValueError, r"initial_state.maximum must be"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "batch of 1"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, message):
    arguments = {"scores": torch.zeros(2, 3, 1), "values": torch.zeros(2, 3, 1, 4), **change}
    with pytest.raises(error, match=message):
        prefix_attention(arguments.pop("scores"), arguments.pop("values"), **arguments)
