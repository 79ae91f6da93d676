"""How many neurons of a language model's feed-forward layers matter, for any activation and without training.

Source: Luo et al. 2024, "Sparsing Law: Towards Large Language Models with Greater Activation Sparsity", section 3.
Neuron i adds ``n_i = h_i W_down[:, i]`` to the output; a rule says which neurons are too weak to be counted, and the
activation ratio is the share of the others, averaged over tokens and layers. Weights are never touched.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from subquad.layers.feedforward_sites import FeedForwardSite, feedforward_sites

Windows = Sequence[Tensor] | Sequence[Mapping[str, Tensor]]
#: From the site's number, s = act(gate x) (or h without a gate) and h, both (tokens, F), to the active neurons.
Rule = Callable[[int, Tensor, Tensor], Tensor]

BISECTIONS, TOLERANCE = 30, 2e-3  # of a layer's threshold, and how far below the error asked for it may stay
SMALLEST_NORM = 1e-3  # of the mean norm of the outputs: what divides an error is no smaller
CANDIDATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class SparsityMeasure:
    """What a rule leaves active, and what it costs.

    Attributes:
        ratio: active neurons over all, mean over tokens and layers; the sparsity is 1 - ratio.
        by_layer: the same for each layer, in the order of :func:`feedforward_sites`.
        loss, dense_loss: nats per token with and without the rule, on the same windows.
        never_active: share of neurons that were active for no token at all (counted as inactive in ratio too).
    """

    ratio: float
    by_layer: tuple[float, ...]
    loss: float
    dense_loss: float
    never_active: float

    @property
    def perplexity_increase(self) -> float:
        """In percent of the dense perplexity."""
        return 100 * math.expm1(self.loss - self.dense_loss)


@dataclass(frozen=True)
class Thresholds:
    """By layer, what a neuron's ``|h_i|`` must reach to count; see :func:`cett_thresholds`.

    Attributes:
        error: c, the relative error of a layer's output that they leave on the windows they were made from.
        by_layer: theta, the least norm of ``n_i``, by the name of the layer.
        by_neuron: theta over the norm of the neuron's column, ``(F,)`` float32, by the name of the layer.
    """

    error: float
    by_layer: dict[str, float]
    by_neuron: dict[str, Tensor] = field(repr=False)


def zero() -> Rule:
    """Neurons with s = 0 are inactive: the sparsity of ReLU."""
    return lambda site, s, h: s != 0


def fat(eps: float) -> Rule:
    """Neurons with ``|s| < eps`` are inactive, one eps for all layers."""
    if not eps >= 0:
        raise ValueError(f"eps must not be negative; got {eps}")
    return lambda site, s, h: (s.abs() >= eps) & (s != 0)


def top_k(k: int) -> Rule:
    """The k neurons of largest ``|s|`` are active, per token and layer."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer >= 1; got {k!r}")

    def rule(site: int, s: Tensor, h: Tensor) -> Tensor:
        active = torch.zeros_like(s, dtype=torch.bool)
        return active.scatter_(-1, s.abs().topk(min(k, s.shape[-1]), dim=-1).indices, True)

    return rule


def truncation(thresholds: Thresholds) -> Rule:
    """Neurons with ``|h_i|`` below their threshold, or 0, are inactive."""
    by_site = list(thresholds.by_neuron.values())
    return lambda site, s, h: (h.abs() >= by_site[site].to(h.device)) & (h != 0)


def measure(model: nn.Module, windows: Windows, rule: Rule | None = None) -> SparsityMeasure:
    """The activation ratio under ``rule`` (None: :func:`zero`), and the loss with inactive neurons left out.

    Args:
        model: any causal language model whose feed-forward layers are found by structure.
        windows: batches of token ids ``(B, T)``, T >= 2, or mappings with ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: no windows, or a model without feed-forward layers of a known kind.

    Example:
        >>> from subquad import SubquadConfig, SubquadForCausalLM
        >>> config = SubquadConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, feedforward="relu")
        >>> found = measure(SubquadForCausalLM(config), [torch.arange(8)[None]])
        >>> 0 < found.ratio < 1 and found.loss == found.dense_loss
        True
    """
    windows, sites = _checked(windows), feedforward_sites(model)
    return _measure(model, sites, windows, rule or zero(), _loss(model, windows))


def cett_thresholds(model: nn.Module, windows: Windows, error: float) -> Thresholds:
    """Per layer the largest threshold whose truncation changes the layer's output by ``error`` on average (CETT).

    The truncated neurons are those with ``|n_i| < theta``; their sum over the norm of the layer's output, averaged over
    tokens, is brought to ``error`` in every layer by bisection, on the inputs that the dense model gives it.

    Args:
        error: in (0, 1).

    Raises:
        ValueError: an error outside (0, 1), no windows, or a model without feed-forward layers of a known kind.
    """
    _check_share("error", error)
    windows = _checked(windows)
    return _thresholds(_error_curves(model, feedforward_sites(model), windows), error)


