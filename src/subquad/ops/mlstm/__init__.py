"""The matrix memory of xLSTM."""

from subquad.ops.mlstm.api import MLSTMState, mlstm

__all__ = ["MLSTMState", "mlstm"]
