"""The one language model: any token mixer in each layer, as ordinary transformers classes.

Causal, masked and classification heads stand on the same blocks. Adding a mixer adds nothing here.
"""

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from subquad import feedforward, mixers
from subquad.blocks import Block
from subquad.kernels.packing import locate
from subquad.layers.chunked_loss import CHUNK_ELEMENTS, IGNORED, linear_cross_entropy
from subquad.layers.norms import build_norm
from subquad.mixers.contract import Mixer, Pattern, total_loss
from subquad.models.cache import SubquadCache
from subquad.models.config import MixerEntry, SubquadConfig
from subquad.positions.absolute import LearnedPositions, SinusoidalPositions

SHIM = "modeling_subquad.py"
SHIM_TEXT = "from subquad.models import *  # noqa: F403  (pip install subquad)\n"


class HasReset(Protocol):
    def reset_parameters(self) -> None: ...


def build_mixer(entry: MixerEntry, config: SubquadConfig, layer: int) -> Mixer:
    """The mixer of one layer: the entry's own options first, then what the configuration says of all mixers."""
    options = dict(entry) if isinstance(entry, dict) else {"name": entry}
    name = options.pop("name")
    accepted = inspect.signature(mixers.mixer_class(name).__init__).parameters
    shared: dict[str, Any] = {
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rope_base": config.rope_theta if config.positions == "rope" else None,
        "causal": config.causal,
        "layer_index": layer,
        "num_layers": config.num_hidden_layers,
    }
    if "rope_base" in accepted and accepted["rope_base"].annotation is float:
        shared["rope_base"] = config.rope_theta  # a mixer that always turns
    shared = {key: value for key, value in shared.items() if key in accepted}
    return mixers.build(name, config.hidden_size, **{**shared, **options})


@dataclass
class SubquadModelOutput(BaseModelOutputWithPast):
    """Hidden states, the cache, and the sum of the mixers' auxiliary losses."""

    auxiliary_loss: Tensor | None = None


class SubquadPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving of all Subquad language models."""

    config_class = SubquadConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
            if module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
        elif hasattr(module, "reset_parameters"):
            cast(HasReset, module).reset_parameters()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Saves as every transformers model does, and adds one line of Python by which tools that never import subquad
        load it (``trust_remote_code=True``)."""
        heads = {
            "AutoModel": "SubquadModel",
            "AutoModelForCausalLM": "SubquadForCausalLM",
            "AutoModelForMaskedLM": "SubquadForMaskedLM",
            "AutoModelForSequenceClassification": "SubquadForSequenceClassification",
        }
        module = SHIM.removesuffix(".py")
        self.config.auto_map = {
            "AutoConfig": f"{module}.SubquadConfig",
            **{auto: f"{module}.{name}" for auto, name in heads.items()},
        }
        super().save_pretrained(save_directory, **kwargs)
        Path(save_directory, SHIM).write_text(SHIM_TEXT)