@dataclass(frozen=True)
class PerplexitySparsity:
    """The result of :func:`perplexity_sparsity`: what was reached, with which thresholds, and the curve on the way."""

    measure: SparsityMeasure
    thresholds: Thresholds
    curve: tuple[tuple[float, SparsityMeasure], ...]  # (c, measure), c rising


def perplexity_sparsity(
    model: nn.Module, windows: Windows, percent: float = 1.0, *, tolerance: float = 1e-3
) -> PerplexitySparsity:
    """CETT-PPL-p%: the least activation ratio whose perplexity is at most p percent above the dense model's.

    c, the error that every layer may make, rises along a grid until the perplexity passes the bound, and is bisected
    between there and the last value that held.

    Args:
        percent: p > 0; at 1 the published models keep their scores on benchmarks.
        tolerance: of c.

    Raises:
        ValueError: p not above 0, no windows, or no c of the grid keeps the perplexity within the bound.
    """
    if not percent > 0:
        raise ValueError(f"percent must be above 0; got {percent}")
    windows, sites = _checked(windows), feedforward_sites(model)
    curves, dense_loss = _error_curves(model, sites, windows), _loss(model, windows)
    found: dict[float, tuple[Thresholds, SparsityMeasure]] = {}

    def holds(c: float) -> bool:
        thresholds = _thresholds(curves, c)
        found[c] = thresholds, _measure(model, sites, windows, truncation(thresholds), dense_loss)
        return found[c][1].perplexity_increase <= percent

    good, bad = 0.0, 1.0
    for c in CANDIDATES:
        if not holds(c):
            bad = c
            break
        good = c
    while bad - good > tolerance:
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    if good == 0:
        least = min(found)
        raise ValueError(
            f"even an error of {least:.4f} raises the perplexity by {found[least][1].perplexity_increase:.2f}%, more "
            f"than {percent}%: use more text, or allow more"
        )
    thresholds, reached = found[good]
    return PerplexitySparsity(reached, thresholds, tuple((c, found[c][1]) for c in sorted(found)))


def largest_gate_threshold(
    model: nn.Module, windows: Windows, percent: float = 1.0, *, highest: float = 1.0, tolerance: float = 1e-3
) -> tuple[float, SparsityMeasure]:
    """FATReLU's threshold for a trained ReLU model: the largest whose perplexity is at most p percent above.

    Args:
        percent: p > 0.
        highest: where the search ends.
        tolerance: of the threshold.

    Raises:
        ValueError: p or highest not above 0, or no windows.
    """
    if not (percent > 0 and highest > 0):
        raise ValueError(f"percent and highest must be above 0; got {percent} and {highest}")
    windows, sites = _checked(windows), feedforward_sites(model)
    dense_loss = _loss(model, windows)
    good, bad, found = 0.0, highest, _measure(model, sites, windows, zero(), dense_loss)
    while bad - good > tolerance:
        middle = (good + bad) / 2
        tried = _measure(model, sites, windows, fat(middle), dense_loss)
        if tried.perplexity_increase <= percent:
            good, found = middle, tried
        else:
            bad = middle
    return good, found


# --- on the way ------------------------------------------------------------------------------------------------------


def _measure(
    model: nn.Module,
    sites: Sequence[FeedForwardSite],
    windows: Sequence[Mapping[str, Tensor]],
    rule: Rule,
    dense_loss: float,
) -> SparsityMeasure:
    with _truncated(sites, rule) as counts:
        loss = _loss(model, windows, counts)
    by_layer = tuple(float(count.active) / (count.tokens * count.used.numel()) for count in counts)
    never = sum(int((~count.used).sum()) for count in counts) / sum(count.used.numel() for count in counts)
    return SparsityMeasure(sum(by_layer) / len(by_layer), by_layer, loss, dense_loss, never)


class _Count:
    """What one layer's rule left active so far."""

    def __init__(self, hidden: int) -> None:
        self.active, self.tokens = 0, 0
        self.used = torch.zeros(hidden, dtype=torch.bool)
        self.real: Tensor | None = None  # (B * T,), the tokens of the present window that are not padding


