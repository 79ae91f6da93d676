"""The one residual block: a token mixer and a feed-forward layer, each with its norm."""

from typing import Any

from torch import Tensor, nn

from subquad.layers.norms import build_norm
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import Mixer, MixerOutput

NORM_PLACES = ("pre", "post")


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feedforward(norm(x))``; or with the norms after the sums.

    Args:
        mixer: the token mixer.
        feedforward: the channel mixer; None: there is none.
        norm: of both, by name.
        norm_place: ``"pre"`` or ``"post"`` (Vaswani et al. 2017).
        norm_eps: of the norms.
    """

    def __init__(
        self,
        mixer: Mixer,
        feedforward: nn.Module | None,
        *,
        norm: str = "rms",
        norm_place: str = "pre",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm_place not in NORM_PLACES:
            raise unknown_name("norm_place", norm_place, NORM_PLACES)
        self.norm_first = norm_place == "pre"
        self.mixer_norm = build_norm(norm, mixer.dim, norm_eps)
        self.mixer = mixer
        self.feedforward_norm = build_norm(norm, mixer.dim, norm_eps) if feedforward is not None else None
        self.feedforward = feedforward

    def forward(self, x: Tensor, **request: Any) -> MixerOutput:
        """x ``(B, T, D)`` and the arguments of the mixer -> output of the block, the mixer's state and losses."""
        mixed = self.mixer(self.mixer_norm(x) if self.norm_first else x, **request)
        x = x + mixed.output
        if not self.norm_first:
            x = self.mixer_norm(x)
        if self.feedforward is not None and self.feedforward_norm is not None:
            if self.norm_first:
                x = x + self.feedforward(self.feedforward_norm(x))
            else:
                x = self.feedforward_norm(x + self.feedforward(x))
        return mixed._replace(output=x)
