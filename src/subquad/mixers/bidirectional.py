"""Two causal mixers, one in each direction (Schuster and Paliwal 1997): the generic non-causal form of any of them."""

import torch
from torch import Tensor, nn

from subquad.kernels.packing import locate
from subquad.layers.registry import unknown_name
from subquad.mixers.contract import Mixer, MixerOutput, Pattern, Request, silence

JOINS = ("sum", "concat")


class Bidirectional(Mixer):
    """Reads every sequence forwards with one mixer and backwards with another; no link between the two.

    Padding stays where it is for either direction, and packed sequences are turned round one by one: the backward pass
    begins at each sequence's last real token.

    Args:
        forward_mixer, backward_mixer: causal self-mixers of one width, with weights of their own.
        join: ``"sum"`` of the two outputs, or ``"concat"``, after which a linear layer leads back to D channels.

    Example:
        >>> from subquad import mixers
        >>> both = Bidirectional(*(mixers.build("gru", 8) for _ in range(2)))
        >>> both(torch.zeros(1, 5, 8)).output.shape
        torch.Size([1, 5, 8])
    """

    patterns = frozenset({Pattern.FULL_SELF})

    def __init__(self, forward_mixer: Mixer, backward_mixer: Mixer, *, join: str = "concat") -> None:
        for mixer in (forward_mixer, backward_mixer):
            if Pattern.CAUSAL_SELF not in mixer.patterns or not mixer.causal:
                raise ValueError(f"both directions must be causal self-mixers; got {type(mixer).__name__}")
        if forward_mixer is backward_mixer or forward_mixer.dim != backward_mixer.dim:
            raise ValueError("the two directions must be two mixers of one width")
        super().__init__(
            forward_mixer.dim,
            forward_mixer.num_heads,
            causal=False,
            layer_index=forward_mixer.layer_index,
            num_layers=forward_mixer.num_layers,
        )
        if join not in JOINS:
            raise unknown_name("join", join, JOINS)
        self.forward_mixer, self.backward_mixer, self.join = forward_mixer, backward_mixer, join
        if join == "concat":
            self.o_proj = nn.Linear(2 * self.dim, self.dim)

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        ahead, back = self.directions(x, mask=request.mask, cu_seqlens=request.cu_seqlens)
        output = ahead + back if self.join == "sum" else self.o_proj(torch.cat([ahead, back], -1))
        (output,) = silence(request.mask, output)
        return MixerOutput(output, None, {})

    def directions(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The outputs of both directions, ``(B, T, D)`` each, every one at its token's place.

        The backward direction's last word is at the first token: ``back[:, 0]``, where no padding stands before it.
        """
        ahead = self.forward_mixer(x, mask=mask, cu_seqlens=cu_seqlens).output
        turned = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
        if cu_seqlens is not None:
            places = locate(cu_seqlens, x.shape[1])
            turned = torch.arange(x.shape[1], device=x.device) + places.sizes[places.sequence] - 1 - 2 * places.place
        flipped = None if mask is None else mask[:, turned]
        back = self.backward_mixer(x[:, turned], mask=flipped, cu_seqlens=cu_seqlens).output
        return ahead, back[:, turned]
