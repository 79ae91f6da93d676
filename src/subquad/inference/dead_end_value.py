"""The value model of rectification: the risk of an undesired end after each next token, learnt from labelled texts.

Source: Cao et al. 2023, "Systematic Rectification of Language Models via Dead-end Analysis", section 4.
"""

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from subquad.evaluation.writing import sample_texts
from subquad.tasks.token_world import TokenWorld
from subquad.training import Batch, TrainingOptions, train
from subquad.training.checkpoint import write_atomically
from subquad.training.data import IGNORED, BatchLike

HEADS_FILE = "dead_end_value.safetensors"
TARGET_RATE = 0.1


class DeadEndValue(nn.Module):
    """``Q_D(s, a)`` for all next tokens a after each prefix s: a language model's body and a head of two layers.

    Args:
        backbone: any causal language model, ours or of transformers, of the vocabulary that is to be rectified; a
            recurrent one keeps a state of constant size. Its body is trained, its own head unused.
        hidden: width inside the head; None is twice the body's.

    Raises:
        ValueError: a backbone without ``config.vocab_size`` and ``config.hidden_size``.
    """

    def __init__(self, backbone: nn.Module, hidden: int | None = None) -> None:
        super().__init__()
        config: Any = getattr(backbone, "config", None)
        width, size = (getattr(config, name, None) for name in ("hidden_size", "vocab_size"))
        if width is None or size is None:
            raise ValueError(
                f"the backbone must be a causal language model with a config; got {type(backbone).__name__}"
            )
        self.backbone, self.vocab_size, self.hidden = backbone, size, hidden or 2 * width
        self.head, self.target_head = (
            nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, size)) for _ in range(2)
        )
        self.target_head.load_state_dict(self.head.state_dict())
        self.target_head.requires_grad_(False)
        if (embeddings := backbone.get_output_embeddings()) is not None:  # type: ignore[operator]
            tied = embeddings.weight is backbone.get_input_embeddings().weight  # type: ignore[operator]
            embeddings.requires_grad_(tied)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Q of the head and of the target head, ``(B, T, V)`` each, after every prefix of ``input_ids (B, T)``."""
        states = self._body(input_ids, attention_mask, use_cache=False).last_hidden_state
        return self.head(states), self.target_head(states)

    def evaluate(self, input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """Q ``(B, T, V)`` after ``input_ids``, which go on from ``cache``, and the cache after them."""
        output = self._body(input_ids, attention_mask, cache=cache, use_cache=True)
        return self.head(output.last_hidden_state), output.cache

    def _body(self, input_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        body = self.backbone.base_model
        if attention_mask is not None and "position_ids" in inspect.signature(inspect.unwrap(body.forward)).parameters:
            places = (attention_mask.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -input_ids.shape[1] :]
        return body(input_ids=input_ids, attention_mask=attention_mask, **options)  # type: ignore[operator]

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the target head a tenth of the way to the head."""
        for target, weight in zip(self.target_head.parameters(), self.head.parameters(), strict=True):
            target.lerp_(weight, TARGET_RATE)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """The backbone as an ordinary folder, and both heads beside it."""
        self.backbone.save_pretrained(folder)  # type: ignore[operator]
        heads = {f"{name}.{key}": value for name in ("head", "target_head") for key, value in self._head(name).items()}
        write_atomically(Path(folder) / HEADS_FILE, lambda temporary: save_file(heads, temporary))

    def _head(self, name: str) -> dict[str, Tensor]:
        return {key: value.contiguous() for key, value in getattr(self, name).state_dict().items()}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> "DeadEndValue":
        """What :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            ValueError: the folder holds no value model.
        """
        from transformers import AutoModelForCausalLM

        path = Path(folder) / HEADS_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {HEADS_FILE}: it is no value model")
        heads = load_file(path)
        value = cls(AutoModelForCausalLM.from_pretrained(folder), hidden=len(heads["head.0.bias"]))
        for name in ("head", "target_head"):
            own = {key.removeprefix(f"{name}."): x for key, x in heads.items() if key.startswith(f"{name}.")}
            getattr(value, name).load_state_dict(own)
        return value.eval()


