"""Ranges and how numbers read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subquad.evaluation.report import Range, bytes_text, count_text, length_text, listed, seconds_text

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5)


@given(numbers, numbers)
def test_ranges_overlap_where_they_share_a_value(one, other):
    a, b = Range.of(one), Range.of(other)
    assert a.overlaps(b) == b.overlaps(a) == (max(a.low, b.low) <= min(a.high, b.high))
    assert a.low <= a.mean <= a.high
    assert a.overlaps(a)


def test_one_measurement_proves_no_difference():
    assert not Range.of([1.0]).differs_from(Range.of([2.0, 2.1]))
    assert Range.of([1.0, 1.1]).differs_from(Range.of([2.0, 2.1]))


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_a_range_needs_finite_numbers(values):
    with pytest.raises(ValueError, match="at least one number, all finite"):
        Range.of(values)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (count_text(0), "0"),
        (count_text(999.6), "1.00k"),
        (count_text(12_345), "12.3k"),
        (count_text(7_654_321), "7.65M"),
        (bytes_text(512), "512 B"),
        (bytes_text(1024), "1.00 KiB"),
        (bytes_text(3.5 * 2**20), "3.50 MiB"),
        (seconds_text(12e-6), "12 us"),
        (seconds_text(0.0034), "3.4 ms"),
        (seconds_text(1.25), "1.25 s"),
        (seconds_text(59.99), "1:00 min"),
        (seconds_text(270), "4:30 min"),
        (seconds_text(2 * 3600 + 300), "2:05 h"),
        (length_text(512), "512"),
        (length_text(4096), "4k"),
        (length_text(5000), "5,000"),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (Range.of([2.5]).text(2), "2.50"),
        (Range.of([2.5, 2.7]).text(2), "2.60 (2.50 to 2.70)"),
    ],
)
def test_numbers_read_like_this(text, written):
    assert text == written
