"""Gated feed-forward layers: SwiGLU (Shazeer 2020), and SGLU without activation (Qin et al. 2023, eq. 9)."""

from torch import Tensor, nn

from subquad.feedforward.activations import activation as get_activation


class GatedFeedForward(nn.Module):
    """``W_3 (act(W_1 x) * (W_2 x))``, no biases; ``(..., dim)`` to the same shape.

    Args:
        dim, hidden: widths outside and inside.
        activation: by name; ``"identity"`` is SGLU.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = get_activation(activation)
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
