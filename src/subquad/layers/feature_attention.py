"""Feature maps of linear attention as layers: with weights or not, each with the op that attends by it.

``build_feature_map(name, num_heads, head_dim)`` makes one. Hedgehog: Zhang et al. 2024, section 4 (three published
forms); T2R: Kasai et al. 2021; DPFP: Schlag et al. 2021, section 5; Performer: Choromanski et al. 2021, lemma 1;
Taylor: Arora et al. 2024.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.taylor.features import feature_width
from subquad.layers.feature_maps import FEATURE_MAPS, NON_NEGATIVE
from subquad.layers.registry import unknown_name
from subquad.ops import NormalizedState, linear_attention, taylor_linear_attention
from subquad.ops.linear.exponential import empty_exponential_state, exponential_linear_attention

FLOOR = 1e-12  # of a softmax feature: its logarithm stays finite


class FeatureMap(nn.Module):
    """phi of linear attention, ``w_tj = phi_q(q_t) . phi_k(k_j)``: queries and keys ``(B, T, H, K) -> (B, T, H, F)``.

    Attributes:
        width: F.
        non_negative: whether weights are never negative, so that they can be divided by their sum.
    """

    non_negative = True

    def __init__(self, num_heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.width = num_heads, head_dim, width

    def query(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define query")

    def key(self, x: Tensor) -> Tensor:
        return self.query(x)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """All weights ``(B, H, T, S)``, not divided by their sum: for losses and diagnostics."""
        return torch.einsum("bthf,bshf->bhts", self.query(q), self.key(k))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        normalize: bool = True,
        mask: Tensor | None = None,
        initial_state: Any = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """Linear attention with this map: q ``(B, T, H, K)``, k ``(B, S, H, K)``, v ``(B, S, H, V)``, not yet mapped.

        ``mask (B, S)`` bool marks real keys. States are those of :meth:`init_state`.
        """
        key = self.key(k)
        if mask is not None:
            key, v = (x.where(mask[..., None, None], 0) for x in (key, v))
        return linear_attention(
            self.query(q),
            key,
            v,
            causal=causal,
            normalize=normalize,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )

    def init_state(self, batch: int, columns: int, normalize: bool, device: torch.device | str) -> Any:
        """The state of ``attend`` before any token, for values ``columns`` wide."""
        state = torch.zeros(batch, self.num_heads, self.width, columns, device=device)
        return NormalizedState(state, state[..., 0].clone()) if normalize else state

    def extra_repr(self) -> str:
        return f"{self.num_heads} heads, {self.head_dim} -> {self.width}"


class Plain(FeatureMap):
    """A map without parameters, by its name in ``FEATURE_MAPS``."""

    def __init__(self, num_heads: int, head_dim: int, *, name: str) -> None:
        super().__init__(num_heads, head_dim, head_dim)
        self.name, self.non_negative = name, name in NON_NEGATIVE
        self.function = FEATURE_MAPS[name]

    def query(self, x: Tensor) -> Tensor:
        return self.function(x)


class DPFP(FeatureMap):
    """``r_i r_{i-1}`` of ``r = [relu(x), relu(-x)]``, a deterministic projection of twice the width."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim, 2 * head_dim)

    def query(self, x: Tensor) -> Tensor:
        positive = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
        return positive * positive.roll(1, dims=-1)


