"""The short convolution equals its definition: whole, in pieces, packed, and with rows of different lengths."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.ops import short_convolution


def draw(time=11, width=4, batch=2, channels=3):
    generator = torch.Generator().manual_seed(time)
    x, weight, bias, state = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, time, channels), (channels, width), (channels,), (batch, width - 1, channels))
    )
    return x, weight, bias, state


@settings(deadline=None, max_examples=30)
@given(time=st.integers(1, 12), width=st.integers(1, 5), activation=st.sampled_from([None, "silu"]))
def test_equals_the_definition(time, width, activation):
    x, weight, bias, state = draw(time, width)
    options = {"activation": activation, "initial_state": state, "return_state": True}
    expected = short_convolution(x, weight, bias, backend="reference", **options)
    for actual, wanted in zip(short_convolution(x, weight, bias, **options), expected):
        torch.testing.assert_close(actual, wanted)


def test_equals_torch_convolution():
    x, weight, bias, _ = draw()
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(short_convolution(x, weight, bias)[0], expected)


def test_pieces_and_steps_equal_whole():
    x, weight, bias, _ = draw()
    whole, last = short_convolution(x, weight, bias, return_state=True)
    for sizes in ([4, 7], [1] * 11, [10, 1]):
        outputs, state = [], None
        for piece in x.split(sizes, 1):
            output, state = short_convolution(piece, weight, bias, initial_state=state, return_state=True)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole)
        torch.testing.assert_close(state, last)


def test_lengths_give_the_state_after_the_last_real_token():
    x, weight, _, state = draw()
    lengths = torch.tensor([2, 9])
    _, last = short_convolution(x, weight, lengths=lengths, initial_state=state, return_state=True)
    for row, length in enumerate(lengths.tolist()):
        alone = slice(row, row + 1)
        _, expected = short_convolution(x[alone, :length], weight, initial_state=state[alone], return_state=True)
        torch.testing.assert_close(last[alone], expected)


@pytest.mark.parametrize("offsets", [[0, 1, 1, 5, 11], [0, 2, 4, 11], [0, 11]])
def test_packed_equals_separate(offsets):
    x, weight, bias, _ = draw(batch=1)
    states = torch.randn(len(offsets) - 1, 3, 3, dtype=torch.float64)
    cu_seqlens = torch.tensor(offsets)
    output, last = short_convolution(x, weight, bias, initial_state=states, return_state=True, cu_seqlens=cu_seqlens)
    for n, (a, b) in enumerate(pairwise(offsets)):
        own = states[n : n + 1]
        if a == b:
            torch.testing.assert_close(last[n : n + 1], own)
            continue
        one, one_last = short_convolution(x[:, a:b], weight, bias, initial_state=own, return_state=True)
        torch.testing.assert_close(output[:, a:b], one)
        torch.testing.assert_close(last[n : n + 1], one_last)


def test_gradients():
    x, weight, bias, state = (t.requires_grad_() for t in draw(5))
    assert torch.autograd.gradcheck(
        lambda x, w, b, s: short_convolution(x, w, b, activation="silu", initial_state=s, return_state=True),
        (x, weight, bias, state),
    )


def test_bad_input_gets_a_sentence():
    x, weight, _, _ = draw()
    with pytest.raises(ValueError, match="weight must be"):
        short_convolution(x, weight[:2])
    with pytest.raises(ValueError, match="activation"):
        short_convolution(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="lengths"):
        short_convolution(x, weight, lengths=torch.tensor([1]))
