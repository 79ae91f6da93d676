"""Flow attention as defined (Wu et al. 2022, "Flowformer", section 3.2): causal token by token, else all pairs at once.

Queries receive flow from keys. I and O are the incoming flow of a query and the outgoing flow of a key; conserving one
side at 1 gives the other side's conserved flow, by which keys compete and queries are allocated their share.
"""

import torch
from torch import Tensor


def causal_flow_reference(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float, clip: float, temperature: float, state: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Every sum runs over the tokens up to and including t, n is their number::

        I_t  = (q_t + eps) . (sum k + eps)                O_t  = (k_t + eps) . (sum q + eps)
        I'_t = (q_t + eps) . (sum k n / O + eps) / n      O'_t = (k_t + eps) . (sum q n / I + eps) / n
        c_t  = n exp(clip(O'_t)) / sum exp(clip(O'))      a_t  = sigmoid(I'_t)
        o_t  = a_t (q_t / I_t) sum k^T c v

    q, k ``(B, T, H, K)`` not negative, v ``(B, T, H, V)``; the state is that of :class:`subquad.ops.FlowState`.
    """
    key_sum, query_sum, key_flow, query_flow, competition, seen, matrix = state
    outputs = []
    for q_t, k_t, v_t in zip(q.unbind(1), k.unbind(1), v.unbind(1)):
        seen = seen + 1
        n = seen[:, None].to(q.dtype)
        key_sum, query_sum = key_sum + k_t, query_sum + q_t
        incoming = ((q_t + eps) * (key_sum + eps)).sum(-1)
        outgoing = ((k_t + eps) * (query_sum + eps)).sum(-1)
        key_flow = key_flow + k_t * (n / outgoing)[..., None]
        query_flow = query_flow + q_t * (n / incoming)[..., None]
        conserved_incoming = ((q_t + eps) * (key_flow + eps)).sum(-1) / n
        conserved_outgoing = ((k_t + eps) * (query_flow + eps)).sum(-1) / n
        exponential = (conserved_outgoing / temperature).clamp(-clip, clip).exp()
        competition = competition + exponential
        competed = (n * exponential / competition)[..., None] * v_t
        matrix = matrix + torch.einsum("bhk,bhv->bhkv", k_t, competed)
        allocated = (torch.sigmoid(conserved_incoming) / incoming)[..., None] * q_t
        outputs.append(torch.einsum("bhk,bhkv->bhv", allocated, matrix))
    return torch.stack(outputs, 1), (key_sum, query_sum, key_flow, query_flow, competition, seen, matrix)


def full_flow_reference(
    q: Tensor, k: Tensor, v: Tensor, *, eps: float, clip: float, temperature: float, query_real: Tensor, real: Tensor
) -> Tensor:
    """Non-causal, sums over all real tokens, T queries and S keys::

        I_i  = (q_i + eps) . (sum k + eps)                O_j  = (k_j + eps) . (sum q + eps)
        I'_i = (q_i + eps) . (sum k / O + eps)            O'_j = (k_j + eps) . (sum q / I + eps)
        c_j  = S softmax_j(clip(O'_j))                    a_i  = sigmoid(I'_i T / S)
        o_i  = a_i (q_i / I_i) sum k^T c v

    ``query_real (B, T)`` and ``real (B, S)`` bool, False = padding.
    """
    query_weight, weight = (x.to(q.dtype)[..., None, None] for x in (query_real, real))
    queries, keys = (x.sum((1, 2, 3)).clamp(min=1)[:, None, None] for x in (query_weight, weight))
    q, k = q * query_weight, k * weight
    incoming = torch.einsum("bthk,bhk->bth", q + eps, k.sum(1) + eps)
    outgoing = torch.einsum("bshk,bhk->bsh", k + eps, q.sum(1) + eps)
    key_flow, query_flow = (k / outgoing[..., None]).sum(1), (q / incoming[..., None]).sum(1)
    conserved_incoming = torch.einsum("bthk,bhk->bth", q + eps, key_flow + eps)
    conserved_outgoing = torch.einsum("bshk,bhk->bsh", k + eps, query_flow + eps)
    score = (conserved_outgoing / temperature).clamp(-clip, clip)
    hidden = ~real[..., None] & real.any(1)[:, None, None]  # a row of padding only stays finite
    competition = keys * score.masked_fill(hidden, -torch.inf).softmax(1)
    allocation = torch.sigmoid(conserved_incoming * queries / keys)
    matrix = torch.einsum("bshk,bshv->bhkv", k, competition[..., None] * v)
    return torch.einsum("bthk,bhkv->bthv", (allocation / incoming)[..., None] * q, matrix)
