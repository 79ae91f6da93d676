"""Prefix linear attention: equal to its definition, and to the causal and non-causal ops that it joins."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import linear_attention, prefix_linear_attention, taylor_features, taylor_linear_attention

FEATURES = pytest.mark.parametrize("features", ["taylor", "identity"])


def draw(time=17, batch=2, width=3, value=4, seed=0, features="taylor"):
    generator = torch.Generator().manual_seed(seed)
    widths = (width, width, value, width, value)
    q, k, v, prefix_k, prefix_v = (
        torch.randn(batch, time, 3, w, generator=generator, dtype=torch.float64) for w in widths
    )
    if features == "identity":
        q, k, prefix_k = (x.exp() for x in (q, k, prefix_k))
    return q, k, v, prefix_k, prefix_v


@FEATURES
@pytest.mark.parametrize("normalize", [True, False])
@settings(deadline=None, max_examples=12)
@given(time=st.sampled_from([1, 2, 17, 65]), first=st.integers(0, 65), second=st.integers(0, 65))
def test_equals_the_definition(features, normalize, time, first, second):
    arguments = [x.requires_grad_() for x in draw(time, features=features)]
    lengths = torch.tensor([min(first, time), min(second, time)])
    results = []
    for backend in ("reference", "chunked"):
        output, last = prefix_linear_attention(
            *arguments,
            prefix_lengths=lengths,
            features=features,
            normalize=normalize,
            return_state=True,
            backend=backend,
        )
        state = [*last] if normalize else [last]
        total = output.cos().sum() + sum(x.sin().sum() for x in state)
        results.append([output, *state, *torch.autograd.grad(total, arguments)])
    for a, b in zip(*results):
        torch.testing.assert_close(b, a)


@FEATURES
def test_cpu_equals_the_definition(features):
    arguments, lengths = draw(150, features=features), torch.tensor([90, 7])
    options = {"prefix_lengths": lengths, "features": features, "return_state": True}
    expected, end = prefix_linear_attention(*arguments, backend="reference", **options)
    leaves = [x.float().requires_grad_() for x in arguments]
    actual, last = prefix_linear_attention(*leaves, backend="cpu", **options)
    for a, b in zip((actual, *last), (expected, *end)):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()
    exact = [x.requires_grad_() for x in arguments]
    expected, _ = prefix_linear_attention(*exact, backend="reference", **options)
    wanted = torch.autograd.grad(expected.cos().sum(), exact)
    for a, b in zip(torch.autograd.grad(actual.cos().sum(), leaves), wanted):
        assert (a.double() - b).abs().max() <= 1e-4 * max(1e-2, b.abs().max())


@FEATURES
def test_without_a_prefix_it_is_the_causal_op(features):
    q, k, v, prefix_k, prefix_v = draw(features=features)
    none = torch.zeros(2, dtype=torch.int64)
    actual = prefix_linear_attention(
        q, k, v, prefix_k, prefix_v, prefix_lengths=none, features=features, return_state=True
    )
    if features == "taylor":
        expected = taylor_linear_attention(q, k, v, return_state=True)
    else:
        expected = linear_attention(q, k, v, normalize=True, return_state=True)
    torch.testing.assert_close(actual, expected)


def test_the_prefix_alone_is_the_non_causal_op():
    """Decoder keys whose features are zero: what is left is the sum over all tokens."""
    q, _, v, prefix_k, prefix_v = draw(features="identity")
    whole = torch.tensor([17, 17])
    actual, _ = prefix_linear_attention(
        q, torch.zeros_like(q), v, prefix_k, prefix_v, prefix_lengths=whole, features="identity"
    )
    expected, _ = linear_attention(q, prefix_k, prefix_v, causal=False, normalize=True)
    torch.testing.assert_close(actual, expected)


def test_two_tokens_in_closed_form():
    q, k, v, prefix_k, prefix_v = draw(2, batch=1)
    output, _ = prefix_linear_attention(q, k, v, prefix_k, prefix_v, prefix_lengths=torch.tensor([1]))

    def weight(i, key, j):
        score = (q[0, i] * key[0, j]).sum(-1, keepdim=True) * 3**-0.5
        return 1 + score + score.square() / 2

    for i in range(2):
        terms = [(weight(i, k, j), v[0, j]) for j in range(i + 1)] + [(weight(i, prefix_k, 0), prefix_v[0, 0])]
        expected = sum(w * value for w, value in terms) / sum(w for w, _ in terms)
        torch.testing.assert_close(output[0, i], expected)


def test_it_is_the_causal_op_from_the_state_of_the_prefix():
    q, k, v, prefix_k, prefix_v = (x.requires_grad_() for x in draw())
    lengths = torch.tensor([9, 9])
    actual, _ = prefix_linear_attention(q, k, v, prefix_k, prefix_v, prefix_lengths=lengths)
    phi = taylor_features(prefix_k[:, :9])
    state = torch.einsum("bthf,bthv->bhfv", phi, prefix_v[:, :9]), phi.sum(1)
    expected, _ = taylor_linear_attention(q, k, v, initial_state=state)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        *(torch.autograd.grad(x.cos().sum(), (prefix_k, prefix_v), retain_graph=True) for x in (actual, expected))
    ):
        torch.testing.assert_close(a, b)
    small = [x[:1, :4].detach().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    three = torch.tensor([3])
    assert torch.autograd.gradcheck(lambda *x: prefix_linear_attention(*x, prefix_lengths=three)[0], small)


def test_a_token_is_seen_by_what_should_see_it():
    arguments, lengths = draw(batch=1), torch.tensor([9])
    before, _ = prefix_linear_attention(*arguments, prefix_lengths=lengths)
    for place, seen_from in ((5, 0), (12, 12)):
        changed = [x.clone() for x in arguments]
        for x in changed[1:]:
            x[:, place] += 1
        after, _ = prefix_linear_attention(*changed, prefix_lengths=lengths)
        moved = ((after - before).abs().sum((0, 2, 3)) > 1e-12).nonzero().flatten().tolist()
        assert moved == list(range(seen_from, 17))


@FEATURES
@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_packed_and_padded_equal_separate(features, backend):
    dtype = torch.float32 if backend == "cpu" else torch.float64
    arguments = [x.to(dtype) for x in draw(30, batch=1, features=features)]
    offsets, lengths = [0, 8, 8, 30], torch.tensor([3, 0, 22])
    options = {"features": features, "return_state": True, "backend": backend}
    packed, last = prefix_linear_attention(
        *arguments, prefix_lengths=lengths, cu_seqlens=torch.tensor(offsets), **options
    )
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    for n, (a, b) in enumerate(((0, 8), (8, 8), (8, 30))):
        if a == b:
            assert float(last.state[n].abs().max()) == 0
            continue
        pieces = [x[:, a:b] for x in arguments]
        one, end = prefix_linear_attention(*pieces, prefix_lengths=lengths[n : n + 1], **options)
        torch.testing.assert_close(packed[:, a:b], one, **tolerance)
        torch.testing.assert_close(last.state[n : n + 1], end.state, **tolerance)
        padded = [torch.cat([x, 7 * torch.ones_like(x[:, :3])], 1) for x in pieces]
        mask = torch.arange(b - a + 3)[None] < b - a
        other, same = prefix_linear_attention(*padded, prefix_lengths=lengths[n : n + 1], mask=mask, **options)
        torch.testing.assert_close(other[:, : b - a], one, **tolerance)
        torch.testing.assert_close(same.state, end.state, **tolerance)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prefix_lengths": torch.tensor([18, 0])}, ValueError, "between 0 and"),
        ({"prefix_lengths": torch.tensor([-1, 0])}, ValueError, "between 0 and"),
        ({"prefix_lengths": torch.tensor([1])}, ValueError, "prefix_lengths must be"),
        ({"prefix_lengths": torch.tensor([1.0, 2.0])}, TypeError, "integer"),
        ({"features": "taylors"}, ValueError, "features must be"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"backend": "cpuu"}, ValueError, "did you mean 'cpu'"),
        ({"cu_seqlens": torch.tensor([0, 17])}, ValueError, "batch of 1"),
    ],
)
def test_bad_options_get_a_sentence(change, error, message):
    with pytest.raises(error, match=message):
        prefix_linear_attention(*draw(), **{"prefix_lengths": torch.tensor([4, 5]), **change})


def test_bad_tensors_get_a_sentence():
    q, k, v, prefix_k, prefix_v = draw()
    with pytest.raises(ValueError, match="prefix_k must be"):
        prefix_linear_attention(q, k, v, prefix_k[:, :5], prefix_v, prefix_lengths=torch.tensor([1, 1]))
    with pytest.raises(TypeError, match="share dtype"):
        prefix_linear_attention(q, k, v, prefix_k, prefix_v.float(), prefix_lengths=torch.tensor([1, 1]))
