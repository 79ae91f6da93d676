"""The Triton kernels of prefix means against their definition, in Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
from subquad.kernels.prefix import gpu
from tests.ops.test_prefix_attention import assert_equal, draw, run_with_gradients, state

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("time", "width", "strength", "offsets"),
    [
        (1, 3, 1.0, None),
        (65, 16, 1.0, None),
        (130, 7, 50.0, None),
        (40, 70, 1.0, None),
        (70, 7, 3.0, [0, 1, 1, 40, 70]),
    ],
)
def test_equal_the_definition(time, width, strength, offsets):
    rows = 2 if offsets is None else len(offsets) - 1
    scores, values = draw(2 if offsets is None else 1, time, 3, width, strength)
    first = state(rows, 3, width)
    scores[:, time // 2 : time // 2 + 3] = -torch.inf  # masked, and in the packed case at a sequence's start
    drawn = [x.float().to(DEVICE) for x in (scores, values, *first)]
    options = {} if offsets is None else {"cu_seqlens": torch.tensor(offsets, device=DEVICE)}
    actual = run_with_gradients(*drawn[:2], drawn[2:], backend="gpu", **options)
    expected = run_with_gradients(
        *(x.double() for x in drawn[:2]), [x.double() for x in drawn[2:]], backend="reference", **options
    )
    assert_equal(actual, expected, 1e-4)


def test_half_precision_values_keep_float32_sums():
    scores, values = draw(2, 40, 2, 16)
    drawn = [scores.float().to(DEVICE), values.half().to(DEVICE), *(x.float().to(DEVICE) for x in state(2, 2, 16))]
    actual = run_with_gradients(*drawn[:2], drawn[2:], backend="gpu")
    assert actual[0].dtype == torch.float16
    expected = run_with_gradients(
        *(x.double() for x in drawn[:2]), [x.double() for x in drawn[2:]], backend="reference"
    )
    assert_equal(actual, expected, 4 * 2.0**-10)


def test_a_wide_value_is_refused():
    wide = torch.zeros(1, 2, 1, 300)
    with pytest.raises(ValueError, match="256 value channels"):
        gpu._sizes(wide)