def sarsa_loss(q: Tensor, q_target: Tensor, actions: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance to the recursion over the tokens of finished texts.

    ``Q(s_t, a_t)`` shall be the target head's ``Q(s_{t+1}, a_{t+1})``, clamped to [-1, 0], and the text's reward at its
    last token: the risk under the policy that wrote the texts.

    Args:
        q, q_target: ``(B, T, V)``, after the prefix before each action.
        actions: ``(B, T)``, the tokens that were chosen.
        rewards: ``(B,)``, -1 for an undesired text, 0 for others, or between.
        mask: ``(B, T)`` bool, True = a real token; padding is on the right. None: all.

    Raises:
        ValueError: shapes that do not fit, or rewards outside [-1, 0].

    Example:
        >>> q = torch.full((1, 2, 3), -0.5)
        >>> sarsa_loss(q, q, torch.tensor([[0, 1]]), torch.tensor([-1.0]))  # (0 + 0.25) / 2
        tensor(0.1250)
    """
    if q.shape != q_target.shape or q.shape[:2] != actions.shape or rewards.shape != actions.shape[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, q_target, actions, rewards))
        raise ValueError(f"q and q_target must be (B, T, V), actions (B, T), rewards (B,); got {shapes}")
    _check_rewards(rewards)
    mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    at = actions.where(mask, 0)[..., None]
    chosen = q.gather(-1, at)[..., 0]
    following = q_target.detach().gather(-1, at)[..., 0].clamp(-1, 0)
    following = torch.cat([following[:, 1:], following[:, :1]], 1)
    goes_on = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    wanted = torch.where(goes_on, following, rewards[:, None].to(q.dtype))
    return ((chosen - wanted).square() * mask).sum() / mask.sum().clamp(min=1)


class SarsaObjective:
    """The objective of :func:`train_value`; the target head follows once per step."""

    def __init__(self, value: DeadEndValue) -> None:
        self.value = value

    def begin_step(self, step: int) -> None:
        if step > 1:
            self.value.follow()

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        q, q_target = model(batch.inputs["input_ids"])
        return sarsa_loss(q, q_target, batch.labels, batch.inputs["rewards"], batch.labels != IGNORED), {}


class LabelledTexts:
    """Batches of finished texts with their rewards, for :func:`subquad.training.train`.

    Args:
        texts: token ids, each of two tokens or more: the first is the prefix of the first action.
        rewards: one in [-1, 0] per text.
        batch_size, seed: batch i is a pure function of (seed, i).

    Raises:
        ValueError: no texts, a text of fewer than two tokens, another number of rewards, or rewards out of range.
    """

    def __init__(self, texts: Sequence[Sequence[int]], rewards: Sequence[float], batch_size: int, seed: int) -> None:
        if not len(texts) or len(texts) != len(rewards):
            raise ValueError(f"one reward per text is needed; got {len(texts)} texts and {len(rewards)} rewards")
        if any(len(text) < 2 for text in texts):
            raise ValueError("a text needs two tokens at least: a first one, and one that is chosen after it")
        self.texts, self.rewards = [torch.as_tensor(t) for t in texts], torch.as_tensor(rewards, dtype=torch.float32)
        self.batch_size, self.seed = batch_size, seed
        _check_rewards(self.rewards)

    def batch(self, index: int) -> Batch:
        drawn = np.random.default_rng((self.seed, index)).integers(0, len(self.texts), self.batch_size)
        chosen = [self.texts[n] for n in drawn]
        pad = torch.nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad([text[:-1] for text in chosen], batch_first=True),
            "rewards": self.rewards[torch.from_numpy(drawn)],
        }
        return Batch(inputs, pad([text[1:] for text in chosen], batch_first=True, padding_value=IGNORED))


def train_value(
    value: DeadEndValue,
    texts: Sequence[Sequence[int]],
    rewards: Sequence[float],
    options: TrainingOptions,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> Any:
    """Trains a value model in place on finished texts and returns :class:`subquad.training.TrainingResult`.

    Args:
        texts, rewards: see :class:`LabelledTexts`; the texts should come from the model that is to be rectified.
        options: of :func:`subquad.training.train`; the authors' are learning rate 3e-4, 500 steps of warm-up, batch 64.
        out, resume, console: see there.

    Raises:
        ValueError: texts or rewards that do not fit, or rewards that are all equal: there is nothing to tell apart.
    """
    data = LabelledTexts(texts, rewards, options.batch_size, options.seed)
    if float(data.rewards.min()) == float(data.rewards.max()):
        raise ValueError(f"all {len(rewards)} rewards are {float(data.rewards[0])}: there is nothing to tell apart")
    objective = SarsaObjective(value)
    folder = None if out is None else os.fspath(out)
    return train(value, data, options, out=folder, resume=resume, objective=objective, console=console)


def sample_and_score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    reward: Callable[[str], float],
    *,
    continuations: int = 25,
    max_new_tokens: int = 20,
    seed: int = 0,
) -> tuple[list[list[int]], list[float]]:
    """Finished texts of a model and their rewards: the data that a value model learns from.

    Args:
        model, tokenizer: of transformers.
        prompts: what the texts begin with.
        reward: from a finished text to a number in [-1, 0].
        continuations: texts per prompt.
        max_new_tokens: of each.
        seed: of the sampling.

    Raises:
        ValueError: no prompt, an empty one, or a reward outside [-1, 0].
    """
    if not prompts or not all(prompts):
        raise ValueError("give at least one prompt, none of them empty")
    texts: list[list[int]] = []
    rewards: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prompt in prompts:
            written, _ = sample_texts(model, tokenizer, prompt, number=continuations, max_new_tokens=max_new_tokens)
            texts += written
            rewards += [float(reward(tokenizer.decode(text, skip_special_tokens=True))) for text in written]
    _check_rewards(torch.tensor(rewards))
    return texts, rewards


def exact_value(world: TokenWorld, policy: np.ndarray | None = None) -> np.ndarray:
    """``Q_D`` of a token world ``(T, S, V)`` by dynamic programming: before token t, in state s, for token a.

    Args:
        policy: ``(S, V)``; None is the world's own.

    Example:
        >>> from subquad.tasks.token_world import dead_ends
        >>> float(exact_value(dead_ends(0))[-1, 7].max())  # from the dead end all is undesired
        -1.0
    """
    policy = world.policy if policy is None else policy
    after = -world.undesired.astype(np.float64)
    values = np.empty((world.length, *world.following.shape))
    for t in reversed(range(world.length)):
        values[t] = after[world.following]
        after = (policy * values[t]).sum(1)
    return values


def _check_rewards(rewards: Tensor) -> None:
    if not bool(((rewards >= -1) & (rewards <= 0)).all()):
        raise ValueError(f"rewards must lie in [-1, 0]; they range from {rewards.min():.3g} to {rewards.max():.3g}")
