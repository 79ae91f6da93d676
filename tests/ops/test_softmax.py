"""Softmax attention: every way of computing it equals the definition, for every kind of sight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import SoftmaxState, softmax_attention


def draw(time=29, context=None, heads=4, groups=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context = context or time

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return tensor(batch, time, heads, 6), tensor(batch, context, groups, 6), tensor(batch, context, groups, 5)


@settings(deadline=None, max_examples=40)
@given(
    time=st.sampled_from([1, 2, 7, 33, 64]),
    window=st.sampled_from([None, 1, 2, 5, 16]),
    sinks=st.integers(0, 3),
    masked=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
)
def test_causal_equals_the_definition(time, window, sinks, masked, groups):
    q, k, v = draw(time, groups=groups)
    mask = (torch.rand(2, time, generator=torch.Generator().manual_seed(1)) > 0.4) if masked else None
    options = {"window_size": window, "num_sinks": sinks if window else 0, "mask": mask}
    expected, _ = softmax_attention(q, k, v, backend="reference", **options)
    actual, _ = softmax_attention(q, k, v, **options)
    torch.testing.assert_close(actual, expected)


def test_definition_is_softmax_of_the_scores():
    q, k, v = draw(9, groups=4)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * 6**-0.5
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)
    torch.testing.assert_close(softmax_attention(q, k, v, backend="reference")[0], expected)


@pytest.mark.parametrize("window", [None, 1, 4, 9])
def test_pieces_and_steps_equal_whole(window):
    q, k, v = draw(31)
    sight = {"window_size": window, "num_sinks": 2 if window else 0}
    whole, _ = softmax_attention(q, k, v, **sight)
    for cuts in ([10, 21], [1] * 31):
        outputs, state, start = [], None, 0
        for size in cuts:
            piece = [x[:, start : start + size] for x in (q, k, v)]
            output, state = softmax_attention(*piece, **sight, initial_state=state, return_state=True)
            outputs.append(output)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1), whole)
        if window:
            assert state.keys.shape[1] <= max(window - 1, 1) + 2 + max(cuts) * (len(cuts) == 2)


def test_left_padding_with_a_cache_equals_single_rows():
    q, k, v = draw(20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    sight = {"window_size": 4, "num_sinks": 1}
    first, state = softmax_attention(q[:, :12], k[:, :12], v[:, :12], mask=mask[:, :12], return_state=True, **sight)
    second, _ = softmax_attention(q[:, 12:], k[:, 12:], v[:, 12:], initial_state=state, **sight)
    alone, _ = softmax_attention(q[1:, 7:], k[1:, 7:], v[1:, 7:], **sight)
    torch.testing.assert_close(torch.cat([first, second], 1)[1:, 7:], alone)
    assert bool((first[1, :7] == 0).all())


def test_prefix_sees_itself_whole_and_no_later_token():
    q, k, v = draw(10)
    lengths = torch.tensor([4, 0])
    output, _ = softmax_attention(q, k, v, prefix_lengths=lengths)
    full, _ = softmax_attention(q[:1, :4], k[:1, :4], v[:1, :4], causal=False)
    torch.testing.assert_close(output[:1, :4], full)
    torch.testing.assert_close(output[1], softmax_attention(q, k, v)[0][1])
    torch.testing.assert_close(output[0, 4:], softmax_attention(q, k, v)[0][0, 4:])


def test_cross_attention_ignores_padded_context():
    q, k, v = draw(8, context=15)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 9:] = False
    output, _ = softmax_attention(q, k, v, causal=False, mask=mask)
    alone, _ = softmax_attention(q[:1], k[:1, :9], v[:1, :9], causal=False)
    torch.testing.assert_close(output[:1], alone)
    mask[1] = False
    assert bool((softmax_attention(q, k, v, causal=False, mask=mask)[0][1] == 0).all())


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(causal):
    q, k, v = draw(40, batch=1)
    offsets = [0, 3, 3, 21, 40]
    output, _ = softmax_attention(q, k, v, causal=causal, cu_seqlens=torch.tensor(offsets))
    for a, b in ((0, 3), (3, 21), (21, 40)):
        one, _ = softmax_attention(q[:, a:b], k[:, a:b], v[:, a:b], causal=causal)
        torch.testing.assert_close(output[:, a:b], one)


def test_packed_states_go_on():
    q, k, v = draw(30, batch=1)
    _, state = softmax_attention(
        q[:, :14], k[:, :14], v[:, :14], cu_seqlens=torch.tensor([0, 5, 14]), return_state=True
    )
    tail, _ = softmax_attention(
        q[:, 14:], k[:, 14:], v[:, 14:], cu_seqlens=torch.tensor([0, 10, 16]), initial_state=state
    )
    joined = [torch.cat([x[:, :5], x[:, 14:24]], 1) for x in (q, k, v)]
    torch.testing.assert_close(tail[:, :10], softmax_attention(*joined)[0][:, 5:])


def test_results_over_disjoint_keys_merge_by_their_log_sum_exp():
    q, k, v = (x.requires_grad_() for x in draw(6, context=20))
    whole, _, total = softmax_attention(q, k, v, causal=False, return_log_sum_exp=True)
    parts = [
        softmax_attention(q, k[:, a:b], v[:, a:b], causal=False, return_log_sum_exp=True) for a, b in ((0, 7), (7, 20))
    ]
    sums = torch.stack([part[2] for part in parts])
    weights = torch.softmax(sums, dim=0)
    merged = sum(w[..., None] * part[0] for w, part in zip(weights, parts))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(torch.logsumexp(sums, 0), total)
    (gradient,) = torch.autograd.grad(merged.cos().sum(), k, retain_graph=True)
    (expected,) = torch.autograd.grad(whole.cos().sum(), k)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window_size": 0}, ValueError, "window_size"),
        ({"num_sinks": 2}, ValueError, "belongs to a window"),
        ({"causal": False, "window_size": 3}, ValueError, "belong to causal"),
        ({"mask": torch.ones(2, 29)}, TypeError, "bool"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"prefix_lengths": torch.zeros(3, dtype=torch.int64)}, ValueError, "prefix_lengths"),
        ({"window_size": 3, "prefix_lengths": torch.zeros(2, dtype=torch.int64)}, ValueError, "exclude"),
    ],
)
def test_bad_options_get_a_sentence(change, error, message):
    with pytest.raises(error, match=message):
        softmax_attention(*draw(), **change)


def test_bad_shapes_get_a_sentence():
    q, k, v = draw()
    with pytest.raises(ValueError, match="as many keys as queries"):
        softmax_attention(q, k[:, :5], v[:, :5])
    with pytest.raises(ValueError, match="multiple of G"):
        softmax_attention(q[:, :, :3], k, v)
    empty = SoftmaxState(k[:1], v, torch.zeros(2, 29, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"initial_state\.keys"):
        softmax_attention(q, k, v, initial_state=empty)


def decode(state, tokens):
    outputs = []
    for piece in zip(*(x.split(1, 1) for x in tokens)):
        output, state = softmax_attention(*piece, initial_state=state, return_state=True)
        outputs.append(output)
    return torch.cat(outputs, 1), state


@torch.no_grad()
def test_a_cache_grows_in_place_and_a_second_continuation_copies():
    q, k, v = draw()
    _, state = softmax_attention(q[:, :9], k[:, :9], v[:, :9], return_state=True)
    _, state = decode(state, [x[:, 9:10] for x in (q, k, v)])
    places = [x.data_ptr() for x in state]
    first, after = decode(state, [x[:, 10:] for x in (q, k, v)])
    assert [x.data_ptr() for x in after] == places
    torch.testing.assert_close(first, softmax_attention(q, k, v)[0][:, 10:])
    other = [torch.cat([x[:, :10], x[:, 10:].flip(1)], 1) for x in (q, k, v)]
    second, elsewhere = decode(state, [x[:, 10:] for x in other])
    torch.testing.assert_close(second, softmax_attention(*other)[0][:, 10:])
    assert elsewhere.keys.data_ptr() != places[0]
    torch.testing.assert_close(after.keys, k)
    again, _ = decode(after, [x[:, :3] for x in (q, k, v)])
    joined = [torch.cat([x, x[:, :3]], 1) for x in (q, k, v)]
    torch.testing.assert_close(again, softmax_attention(*joined)[0][:, q.shape[1] :])


def test_a_cache_grown_in_inference_mode_continues_outside_of_it():
    q, k, v = draw()
    with torch.inference_mode():
        _, state = softmax_attention(q[:, :9], k[:, :9], v[:, :9], return_state=True)
        _, state = decode(state, [x[:, 9:12] for x in (q, k, v)])
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            output, _ = decode(state, [x[:, 12:] for x in (q, k, v)])
        torch.testing.assert_close(output, softmax_attention(q, k, v)[0][:, 12:])
