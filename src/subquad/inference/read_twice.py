"""Giving a model its context twice: when it reads it again, it knows what it will be asked and what matters.

Source: Arora et al. 2024b, "Just read twice: closing the recall gap for recurrent language models", section 3.1
(JRT-Prompt). No training, no change to the model; a recurrent one gains most, because it cannot look back.
"""

import string
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.evaluation.writing import padding_token


class JustReadTwice:
    """Builds prompts in which the context stands several times, and answers questions by them with any causal model.

    Args:
        tokenizer: of transformers.
        repeats: how often the context stands in the default template, a line each, the question after them.
        template: your own text with ``{context}`` in it as often as it shall be read, and ``{question}`` at most once.
        max_tokens: of a whole prompt; the end of the context is cut so that all its copies stay equal. None: no limit.

    Raises:
        ValueError: a template without ``{context}``, with other fields, or repeats below 1.

    Example:
        >>> from subquad import tasks
        >>> tokenizer = tasks.byte_tokenizer()
        >>> reader = JustReadTwice(tokenizer, template="{context};{context}? {question}")
        >>> tokenizer.decode(reader.prompt("a=1", "a"), skip_special_tokens=True)
        'a=1;a=1? a'
    """

    def __init__(
        self, tokenizer: Any, *, repeats: int = 2, template: str | None = None, max_tokens: int | None = None
    ) -> None:
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats must be an integer >= 1; got {repeats!r}")
        if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
            raise ValueError(f"max_tokens must be None or an integer >= 1; got {max_tokens!r}")
        self.template = "{context}\n" * repeats + "{question}" if template is None else template
        fields = [field for _, field, _, _ in string.Formatter().parse(self.template) if field is not None]
        if "context" not in fields or fields.count("question") > 1 or set(fields) - {"context", "question"}:
            raise ValueError(
                "a template holds {context} once or more, {question} at most once, and no other field; "
                f"it holds {fields}"
            )
        self.tokenizer, self.max_tokens, self.repeats = tokenizer, max_tokens, fields.count("context")
        self.padding = padding_token(tokenizer) or 0  # masked: any token will do

    def prompt(self, context: str, question: str = "") -> list[int]:
        """The token ids of one prompt; what the tokenizer puts before and after a text is put there once.

        Raises:
            ValueError: an empty context, or a template and question that alone are longer than ``max_tokens``.
        """
        if not context:
            raise ValueError("the context is empty")
        whole = self.tokenizer("")["input_ids"]
        pieces: list[list[int] | None] = []  # None: the context
        for text, field, _, _ in string.Formatter().parse(self.template):
            pieces.append(self._ids(text))
            if field is not None:
                pieces.append(None if field == "context" else self._ids(question))
        read = self._ids(context)
        if self.max_tokens is not None:
            room = self.max_tokens - len(whole) - sum(len(piece) for piece in pieces if piece is not None)
            if room < self.repeats:
                raise ValueError(
                    f"{self.max_tokens} tokens have no room for {self.repeats} copies of any context: the rest of the "
                    f"prompt takes {self.max_tokens - room}"
                )
            read = read[: room // self.repeats]
        ids = [token for piece in pieces for token in (read if piece is None else piece)]
        first = [token for token in whole if token == self.tokenizer.bos_token_id]
        return [*first, *ids]

    def batch(self, contexts: Sequence[str], questions: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(B, T)`` of several prompts, padded on the left.

        Raises:
            ValueError: no contexts, or another number of questions.
        """
        if not contexts or len(contexts) != len(questions):
            raise ValueError(f"one question per context is needed; got {len(contexts)} and {len(questions)}")
        rows = [self.prompt(context, question) for context, question in zip(contexts, questions)]
        longest = max(map(len, rows))
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        pad = self.padding
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": mask,
        }

    @torch.no_grad()
    def answer(
        self,
        model: Any,
        contexts: Sequence[str],
        questions: Sequence[str],
        *,
        max_new_tokens: int = 32,
        **generation: Any,
    ) -> list[str]:
        """What the model says after each prompt; further options go to ``model.generate``, greedy by default.

        A prompt longer than the model was made for is warned of: most models fail past that length.
        """
        inputs = self.batch(contexts, questions)
        length = inputs["input_ids"].shape[1]
        limit = getattr(model.config, "max_position_embeddings", None)
        if isinstance(limit, int) and length + max_new_tokens > limit:
            warnings.warn(
                f"prompts of {length} tokens and {max_new_tokens} more exceed the model's {limit} positions: give "
                "max_tokens, or shorter contexts",
                stacklevel=2,
            )
        output = model.generate(
            **{name: tensor.to(model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            pad_token_id=self.padding,
            **{"do_sample": False, **generation},
        )
        return [self.tokenizer.decode(row[length:], skip_special_tokens=True) for row in output]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return ids


@torch.no_grad()
def read_twice_state(
    model: Any, context_ids: Tensor, *, repeats: int = 2, separator_ids: Tensor | None = None
) -> tuple[Any, int]:
    """The cache after a context that was read several times: many questions can go on from copies of it.

    Equal to what a prompt with as many copies leaves. Give ``copy.deepcopy`` of it to each question: caches grow in
    place.

    Args:
        model: any causal language model, ours or of transformers.
        context_ids: ``(B, T)``, without padding.
        repeats: how often the context is read.
        separator_ids: ``(B, S)``, read after every copy but the last.

    Returns:
        The cache and the number of tokens that it holds.

    Raises:
        ValueError: context_ids that are not ``(B, T)``, or repeats below 1.
    """
    if context_ids.ndim != 2 or not context_ids.numel():
        raise ValueError(f"context_ids must be (batch, time), not empty; got {tuple(context_ids.shape)}")
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"repeats must be an integer >= 1; got {repeats!r}")
    between = context_ids[:, :0] if separator_ids is None else separator_ids
    ids = torch.cat([context_ids, *[torch.cat([between, context_ids], 1)] * (repeats - 1)], 1)
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).cache, ids.shape[1]
