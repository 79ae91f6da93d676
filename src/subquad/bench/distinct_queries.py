"""Whether attention tells queries apart: how near the weights of different queries come to each other.

Han et al. 2024 ("Bridging the Divide: Reconsidering Softmax and Linear Attention", section 4.1): attention is a
function from queries to weights over the keys. Where it is not injective, different queries read the same; normalised
linear attention with a homogeneous feature map confuses all queries on one ray.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.mixers import Mixer
from subquad.mixers.inline import InLineAttention
from subquad.mixers.linear import LinearAttention
from subquad.mixers.softmax import SoftmaxAttention


class Injectivity(NamedTuple):
    """Distances are the largest difference over the keys; of all heads the smallest counts.

    Attributes:
        smallest_distance: between the weights of any two of the queries.
        ray_distance: between the weights of a query and of twice that query.
        key_rank: of the centred keys, after the feature map; InLine is injective in the mapped query where it is the
            key width.
        key_width: width of a mapped key.
    """

    smallest_distance: float
    ray_distance: float
    key_rank: int
    key_width: int


@torch.no_grad()
def injectivity(
    mixer: Mixer, x: Tensor | None = None, queries: Tensor | None = None, *, tokens: int = 64, seed: int = 0
) -> Injectivity:
    """Compares the weights that a mixer gives the same keys for different queries, positions left out.

    Args:
        mixer: InLine, softmax or linear attention with a feature map that makes weights; linear attention is divided by
            the sum of its weights.
        x: ``(1, S, D)``, whose keys are weighed; normal noise if not given.
        queries: ``(1, T, D)`` with T >= 2 different rows; 100 rows of normal noise if not given.
        tokens: S of the noise.
        seed: of the noise.

    Raises:
        ValueError: another mixer, an x or queries of another shape.

    Example:
        >>> from subquad import mixers
        >>> linear = mixers.build("linear", 16, num_heads=2, feature_map="relu", causal=False)
        >>> injectivity(linear).ray_distance, injectivity(mixers.build("inline", 16, num_heads=2)).ray_distance > 0
        (0.0, True)
    """
    generator = torch.Generator().manual_seed(seed)
    weight = next(mixer.parameters())
    if x is None:
        x = torch.randn(1, tokens, mixer.dim, generator=generator).to(weight)
    if queries is None:
        queries = torch.randn(1, 100, mixer.dim, generator=generator).to(weight)
    for name, rows in (("x", x), ("queries", queries)):
        if rows.ndim != 3 or rows.shape[0] != 1 or rows.shape[1] < 2 or rows.shape[2] != mixer.dim:
            raise ValueError(f"{name} must be (1, at least 2 rows, {mixer.dim}); got {tuple(rows.shape)}")
    q, k, mapped = _projected(mixer, queries, x)
    once, twice = attention_weights(mixer, q, k)[0], attention_weights(mixer, 2 * q, k)[0]
    apart = torch.cdist(once, once, p=torch.inf)
    apart.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    centred = (mapped - mapped.mean(1, keepdim=True))[0].transpose(0, 1)
    return Injectivity(
        float(apart.min()),
        float((once - twice).abs().amax(-1).min()),
        int(torch.linalg.matrix_rank(centred.float() if centred.dtype.itemsize < 4 else centred).min()),
        mapped.shape[-1],
    )


def attention_weights(mixer: Mixer, q: Tensor, k: Tensor) -> Tensor:
    """The weights ``(B, H, T, S)`` that a mixer gives projected keys ``(B, S, H, K)`` for queries ``(B, T, H, K)``.

    Raises:
        ValueError: a mixer whose weights are not known here.
    """
    if isinstance(mixer, InLineAttention):
        return mixer.attention_weights(q, k)
    if isinstance(mixer, LinearAttention):
        weights = mixer.phi.weights(q, k)
        total = weights.sum(-1, keepdim=True)
        return weights / total.where(total != 0, 1)  # a query without a feature weighs nothing
    if isinstance(mixer, SoftmaxAttention):
        return torch.softmax(torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5, -1)
    raise ValueError(
        f"{type(mixer).__name__} shows no weights here; InLineAttention, LinearAttention and SoftmaxAttention do"
    )


def _projected(mixer: Mixer, queries: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and the keys after the feature map."""
    if isinstance(mixer, InLineAttention):
        q, k, _ = mixer.project(queries, x)
        return q, k, mixer.phi(k)
    if isinstance(mixer, LinearAttention):
        q, k, _ = mixer.project(queries, x)
        return q, k, mixer.phi.key(k)
    if isinstance(mixer, SoftmaxAttention) and mixer.num_key_value_heads == mixer.num_heads:
        q = mixer.q_norm(mixer.q_proj(queries).unflatten(-1, (-1, mixer.head_dim)))
        k = mixer.k_norm(mixer.k_proj(x).unflatten(-1, (-1, mixer.head_dim)))
        return q, k, k
    raise ValueError(
        f"{type(mixer).__name__} shows no weights here; InLineAttention, LinearAttention and SoftmaxAttention (of as "
        "many key heads as query heads) do"
    )
