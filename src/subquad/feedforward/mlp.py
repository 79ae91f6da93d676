"""The two-layer feed-forward of the Transformer (Vaswani et al. 2017, section 3.3)."""

from torch import Tensor, nn

from subquad.feedforward.activations import activation as get_activation


class FeedForward(nn.Module):
    """``W_2 act(W_1 x)``, no biases; ``(..., dim)`` to the same shape.

    Args:
        dim, hidden: widths outside and inside.
        activation: by name.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.activation = get_activation(activation)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))
