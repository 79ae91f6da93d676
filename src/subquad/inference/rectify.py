"""Capping the probability of each next token by the risk that the finished text will be undesired.

Source: Cao et al. 2023, "Systematic Rectification of Language Models via Dead-end Analysis", section 3: a policy is
secure if ``pi(a | s) <= 1 + Q_D(s, a)``, where ``-Q_D`` is the probability of an undesired end after a.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from subquad.inference.dead_end_value import DeadEndValue

LEAST_CAP = 1e-7


def rectify(log_probs: Tensor, caps: Tensor, *, rounds: int | None = None) -> Tensor:
    """The distribution nearest to a base distribution under caps, in the sense of ``KL(q || p)``.

    ``q = min(kappa p, c)`` with the kappa >= 1 for which q sums to 1. Where even all caps together do not reach 1 there
    is no such distribution, and q is proportional to the caps of the tokens that the base can choose.

    Args:
        log_probs: ``(..., V)``, normalised log probabilities p.
        caps: ``(..., V)``, c in [0, 1].
        rounds: None: exact; a number: so many rounds of the authors' iteration, which approaches it and may exceed
            caps on the way.

    Returns:
        log q, ``(..., V)`` in the dtype of ``log_probs``; computed in float64.

    Raises:
        ValueError, TypeError: shapes that differ, caps outside [0, 1], rounds below 1.

    Example:
        >>> rectify(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.3, 1.0])).exp()
        tensor([0.3000, 0.7000])
    """
    if log_probs.shape != caps.shape or log_probs.ndim < 1:
        raise ValueError(f"log_probs and caps must share a shape; got {tuple(log_probs.shape)} and {tuple(caps.shape)}")
    if not (log_probs.is_floating_point() and caps.is_floating_point()):
        raise TypeError(f"log_probs and caps must be floating point; got {log_probs.dtype} and {caps.dtype}")
    if not bool(((caps >= 0) & (caps <= 1)).all()):
        raise ValueError(f"caps must lie in [0, 1]; they range from {caps.min():.3g} to {caps.max():.3g}")
    if rounds is not None and (not isinstance(rounds, int) or rounds < 1):
        raise ValueError(f"rounds must be None or an integer >= 1; got {rounds!r}")
    logs, cap = log_probs.double(), caps.double()
    if rounds is not None:
        for _ in range(rounds):
            logs = torch.minimum(logs, cap.log() + logs.logsumexp(-1, keepdim=True))
        return logs.log_softmax(-1).to(log_probs.dtype)
    p = logs.exp()
    cap = cap.where(p > 0, 0)
    ratio, order = (cap / p).where(p > 0, torch.inf).sort(dim=-1)
    p_sorted, cap_sorted = p.gather(-1, order), cap.gather(-1, order)
    # before token k of the order all are at their caps, from k on all are kappa p
    left = 1 - (cap_sorted.cumsum(-1) - cap_sorted)
    mass = p_sorted.flip(-1).cumsum(-1).flip(-1)
    kappa = left / mass.clamp(min=torch.finfo(p.dtype).tiny)
    fits = (kappa <= ratio) & (mass > 0)
    first = fits.to(torch.int8).argmax(-1, keepdim=True)
    q = torch.minimum(kappa.gather(-1, first) * p, cap)
    possible = fits.any(-1, keepdim=True)
    total = cap.sum(-1, keepdim=True)
    q = torch.where(possible, q / q.sum(-1, keepdim=True), (cap / total).where(total > 0, p))
    return q.log().to(log_probs.dtype)


class RectifyLogits(LogitsProcessor):
    """Rectifies the next token's distribution by a value model, in ``model.generate(logits_processor=[...])``.

    Put it before temperature and top-p, which can lift a token above its cap again. Greedy and beam search feel the
    caps only through the order of tokens. The value model keeps its own cache: a step costs it one token, and rows that
    beams permute or copy are gathered.

    Args:
        value: of the same vocabulary as the model.
        epsilon: strictness in [0, 1): caps are ``1 + Q - epsilon``.
        attention_mask: ``(B, T)`` of the prompts, if some are padded.
        rounds: see :func:`rectify`.

    Attributes:
        without_safe_token: how many (row, step) pairs had caps that no distribution satisfies.
        divergences: ``KL(q || p)`` of each row ``(B,)``, step by step.

    Raises:
        ValueError: epsilon outside [0, 1).
    """

    def __init__(
        self,
        value: DeadEndValue,
        epsilon: float = 0.1,
        *,
        attention_mask: Tensor | None = None,
        rounds: int | None = None,
    ) -> None:
        if not 0 <= epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1); got {epsilon}")
        self.value, self.epsilon, self.attention_mask, self.rounds = value, epsilon, attention_mask, rounds
        self.without_safe_token = 0
        self.divergences: list[Tensor] = []
        self._seen: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rectified log probabilities ``(B, V)`` of the tokens after ``input_ids (B, T)``, in the dtype of scores.

        Raises:
            ValueError: scores over another vocabulary than the value model's.
        """
        if scores.shape[-1] != self.value.vocab_size:
            raise ValueError(
                f"the value model knows {self.value.vocab_size} tokens, the scores are over {scores.shape[-1]}: both "
                "models must share one tokenizer"
            )
        risk = -self._q(input_ids).float().clamp(-1, 0)
        caps = (1 - risk - self.epsilon).clamp(LEAST_CAP, 1)
        infeasible = int((caps.sum(-1) < 1).sum())
        if infeasible and not self.without_safe_token:
            warnings.warn("no safe continuation: at some step the caps of all tokens sum to less than 1", stacklevel=2)
        self.without_safe_token += infeasible
        log_probs = scores.float().log_softmax(-1)
        rectified = rectify(log_probs, caps, rounds=self.rounds)
        q = rectified.exp()
        self.divergences.append((q * (rectified - log_probs)).where(q > 0, 0).sum(-1))
        return rectified.to(scores.dtype)

    def _q(self, input_ids: Tensor) -> Tensor:
        """Q ``(B, V)`` after the last token, from the cache where it knows all tokens but that one."""
        rows = self._rows_of(input_ids)
        if rows is None:
            q, self._cache = self.value.evaluate(input_ids, self._mask(input_ids), None)
        else:
            if not torch.equal(rows, torch.arange(len(rows), device=rows.device)):
                self._cache.reorder_cache(rows)
            q, self._cache = self.value.evaluate(input_ids[:, -1:], self._mask(input_ids), self._cache)
        self._seen = input_ids.clone()
        return q[:, -1]

    def _rows_of(self, input_ids: Tensor) -> Tensor | None:
        """Which row of the last call each row goes on from; None where one of them goes on from none."""
        seen = self._seen
        if seen is None or input_ids.shape[1] != seen.shape[1] + 1 or self._cache is None:
            return None
        equal = (input_ids[:, None, :-1] == seen[None]).all(-1)
        mask = self._mask(seen)
        if mask is not None:  # the same tokens behind another padding are another text
            if len(seen) != len(input_ids):
                return None
            equal &= (mask[:, None] == mask[None]).all(-1)
        return equal.to(torch.int8).argmax(1) if bool(equal.any(1).all()) else None

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        """The prompts' mask, for every beam, and ones for what was added."""
        if self.attention_mask is None:
            return None
        mask = self.attention_mask.to(input_ids.device)
        if len(input_ids) % len(mask) or input_ids.shape[1] < mask.shape[1]:
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} is not that of prompts which grew to {tuple(input_ids.shape)}"
            )
        mask = mask.repeat_interleave(len(input_ids) // len(mask), dim=0)
        return torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], dim=1)