class SubquadModel(SubquadPreTrainedModel):
    """Embeddings, blocks and a last norm; returns hidden states.

    Args:
        config: see :class:`SubquadConfig`.
    """

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        dim = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.embed_positions: nn.Module | None = None
        if config.positions == "sinusoidal":
            self.embed_positions = SinusoidalPositions(dim)
        elif config.positions == "learned":
            self.embed_positions = LearnedPositions(dim, config.max_position_embeddings)
        self.layers = nn.ModuleList(self._block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = build_norm(config.norm if config.norm_place == "pre" else "none", dim, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self._is_stateful = any(mixer.constant_state for mixer in self.mixers())
        self.post_init()

    @staticmethod
    def _block(config: SubquadConfig, layer: int) -> Block:
        channel_mixer = None
        if config.feedforward is not None:
            assert config.intermediate_size is not None
            channel_mixer = feedforward.build(config.feedforward, config.hidden_size, config.intermediate_size)
        return Block(
            build_mixer(cast(list[MixerEntry], config.mixers)[layer], config, layer),
            channel_mixer,
            norm=config.norm,
            norm_place=config.norm_place,
            norm_eps=config.rms_norm_eps,
        )

    def mixers(self) -> list[Mixer]:
        """The token mixers in layer order."""
        return [cast(Block, block).mixer for block in self.layers]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> SubquadModelOutput | tuple[Any, ...]:
        """Hidden states of the tokens.

        Args:
            input_ids: ``(B, T)`` int64; or inputs_embeds ``(B, T, D)``.
            attention_mask: ``(B, T)`` or ``(B, earlier + T)``, nonzero = a real token, on any side.
            position_ids: ``(B, T)``; by default real tokens are counted. In a batch of one, positions that start again
                at 0 mark packed sequences, which stay apart.
            cache: states of the tokens before these; ``past_key_values`` is its older name.
            use_cache: whether to return it; by default in evaluation only.
            output_hidden_states: also return the input of every block and the final states.
            cu_seq_lens_q: ``(N + 1,)`` boundaries of packed sequences in a batch of one.
            prefix_lengths: ``(B,)``, or ``(N,)`` of packed sequences: the first so many real tokens of a row are seen
                by all its tokens, in the layers that serve prefix-causal use; all others stay causal.

        Raises:
            ValueError, TypeError: both or neither of input_ids and inputs_embeds, token ids outside the vocabulary, a
                mask of another shape, a cache of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(self._checked(cast(Tensor, input_ids)))
        x = inputs_embeds
        cache = self._checked_cache(past_key_values if cache is None else cache)
        mask = self._current_mask(attention_mask, x, cache)
        cu_seqlens = cu_seq_lens_q
        if cu_seqlens is None and mask is None and (cache is None or cache.get_seq_length() == 0):
            cu_seqlens = self._packing(position_ids, x)
        if cu_seqlens is not None:
            cache, use_cache = None, False  # packed rows are whole: nothing follows them
        elif use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None and self.config.causal:
            cache = SubquadCache(len(self.layers))
        x = self._embed(x, attention_mask, position_ids, cu_seqlens, cache)
        if prefix_lengths is not None:
            self._check_prefix(cache)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        all_states: list[Tensor] = []
        losses: list[dict[str, Any]] = []
        for layer, block in enumerate(self.layers):
            if output_hidden_states:
                all_states.append(x)
            own = cast(Mixer, block.mixer)
            request = {
                "mask": mask,
                "cu_seqlens": cu_seqlens,
                "positions": self._positions_for(own, position_ids, x),
                "prefix_lengths": prefix_lengths if Pattern.PREFIX_SELF in own.patterns else None,
                "state": None if cache is None else cache.states[layer].state,
                "use_state": cache is not None,
            }
            if self.gradient_checkpointing and self.training:
                mixed = self._gradient_checkpointing_func(
                    lambda x, block=block, request=request: block(x, **request), x
                )
            else:
                mixed = block(x, **request)
            x = mixed.output
            losses.append(mixed.losses)
            if cache is not None:
                cache.states[layer].store(mixed.state, x.shape[1])
        x = self.norm(x)
        if output_hidden_states:
            all_states.append(x)
        return SubquadModelOutput(
            last_hidden_state=x,
            cache=cache,
            hidden_states=tuple(all_states) or None,
            auxiliary_loss=total_loss(losses),
        )

    def _checked(self, input_ids: Tensor) -> Tensor:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (batch, time), nothing empty; got {tuple(input_ids.shape)}")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(f"token id {wrong} is outside the vocabulary of {self.config.vocab_size}")
        return input_ids

    def _checked_cache(self, cache: Any) -> SubquadCache | None:
        if cache is None:
            return None
        if not isinstance(cache, SubquadCache):
            raise TypeError(f"cache must be a SubquadCache, which holds each mixer's state; got {type(cache).__name__}")
        if not self.config.causal:
            raise ValueError("a cache belongs to a causal model; this one has causal=False")
        return cache

    def _check_prefix(self, cache: SubquadCache | None) -> None:
        if not any(Pattern.PREFIX_SELF in mixer.patterns for mixer in self.mixers()):
            kinds = ", ".join(sorted({type(mixer).__name__ for mixer in self.mixers()}))
            raise ValueError(f"prefix_lengths needs a layer for prefix-causal use (jrt, softmax); there is {kinds}")
        if cache is not None and cache.get_seq_length():
            raise ValueError("a prefix is read in one call, at the beginning: these tokens go on from a cache")

    @staticmethod
    def _current_mask(attention_mask: Tensor | None, x: Tensor, cache: SubquadCache | None) -> Tensor | None:
        """The mask of the current tokens, None where all are real."""
        if attention_mask is None:
            return None
        time, earlier = x.shape[1], 0 if cache is None else cache.get_seq_length()
        if (
            attention_mask.ndim != 2
            or attention_mask.shape[0] != x.shape[0]
            or (attention_mask.shape[1] not in (time, earlier + time))
        ):
            raise ValueError(
                f"attention_mask must be (batch, time) = {(x.shape[0], time)}"
                + (f" or (batch, earlier + time) = {(x.shape[0], earlier + time)}" if earlier else "")
                + f"; it has shape {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, -time:] != 0
        if not torch.compiler.is_compiling() and bool(mask.all()):
            return None
        return mask

    @staticmethod
    def _packing(position_ids: Tensor | None, x: Tensor) -> Tensor | None:
        """Boundaries of packed sequences from positions that start again at 0; None where nothing is packed."""
        if position_ids is None or x.shape[0] != 1 or torch.compiler.is_compiling():
            return None
        starts = torch.nonzero(position_ids[0] == 0).flatten()
        if len(starts) < 2:
            return None
        return torch.cat([starts, starts.new_tensor([x.shape[1]])])

    @staticmethod
    def _positions_for(mixer: Mixer, position_ids: Tensor | None, x: Tensor) -> Tensor | None:
        if position_ids is None or not mixer.uses_positions:
            return None
        return position_ids.expand(x.shape[0], -1)

    def _embed(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: SubquadCache | None,
    ) -> Tensor:
        if self.config.scale_embeddings:
            x = x * self.config.hidden_size**0.5
        if self.embed_positions is None:
            return x
        if position_ids is None:
            position_ids = self._count(x, attention_mask, cu_seqlens, 0 if cache is None else cache.get_seq_length())
        return x + self.embed_positions(position_ids).to(x.dtype)

    @staticmethod
    def _count(x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, earlier: int) -> Tensor:
        """Each token's place among its row's real tokens. Earlier columns outside the mask were all real."""
        if cu_seqlens is not None:
            return locate(cu_seqlens, x.shape[1]).place[None]
        if attention_mask is None:
            return (earlier + torch.arange(x.shape[1], device=x.device)).expand(x.shape[0], -1)
        counted = ((attention_mask != 0).cumsum(1) - 1).clamp(min=0)
        covered = attention_mask.shape[1] == earlier + x.shape[1]
        return counted[:, -x.shape[1] :] + (0 if covered else earlier)


class SubquadForCausalLM(SubquadPreTrainedModel, GenerationMixin):
    """A causal language model: the blocks of :class:`SubquadModel` and a head over the vocabulary.

    Works with ``generate``, ``Trainer``, ``peft`` and ``pipeline`` as any transformers model does.

    Example:
        >>> config = SubquadConfig(mixers="gla", vocab_size=16, hidden_size=32, num_hidden_layers=1)
        >>> model = SubquadForCausalLM(config)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 16])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        if not config.causal:
            raise ValueError("SubquadForCausalLM needs causal=True; for causal=False use SubquadForMaskedLM")
        self.model = SubquadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._is_stateful = self.model._is_stateful
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SubquadCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: SubquadCache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits ``(B, T, vocabulary)`` and, with labels, the loss.

        Args:
            labels: ``(B, T)``, the input ids themselves (they are shifted here); -100 is ignored, and must stand for
                the tokens of a prefix and the first after it: inside a prefix every token is seen.
            logits_to_keep: how many last positions get logits (0: all), or which.
            num_items_in_batch: what the summed loss is divided by; by default the number of labels that count.
            skip_logits: leave the logits out, so that they never exist as a whole: the loss is computed in chunks.
                Default: while training with labels, where they would take more than 64 MB.

        All other arguments are those of :meth:`SubquadModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cu_seq_lens_q=cu_seq_lens_q,
            past_key_values=past_key_values,
            prefix_lengths=prefix_lengths,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if prefix_lengths is not None:
                self._refuse_prefix_targets(targets, attention_mask, prefix_lengths, cu_seq_lens_q)
            if num_items_in_batch is None:
                loss = linear_cross_entropy(hidden, self.lm_head.weight, targets)
            else:
                summed = linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction="sum")
                loss = summed / num_items_in_batch
            if outputs.auxiliary_loss is not None:
                loss = loss + outputs.auxiliary_loss
        if skip_logits is None:
            size = hidden.shape[0] * hidden.shape[1] * self.config.vocab_size
            skip_logits = self.training and labels is not None and size > CHUNK_ELEMENTS
        logits = None if skip_logits else self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, cache=outputs.cache, hidden_states=outputs.hidden_states
        )

    def loss_from_labels(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        """Mean loss in nats where ``labels[b, t]`` is what position t should predict (no shift); -100 is ignored.

        With ``weights (B, T)`` it is the sum of the positions' losses, weighted. For ``prefix_lengths`` see
        :meth:`SubquadModel.forward`.
        """
        outputs = self.model(input_ids=input_ids, use_cache=False, prefix_lengths=prefix_lengths, return_dict=True)
        if weights is None:
            loss = linear_cross_entropy(outputs.last_hidden_state, self.lm_head.weight, labels)
        else:
            each = linear_cross_entropy(outputs.last_hidden_state, self.lm_head.weight, labels, reduction="none")
            loss = (each.view_as(weights) * weights).sum()
        return loss if outputs.auxiliary_loss is None else loss + outputs.auxiliary_loss

    @staticmethod
    def _refuse_prefix_targets(
        targets: Tensor, attention_mask: Tensor | None, prefix_lengths: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        if cu_seqlens is not None:
            places = locate(cu_seqlens, targets.shape[1])
            inside = (places.place < prefix_lengths[places.sequence])[None]
        elif attention_mask is not None:
            inside = (attention_mask != 0).cumsum(1) <= prefix_lengths[:, None]
        else:
            inside = torch.arange(targets.shape[1], device=targets.device) < prefix_lengths[:, None]
        if not torch.compiler.is_compiling() and bool(((targets != IGNORED) & inside).any()):
            raise ValueError(
                "labels inside a prefix ask for tokens that are seen: set those of the prefix and of the first token "
                "after it to -100 (masked prefix tokens: training.PrefixLM)"
            )

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A prefix is given with the tokens that it begins; what the cache holds was read with it."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        cache = inputs.get("cache")
        if cache is not None and cache.get_seq_length():
            inputs.pop("prefix_lengths", None)
        return inputs

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """With ``config.prefix_lm`` the prompt is the prefix, also of the steps after it where there is no cache."""
        cache = model_kwargs.get("cache")
        begins = cache is None or not cache.get_seq_length()
        if self.config.prefix_lm and begins and model_kwargs.get("prefix_lengths") is None:
            mask, prompt = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
            prompt = input_ids if prompt is None else prompt
            whole = torch.full((prompt.shape[0],), prompt.shape[1], device=prompt.device)
            model_kwargs["prefix_lengths"] = whole if mask is None else (mask != 0).sum(1)
        if model_kwargs.get("prefix_lengths") is not None and generation_config.prefill_chunk_size is not None:
            raise ValueError("a prefix is read in one call: prefill_chunk_size does not apply")
        return super()._prefill(  # type: ignore[misc]
            input_ids, generation_config, model_kwargs, *args, **kwargs
        )

    def load_cache(self, path: str | os.PathLike[str]) -> SubquadCache:
        """The cache that ``cache.save(path)`` wrote, to go on where it stopped."""
        return SubquadCache.load(path, self.model.mixers())

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Generation starts from our own cache: transformers' kinds hold keys and values only."""
        given = model_kwargs.pop("past_key_values", None)
        if given is not None:
            model_kwargs["cache"] = given
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not apply: "
                "a Subquad model keeps each mixer's own state"
            )
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("cache") is None:
            model_kwargs["cache"] = SubquadCache(self.config.num_hidden_layers)
        elif not isinstance(model_kwargs["cache"], SubquadCache):
            raise TypeError(f"cache must be a SubquadCache; got {type(model_kwargs['cache']).__name__}")


class SubquadForMaskedLM(SubquadPreTrainedModel):
    """A masked language model on bidirectional mixers (``causal=False``), with a head over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        if config.causal:
            raise ValueError("SubquadForMaskedLM needs causal=False in its configuration")
        self.model = SubquadModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits ``(B, T, vocabulary)`` and, with labels ``(B, T)`` (not shifted; -100 is ignored), the loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden, loss = outputs.last_hidden_state, None
        if labels is not None:
            loss = linear_cross_entropy(hidden, self.lm_head.weight, labels)
            if outputs.auxiliary_loss is not None:
                loss = loss + outputs.auxiliary_loss
        return MaskedLMOutput(loss=loss, logits=self.lm_head(hidden), hidden_states=outputs.hidden_states)


class SubquadForSequenceClassification(SubquadPreTrainedModel):
    """A classifier of sequences: causal models read the last real token, bidirectional ones the mean of all."""

    def __init__(self, config: SubquadConfig) -> None:
        super().__init__(config)
        self.model = SubquadModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels or 2, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """Logits ``(B, num_labels)`` and, with labels ``(B,)``, the loss of ``config.problem_type``."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = outputs.last_hidden_state
        real = torch.ones_like(hidden[..., 0]) if attention_mask is None else (attention_mask != 0).to(hidden.dtype)
        if self.config.causal:
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(dim=1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        else:
            pooled = (hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if outputs.auxiliary_loss is not None:
                loss = loss + outputs.auxiliary_loss
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
