"""What two lists have in common: a question whose answer asks for the first list before the second is known.

Arora et al. 2024b, "Just read twice", section 3: a causal reader of constant memory must keep the first list whole; one
that knows what comes can keep the shorter.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .contract import Draw, TokenTask, check_choice, check_integer, no_labels

ORDERS = ("short first", "long first", "both")
FIRST_TOKEN = 4  # 0 is no token of the task, 1 to 3 mark the lists


@dataclass(frozen=True)
class SetIntersection(TokenTask):
    """1, a list, 2, another list, 3: the label at the last place is the one token that is in both.

    One list has ``short`` different tokens, the other as many as the length leaves, in an order that is fixed or drawn
    for each row. Tokens are 4..V-1; beside the common one the lists share none. With ``repeats`` the whole input comes
    so many times, and the last question counts.

    Example:
        >>> SetIntersection(order="short first").batch(1, seed=0, index=0).inputs.shape
        torch.Size([1, 18])
    """

    name: ClassVar[str] = "set_intersection"
    standard_parameters: ClassVar = {"vocab_size": 2048, "short": 16, "long": 256}
    vocab_size: int = 28
    short: int = 3
    long: int = 12
    order: str = "both"
    repeats: int = 1

    def __post_init__(self) -> None:
        check_integer("short", self.short, 1)
        check_integer("long", self.long, self.short)
        check_integer("repeats", self.repeats, 1)
        check_integer("vocab_size", self.vocab_size, FIRST_TOKEN + self.short + self.long - 1)
        check_choice("order", self.order, ORDERS)

    @property
    def length(self) -> int:  # type: ignore[override]
        return self.repeats * (3 + self.short + self.long)

    @property
    def length_step(self) -> int:  # type: ignore[override]
        return self.repeats

    @property
    def minimum_length(self) -> int:
        return self.repeats * (3 + 2 * self.short)

    @property
    def chance(self) -> float:
        return 1 / self.short

    def check_length(self, length: int) -> int:
        super().check_length(length)
        needed = length // self.repeats - 3 - 1  # different tokens in both lists
        if needed > self.vocab_size - FIRST_TOKEN:
            raise ValueError(
                f"{self.name} of length {length} needs {needed} different tokens; "
                f"vocab_size {self.vocab_size} leaves {self.vocab_size - FIRST_TOKEN}"
            )
        return length

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        short, long = self.short, length // self.repeats - 3 - self.short
        tokens = draw.distinct(FIRST_TOKEN, self.vocab_size, batch_size, short + long - 1)
        answer = tokens[:, :1]
        lists = []
        for others in (tokens[:, 1:short], tokens[:, short:]):
            whole = np.concatenate([answer, others], axis=1)
            lists.append(
                np.take_along_axis(whole, draw.distinct(0, whole.shape[1], batch_size, whole.shape[1]), axis=1)
            )
        mark = np.ones((batch_size, 1), dtype=np.int64)
        rows = [np.concatenate([mark, a, 2 * mark, b, 3 * mark], axis=1) for a, b in (lists, lists[::-1])]
        long_first = draw.integers(0, 2, batch_size) == 1 if self.order == "both" else self.order == "long first"
        inputs = np.where(np.broadcast_to(np.reshape(long_first, (-1, 1)), rows[0].shape), rows[1], rows[0])
        inputs = np.tile(inputs, (1, self.repeats))
        labels = no_labels(batch_size, length)
        labels[:, -1] = answer[:, 0]
        return inputs, labels
