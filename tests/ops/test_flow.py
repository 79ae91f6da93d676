"""Flow attention: conservation, both forms against their definitions, the hand-written backward pass, and refusals."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels.flow import cpu
from subquad.kernels.flow.dispatch import flow_gates_cpu
from subquad.ops import FlowState, flow_attention, linear_attention
from subquad.ops.flow.api import empty_flow_state

SEGMENT = cpu.SEGMENT


def draw(time=29, keys=None, batch=2, width=6, value=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = keys or time
    return (
        tensor(batch, time, 3, width).sigmoid(),
        tensor(batch, keys, 3, width).sigmoid(),
        tensor(batch, keys, 3, value),
    )


def earlier(rows=2, seed=5):
    """The state that seven tokens left."""
    return flow_attention(*draw(7, batch=rows, seed=seed), return_state=True)[1]


def with_gradients(tensors, state, mask=None, **options):
    """Output, state and gradients of everything, each leaf of the state weighing about as much as the output."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    sums = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in state]
    output, last = flow_attention(*leaves, initial_state=FlowState(*sums), return_state=True, mask=mask, **options)
    if mask is not None:
        output = output * mask[..., None, None]
    last = [x for x in last if x.is_floating_point()]
    (output.cos().sum() + sum((x.sin() / x.detach().abs().max()).sum() for x in last)).backward()
    results = [output, *last, *(x.grad for x in leaves), *(x.grad for x in sums if x.is_floating_point())]
    return [x.detach() for x in results]


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@settings(deadline=None, max_examples=12)
@given(
    time=st.sampled_from([1, 2, 33, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 7]),
    masked=st.booleans(),
    clip=st.sampled_from([None, 1.0]),
    temperature=st.sampled_from([1.0, 0.5]),
    width=st.sampled_from([1, 6]),
)
def test_causal_equals_the_definition(backend, time, masked, clip, temperature, width):
    tensors = draw(time, width=width)
    state = flow_attention(*draw(7, width=width, seed=5), return_state=True)[1]
    mask = None
    if masked:
        mask = torch.rand(2, time, generator=torch.Generator().manual_seed(1)) > 0.3
        mask[:, 0] = True
    options = {"clip": clip, "temperature": temperature}
    expected = with_gradients(tensors, state, mask, backend="reference", **options)
    if backend == "chunked":
        actual, bound = with_gradients(tensors, state, mask, backend=backend, chunk_size=16, **options), 1e-10
    else:
        single = [x.float() for x in tensors], [x.float() if x.is_floating_point() else x for x in state]
        actual, bound = with_gradients(*single, mask, backend=backend, **options), 1e-4
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = float((a.double() - b).abs().max())
        assert error <= bound * max(float(b.abs().max()), 1e-2), f"tensor {place}: {error}"


def test_the_quadratic_form_of_the_causal_definition():
    q, k, v = draw(12)
    n = torch.arange(1, 13, dtype=torch.float64)[None, :, None]
    incoming = torch.einsum("bthk,bthk->bth", q + 1e-6, k.cumsum(1) + 1e-6)
    outgoing = torch.einsum("bthk,bthk->bth", k + 1e-6, q.cumsum(1) + 1e-6)
    key_flow = (k * (n / outgoing)[..., None]).cumsum(1)
    query_flow = (q * (n / incoming)[..., None]).cumsum(1)
    exponential = (torch.einsum("bthk,bthk->bth", k + 1e-6, query_flow + 1e-6) / n).exp()
    competition = n * exponential / exponential.cumsum(1)
    allocation = torch.sigmoid(torch.einsum("bthk,bthk->bth", q + 1e-6, key_flow + 1e-6) / n)
    weights = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    o = torch.einsum("bhij,bjh,bjhv->bihv", weights, competition, v) * (allocation / incoming)[..., None]
    torch.testing.assert_close(flow_attention(q, k, v)[0], o)


