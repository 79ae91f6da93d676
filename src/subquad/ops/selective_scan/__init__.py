"""The selective scan of state space models."""

from subquad.ops.selective_scan.api import gated_selective_scan, selective_scan

__all__ = ["gated_selective_scan", "selective_scan"]
