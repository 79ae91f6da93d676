"""Gated feed-forward layers: SwiGLU and ReGLU (Shazeer 2020), SGLU without activation (Qin et al. 2023, eq. 9), and
ReGLU with a raised threshold, FATReLU (Song et al. 2024, section 3.3)."""

from torch import Tensor, nn

from subquad.feedforward.activations import activation as get_activation


class GatedFeedForward(nn.Module):
    """``W_3 (act(W_1 x) * (W_2 x))``, no biases; ``(..., dim)`` to the same shape.

    Args:
        dim, hidden: widths outside and inside.
        activation: by name; ``"identity"`` is SGLU.
        threshold: gates smaller than this, after the activation and without their sign, are zero.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "silu", threshold: float = 0.0) -> None:
        super().__init__()
        if not threshold >= 0:
            raise ValueError(f"threshold must not be negative; got {threshold}")
        self.activation = get_activation(activation)
        self.threshold = threshold
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate_proj(x))
        if self.threshold:
            gate = gate.where(gate.abs() >= self.threshold, 0)
        return self.down_proj(gate * self.up_proj(x))
