"""Flow attention: linear attention whose weights are sharpened by two gates from the conservation of flow."""

from subquad.ops.flow.api import FlowState, flow_attention

__all__ = ["FlowState", "flow_attention"]
