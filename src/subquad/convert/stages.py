"""The trained stages of a conversion: layer-wise transfer, and adaptation of the whole model by low-rank additions.

Both train few parameters of a large model that stands still, so a checkpoint holds those alone. In transfer each layer
reads what the source's own layer before it gave, so that its loss is its own: its gradient is taken as soon as the
layer has run, and no graph outlives it (LoLCATs, Zhang et al. 2025, section 3.2; Hedgehog, Zhang et al. 2024).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.convert.attention import ConvertedAttention, Layout, as_source, converted_layers
from subquad.convert.recipes import Adapt
from subquad.convert.sites import PROJECTIONS, Family
from subquad.layers.chunked_loss import linear_cross_entropy
from subquad.layers.mimicry import mimicry_loss
from subquad.layers.registry import unknown_name
from subquad.mixers.cores import AttentionCore, Heads, repeat_heads
from subquad.training.data import BatchLike

OUTPUT_SCALE = 1000.0  # outputs differ by some 1e-5 at the end, squared: too little for float16's gradients


class TrainedPart(nn.Module):
    """Some parameters of a model as a module of their own: what a stage trains, and what its checkpoints hold.

    Args:
        parameters: with their names in the model, where they stay; dots become slashes.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__()
        for name, parameter in parameters:
            self.register_parameter(name.replace(".", "/"), parameter)


def core_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that a conversion added, with their names in the model."""
    return [
        (f"{layer}.subquad.{name}", parameter)
        for layer, module in converted_layers(model)
        for name, parameter in module.subquad.named_parameters()
    ]


def output_loss(core: AttentionCore, heads: Heads, layout: Layout, output: Tensor) -> Tensor:
    """1000 times the mean squared difference between a core's heads and those of softmax, over real tokens."""
    ours, _ = core(heads, mask=layout.mask, cu_seqlens=layout.cu_seqlens)
    if layout.mask is not None:
        ours, output = ours[layout.mask], output[layout.mask]
    return OUTPUT_SCALE * F.mse_loss(ours, output)


def weights_loss(core: Any, heads: Heads, layout: Layout, output: Tensor) -> Tensor:
    """Cross entropy of a linear attention's weights against softmax's, summed over heads."""
    if layout.cu_seqlens is not None:
        raise ValueError("attention weights are compared on whole rows: packed sequences are not supported here")
    key = repeat_heads(heads.k_turned, heads.q.shape[2])
    return mimicry_loss(core.phi, heads.q_turned, key, causal=core.causal, mask=layout.mask).sum()


TRANSFER_LOSSES: dict[str, Callable[[Any, Heads, Layout, Tensor], Tensor]] = {
    "output": output_loss,
    "weights": weights_loss,
}


class _Installed(torch.autograd.Function):
    """A loss whose gradients were taken before: backward hands them out."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, None, *(upstream[0] * gradient for gradient in ctx.gradients)


class LayerTransfer:
    """The objective of transfer: the mean over layers of each layer's own loss.

    Args:
        model: converted; it computes what its source does, and its cores learn beside it.
        loss: ``"output"`` or ``"weights"``; see :class:`subquad.convert.recipes.Transfer`.
    """

    def __init__(self, model: Any, loss: str) -> None:
        if loss not in TRANSFER_LOSSES:
            raise unknown_name("transfer loss", loss, TRANSFER_LOSSES)
        self.model, self.loss = model, TRANSFER_LOSSES[loss]
        self.count = len(converted_layers(model))

    def __call__(self, part: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        values: list[Tensor] = []
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        wanted = torch.is_grad_enabled()

        def observe(module: ConvertedAttention, heads: Heads, layout: Layout, output: Tensor) -> None:
            own = [parameter for parameter in module.subquad.parameters() if parameter.requires_grad]
            with torch.set_grad_enabled(wanted):
                loss = self.loss(module.subquad, heads.map(Tensor.detach), layout, output.detach()) / self.count
            values.append(loss.detach())
            if wanted:
                parameters.extend(own)
                gradients.extend(torch.autograd.grad(loss, own))

        with torch.no_grad(), as_source(self.model, observe):
            self.model.base_model(**inputs_of(batch), use_cache=False)
        total = torch.stack(values).sum()
        if wanted:
            total = _Installed.apply(total, gradients, *parameters)
        return total, {}


class NextTokens:
    """The objective of adaptation: next tokens, with the logits of a large vocabulary computed in chunks."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, part: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        hidden = self.model.base_model(**inputs_of(batch), use_cache=False).last_hidden_state
        head = self.model.get_output_embeddings()
        loss = linear_cross_entropy(hidden, head.weight, batch.labels, bias=getattr(head, "bias", None))
        return loss, {}


class HiddenStates:
    """The objective of adaptation for a bare encoder: its last hidden states against those of its source.

    Args:
        model: converted and adapted by ``adapter``.
        adapter: the peft wrapper, whose additions are left out while the source is run.
    """

    def __init__(self, model: Any, adapter: Any) -> None:
        self.model, self.adapter = model, adapter

    def __call__(self, part: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        inputs = inputs_of(batch)
        self.adapter.disable_adapter_layers()
        try:
            with torch.no_grad(), as_source(self.model):
                wanted = self.model.base_model(**inputs).last_hidden_state
        finally:
            self.adapter.enable_adapter_layers()
        hidden = self.model.base_model(**inputs).last_hidden_state
        return F.mse_loss(hidden, wanted), {}


def inputs_of(batch: BatchLike) -> dict[str, Tensor]:
    """The arguments of a model's forward: token ids, or whatever a batch names."""
    return dict(batch.inputs) if isinstance(batch.inputs, dict) else {"input_ids": batch.inputs}


def add_adapters(model: Any, stage: Adapt, family: Family, seed: int) -> Any:
    """Low-rank additions to the projections of converted layers, in place; the peft wrapper that can merge them.

    Raises:
        ValueError: a projection that a layer does not have.
    """
    from peft import LoraConfig, LoraModel

    names = adapted_names(model, stage, family)
    config = LoraConfig(r=stage.rank, lora_alpha=stage.alpha, target_modules=names, lora_dropout=0.0)
    config.fan_in_fan_out = family.name == "gpt2"  # its Conv1D keeps weights transposed
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = LoraModel(model, {"default": config}, "default")
    if stage.train_cores:
        for _, parameter in core_parameters(model):
            parameter.requires_grad_(True)
    return adapter


def adapted_names(model: nn.Module, stage: Adapt, family: Family) -> list[str]:
    """Names of the linear layers that a stage adapts, inside converted layers alone."""
    wanted = [name for kind, name in zip(PROJECTIONS, family.projections) if kind in stage.projections]
    inside = [f"{layer}.{name}" for layer, _ in converted_layers(model) for name in dict.fromkeys(wanted)]
    present = dict(model.named_modules())
    # BERT's output projection lies beside its attention, in the module that holds both
    found = [name if name in present else _beside(name) for name in inside]
    missing = [name for name in found if name not in present]
    if missing:
        raise ValueError(f"this {type(model).__name__} has no {missing[0]} to adapt")
    return found


def _beside(name: str) -> str:
    parent, _, rest = name.partition(".self.")
    return f"{parent}.{rest}"


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model that learn."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
