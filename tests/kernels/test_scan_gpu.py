"""The Triton kernels of the scans against their definitions, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
from subquad.kernels.scan.gpu_tiles import Grid
from tests.ops import test_diagonal_scan as diagonal
from tests.ops import test_selective_scan as selective
from tests.ops import test_wkv as wkv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(arguments, dtype):
    return [None if x is None else x.to(DEVICE) for x in selective.cast(arguments, dtype)]


@pytest.mark.parametrize(
    ("time", "channels", "states", "groups", "gated", "strength", "offsets"),
    [
        (1, 3, 1, 1, False, 1.0, None),
        (33, 70, 3, 1, True, 1.0, None),
        (40, 12, 16, 2, True, 200.0, None),
        (65, 6, 5, 1, False, 1e-3, None),
        (72, 5, 4, 1, True, 3.0, [0, 1, 1, 34, 72]),
    ],
)
def test_selective_scan_equals_the_definition(time, channels, states, groups, gated, strength, offsets):
    rows = 2 if offsets is None else len(offsets) - 1
    drawn = selective.draw(
        2 if offsets is None else 1, time, channels, states, groups, gated=gated, strength=strength, rows=rows
    )
    arguments = moved(drawn, torch.float32)
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets, device=DEVICE)}
    actual = selective.with_gradients(arguments, backend="gpu", **options)
    selective.assert_equal(actual, selective.definition(arguments, **options), 1e-4)


def test_half_precision_keeps_float32_states():
    arguments = moved(selective.draw(time=20, states=16, gated=True), torch.float16)
    actual = selective.with_gradients(arguments, backend="gpu")
    assert actual["y"].dtype == torch.float16
    assert actual["state"].dtype == torch.float32
    selective.assert_equal(actual, selective.definition(arguments), 4 * 2.0**-10)


@torch.no_grad()
def test_a_step_equals_the_whole():
    u, delta, A, B, C, D, bias, gate, state = moved(selective.draw(time=4, gated=True), torch.float32)
    whole, last = selective.call([u, delta, A, B, C, D, bias, gate, state], backend="gpu")
    for t in range(4):
        at = slice(t, t + 1)
        pieces = [u[:, at], delta[:, at], A, B[:, at], C[:, at], D, bias, gate[:, at], state]
        y, state = selective.call(pieces, backend="gpu")
        torch.testing.assert_close(y, whole[:, at])
    torch.testing.assert_close(state, last)


def test_many_states_are_refused():
    with pytest.raises(ValueError, match="256 states"):
        Grid.of(4, 300, 1)
    arguments = moved(selective.draw(states=300, time=2), torch.float32)
    with pytest.raises(ValueError, match="256 states"):
        selective.call(arguments, backend="gpu")


@pytest.mark.parametrize(("time", "channels", "offsets"), [(1, 3, None), (20, 70, None), (40, 5, [0, 1, 1, 17, 40])])
def test_diagonal_scan_equals_the_definition(time, channels, offsets):
    rows = 2 if offsets is None else len(offsets) - 1
    drawn = diagonal.draw(2 if offsets is None else 1, time, channels, low=-1.0, rows=rows)
    arguments = [x.float().to(DEVICE) for x in drawn]
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets, device=DEVICE)}
    actual = diagonal.with_gradients(arguments, backend="gpu", **options)
    expected = diagonal.with_gradients([x.double() for x in arguments], backend="reference", **options)
    diagonal.assert_equal(actual, expected, 1e-4)


@pytest.mark.parametrize(
    ("time", "channels", "offsets", "strength"),
    [(2, 3, None, 20.0), (9, 70, None, 1.0), (24, 5, [0, 1, 1, 9, 24], 20.0)],
)
def test_wkv_equals_the_definition(time, channels, offsets, strength):
    rows = 2 if offsets is None else len(offsets) - 1
    drawn = wkv.draw(2 if offsets is None else 1, time, channels, strength=strength, rows=rows)
    arguments = [x.float().to(DEVICE) for x in drawn]
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets, device=DEVICE)}
    actual = wkv.with_gradients(arguments, backend="gpu", **options)
    expected = wkv.with_gradients([x.double() for x in arguments], backend="reference", **options)
    wkv.assert_equal(actual, expected, 1e-4)


def test_wkv_in_half_precision_keeps_a_float32_state():
    arguments = [
        x.to(DEVICE, torch.float16 if place < 2 else torch.float32) for place, x in enumerate(wkv.draw(time=9))
    ]
    actual = wkv.with_gradients(arguments, backend="gpu")
    assert (actual[0].dtype, actual[1].dtype) == (torch.float16, torch.float32)
    expected = wkv.with_gradients([x.double() for x in arguments], backend="reference")
    wkv.assert_equal(actual, expected, 4 * 2.0**-10)
