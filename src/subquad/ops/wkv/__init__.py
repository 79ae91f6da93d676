"""The weighted average of RWKV-4."""

from subquad.ops.wkv.api import WKVState, wkv

__all__ = ["WKVState", "wkv"]
