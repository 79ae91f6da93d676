"""Taylor linear attention: its features, every backend against the definition, and what its weights are."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import ops
from subquad.kernels.taylor import features
from subquad.kernels.taylor.dispatch import taylor_cpu
from subquad.ops import NormalizedState, taylor_features, taylor_linear_attention


def draw(time=29, keys=None, batch=2, heads=3, width=4, value=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = keys or time
    return tensor(batch, time, heads, width), tensor(batch, keys, heads, width), tensor(batch, keys, heads, value)


def start(rows=2, heads=3, width=4, value=5, seed=1):
    """A state that some tokens left, so that its normaliser is one."""
    _, k, v = draw(6, batch=rows, heads=heads, width=width, value=value, seed=seed)
    phi = taylor_features(k)
    return NormalizedState(torch.einsum("bthf,bthv->bhfv", phi, v), phi.sum(1))


def with_gradients(tensors, state, **options):
    """Output, state and the gradients of everything, of one scalar of all results."""
    leaves = [x.detach().clone().requires_grad_() for x in (*tensors, *state)]
    output, last = taylor_linear_attention(
        *leaves[:3], initial_state=NormalizedState(*leaves[3:]), return_state=True, **options
    )
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    ((weight * output).sum() + last.state.sin().sum() + last.normalizer.sin().sum()).backward()
    return [output.detach(), last.state.detach(), last.normalizer.detach(), *(x.grad for x in leaves)]


def assert_within(actual, expected, bound):
    """``max|a - b| <= bound * max|b|`` per tensor; a head's share of a gradient may be small beside the others'."""
    for place, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error, size = float((a.double() - b).abs().max()), float(b.abs().max())
        assert error <= bound * max(size, 1e-2), f"tensor {place}: {error} for size {size}"


@pytest.mark.parametrize("width", [1, 2, 4, 16])
def test_products_of_features_are_the_series(width):
    q, k = torch.randn(2, 50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = (q * k).sum(-1) * width**-0.5
    expected = 1 + score + score.square() / 2
    phi_q, phi_k = taylor_features(q), taylor_features(k)
    assert phi_q.shape[-1] == features.feature_width(width) == 1 + width + width * (width + 1) // 2
    torch.testing.assert_close((phi_q * phi_k).sum(-1), expected)

    def full(x):  # the layout without symmetry
        outer = (x[:, :, None] * x[:, None, :]).flatten(1) / (2 * width) ** 0.5
        return torch.cat([torch.ones(len(x), 1).double(), x * width**-0.25, outer], dim=-1)

    torch.testing.assert_close((full(q) * full(k)).sum(-1), expected)


def test_features_of_half_precision_are_float32():
    assert taylor_features(torch.full((2, 4), 300.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
@settings(deadline=None, max_examples=15)
@given(
    time=st.sampled_from([1, 2, 31, 32, 33, 64, 65, 130]),
    width=st.sampled_from([1, 3, 16]),
    value=st.sampled_from([1, 7, 16, 33]),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2),
)
def test_equals_the_definition(backend, time, width, value, heads, seed):
    tensors, state = draw(time, heads=heads, width=width, value=value, seed=seed), start(2, heads, width, value)
    expected = with_gradients(tensors, state, backend="reference")
    if backend == "chunked":
        assert_within(with_gradients(tensors, state, backend=backend, chunk_size=16), expected, 1e-9)
    else:
        single = [x.float() for x in tensors], NormalizedState(*(x.float() for x in state))
        assert_within(with_gradients(*single, backend=backend), expected, 1e-4)


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_bfloat16_is_as_good_as_its_inputs(backend):
    tensors, state = [x.bfloat16() for x in draw(70, width=16)], start(width=16)
    output, last = taylor_linear_attention(
        *tensors, initial_state=NormalizedState(*(x.float() for x in state)), return_state=True, backend=backend
    )
    assert (output.dtype, last.state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = taylor_linear_attention(*(x.double() for x in tensors), initial_state=state, backend="reference")
    assert (output.double() - expected).abs().max() <= 4 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("normalize", [True, False])
def test_packed_equals_separate_with_gradients(backend, normalize):
    tensors = [x.float() for x in draw(75, batch=1)]
    offsets = [0, 1, 1, 34, 75]
    states = NormalizedState(*(x.float() for x in start(4)))

    def run(packed):
        leaves = [x.clone().requires_grad_() for x in (*tensors, *states)]
        own = NormalizedState(*leaves[3:])
        options = {"normalize": normalize, "return_state": True, "backend": backend}

        def state_of(n):
            return NormalizedState(*(x[n : n + 1] for x in own)) if normalize else own.state[n : n + 1]

        if packed:
            initial = own if normalize else own.state
            o, s = taylor_linear_attention(
                *leaves[:3], initial_state=initial, cu_seqlens=torch.tensor(offsets), **options
            )
        else:
            parts = [
                taylor_linear_attention(*(x[:, a:b] for x in leaves[:3]), initial_state=state_of(n), **options)
                if b > a
                else (leaves[2][:, :0], state_of(n))
                for n, (a, b) in enumerate(pairwise(offsets))
            ]
            o = torch.cat([part[0] for part in parts], 1)
            s = [part[1] for part in parts]
            s = NormalizedState(*(torch.cat(x) for x in zip(*s))) if normalize else torch.cat(s)
        total = s.state.sin().sum() + s.normalizer.sin().sum() if normalize else s.sin().sum()
        (o.cos().sum() + total).backward()
        return [o.detach(), *(x.grad for x in leaves[: 5 if normalize else 4])]

    for a, b in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("cut", [1, 32, 2048, 4096])
def test_split_equals_whole_at_4097_tokens(cut):
    q, k, v = (x.float() for x in draw(4097, batch=1, heads=1))
    whole, last = taylor_linear_attention(q, k, v, return_state=True)
    head, state = taylor_linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], return_state=True)
    tail, end = taylor_linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], initial_state=state, return_state=True)
    assert_within([torch.cat([head, tail], 1), *end], [x.double() for x in (whole, *last)], 1e-4)


def test_steps_equal_whole():
    q, k, v = (x.float() for x in draw(20))
    whole, last = taylor_linear_attention(q, k, v, return_state=True)
    state, outputs = NormalizedState(torch.zeros_like(last.state), torch.zeros_like(last.normalizer)), []
    for t in range(20):
        before = [x.clone() for x in state]
        output, after = taylor_linear_attention(
            *(x[:, t : t + 1] for x in (q, k, v)), initial_state=state, return_state=True
        )
        assert all(torch.equal(a, b) for a, b in zip(state, before))  # the old state is not written to
        outputs.append(output)
        state = after
    assert_within([torch.cat(outputs, 1), *state], [x.double() for x in (whole, *last)], 1e-4)


@pytest.mark.parametrize("normalize", [True, False])
def test_non_causal_and_cross(normalize):
    q, k, v = draw(9, keys=23)
    expected, _ = taylor_linear_attention(q, k, v, causal=False, normalize=normalize, backend="reference")
    actual, last = taylor_linear_attention(q, k, v, causal=False, normalize=normalize, return_state=True)
    torch.testing.assert_close(actual, expected)
    _, causal = taylor_linear_attention(k, k, v, normalize=normalize, return_state=True)
    torch.testing.assert_close(last, causal)
    x = draw(40, batch=1)
    packed, _ = taylor_linear_attention(*x, causal=False, cu_seqlens=torch.tensor([0, 3, 3, 40]))
    for a, b in ((0, 3), (3, 40)):
        alone, _ = taylor_linear_attention(*(t[:, a:b] for t in x), causal=False)
        torch.testing.assert_close(packed[:, a:b], alone)


def test_long_sequences_are_read_in_segments(monkeypatch):
    q, k, v = draw(50)
    expected = [taylor_linear_attention(q, k, v, causal=causal, return_state=True) for causal in (True, False)]
    monkeypatch.setattr(features, "SEGMENT", 8)
    monkeypatch.setattr("subquad.kernels.taylor.chunked.SEGMENT", 8)
    for causal, wanted in zip((True, False), expected):
        found = taylor_linear_attention(q, k, v, causal=causal, return_state=True, chunk_size=4)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_a_padded_key_weighs_nothing(causal, backend):
    """A zero key would weigh 1: the mask takes it out of the count too."""
    q, k, v = (x.float() for x in draw(12))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = False
    output, last = taylor_linear_attention(q, k, v, causal=causal, mask=mask, return_state=True, backend=backend)
    alone, end = taylor_linear_attention(
        *(x[:1, :7] for x in (q, k, v)), causal=causal, return_state=True, backend=backend
    )
    torch.testing.assert_close(output[:1, :7], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([x[:1] for x in last], list(end), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_one(causal):
    q, k, v = draw()
    output, _ = taylor_linear_attention(q, k, torch.ones_like(v), causal=causal)
    torch.testing.assert_close(output, torch.ones_like(v))


def test_equal_keys_give_the_running_mean():
    q, k, v = draw()
    output, _ = taylor_linear_attention(q, 0 * k, v)
    count = torch.arange(1, 30, dtype=torch.float64)[None, :, None, None]
    torch.testing.assert_close(output, v.cumsum(1) / count)


def test_one_channel_in_closed_form():
    q, k, v = draw(7, heads=1, width=1, value=1)
    score = (q[:, :, 0] @ k[:, :, 0].mT).tril()
    weights = (1 + score + score**2 / 2).tril()
    expected = weights @ v[:, :, 0] / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(taylor_linear_attention(q, k, v)[0][:, :, 0], expected)


def test_small_scores_give_softmax():
    """The series leaves out s^3 / 6, 1.7e-4 of a weight at |s| = 0.1."""
    q, k, v = draw()
    q, k, v = q.clamp(-0.1, 0.1) / 2, k.clamp(-1, 1), v.clamp(-1, 1)  # |s| <= 0.05 sqrt(4)
    expected, _ = ops.softmax_attention(q, k, v)
    assert (taylor_linear_attention(q, k, v)[0] - expected).abs().max() < 2e-4


def test_strides_do_not_matter():
    tensors = [x.float() for x in draw()]
    plain, _ = taylor_linear_attention(*tensors)
    strided = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in tensors]
    torch.testing.assert_close(taylor_linear_attention(*strided)[0], plain)
    expanded = [x[:1].expand_as(x) for x in tensors]
    torch.testing.assert_close(taylor_linear_attention(*expanded)[0][1], plain[0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend):
    leaves = [x.requires_grad_() for x in (*draw(5, batch=1, heads=2, width=2, value=2), *start(1, 2, 2, 2))]

    def run(q, k, v, state, normalizer):
        output, last = taylor_linear_attention(
            q, k, v, initial_state=(state, normalizer), return_state=True, chunk_size=3, backend=backend
        )
        return output, *last

    assert torch.autograd.gradcheck(run, leaves)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_operator_passes_opcheck():
    q, k, v = (x.float().requires_grad_() for x in draw(9))
    state = start().state.float().requires_grad_()
    for extra in ((state, None), (None, None)):
        torch.library.opcheck(torch.ops.subquad.taylor_cpu.default, (q, k, v, *extra, 0.5))
    one = [x[:1].detach() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.subquad.taylor_cpu.default, (*one, None, torch.tensor([0, 4, 9]), 0.5))


@pytest.mark.parametrize("backend", ["chunked", "cpu"])
def test_compiles_as_one_graph(backend):
    torch._dynamo.reset()

    def run(*tensors):
        output, state = taylor_linear_attention(*tensors, return_state=True, backend=backend)
        return output.sin().sum() + state.state.sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.float().requires_grad_() for x in draw(20)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    for plain, graph in zip(*results):
        torch.testing.assert_close(graph, plain, rtol=1e-4, atol=1e-4)


def test_second_derivative_of_the_kernel_is_refused_by_name():
    q, k, v = (x.float().requires_grad_() for x in draw(4))
    (first,) = torch.autograd.grad(taylor_linear_attention(q, k, v, backend="cpu")[0].sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="chunked"):
        torch.autograd.grad(first.square().sum(), q)


def test_the_kernel_checks_what_it_indexes():
    q, k, v = (x.float() for x in draw(4))
    with pytest.raises(ValueError, match="initial_state"):
        taylor_cpu.module.forward(q, k, v, torch.zeros(2, 3, 4, 5), None, 0.5)
    with pytest.raises(ValueError, match="must fit q"):
        taylor_cpu.module.step(q[:, 0], k[:, 0], v[:, 0], torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4), 0.5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale": -1.0}, ValueError, "above 0"),
        ({"scale": float("nan")}, ValueError, "finite"),
        ({"eps": -1}, ValueError, "eps"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
        ({"chunk_size": 0}, ValueError, "between 1 and 1024"),
        ({"mask": torch.ones(2, 29)}, TypeError, "bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"initial_state": torch.zeros(2, 3, 15, 5)}, TypeError, "pair"),
        ({"initial_state": (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4))}, ValueError, "features"),
        ({"initial_state": (torch.zeros(2, 3, 15, 5), torch.zeros(2, 3, 15)), "normalize": False}, TypeError, "pair"),
        ({"cu_seqlens": torch.tensor([0, 29])}, ValueError, "batch of 1"),
    ],
)
def test_bad_options_get_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        taylor_linear_attention(*draw(), **options)


def test_wide_keys_need_permission():
    q, k, v = draw(5, width=33)
    with pytest.raises(ValueError, match="allow_large_state"):
        taylor_linear_attention(q, k, v)
    expected, _ = taylor_linear_attention(q, k, v, allow_large_state=True, backend="reference")
    torch.testing.assert_close(taylor_linear_attention(q, k, v, allow_large_state=True)[0], expected)
    with pytest.raises(ValueError, match="256 features"):
        taylor_linear_attention(q, k, v, allow_large_state=True, backend="gpu")
