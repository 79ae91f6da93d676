"""Linear attention whose features are the second-order Taylor series of the exponential."""

from subquad.kernels.taylor.features import taylor_features
from subquad.ops.taylor.api import taylor_linear_attention

__all__ = ["taylor_features", "taylor_linear_attention"]