@contextmanager
def _truncated(sites: Sequence[FeedForwardSite], rule: Rule) -> Iterator[list[_Count]]:
    """Inactive neurons are zero wherever the model runs inside the block."""
    counts, gates, handles = [_Count(site.hidden) for site in sites], [None] * len(sites), []

    def remember(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            gates[number] = output  # type: ignore[call-overload]

        return hook

    def truncate(number: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = inputs
            gate = gates[number]
            s = h if gate is None else sites[number].activation(gate)
            active = rule(number, s.flatten(0, -2), h.flatten(0, -2))
            count = counts[number]
            seen = active if count.real is None else active[count.real]
            count.active += int(seen.sum())
            count.tokens += len(seen)
            count.used |= seen.any(0).cpu()
            return (h.where(active.view(h.shape), 0),)

        return hook

    try:
        for number, site in enumerate(sites):
            if site.gate is not None:
                handles.append(site.gate.register_forward_hook(remember(number)))
            handles.append(site.down.register_forward_pre_hook(truncate(number)))
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _loss(model: nn.Module, windows: Iterable[Mapping[str, Tensor]], counts: Sequence[_Count] = ()) -> float:
    """Nats per token, over targets that are not padding."""
    total, number = 0.0, 0
    for window, real, logits in _runs(model, windows, counts):
        losses = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), window["input_ids"][:, 1:].flatten(), reduction="none"
        )
        counted = (real[:, 1:] & real[:, :-1]).flatten()
        total += float(losses[counted].double().sum())
        number += int(counted.sum())
    return total / number


def _runs(
    model: nn.Module, windows: Iterable[Mapping[str, Tensor]], counts: Sequence[_Count] = ()
) -> Iterator[tuple[Mapping[str, Tensor], Tensor, Tensor]]:
    """Each window with its real tokens and the model's logits, in evaluation mode."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for window in windows:
            window = {name: value.to(device) for name, value in window.items()}
            mask = window.get("attention_mask")
            real = torch.ones_like(window["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
            for count in counts:
                count.real = real.flatten()
            yield window, real, model(**window, use_cache=False).logits
    finally:
        model.train(was_training)


@torch.no_grad()
def _error_curves(
    model: nn.Module, sites: Sequence[FeedForwardSite], windows: Iterable[Mapping[str, Tensor]]
) -> list["_ErrorCurve"]:
    """Of every layer, from h of all real tokens, ``(tokens, F)`` float32, in the dense model."""
    kept: list[list[Tensor]] = [[] for _ in sites]
    latest: dict[int, Tensor] = {}
    handles = [
        site.down.register_forward_pre_hook(lambda module, inputs, number=number: latest.update({number: inputs[0]}))
        for number, site in enumerate(sites)
    ]
    try:
        for _, real, _ in _runs(model, windows):
            for number in range(len(sites)):
                kept[number].append(latest[number].flatten(0, -2)[real.flatten()].float())
    finally:
        for handle in handles:
            handle.remove()
    return [_ErrorCurve(site, torch.cat(parts)) for site, parts in zip(sites, kept, strict=True)]


class _ErrorCurve:
    """The error that a threshold makes in one layer, from the layer's own inputs in the dense model.

    It is all but monotone: what was evaluated for one error brackets the threshold of the next.
    """

    @torch.no_grad()
    def __init__(self, site: FeedForwardSite, h: Tensor) -> None:
        self.name, self.h, self.weight = site.name, h, site.down_weight.detach().float()
        self.column = torch.linalg.vector_norm(self.weight, dim=0)
        self.norms = h.abs() * self.column
        size = torch.linalg.vector_norm(h @ self.weight.mT, dim=-1)
        self.size = size.clamp(min=SMALLEST_NORM * float(size.mean()))
        self.known = {0.0: 0.0}
        self.error(2 * float(self.norms.max()))  # nothing is left there

    @torch.no_grad()
    def error(self, theta: float) -> float:
        left_out = self.h.where(self.norms < theta, 0) @ self.weight.mT
        self.known[theta] = float((torch.linalg.vector_norm(left_out, dim=-1) / self.size).mean())
        return self.known[theta]

    def threshold(self, error: float) -> float:
        """The largest theta found whose error is at most ``error``, and less than that by ``TOLERANCE`` of it."""
        low = max(theta for theta, known in self.known.items() if known <= error)
        above = [theta for theta in self.known if theta > low]
        if not above:
            return low
        high = min(above)
        for _ in range(BISECTIONS):
            under, over = self.known[low], self.known[high]
            if error - under <= TOLERANCE * error:
                break
            share = (error - under) / (over - under)
            theta = low + (high - low) * min(0.9, max(0.1, share))
            low, high = (theta, high) if self.error(theta) <= error else (low, theta)
        return low


def _thresholds(curves: Sequence[_ErrorCurve], error: float) -> Thresholds:
    by_layer = {curve.name: curve.threshold(error) for curve in curves}
    by_neuron = {  # 0 / 0: a neuron that adds nothing
        curve.name: (by_layer[curve.name] / curve.column).nan_to_num(nan=math.inf, posinf=math.inf) for curve in curves
    }
    return Thresholds(error, by_layer, by_neuron)


def _checked(windows: Windows) -> list[Mapping[str, Tensor]]:
    checked = [{"input_ids": window} if isinstance(window, Tensor) else window for window in windows]
    if not checked:
        raise ValueError("there are no windows to measure on; give batches of token ids (B, T)")
    for window in checked:
        ids = window.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
            found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"a window must be token ids (B, T) with T >= 2, or a mapping with input_ids; got {found}")
    return checked


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be in (0, 1); got {value}")