class Taylor(FeatureMap):
    """``phi(q) . phi(k) = 1 + s + s^2 / 2`` with ``s = q . k / sqrt(K)``; features are built inside the op."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        if head_dim > 32:
            raise ValueError(
                f"the Taylor map of {head_dim} channels has {feature_width(head_dim)} features; "
                "at most 32 channels are allowed: set feature_dim"
            )
        super().__init__(num_heads, head_dim, feature_width(head_dim))

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        score = torch.einsum("bthk,bshk->bhts", q, k) * self.head_dim**-0.5
        return 1 + score + score.square() / 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
        return taylor_linear_attention(q, k, v, **options)


class HeadLinear(nn.Module):
    """``y_h = W_h x_h + b_h``: a linear map per head, ``(..., H, K) -> (..., H, E)``, the identity at the start.

    Its weights are spared weight decay, which would pull them away from the identity, towards even attention.

    Args:
        num_heads, head_dim: H, K.
        outputs: E; None is K. Where it is less or more the identity is cut or filled up with zeros.
        bias: whether there is b.
    """

    bias: nn.Parameter | None

    def __init__(self, num_heads: int, head_dim: int, outputs: int | None = None, *, bias: bool = True) -> None:
        super().__init__()
        outputs = head_dim if outputs is None else outputs
        self.weight = nn.Parameter(torch.empty(num_heads, outputs, head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads, outputs)) if bias else None
        for parameter in self.parameters():
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.copy_(torch.eye(*self.weight.shape[1:], device=self.weight.device).expand_as(self.weight))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        mapped = torch.matmul(x.transpose(-2, -3), self.weight.mT.to(x.dtype)).transpose(-2, -3)
        return mapped if self.bias is None else mapped + self.bias.to(x.dtype)


class LearnedMap(FeatureMap):
    """A map on top of a linear map per head, of queries and of keys.

    Args:
        num_heads, head_dim, width: see :class:`FeatureMap`.
        shared: one linear map for both.
        outputs: of the linear maps; None is K.
        bias: of the linear maps.
        key_heads: heads of the keys' map, where keys are mapped before they are repeated; None is H.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        width: int,
        *,
        shared: bool = False,
        outputs: int | None = None,
        bias: bool = True,
        key_heads: int | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, width)
        self.q_map = HeadLinear(num_heads, head_dim, outputs, bias=bias)
        self.k_map = self.q_map if shared else HeadLinear(key_heads or num_heads, head_dim, outputs, bias=bias)

    def features(self, y: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define features")

    def query(self, x: Tensor) -> Tensor:
        return self.features(self.q_map(x))

    def key(self, x: Tensor) -> Tensor:
        return self.features(self.k_map(x))


class T2R(LearnedMap):
    """``relu(W x + b)``: the map of "Finetuning Pretrained Transformers into RNNs". For ``linear`` see LearnedMap."""

    def __init__(self, num_heads: int, head_dim: int, **linear: Any) -> None:
        super().__init__(num_heads, head_dim, linear.get("outputs") or head_dim, **linear)

    def features(self, y: Tensor) -> Tensor:
        return F.relu(y)


class Hedgehog(LearnedMap):
    """Exponentials of ``y = W x + b`` and of its negative, which can become as spiky as softmax: 2 E features.

    Args:
        num_heads, head_dim: H, K.
        form: ``"softmax"``: ``[softmax(y), softmax(-y)]`` (the authors' code); ``"joint"``: one softmax over
            ``[2y, -2y]`` (flash-linear-attention). They are different maps from ``"exp"``, the paper's own, which is
            :class:`ExponentialHedgehog`.
        linear: of the linear maps, see :class:`LearnedMap`.

    Example:
        >>> Hedgehog(2, 4).query(torch.zeros(1, 3, 2, 4)).sum(-1).flatten().tolist()
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """

    def __init__(self, num_heads: int, head_dim: int, *, form: str = "softmax", **linear: Any) -> None:
        super().__init__(num_heads, head_dim, 2 * (linear.get("outputs") or head_dim), **linear)
        if form not in ("softmax", "joint"):
            raise unknown_name("form of Hedgehog", form, ("softmax", "joint"))
        self.form = form

    def features(self, y: Tensor) -> Tensor:
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        if self.form == "joint":
            phi = torch.cat([2 * wide, -2 * wide], dim=-1).softmax(-1)
        else:
            phi = torch.cat([wide.softmax(-1), (-wide).softmax(-1)], dim=-1)
        return phi.clamp(min=FLOOR).to(y.dtype)


class ExponentialMap(FeatureMap):
    """Features that are exponentials, computed from their logarithms so that none overflows.

    ``query_logarithms`` and ``key_logarithms`` must be defined. Weights are always divided by their sum.
    """

    def query_logarithms(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define query_logarithms")

    def key_logarithms(self, x: Tensor) -> Tensor:
        return self.query_logarithms(x)

    def query(self, x: Tensor) -> Tensor:
        return self.query_logarithms(x).exp()

    def key(self, x: Tensor) -> Tensor:
        return self.key_logarithms(x).exp()

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Up to a factor per query and one for all keys of a head, which normalised weights do not see."""
        query, key = self.query_logarithms(q), self.key_logarithms(k)
        query = query - query.detach().amax(-1, keepdim=True)
        key = key - key.detach().amax((1, 3), keepdim=True)
        return torch.einsum("bthf,bshf->bhts", query.exp(), key.exp())

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, normalize: bool = True, **options: Any) -> tuple[Tensor, Any]:
        self._check(normalize)
        return exponential_linear_attention(self.query_logarithms(q), self.key_logarithms(k), v, **options)

    def init_state(self, batch: int, columns: int, normalize: bool, device: torch.device | str) -> Any:
        self._check(normalize)
        return empty_exponential_state(batch, self.num_heads, self.width, columns, device)

    def _check(self, normalize: bool) -> None:
        if not normalize:
            raise ValueError(
                f"{type(self).__name__} is kept from overflowing by its normaliser: it needs normalize=True"
            )


class ExponentialHedgehog(LearnedMap, ExponentialMap):
    """Hedgehog as the paper defines it: ``[exp(y), exp(-y)]``, ``y = W x + b``; 2K features."""

    def __init__(self, num_heads: int, head_dim: int, *, shared: bool = False) -> None:
        super().__init__(num_heads, head_dim, 2 * head_dim, shared=shared)

    query, key = ExponentialMap.query, ExponentialMap.key

    def query_logarithms(self, x: Tensor) -> Tensor:
        y = self.q_map(x)
        return torch.cat([y, -y], dim=-1)

    def key_logarithms(self, x: Tensor) -> Tensor:
        y = self.k_map(x)
        return torch.cat([y, -y], dim=-1)


class Performer(ExponentialMap):
    """``exp(w_i . x - |x|^2 / 2)`` with K random orthogonal directions, x scaled by ``K^-1/4``: unbiased for softmax.

    The directions are drawn once and saved with the weights.
    """

    directions: Tensor

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__(num_heads, head_dim, head_dim)
        self.register_buffer("directions", torch.empty(num_heads, head_dim, head_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.directions)
        if self.directions.device.type != "meta":
            lengths = torch.randn_like(self.directions).norm(dim=-1, keepdim=True)
            self.directions.copy_(torch.linalg.qr(self.directions).Q.mT * lengths)

    def query_logarithms(self, x: Tensor) -> Tensor:
        scaled = x * self.head_dim**-0.25
        along = torch.matmul(scaled.transpose(-2, -3), self.directions.mT.to(x.dtype)).transpose(-2, -3)
        return along - scaled.square().sum(-1, keepdim=True) / 2


LAYERS: dict[str, Callable[[int, int], FeatureMap]] = {
    "hedgehog_exp": ExponentialHedgehog,
    "hedgehog_softmax": partial(Hedgehog, form="softmax"),
    "hedgehog_joint": partial(Hedgehog, form="joint"),
    "t2r": T2R,
    "taylor": Taylor,
    "performer": Performer,
    "dpfp": DPFP,
}


def build_feature_map(name: str, num_heads: int, head_dim: int) -> FeatureMap:
    """The feature map called ``name`` for H heads of K channels: a key of ``LAYERS`` or of ``FEATURE_MAPS``.

    Raises:
        ValueError: an unknown name; the message lists the nearest.

    Example:
        >>> build_feature_map("hedgehog_softmax", 2, 16).width
        32
    """
    if name in LAYERS:
        return LAYERS[name](num_heads, head_dim)
    if name not in FEATURE_MAPS:
        raise unknown_name("feature map", name, [*FEATURE_MAPS, *LAYERS])
    return Plain(num_heads, head_dim, name=name)
