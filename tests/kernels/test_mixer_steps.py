"""The pieces of the one-token kernels against torch, at their ends; and when a token may go through a kernel."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from subquad.kernels import backends
from subquad.kernels.steps import pieces, plan
from subquad.positions.rope import apply_rope

VALUES = np.array([-np.inf, -1e4, -104, -88.5, -87, -20, -1, -1e-4, 0, 1e-4, 1, 20.5, 87, 88.5, 1e4], np.float32)


def test_sigmoid_over_the_whole_range():
    got = np.array([pieces.sigmoid32(x) for x in VALUES])
    expected = torch.sigmoid(torch.from_numpy(VALUES).double()).numpy()
    # exp32 is within 2e-7; below -88 what is left is under 6e-39, whatever it is
    np.testing.assert_allclose(got, expected, rtol=6e-7, atol=1e-38)
    assert math.isnan(pieces.sigmoid32(np.float32(np.nan)))


def test_log_sigmoid_and_softplus_over_the_whole_range():
    x = torch.from_numpy(VALUES[1:]).double()
    np.testing.assert_allclose([pieces.log_sigmoid32(v) for v in VALUES[1:]], F.logsigmoid(x), rtol=4e-7, atol=1e-37)
    softplus = torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)
    # the difference x - logsigmoid(x) rounds once at the size of x
    rounding = 2.0**-23 * np.abs(VALUES[1:]).max()
    np.testing.assert_allclose([pieces.softplus32(v) for v in VALUES[1:]], softplus, rtol=4e-7, atol=rounding)
    assert math.isnan(pieces.log_sigmoid32(np.float32(np.nan)))
    assert math.isnan(pieces.softplus32(np.float32(np.nan)))


def test_rotation_at_far_positions():
    width, positions = 8, np.array([0, 7, 2_000_003])
    x = torch.randn(3, 1, 2, width, generator=torch.Generator().manual_seed(0))
    expected = apply_rope(x, torch.from_numpy(positions)[:, None], 10_000.0)[:, 0]
    rates = (10_000.0 ** (-torch.arange(0, width, 2) / width)).numpy()
    turned = x[:, 0].clone()
    pieces.rotate(turned.numpy(), positions, rates)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-6)


def test_heads_are_shared_by_neighbours():
    x = np.arange(2 * 6, dtype=np.float32).reshape(2, 6)  # two groups of width 3
    expected = np.repeat(x.reshape(2, 2, 3), 3, axis=1)
    np.testing.assert_array_equal(pieces.spread_heads(x, 6, 3), expected)


@pytest.mark.parametrize("name", [*backends.BACKENDS, None])
def test_a_token_is_served_where_the_choice_of_backends_is_cpu(name, monkeypatch):
    monkeypatch.delenv("SUBQUAD_BACKEND", raising=False)
    if name is not None:
        monkeypatch.setenv("SUBQUAD_BACKEND", name)
    x = torch.zeros(1, 1, 4)
    try:
        chosen = backends.resolve("auto", x.device, x.dtype)
    except ValueError:  # 'gpu' for a tensor on a CPU, where Triton does not interpret
        chosen = None
    with torch.no_grad():
        assert plan.serves(x, 4) == (chosen == "cpu")


def _in_mode(x):
    with FlopCounterMode(display=False):
        return plan.serves(x, 4)


def _vmapped(x):
    served = []
    torch.vmap(lambda row: served.append(plan.serves(row, 4)) or row)(x[None])
    return served[0]


def _dual(x):
    with torch.autograd.forward_ad.dual_level():
        return plan.serves(torch.autograd.forward_ad.make_dual(x, x), 4)


def _traced(x):
    served = []
    torch.jit.trace(lambda x: served.append(plan.serves(x, 4)) or x + 1, x, check_trace=False)
    return served[0]


def _on_meta(x):
    with torch.device("meta"):
        return plan.serves(x, 4)


def _under_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plan.serves(x, 4)


@pytest.mark.parametrize("within", [_in_mode, _vmapped, _dual, _traced, _on_meta, _under_autocast])
def test_a_token_is_not_served_where_torch_is_intercepted(within):
    x = torch.zeros(2, 1, 4)
    with torch.no_grad():
        assert plan.serves(x, 4)
        assert not within(x)
    assert not plan.serves(x, 4)  # gradients may be wanted


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 4),
        torch.zeros(2, 2, 4),
        torch.zeros(2, 1, 5),
        torch.zeros(0, 1, 4),
        torch.zeros(2, 1, 4, dtype=torch.float64),
        torch.zeros(2, 1, 4, device="meta"),
        torch.nn.Parameter(torch.zeros(2, 1, 4)),
        [[[0.0] * 4]],
    ],
)
def test_other_inputs_are_not_served(x):
    with torch.no_grad():
        assert not plan.serves(x, 4)


def test_global_hooks_are_called():
    x = torch.zeros(1, 1, 4)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, arguments, output: None)
    try:
        with torch.no_grad():
            assert not plan.serves(x, 4)
    finally:
        handle.remove()
