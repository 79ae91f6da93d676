"""Linear attention that erases before it writes."""

from subquad.ops.delta.api import delta_attention_matrix, delta_product, delta_rule, gated_delta_rule, kda

__all__ = ["delta_attention_matrix", "delta_product", "delta_rule", "gated_delta_rule", "kda"]
