"""Recurrent encoder and decoder (Sutskever et al. 2014; Cho et al. 2014; with attention Bahdanau et al. 2015).

The encoder reads the source; what the decoder gets of it is its final state, a summary at every step, or attention to
all of its outputs. Padding never enters a state: sources are turned round within their own length.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad import mixers
from subquad.layers.registry import unknown_name
from subquad.mixers.bidirectional import Bidirectional
from subquad.mixers.contract import map_state

WAYS = ("final_state", "every_step", "attention")
IGNORED = -100


class Memory(NamedTuple):
    """What the decoder reads of a source, rows first."""

    states: tuple[Any, ...]  # of the decoder's layers, before its first step
    summary: Tensor  # (B, D)
    outputs: Tensor  # (B, S, D)
    mask: Tensor  # (B, S) bool


class EncoderDecoder(nn.Module):
    """Recurrent layers that read a sequence and write another.

    Args:
        source_vocab, target_vocab: numbers of tokens.
        dim: D, the width of embeddings and layers.
        num_layers: of encoder and decoder each.
        cell: a recurrent mixer by name (``"lstm"``, ``"gru"``, ``"elman"``, or any causal mixer with a state).
        init_from: ``"final_state"``: each decoder layer starts from the final state of its encoder layer;
            ``"every_step"``: the last encoder output is an input of every step; ``"attention"``: the encoder reads in
            both directions, and every step attends to its outputs.
        reverse_source: read the source backwards (not with attention, which reads both ways).
        attention_heads: of the attention.
        pad, bos, eos: token ids; padding stands at the end of a source.

    Raises:
        ValueError: a way or cell that is not known, token ids outside of the vocabulary.
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        dim: int,
        *,
        num_layers: int = 1,
        cell: str = "lstm",
        init_from: str = "final_state",
        reverse_source: bool = True,
        attention_heads: int = 1,
        pad: int = 0,
        bos: int = 1,
        eos: int = 2,
    ) -> None:
        super().__init__()
        if init_from not in WAYS:
            raise unknown_name("init_from", init_from, WAYS)
        if num_layers < 1 or dim < 1:
            raise ValueError(f"num_layers and dim must be at least 1; got {num_layers} and {dim}")
        if not all(0 <= token < target_vocab for token in (pad, bos, eos)) or not pad < source_vocab:
            raise ValueError(f"pad, bos and eos must be tokens of the vocabularies; got {pad}, {bos}, {eos}")
        self.init_from, self.pad, self.bos, self.eos = init_from, pad, bos, eos
        self.reverse_source = reverse_source and init_from != "attention"
        self.source_embedding = nn.Embedding(source_vocab, dim)
        self.target_embedding = nn.Embedding(target_vocab, dim)

        def layer(index: int) -> mixers.Mixer:
            return mixers.build(cell, dim, num_heads=1, layer_index=index, num_layers=num_layers)

        directed = [layer(i) for i in range(num_layers)]
        both = init_from == "attention"
        self.encoder = nn.ModuleList(Bidirectional(a, layer(i)) if both else a for i, a in enumerate(directed))
        self.decoder = nn.ModuleList(layer(i) for i in range(num_layers))
        self.summary_proj = nn.Linear(dim, dim, bias=False) if init_from == "every_step" else None
        self.attention: mixers.Mixer | None = None
        if both:
            self.attention = mixers.build("softmax", dim, num_heads=attention_heads, rope_base=None, causal=True)
            self.attention_out = nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, target_vocab)

    def encode(self, source: Tensor) -> Memory:
        """Source ``(B, S)``, padded at the end -> what the decoder reads of it."""
        if source.ndim != 2 or 0 in source.shape:
            raise ValueError(f"source must be (batch, time), nothing empty; got {tuple(source.shape)}")
        mask = source != self.pad
        lengths = mask.sum(1)
        if not torch.equal(mask, torch.arange(source.shape[1], device=source.device) < lengths[:, None]):
            raise ValueError(f"padding ({self.pad}) must stand at the end of each source")
        if bool((lengths == 0).any()):
            raise ValueError("a source holds nothing but padding")
        if self.reverse_source:  # inside its own length
            step = torch.arange(source.shape[1], device=source.device)
            place = (lengths[:, None] - 1 - step).where(mask, step)
            source = source.gather(1, place)
        hidden, states = self.source_embedding(source), []
        for layer in self.encoder:
            result = layer(hidden, mask=mask, use_state=self.init_from != "attention")
            hidden = result.output
            states.append(result.state)
        last = hidden.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        if self.init_from != "final_state":
            states = [
                cast(mixers.Mixer, layer).init_state(len(source), hidden.dtype, source.device) for layer in self.decoder
            ]
        return Memory(tuple(states), last, hidden, mask)

    def decode(self, target: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Target tokens ``(B, T)`` after ``memory`` -> logits ``(B, T, V)`` of the next ones, and memory after them."""
        hidden, states = self.target_embedding(target), []
        if self.summary_proj is not None:
            hidden = hidden + self.summary_proj(memory.summary)[:, None]
        for layer, state in zip(self.decoder, memory.states):
            result = layer(hidden, state=state, use_state=True)
            hidden = result.output
            states.append(result.state)
        if self.attention is not None:
            read = self.attention(hidden, memory.outputs, mask=memory.mask).output
            hidden = torch.tanh(self.attention_out(torch.cat([hidden, read], -1)))
        return self.head(hidden), memory._replace(states=tuple(states))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits ``(B, T, V)`` of ``target (B, T)`` with teacher forcing: token t is predicted from those before it."""
        shifted = torch.cat([torch.full_like(target[:, :1], self.bos), target[:, :-1]], 1)
        logits, _ = self.decode(shifted, self.encode(source))
        return logits

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy in nats of the target's tokens (padding left out); a target ends with ``eos``."""
        labels = target.masked_fill(target == self.pad, IGNORED)
        return F.cross_entropy(self(source, target).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    @torch.no_grad()
    def generate(
        self, source: Tensor, *, max_length: int = 50, num_beams: int = 1, length_penalty: float = 1.0
    ) -> list[list[int]]:
        """The best target of each source, without ``bos`` and ``eos``.

        Args:
            source: ``(B, S)``, padded at the end.
            max_length: at most so many tokens.
            num_beams: 1 is greedy; else hypotheses that are kept, scored by log probability over
                ``length ** length_penalty``.

        Raises:
            ValueError: max_length or num_beams below 1.
        """
        if max_length < 1 or num_beams < 1:
            raise ValueError(f"max_length and num_beams must be at least 1; got {max_length} and {num_beams}")
        return [self._search(row[None], max_length, num_beams, length_penalty) for row in source]

    def _search(self, source: Tensor, max_length: int, beams: int, length_penalty: float) -> list[int]:
        memory = self.encode(source)
        tokens = source.new_full((1, 1), self.bos)
        scores = torch.zeros(1, device=source.device)
        written: list[list[int]] = [[]]
        finished: list[tuple[float, list[int]]] = []
        for length in range(1, max_length + 1):
            logits, memory = self.decode(tokens, memory)
            total = scores[:, None] + logits[:, -1].log_softmax(-1)
            best, at = total.flatten().topk(min(2 * beams, total.numel()))
            rows: list[int] = []
            following: list[int] = []
            kept: list[float] = []
            for score, place in zip(best.tolist(), at.tolist()):
                row, token = divmod(place, total.shape[1])
                if token == self.eos:
                    if len(rows) < beams:
                        finished.append((score / length**length_penalty, written[row]))
                elif len(rows) < beams:
                    rows.append(row)
                    following.append(token)
                    kept.append(score)
            done = len(finished) >= beams and max(f[0] for f in finished) >= max(kept) / length**length_penalty
            if done or (beams == 1 and finished):
                break
            written = [[*written[row], token] for row, token in zip(rows, following)]
            tokens = tokens.new_tensor(following)[:, None]
            scores = scores.new_tensor(kept)
            memory = _rows(memory, torch.tensor(rows, device=source.device))
        else:
            finished += [(score / max_length**length_penalty, text) for score, text in zip(scores.tolist(), written)]
        return max(finished, key=lambda item: item[0])[1]


def _rows(memory: Memory, rows: Tensor) -> Memory:
    states = tuple(map_state(lambda leaf: leaf[rows], state) for state in memory.states)
    return Memory(states, memory.summary[rows], memory.outputs[rows], memory.mask[rows])
