"""InLine attention: injective linear attention and a dynamic local residual (Han et al. 2024, section 4)."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.layers.registry import unknown_name
from subquad.mixers.contract import Mixer, MixerOutput, Pattern, Request, silence, wide
from subquad.ops import dynamic_depthwise_conv, injective_linear_attention
from subquad.ops.convolution.dynamic import check_grid
from subquad.ops.injective.reference import injective_weights

KERNELS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: torch.exp(0.2 * wide(x)),  # in half precision it would overflow near x = 55
}


class InLineAttention(Mixer):
    """Linear attention that subtracts the mean score, so that no two queries weigh alike, and a 3 x 3 local residual.

    ``o_i = mean v + s C^T phi(q_i)`` with the covariance C of keys and values, plus a depthwise convolution of the
    values whose kernels a small network makes of the mean of x. There is no causal form: the mean over all keys is the
    point.

    Args:
        dim, num_heads, layer_index, num_layers: see :class:`Mixer`.
        causal: False, the only use there is.
        kernel: phi, ``"identity"``, ``"relu"``, ``"leaky_relu"`` or ``"exp"``, which is ``exp(0.2 x)``. Relu alone
            confuses queries.
        local: the convolution; a call then needs its ``grid`` (height, width), and there is no cross-attention.
        cls_tokens: how many tokens stand before the grid (class and register tokens): they take part in the global
            part and in the mean of x alone.
        bias: of the projections of queries, keys and values.
        context_dim: width of the context in cross-attention; None is D.

    Without a normaliser the size of the queries matters: give it normed inputs. A sequence of no more tokens than a
    head is wide cannot tell all queries apart, which is warned of.

    Example:
        >>> mixer = InLineAttention(16, 2, cls_tokens=1)
        >>> mixer(torch.zeros(1, 13, 16), grid=(3, 4)).output.shape
        torch.Size([1, 13, 16])
    """

    patterns = frozenset({Pattern.FULL_SELF, Pattern.FULL_CROSS})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        kernel: str = "identity",
        local: bool = True,
        cls_tokens: int = 0,
        bias: bool = True,
        context_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, layer_index=layer_index, num_layers=num_layers)
        if kernel not in KERNELS:
            raise unknown_name("kernel of InLine attention", kernel, KERNELS)
        if not isinstance(cls_tokens, int) or cls_tokens < 0 or (cls_tokens and not local):
            raise ValueError(f"cls_tokens must be an integer >= 0, and 0 with local=False; got {cls_tokens!r}")
        self.head_dim, self.phi, self.cls_tokens = self.head_width(dim), KERNELS[kernel], cls_tokens
        if local:
            self.patterns = frozenset({Pattern.FULL_SELF})  # type: ignore[misc]
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.v_proj = nn.Linear(context_dim or dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        self.residual = (
            nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=num_heads), nn.GELU(), nn.Conv1d(dim, 9 * dim, 1, groups=num_heads)
            )
            if local
            else None
        )

    def mix(self, x: Tensor, context: Tensor | None, request: Request) -> MixerOutput:
        source = x if context is None else context
        self._check_grid(x, request)
        if source.shape[1] <= self.head_dim and not torch.compiler.is_compiling():
            warnings.warn(
                f"{source.shape[1]} keys cannot span heads of width {self.head_dim}: some queries weigh alike",
                stacklevel=3,
            )
        q, k, v = self.project(x, source)
        q, k = self.phi(q), self.phi(k)
        o, _ = injective_linear_attention(q, k, v.to(q.dtype), mask=request.mask, cu_seqlens=request.cu_seqlens)
        mixed = o.to(v.dtype).flatten(-2)
        if self.residual is not None:
            mixed = mixed + self._local(x, v.flatten(-2), request)
        output = self.o_proj(mixed)
        if context is None:
            (output,) = silence(request.mask, output)
        return MixerOutput(output, None, {})

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of ``source``, in heads; the kernel is not applied yet."""
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return tuple(y.unflatten(-1, (-1, self.head_dim)) for y in (q, k, v))

    def attention_weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights ``(B, H, T, S)`` of projected keys for projected queries; rows sum to 1, of either sign."""
        q, k = self.phi(q), self.phi(k)
        return injective_weights(q, k, scale=self.head_dim**-0.5)

    def _local(self, x: Tensor, v: Tensor, request: Request) -> Tensor:
        """The convolution of the values ``(B, T, D)`` on their grid, zero for the tokens before it."""
        assert self.residual is not None
        if request.mask is None:
            mean = x.mean(1)
        else:
            (x, v), number = silence(request.mask, x, v), request.mask.sum(1).clamp(min=1)
            mean = (wide(x).sum(1) / number[:, None]).to(x.dtype)
        r = self.residual(mean[..., None]).view(-1, self.dim, 3, 3)
        local = dynamic_depthwise_conv(v[:, self.cls_tokens :], r, request.grid)  # type: ignore[arg-type]
        return F.pad(local, (0, 0, self.cls_tokens, 0))

    def _check_grid(self, x: Tensor, request: Request) -> None:
        if self.residual is None:
            return  # the order of tokens changes nothing: any grid will do
        if request.cu_seqlens is not None:
            raise ValueError("packed sequences lie on no grid: build InLineAttention with local=False for them")
        if request.grid is None:
            raise ValueError("local=True needs grid=(height, width) at every call; without one build with local=False")
        check_grid(request.grid, x.shape[1] - self.cls_tokens)
