"""One sentence to find in a long text: "The key of NAME is NUMBER." at a chosen depth, asked at the end.

After the "needle in a haystack" test of long-context language models; the haystack is :func:`subquad.tasks.prose_text`.
"""

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .contract import Draw, TokenTask, check_integer, no_labels
from .text import prose_text

_NAME_LIST = """
    Alice Bruno Clara David Elena Felix Grace Henry Irene Jonas Karin Lucas Maria
    Nadia Oscar Paula Quinn Ralph Sofia Tomas Uriah Vasco Wanda Xenia Yusuf Zelda
"""
_NAMES = _NAME_LIST.split()  # all of five letters, so that the filler has one length in every row
_NUM_DIGITS = 5


@dataclass(frozen=True)
class Needle(TokenTask):
    """Find five digits in filler text, as bytes: the labels are the digits, at the last five positions, teacher forced.

    ``depth`` says where the sentence stands, 0 the start and 1 the end of the filler (moved back to the nearest word
    boundary); None draws it uniformly for every row. Each digit is uniform over 0..9; score rows with
    :func:`subquad.tasks.exact_match` (a guess is right once in 10^5 rows). Filler of the three splits comes from
    different topics. A model with its own tokenizer takes :meth:`examples` and :func:`answer_matches`.
    """

    name: ClassVar[str] = "needle"
    standard_parameters: ClassVar = {"length": 4096}
    length: int = 512
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be between 0 (start) and 1 (end), or None; got {self.depth}")
        self.check_length(self.length)

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 256

    @property
    def minimum_length(self) -> int:
        return len(_statement(_NAMES[0], "0" * _NUM_DIGITS)) + len(_question(_NAMES[0])) + _NUM_DIGITS

    @property
    def chance(self) -> float:
        return 1 / 10

    def examples(
        self, batch_size: int, *, seed: int, index: int, split: str = "test", length: int | None = None
    ) -> list[tuple[str, str]]:
        """The rows of the batch with the same arguments as text: (prompt, the five digits that should follow it).

        ``length`` counts characters: prompt, a space and digits have length + 1 of them.
        """
        check_integer("batch_size", batch_size, 1)
        length = self.length if length is None else self.check_length(length)
        return self._texts(Draw(self.name, seed=seed, split=split, index=index), batch_size, length, split)

    def _texts(self, draw: Draw, batch_size: int, length: int, split: str) -> list[tuple[str, str]]:
        filler = _filler(split)
        filler_length = length - self.minimum_length
        starts = draw.integers(0, len(filler), batch_size)
        depths = draw.uniform(batch_size) if self.depth is None else np.full(batch_size, float(self.depth))
        names = draw.integers(0, len(_NAMES), batch_size)
        numbers = draw.integers(0, 10**_NUM_DIGITS, batch_size)
        filler *= 1 + -(-filler_length // len(filler))
        rows = []
        for start, depth, name_index, number in zip(starts, depths, names, numbers, strict=True):
            name, answer = _NAMES[name_index], f"{number:0{_NUM_DIGITS}d}"
            text = filler[start : start + filler_length]
            place = text.rfind(" ", 0, round(depth * filler_length)) + 1
            prompt = text[:place] + _statement(name, answer) + text[place:] + _question(name)
            rows.append((prompt, answer))
        return rows

    def _draw(self, draw: Draw, batch_size: int, length: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        rows = self._texts(draw, batch_size, length, split)
        text = "".join(f"{prompt} {answer}" for prompt, answer in rows).encode("ascii")
        tokens = np.frombuffer(text, dtype=np.uint8).reshape(batch_size, length + 1).astype(np.int64)
        labels = no_labels(batch_size, length)
        labels[:, -_NUM_DIGITS:] = tokens[:, -_NUM_DIGITS:]
        return tokens[:, :-1].copy(), labels


def answer_matches(completion: str, answer: str) -> bool:
    """Whether the first number that a model wrote after the prompt is the answer.

    Example:
        >>> answer_matches(" 04217.", "04217"), answer_matches(" 042170", "04217"), answer_matches(" unknown", "04217")
        (True, False, False)
    """
    number = re.search(r"\d+", completion)
    return number is not None and number.group() == answer


def _statement(name: str, number: str) -> str:
    return f"The key of {name} is {number}. "


def _question(name: str) -> str:
    return f"\nThe key of {name} is"


@functools.cache
def _filler(split: str) -> str:
    """The split's prose in one line of ASCII."""
    text = bytes(getattr(prose_text(), split)).replace(b"\0", b" ").decode()
    return " ".join(text.encode("ascii", "ignore").decode().split()) + " "
