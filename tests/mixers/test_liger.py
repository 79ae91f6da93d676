"""What is particular to Liger: its three recurrences step by step, the key as gate, and a window on the same heads."""

import pytest
import torch
import torch.nn.functional as F

from subquad.mixers.contract import MixerOutput
from subquad.mixers.cores import Heads
from subquad.mixers.liger import LigerCore
from tests.mixers.cases import DIM, make, tokens


def heads(time=21, groups=2, width=8, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        spread * torch.randn(2, time, n, width, generator=generator, dtype=torch.float64) for n in (4, groups, groups)
    )
    q_turned, k_turned = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (q, k))
    return Heads(q, k, v, q_turned, k_turned, 0.3)


def stepwise(h, recurrence):
    """The sheet of equations, one token after another, on heads repeated first."""
    q, k, v = h.q, h.k.repeat_interleave(2, 2), h.v.repeat_interleave(2, 2)
    state, slots, outputs = 0.0, 0.0, []
    for t in range(q.shape[1]):
        q_t, k_t, v_t = q[:, t], k[:, t], v[:, t]
        if recurrence == "gsa":
            gate = (F.logsigmoid(k_t.unflatten(-1, (4, 2)).mean(-1)) / 16).exp()
            state = gate[..., None] * state + (1 - gate)[..., None] * k_t[..., None, :]
            slots = gate[..., None] * slots + (1 - gate)[..., None] * v_t[..., None, :]
            read = torch.einsum("bhmk,bhk->bhm", state, q_t).softmax(-1)
            outputs.append(torch.einsum("bhmv,bhm->bhv", slots, read))
            continue
        if recurrence == "gla":
            gate, key = (F.logsigmoid(k_t) / 16).exp(), k_t.softmax(-1)
        else:
            gate, key = k_t.sigmoid(), 1 - k_t.sigmoid()
        state = gate[..., None] * state + key[..., None] * v_t[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q_t.softmax(-1)))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("recurrence", ["gla", "hgrn2", "gsa"])
def test_the_recurrent_branch_is_its_equation(recurrence):
    slots = {"num_slots": 4} if recurrence == "gsa" else {}
    core = LigerCore(4, 8, recurrence=recurrence, mix=(1, 0), **slots)
    h = heads()
    torch.testing.assert_close(core(h)[0], stepwise(h, recurrence), rtol=1e-9, atol=1e-9)
    # keys down to -100: the gate closes within a step, which no chunk may divide by
    wide = heads(spread=30.0)
    torch.testing.assert_close(core(wide)[0], stepwise(wide, recurrence), rtol=1e-7, atol=1e-7)


def test_the_window_sees_its_last_keys_turned_by_position():
    h = heads()
    k, v = h.k_turned.repeat_interleave(2, 2), h.v.repeat_interleave(2, 2)
    scores = torch.einsum("bthk,bshk->bhts", h.q_turned, k) * h.scale
    t = torch.arange(21)
    seen = (t[:, None] >= t) & (t[:, None] - t < 5)
    near = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(LigerCore(4, 8, window=5, mix=(0, 1))(h)[0], near, rtol=1e-9, atol=1e-9)
    both = 0.25 * stepwise(h, "gla") + 0.75 * near
    torch.testing.assert_close(LigerCore(4, 8, window=5, mix=(0.25, 0.75))(h)[0], both, rtol=1e-9, atol=1e-9)


def test_gates_are_the_key_its_mean_or_none():
    k = heads().k
    assert torch.equal(LigerCore(4, 8).log_gate(k), F.logsigmoid(k) / 16)
    scalar = LigerCore(4, 8, gate="scalar").log_gate(k)
    torch.testing.assert_close(scalar, (F.logsigmoid(k.mean(-1, keepdim=True)) / 16).expand_as(k))
    assert not LigerCore(4, 8, gate="none").log_gate(k).any()


def test_k_learns_through_the_gate_its_writing_and_the_window():
    core = LigerCore(2, 4, window=3)
    q, k, v = (torch.randn(1, 6, n, 4, dtype=torch.float64, requires_grad=True) for n in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda q, k, v: core(Heads(q, k, v, q, k, 0.5))[0], (q, k, v))


def test_there_is_no_parameter_unless_the_mix_is_learnt():
    assert not list(LigerCore(4, 8).parameters())
    learnt = LigerCore(4, 8, window=5, mix=(0.25, 0.75), learn_mix=True).double()
    assert [tuple(p.shape) for p in learnt.parameters()] == [(2, 4)]
    h = heads()
    torch.testing.assert_close(learnt(h)[0], LigerCore(4, 8, window=5, mix=(0.25, 0.75))(h)[0])


def test_a_pure_window_and_a_pure_recurrence_keep_the_state_of_one():
    x = tokens()
    window, recurrence = (make("liger", mix=mix) for mix in ((0, 1), (1, 0)))
    result = window(x, use_state=True)
    assert isinstance(result, MixerOutput)
    assert result.state.core.state is None
    assert result.state.core.window.keys.shape == (2, 4, 2, DIM // 4)
    assert recurrence(x, use_state=True).state.core.window is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recurrence": "gka"}, "gla"),
        ({"gate": "keys"}, "key"),
        ({"gate": "none", "recurrence": "hgrn2"}, "writes with 1 - g"),
        ({"window": 0}, "window must be an integer >= 1"),
        ({"mix": (1, 0, 0)}, "two weights"),
        ({"num_slots": 3, "recurrence": "gsa"}, "must divide the head width 8"),
        ({"num_slots": 4}, "belongs to recurrence 'gsa'"),
    ],
)
def test_wrong_options_get_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        make("liger", **options)
