"""LoLCATs' two window forms: blocks, steps, splits and packs against the equation, written here as a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import linear_attention, sliding_linear_attention, softmax_attention, terraced_linear_attention

OPS = {"sliding": sliding_linear_attention, "terraced": terraced_linear_attention}
forms = pytest.mark.parametrize("form", OPS)
NAMES = ("keys", "values", "features", "state", "normaliser", "seen")


def draw(batch=2, time=23, heads=4, groups=2, shared=None, key=5, value=7, features=6, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = heads if shared is None else shared
    return (
        spread * normal(batch, time, heads, key),
        spread * normal(batch, time, groups, key),
        normal(batch, time, groups, value),
        normal(batch, time, heads, features).softmax(-1),
        normal(batch, time, shared, features).softmax(-1),
        normal(heads).sigmoid(),
    )


def by_loop(form, q, k, v, phi_q, phi_k, mix, *, window, scale):
    """One query after another, one head after another."""
    output = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            g, p = h * k.shape[2] // q.shape[2], h * phi_k.shape[2] // q.shape[2]
            for t in range(q.shape[1]):
                first = max(t - window + 1 if form == "sliding" else (t // window - 1) * window, 0)
                scores = scale * k[b, first : t + 1, g] @ q[b, t, h]
                near = mix[h] * (scores - scores.max()).exp()
                far = phi_k[b, :first, p] @ phi_q[b, t, h]
                weights = torch.cat([far, near])
                output[b, t, h] = weights @ v[b, : t + 1, g] / weights.sum()
    return output


@forms
@pytest.mark.parametrize("window", [1, 4, 8, 64])
@pytest.mark.parametrize("shared", [4, 2])
def test_every_form_is_the_equation(form, window, shared):
    x = draw(shared=shared)
    expected = by_loop(form, *x, window=window, scale=0.7)
    for backend in ("reference", "chunked", "auto"):
        output, state = OPS[form](*x, window=window, scale=0.7, backend=backend)
        assert state is None
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@forms
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_splits_steps_and_packs_equal_the_whole(form, data):
    window, time = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    shared = data.draw(st.sampled_from([2, 4]))
    x = draw(time=time, shared=shared, seed=data.draw(st.integers(0, 99)), spread=3.0)
    whole, last = OPS[form](*x, window=window, return_state=True)
    cuts = sorted(data.draw(st.lists(st.integers(0, time), max_size=4)))
    parts, state = [], None
    for first, stop in zip([0, *cuts], [*cuts, time]):
        if first == stop:
            continue
        piece = [t[:, first:stop] for t in x[:5]]
        backend = data.draw(st.sampled_from(["chunked", "reference"]))
        o, state = OPS[form](*piece, x[5], window=window, initial_state=state, return_state=True, backend=backend)
        parts.append(o)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    for name, a, b in zip(NAMES, state, last):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    # the same pieces as packed sequences, each by itself and then gone on with
    bounds = torch.tensor([0, *cuts, time])
    packed, states = OPS[form](*(t[:1] for t in x[:5]), x[5], window=window, cu_seqlens=bounds, return_state=True)
    again, after = OPS[form](
        *(t[:1] for t in x[:5]), x[5], window=window, cu_seqlens=bounds, initial_state=states, return_state=True
    )
    for n, (first, stop) in enumerate(zip([0, *cuts], [*cuts, time])):
        own = [t[:1, first:stop] for t in x[:5]]
        if first == stop:
            assert int(after.seen[n]) == 0
            continue
        twice, end = OPS[form](*(torch.cat([t, t], 1) for t in own), x[5], window=window, return_state=True)
        torch.testing.assert_close(
            torch.cat([packed[:, first:stop], again[:, first:stop]], 1), twice, rtol=1e-9, atol=1e-9
        )
        for a, b in zip(after, end):
            torch.testing.assert_close(a[n : n + 1], b, rtol=1e-9, atol=1e-9)


@forms
def test_special_cases_are_known_methods(form):
    q, k, v, phi_q, phi_k, mix = draw(time=12)
    op, near = OPS[form], softmax_attention(q, k, v)[0]
    torch.testing.assert_close(op(q, k, v, phi_q, phi_k, mix, window=12)[0], near, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(op(q, k, v, phi_q, phi_k, mix, window=500)[0], near, rtol=1e-10, atol=1e-10)
    even = op(q, k, torch.ones_like(v), phi_q, phi_k, mix, window=3)[0]
    torch.testing.assert_close(even, torch.ones_like(even))
    # a window of no weight leaves the older keys: the last of a window that moves by one token
    v_all, window = v.repeat_interleave(2, dim=2), 3
    far = op(q, k, v, phi_q, phi_k, mix * 1e-14, window=window)[0]
    linear = linear_attention(phi_q, phi_k, v_all, normalize=True, eps=0.0)[0]
    for t in (9, 11):
        first = t - window if form == "sliding" else (t // window - 1) * window - 1
        old = torch.einsum("bhf,bshf->bhs", phi_q[:, t], phi_k[:, : first + 1])
        expected = torch.einsum("bhs,bshv->bhv", old / old.sum(-1, keepdim=True), v_all[:, : first + 1])
        torch.testing.assert_close(far[:, t], expected, rtol=1e-9, atol=1e-9)
    assert linear.shape == far.shape


@forms
def test_gradients_flow_through_the_maximum_and_the_state(form):
    x = [t.requires_grad_() for t in draw(1, 7, 2, 1, 1, 3, 2, 3)]

    def run(*x):
        first, state = OPS[form](*(t[:, :4] for t in x[:5]), x[5], window=2, return_state=True)
        second, last = OPS[form](*(t[:, 4:] for t in x[:5]), x[5], window=2, initial_state=state, return_state=True)
        return first, second, last.state, last.normaliser

    assert torch.autograd.gradcheck(run, x)
    whole = OPS[form](*x, window=2)[0]
    expected = torch.autograd.grad(by_loop(form, *x, window=2, scale=3**-0.5).cos().sum(), x)
    for a, b in zip(torch.autograd.grad(whole.cos().sum(), x), expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_stay_near_float64(form, dtype):
    x = [t.to(dtype) for t in draw(time=130, spread=3.0)]
    expected = OPS[form](*(t.double() for t in x), window=16)[0]
    output, state = OPS[form](*x, window=16, return_state=True)
    assert output.dtype == dtype
    assert (state.keys.dtype, state.state.dtype) == (dtype, torch.float32)
    bound = 1e-4 if dtype == torch.float32 else 4 * 2**-8
    assert (output.double() - expected).abs().max() <= bound * expected.abs().max()


def test_compiles_whole_and_takes_strided_input():
    x = draw(time=19)
    compiled = torch.compile(lambda *a: sliding_linear_attention(*a, window=4)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*x), sliding_linear_attention(*x, window=4)[0])
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:5]]
    spread = [*turned[:2], turned[2][..., :1].expand(-1, -1, -1, 7), *turned[3:], x[5]]
    expected = by_loop("sliding", *spread, window=4, scale=5**-0.5)
    torch.testing.assert_close(sliding_linear_attention(*spread, window=4)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(window=0), ValueError, "window must be an integer >= 1"),
        (lambda a: a.update(phi_k=a["phi_k"][:, :, :3]), ValueError, "with 4 heads, or 2 that groups share"),
        (lambda a: a.update(phi_q=a["phi_q"][:, 1:]), ValueError, "phi_q must be"),
        (lambda a: a.update(mix=a["mix"][1:]), ValueError, "mix must be"),
        (lambda a: a.update(k=a["k"][:, :, :, 1:]), ValueError, "must agree"),
        (lambda a: a.update(v=a["v"].float()), TypeError, "share dtype"),
        (lambda a: a.update({n: a[n][:, :0] for n in ("q", "k", "v", "phi_q", "phi_k")}), ValueError, "empty"),
        (lambda a: a.update(scale=float("inf")), ValueError, "scale"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 23])), ValueError, "batch of 1"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, message):
    arguments = dict(zip(("q", "k", "v", "phi_q", "phi_k", "mix"), draw()), window=4)
    change(arguments)
    with pytest.raises(error, match=message):
        sliding_linear_attention(**arguments)


def test_a_state_of_another_window_is_refused():
    x = draw()
    _, state = sliding_linear_attention(*x, window=4, return_state=True)
    with pytest.raises(ValueError, match=r"initial_state\.keys must be"):
        sliding_linear_attention(*x, window=5, initial_state=state)
