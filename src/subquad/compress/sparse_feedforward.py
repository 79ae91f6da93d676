"""Feed-forward layers of an existing model that skip inactive neurons when it decodes.

A ReLU model is computed exactly (Song et al. 2024, "ProSparse"); with thresholds from
:func:`subquad.evaluation.sparsity.perplexity_sparsity` any model loses what was measured (Luo et al. 2024).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from subquad.layers.feedforward_sites import FeedForwardSite, feedforward_sites
from subquad.ops.sparse_feedforward import sparse_down_projection, sparse_gated_feedforward
from subquad.ops.sparse_feedforward.api import ACTIVATIONS
from subquad.training.checkpoint import write_atomically

FILE = "sparse_feedforward.safetensors"


class SparseGatedFeedForward(nn.Module):
    """A gated layer in the place of the one it was made from, with the same weights under the same names.

    Attributes:
        gate_threshold: gates smaller than it are inactive.
        output_threshold: ``(F,)``, hidden values smaller than it are inactive; None: only zeros are.
    """

    output_threshold: Tensor | None

    def __init__(
        self, site: FeedForwardSite, activation: str, gate_threshold: float, output_threshold: Tensor | None
    ) -> None:
        super().__init__()
        self.activation, self.gate_threshold, self._names = activation, gate_threshold, site.children
        for name, projection in zip(site.children, (site.gate, site.up, site.down)):
            self.add_module(str(name), projection)
        self.register_buffer("output_threshold", output_threshold, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, str(name)).weight for name in self._names)
        return sparse_gated_feedforward(
            x,
            gate,
            up,
            down,
            activation=self.activation,
            gate_threshold=self.gate_threshold,
            output_threshold=self.output_threshold,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gate_threshold={self.gate_threshold}"


class SparseDownProjection(nn.Linear):
    """The last projection of a layer without a gate, in the place of the linear map whose parameters it holds."""

    output_threshold: Tensor | None

    def __init__(self, linear: nn.Linear, output_threshold: Tensor | None) -> None:
        super().__init__(1, 1, bias=linear.bias is not None, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("output_threshold", output_threshold, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output = sparse_down_projection(hidden, self.weight, threshold=self.output_threshold)
        return output if self.bias is None else output + self.bias


def sparsify(
    model: nn.Module, thresholds: Mapping[str, Tensor] | None = None, *, gate_threshold: float = 0.0
) -> list[str]:
    """Exchanges the feed-forward layers of ``model`` in place for ones that skip inactive neurons.

    Without thresholds only zeros are skipped, and nothing changes but the time of a decode step: use it for models with
    ReLU. The storage of the last projections is turned round, which their values do not show.

    Args:
        model: any model whose layers :func:`subquad.layers.feedforward_sites.feedforward_sites` finds.
        thresholds: by the name of the layer one value per neuron, ``Thresholds.by_neuron``.
        gate_threshold: FATReLU's, for all gated layers.

    Returns:
        The names of the layers that were exchanged: all of them.

    Raises:
        ValueError, TypeError: no layers, a layer with another kind of projection, with biases, or an activation that is
            not relu, silu or gelu; thresholds for other layers than the model has; a negative threshold.

    Example:
        >>> from subquad import SubquadConfig, SubquadForCausalLM
        >>> config = SubquadConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, feedforward="reglu")
        >>> sparsify(SubquadForCausalLM(config))
        ['model.layers.0.feedforward']
    """
    if not gate_threshold >= 0:
        raise ValueError(f"gate_threshold must not be negative; got {gate_threshold}")
    sites = feedforward_sites(model)
    names = [site.name for site in sites]
    if thresholds is not None and set(thresholds) != set(names):
        other = sorted(set(thresholds) ^ set(names))
        raise ValueError(f"thresholds must be given for each layer of the model; in one of the two only: {other[0]}")
    activations = [_activation_name(site) for site in sites]
    for site in sites:  # all are looked at before one is changed
        _check_site(site, gate_threshold)
    for site, activation in zip(sites, activations, strict=True):
        threshold = None if thresholds is None else thresholds[site.name].to(site.down_weight)
        weight = site.down.weight
        assert isinstance(weight, nn.Parameter)
        assert isinstance(site.down, nn.Linear)
        weight.data = weight.data.mT.contiguous().mT
        if site.gate is None:
            setattr(site.module, site.children[2], SparseDownProjection(site.down, threshold))
        else:
            _replace(model, site.name, SparseGatedFeedForward(site, activation, gate_threshold, threshold))
    return names


def save_sparse(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """``model.save_pretrained`` and, beside the weights, the thresholds: any tool loads the folder as a dense model.

    Raises:
        ValueError: the model was not made sparse.
    """
    gated = {n: m for n, m in model.named_modules() if isinstance(m, SparseGatedFeedForward)}
    plain = {n.rpartition(".")[0]: m for n, m in model.named_modules() if isinstance(m, SparseDownProjection)}
    layers: dict[str, SparseGatedFeedForward | SparseDownProjection] = {**gated, **plain}
    if not layers:
        raise ValueError("the model has no sparse feed-forward layers; call sparsify(model) first")
    model.save_pretrained(folder)  # type: ignore[operator]
    tensors = {name: layer.output_threshold for name, layer in layers.items() if layer.output_threshold is not None}
    gate = next((layer.gate_threshold for layer in gated.values()), 0.0)
    metadata = {"gate_threshold": json.dumps(gate)}
    write_atomically(
        Path(folder) / FILE,
        lambda temporary: save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata),
    )


def load_sparse(folder: str | os.PathLike[str], **options: object) -> nn.Module:
    """The causal language model that :func:`save_sparse` wrote, its layers sparse; options go to ``from_pretrained``.

    Raises:
        ValueError: the folder holds no thresholds.
    """
    from transformers import AutoModelForCausalLM

    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {FILE}: it was not written by save_sparse")
    with safe_open(path, framework="pt") as file:
        gate_threshold = json.loads(file.metadata()["gate_threshold"])
        thresholds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    sparsify(model, thresholds or None, gate_threshold=gate_threshold)
    return model


def _activation_name(site: FeedForwardSite) -> str:
    probe = torch.linspace(-4, 4, 33)
    for name, function in ACTIVATIONS.items():
        if torch.equal(function(probe), site.activation(probe)):
            return name
    known = ", ".join(ACTIVATIONS)
    raise ValueError(f"the activation of {site.name} is none of {known}: {site.activation}")


def _check_site(site: FeedForwardSite, gate_threshold: float) -> None:
    for projection in (site.gate, site.up, site.down):
        if projection is not None and not isinstance(projection, nn.Linear):
            raise TypeError(f"{site.name} has a {type(projection).__name__} where a linear layer is needed")
        if site.gate is not None and getattr(projection, "bias", None) is not None:
            raise ValueError(f"{site.name} has biases in its gated layer, which the sparse form does not")
    if site.gate is None and gate_threshold:
        raise ValueError(f"gate_threshold belongs to gated layers; {site.name} has no gate")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
