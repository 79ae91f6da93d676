"""The diagonal scan, a gated sum per channel."""

from subquad.ops.diagonal_scan.api import diagonal_scan

__all__ = ["diagonal_scan"]
