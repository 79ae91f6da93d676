"""How far a trained model looks, and how even its gradients are.

The two diagnoses of Qin et al. 2022 ("The Devil in Linear Transformer", section 3): linear attention spreads its mass
over far tokens (dilution), and its normaliser makes gradients unbounded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from subquad.mixers import Mixer
from subquad.mixers.linear import LinearAttention
from subquad.mixers.norm_attention import DiagAttention, NormAttention
from subquad.mixers.softmax import SoftmaxAttention
from subquad.models import SubquadForCausalLM
from subquad.positions.rope import apply_rope

Weights = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class LayerMass:
    """One layer: the tokens back that hold the share of the attention mass, as a mean over queries and heads."""

    layer: int
    mixer: str
    distance: float


@torch.no_grad()
def attention_mass(model: SubquadForCausalLM, inputs: Tensor, *, share: float = 0.8) -> list[LayerMass]:
    """How many tokens back each layer must look for ``share`` of its attention mass.

    For query i and weights ``p_ij >= 0`` that sum to 1, the distance is the smallest d with ``sum_{j >= i-d} p_ij >=
    share``: 0 where a token looks at itself only. Queries of the first half of the window, which cannot look far, are
    left out.

    Args:
        model: causal, whose mixers are softmax, linear (normalised), norm attention with a feature map that is not
            negative (1 + elu), or diag attention with softmax weights.
        inputs: ``(B, T)`` int64 tokens, T >= 2.
        share: in (0, 1].

    Raises:
        ValueError: a mixer whose weights are signed or that has none, a share out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    mixers = model.model.mixers()
    weigh = [_weights_of(mixer) for mixer in mixers]
    seen: list[Tensor] = []
    hooks = [mixer.register_forward_pre_hook(lambda mixer, inputs: seen.append(inputs[0])) for mixer in mixers]
    try:
        model(input_ids=inputs.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer, (mixer, x) in enumerate(zip(mixers, seen)):
        distances = mass_distances(weigh[layer](mixer, x), share)
        later = distances[..., distances.shape[-1] // 2 :]
        found.append(LayerMass(layer, type(mixer).__name__, float(later.double().mean())))
    return found


def mass_distances(weights: Tensor, share: float) -> Tensor:
    """Distances of causal weights ``(..., T, T)``, not negative, zero above the diagonal -> ``(..., T)`` int64.

    Example:
        >>> mass_distances(torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.7, 0.2, 0.1]]), 0.8).tolist()
        [0, 1, 2]
    """
    length = weights.shape[-1]
    weights = weights.double()
    place = torch.arange(length, device=weights.device)
    back = place[:, None] - place  # [i, d]: the key at distance d of query i, negative before the first token
    by_distance = weights.gather(-1, back.clamp(min=0).expand_as(weights)).where(back >= 0, 0)
    mass = by_distance.cumsum(-1) / by_distance.sum(-1, keepdim=True)
    return (mass < share - 1e-9).sum(-1).clamp(max=length - 1)


def _weights_of(mixer: Mixer) -> Weights:
    kind = next((kind for kind in WEIGHTS if isinstance(mixer, kind)), None)
    if kind is None:
        known = ", ".join(kind.__name__ for kind in WEIGHTS)
        raise ValueError(f"{type(mixer).__name__} has no attention weights to read; those that have: {known}")
    if isinstance(mixer, DiagAttention) and mixer.weights != "softmax":
        raise ValueError(f"attention mass needs weights that sum to 1: DiagAttention with weights={mixer.weights!r}")
    return WEIGHTS[kind]


def _featured(mixer: LinearAttention | NormAttention, x: Tensor) -> Tensor:
    if isinstance(mixer, LinearAttention):
        q, k, _ = mixer.project(x, x)
        scores = mixer.phi.weights(q, k).tril()
    else:
        q, k = (mixer.phi(_heads(proj(x), mixer.head_dim)) for proj in (mixer.q_proj, mixer.k_proj))
        scores = torch.einsum("bihk,bjhk->bhij", q, k).tril()
    if bool((scores < 0).any()):
        raise ValueError(
            f"attention mass needs weights that are not negative; the feature map of this {type(mixer).__name__} is "
            "signed (1 + elu is not)"
        )
    return scores


def _softmax(mixer: SoftmaxAttention, x: Tensor) -> Tensor:
    q = mixer.q_norm(_heads(mixer.q_proj(x), mixer.head_dim))
    k = mixer.k_norm(_heads(mixer.k_proj(x), mixer.head_dim))
    if mixer.rope_base is not None:
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        q, k = apply_rope(q, positions, mixer.rope_base), apply_rope(k, positions, mixer.rope_base)
    k = k.repeat_interleave(mixer.num_heads // mixer.num_key_value_heads, dim=2)
    place = torch.arange(x.shape[1], device=x.device)
    back = place[:, None] - place
    visible = back >= 0
    if mixer.window_size is not None:
        visible &= (back < mixer.window_size) | (place < mixer.num_sinks)
    return _softmax_of(q, k, visible)


def _diagonal(mixer: DiagAttention, x: Tensor) -> Tensor:
    q, k = (_heads(proj(x), mixer.head_dim) for proj in (mixer.q_proj, mixer.k_proj))
    place = torch.arange(x.shape[1], device=x.device)
    block = place // mixer.block_size
    return _softmax_of(q, k, (place[:, None] >= place) & (block[:, None] == block))


def _softmax_of(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))


WEIGHTS: dict[type[Mixer], Weights] = {
    LinearAttention: _featured,
    NormAttention: _featured,
    DiagAttention: _diagonal,
    SoftmaxAttention: _softmax,
}


@dataclass(frozen=True)
class LayerGradient:
    """One layer over the batches: mean of the gradient's norm, and its standard deviation over that mean."""

    layer: int
    mixer: str
    mean: float
    relative_spread: float


def gradient_norms(model: SubquadForCausalLM, batches: Iterable[Any]) -> list[LayerGradient]:
    """The norm of the loss's gradient for each mixer's parameters, over batches: how large, and how uneven.

    Args:
        model: a language model with ``loss_from_labels``; its parameters and their ``.grad`` are left as they are.
        batches: two or more with ``inputs`` and ``labels``, labels aligned with the positions.

    Raises:
        ValueError: fewer than two batches.
    """
    mixers: list[nn.Module] = list(model.model.mixers())
    owned = [[p for p in mixer.parameters() if p.requires_grad] for mixer in mixers]
    norms: list[list[float]] = []
    for batch in batches:
        loss = model.loss_from_labels(batch.inputs.to(model.device), batch.labels.to(model.device))
        gradients = iter(torch.autograd.grad(loss, [p for parameters in owned for p in parameters]))
        norms.append([float(nn.utils.get_total_norm([next(gradients) for _ in parameters])) for parameters in owned])
    if len(norms) < 2:
        raise ValueError(f"a spread needs two batches or more; got {len(norms)}")
    by_layer = torch.tensor(norms, dtype=torch.float64)
    means, spreads = by_layer.mean(0), by_layer.std(0)
    return [
        LayerGradient(layer, type(mixer).__name__, float(mean), float(spread / mean))
        for layer, (mixer, mean, spread) in enumerate(zip(mixers, means, spreads))
    ]


def layer_table(rows: Sequence[LayerMass | LayerGradient]) -> Table:
    """Layers of either measurement, for a rich console."""
    table = Table()
    for name in vars(rows[0]):
        table.add_column(name.replace("_", " "), justify="left" if name == "mixer" else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in vars(row).values()))
    return table