def test_flow_is_conserved():
    q, k, _ = draw(29, keys=17)
    incoming = torch.einsum("bthk,bhk->bth", q, k.sum(1))
    outgoing = torch.einsum("bshk,bhk->bsh", k, q.sum(1))
    conserved_incoming = torch.einsum("bthk,bhk->bth", q, (k / outgoing[..., None]).sum(1))
    conserved_outgoing = torch.einsum("bshk,bhk->bsh", k, (q / incoming[..., None]).sum(1))
    torch.testing.assert_close(conserved_outgoing.sum(1), torch.full((2, 3), 29.0).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(conserved_incoming.sum(1), torch.full((2, 3), 17.0).double(), rtol=1e-4, atol=0)
    # values of one: what a query gets is its allocation times the mean of the competitions that it weighs
    competition = 17 * conserved_outgoing.softmax(1)
    torch.testing.assert_close(competition.sum(1), torch.full((2, 3), 17.0).double())
    weights = torch.einsum("bthk,bshk->bhts", q, k) / incoming.mT[..., None]
    allocation = torch.sigmoid(conserved_incoming * 29 / 17)
    expected = allocation * torch.einsum("bhts,bsh->bth", weights, competition)
    actual, _ = flow_attention(q, k, torch.ones(2, 17, 3, 1, dtype=torch.float64), causal=False)
    torch.testing.assert_close(actual[..., 0], expected, rtol=1e-4, atol=1e-5)  # eps 1e-6 in sums of order one


def test_without_gates_it_is_normalised_linear_attention(monkeypatch):
    """Equal keys and queries compete and are allocated alike: what is left is the plain average, times sigmoid(1)."""
    q, k, v = draw(20)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    plain, _ = linear_attention(q, k, v, causal=False, normalize=True)
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(flow_attention(q, k, v, causal=False)[0], share * plain, rtol=1e-5, atol=1e-5)


def test_order_does_not_matter_where_all_is_seen():
    q, k, v = draw(12, keys=9)
    output, _ = flow_attention(q, k, v, causal=False)
    turned, _ = flow_attention(q, k.flip(1), v.flip(1), causal=False)
    torch.testing.assert_close(turned, output)
    torch.testing.assert_close(flow_attention(q.flip(1), k, v, causal=False)[0], output.flip(1))


def test_a_clip_of_one_is_the_competition_of_the_authors_own_file():
    """The non-causal definition from its table of pairs, with the exponent kept within one."""
    q, k, v = draw(21)
    pairs = torch.einsum("bihk,bjhk->bhij", q, k)
    to_query, from_key = 1 / pairs.sum(3, keepdim=True), 1 / pairs.sum(2, keepdim=True)
    competition = 21 * (pairs * to_query).sum(2).clamp(-1, 1).softmax(-1)
    allocation = torch.sigmoid((pairs * from_key).sum(3))
    expected = torch.einsum("bhij,bhj,bjhv->bhiv", pairs * to_query, competition, v) * allocation[..., None]
    actual, _ = flow_attention(q, k, v, causal=False, clip=1.0, eps=1e-12)
    torch.testing.assert_close(actual.transpose(1, 2), expected)
    assert not torch.allclose(flow_attention(q, k, v, causal=False)[0], actual, rtol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_one_token_gets_the_share_of_its_value(backend):
    q, k, v = (x.float() for x in draw(1))
    output, state = flow_attention(q, k, v, return_state=True, backend=backend)
    torch.testing.assert_close(output, torch.sigmoid(torch.tensor(1.0)) * v, rtol=1e-4, atol=1e-5)
    assert state.seen.tolist() == [1, 1]


def test_the_last_causal_token_is_near_the_non_causal_one():
    q, k, v = draw(64)
    causal, full = (flow_attention(q, k, v, causal=causal)[0][:, -1] for causal in (True, False))
    assert 0 < (causal - full).abs().max() < 2e-2


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_split_and_steps_equal_whole(backend):
    q, k, v = (x.float() for x in draw(20))
    whole, last = flow_attention(q, k, v, return_state=True, backend=backend)
    for cuts in ([1] * 20, [13, 7], [19, 1]):
        state, outputs, start = empty_flow_state(2, 3, 6, 5, "cpu"), [], 0
        for size in cuts:
            pieces = (x[:, start : start + size] for x in (q, k, v))
            output, state = flow_attention(*pieces, initial_state=state, return_state=True, backend=backend)
            outputs.append(output)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate_with_gradients(backend, causal):
    tensors = [x.float() for x in draw(40, batch=1)]
    offsets = [0, 1, 1, 17, 40]
    options = {"causal": causal, "backend": backend}
    state = FlowState(*(x.float() if x.is_floating_point() else x for x in earlier(4))) if causal else None
    results = []
    for packed in (True, False):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if packed:
            o, _ = flow_attention(*leaves, cu_seqlens=torch.tensor(offsets), initial_state=state, **options)
        else:
            parts = [
                flow_attention(
                    *(x[:, a:b] for x in leaves),
                    initial_state=None if state is None else FlowState(*(x[n : n + 1] for x in state)),
                    **options,
                )[0]
                for n, (a, b) in enumerate(pairwise(offsets))
                if b > a
            ]
            o = torch.cat(parts, 1)
        results.append([o.detach(), *torch.autograd.grad(o.cos().sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_enters_no_sum(causal):
    q, k, v = draw(15)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 9:] = False
    masks = {"mask": mask} if causal else {"mask": mask, "query_mask": mask}
    output, _ = flow_attention(q, k, v, causal=causal, **masks)
    alone, _ = flow_attention(q[:1, :9], k[:1, :9], v[:1, :9], causal=causal)
    torch.testing.assert_close(output[:1, :9], alone)


def test_cross_reads_real_keys_for_every_query():
    q, k, v = draw(8, keys=8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 5:] = False
    output, _ = flow_attention(q, k, v, causal=False, mask=mask)
    torch.testing.assert_close(output, flow_attention(q, k[:, :5], v[:, :5], causal=False)[0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    tensors = [x[:1, :5].requires_grad_() for x in draw(5, width=2, value=2)]
    state = flow_attention(*draw(3, batch=1, width=2, value=2, seed=2), return_state=True)[1]
    sums = [x.requires_grad_() for x in state if x.is_floating_point()]

    def run(q, k, v, *sums):
        own = FlowState(*sums[:5], state.seen, sums[5])
        output, last = flow_attention(q, k, v, initial_state=own, return_state=True, chunk_size=3, backend=backend)
        return output, *(x for x in last if x.is_floating_point())

    assert torch.autograd.gradcheck(run, (*tensors, *sums))
    assert torch.autograd.gradcheck(lambda *x: flow_attention(*x, causal=False)[0], tensors)


def test_operator_passes_opcheck_and_compiles():
    q, k, v = (x.float().requires_grad_() for x in draw(9))
    state = empty_flow_state(2, 3, 6, 5, "cpu")
    sums = torch.rand(2, 3, 4, 6).requires_grad_()
    rest = (state.competition.requires_grad_(), state.seen, None, 1e-6, 10.0, 1.0)
    for mask in (None, torch.ones(2, 9, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.subquad.flow_gates_cpu.default, (q, k, mask, sums, *rest))
    torch._dynamo.reset()

    def run(*tensors):
        output, last = flow_attention(*tensors, return_state=True)
        return output.sin().sum() + last.state.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)
    (first,) = torch.autograd.grad(flow_attention(q, k, v, backend="cpu")[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.square().sum(), k)


def test_half_precision_and_strides():
    tensors = draw(70)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = [x.to(dtype) for x in tensors]
        output, state = flow_attention(*rounded, return_state=True)
        assert (output.dtype, state.state.dtype) == (dtype, torch.float32)
        expected, _ = flow_attention(*(x.double() for x in rounded), backend="reference")
        assert (output.double() - expected).abs().max() <= 4 * 2**-8 * expected.abs().max()
    single = [x.float() for x in tensors]
    plain, _ = flow_attention(*single)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in single]
    torch.testing.assert_close(flow_attention(*strided)[0], plain)


def test_features_that_are_zero_stay_finite():
    q, k, v = (x.float() for x in draw(50))
    q[:, 10:20] = 1e-6
    k[:, 5:30] = 1e-6
    for causal in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output, _ = flow_attention(*leaves, causal=causal)
        assert output.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(output.sum(), leaves))


def test_a_million_tokens_do_not_overflow():
    """The sum of exponentials grows with the tokens: e^10 of each is far below float32's range."""
    state = empty_flow_state(1, 1, 2, 1, "cpu")
    state = state._replace(competition=torch.full((1, 1), 1e6 * math.exp(10)), seen=torch.tensor([10**6]))
    state = state._replace(**{name: torch.full((1, 1, 2), 5e5) for name in FlowState._fields[:4]})
    q = k = torch.full((1, 3, 1, 2), 0.5)
    output, last = flow_attention(q, k, torch.ones(1, 3, 1, 1), initial_state=state, return_state=True)
    assert output.isfinite().all()
    assert last.seen.item() == 10**6 + 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": 0.0}, ValueError, "eps"),
        ({"clip": 0.0}, ValueError, "clip"),
        ({"clip": math.inf}, ValueError, "clip"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"mask": torch.ones(2, 29)}, TypeError, "bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"query_mask": torch.ones(2, 29, dtype=torch.bool)}, ValueError, "causal=False"),
        ({"causal": False, "return_state": True}, ValueError, "belongs to causal"),
        ({"initial_state": torch.zeros(3)}, TypeError, "FlowState"),
        ({"initial_state": FlowState(*torch.zeros(7, 1))}, ValueError, r"initial_state\.key_sum"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
        ({"cu_seqlens": torch.tensor([0, 29])}, ValueError, "batch of 1"),
        ({"chunk_size": 0}, ValueError, "between 1 and 1024"),
    ],
)
def test_bad_options_get_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        flow_attention(*draw(), **options)


def test_bad_tensors_get_a_sentence():
    q, k, v = draw()
    with pytest.raises(ValueError, match="must not be negative"):
        flow_attention(q - 1, k, v)
    with pytest.raises(ValueError, match="one shape"):
        flow_attention(q, k[:, :5], v[:, :5])
    with pytest.raises(ValueError, match="sums, competition, count"):
        flow_gates_cpu.module.forward(
            q, k, None, torch.zeros(2, 3, 4, 5), torch.zeros(2, 3), torch.zeros(2), None, 1e-6, 1.0, 1.0
        )
