"""What reports are made of: ranges over repetitions, and numbers as a person reads them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Several measurements of one thing: their mean and how far they spread.

    Attributes:
        low, mean, high: of the measurements.
        count: how many there are. One alone has no spread, and proves no difference.

    Example:
        >>> a, b = Range.of([2.0, 2.2]), Range.of([2.1, 2.5])
        >>> a.overlaps(b), a.overlaps(Range.of([2.3, 2.4]))
        (True, False)
    """

    low: float
    mean: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Range":
        """The range of at least one finite number.

        Raises:
            ValueError: no numbers, or one that is not finite.
        """
        values = list(values)
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"a range needs at least one number, all finite; got {values}")
        low, high = min(values), max(values)
        return cls(low, min(max(math.fsum(values) / len(values), low), high), high, len(values))

    def overlaps(self, other: "Range") -> bool:
        """Whether the two have a value in common."""
        return self.low <= other.high and other.low <= self.high

    def differs_from(self, other: "Range") -> bool:
        """Whether both were measured at least twice and they do not overlap."""
        return self.count > 1 and other.count > 1 and not self.overlaps(other)

    def text(self, digits: int) -> str:
        """The mean, and the spread where there is one: ``2.61 (2.60 to 2.62)``."""
        mean, low, high = (f"{value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return mean if self.count == 1 else f"{mean} ({low} to {high})"


def count_text(value: float) -> str:
    """A count in three digits: ``950``, ``12.3k``, ``4.56M``.

    Example:
        >>> count_text(127_456), count_text(16_384), count_text(2_000_000)
        ('127k', '16.4k', '2.00M')
    """
    return _scaled(value, 1000, ("", "k", "M", "G", "T"))


def bytes_text(value: float) -> str:
    """Bytes in binary units: ``512 B``, ``33.0 KiB``, ``1.50 MiB``."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def seconds_text(value: float) -> str:
    """A duration: ``120 us``, ``3.4 ms``, ``1.25 s``, ``4:30 min``, ``2:05 h``."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    if value < 59.95:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d} h"


def length_text(tokens: int) -> str:
    """A context length: ``512``, ``4k``, ``1,000``; k is 1,024.

    Example:
        >>> length_text(16_384), length_text(1000)
        ('16k', '1,000')
    """
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    names = list(names)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value /= base
        power += 1
    if power == 0:
        return f"{value:.0f}{units[0]}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}{units[power]}"
