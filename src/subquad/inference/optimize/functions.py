"""Our operations with the arguments and layouts of the functions that transformers' models share.

Each function here takes the place of one in ``transformers.models.*.modeling_*`` (5.24; of which one is said in
:data:`.families.FUNCTIONS`): it computes the same from the same arguments. Layouts are transformers': convolutions and
Mamba's scan have time last, all else has it second. Packed sequences are refused, as transformers refuses them without
further packages.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from subquad.inference.optimize import step_kernels
from subquad.ops import gated_delta_rule, kda, short_convolution, ssd
from subquad.ops.selective_scan import gated_selective_scan, selective_scan

SILU = ("silu", "swish")


def refuse_packed(arguments: dict[str, Any]) -> None:
    """Raises ValueError for packed sequences, which transformers' layers would not keep apart everywhere."""
    for name in ("cu_seqlens", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"packed sequences ({name}) are not kept apart in this layer; give one sequence per row with padding"
            )


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """The causal depthwise convolution of ``hidden_states (B, C, T)`` with ``weight (C, K)``, then the activation."""
    refuse_packed(kwargs)
    silu = activation in SILU
    x = hidden_states.transpose(1, 2)
    output, _ = short_convolution(x, weight, bias, activation="silu" if silu else None)
    output = output.transpose(1, 2)
    return output if silu or activation is None else ACT2FN[activation](output)


def causal_conv1d_update(
    hidden_states: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """The same for the next tokens ``(B, C, T)`` after ``conv_state (B, C, K)``, which takes them in."""
    refuse_packed(kwargs)
    if hidden_states.shape[-1] == 1 and step_kernels.serves(hidden_states, conv_state, weight, bias):
        silu = activation in SILU
        output = step_kernels.convolve_rows(hidden_states[..., 0], conv_state, weight, bias, silu=silu)[..., None]
    else:
        window = torch.cat([conv_state, hidden_states], dim=-1).to(weight.dtype)
        conv_state.copy_(window[..., -conv_state.shape[-1] :])
        output = F.conv1d(window, weight[:, None], bias, groups=weight.shape[0])[..., -hidden_states.shape[-1] :]
        output = F.silu(output) if activation in SILU else output
    output = output if activation in SILU or activation is None else ACT2FN[activation](output)
    return output.to(hidden_states.dtype)


def mamba_inner_fn(*args: Any, **kwargs: Any) -> None:
    """Declines, as transformers' own does: the layer then takes its separate steps, which are ours."""
    refuse_packed(kwargs)


mamba2_split_conv1d_scan_combined = mamba_inner_fn


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan of ``hidden_states, dt, z (B, D, T)``, ``B, C (B, N, T)``; the state is ``(B, D, N)``.

    ``initial_state`` is ours: transformers' function begins with zeros.
    """
    refuse_packed(kwargs)
    u, delta, write, read = (x.transpose(1, 2) for x in (hidden_states, dt, B, C))
    write, read = write.to(u.dtype), read.to(u.dtype)
    if delta_softplus and delta_bias is not None and z is not None:
        output, state = gated_selective_scan(
            u,
            delta,
            A,
            write,
            read,
            D,
            delta_bias,
            z.transpose(1, 2),
            initial_state=initial_state,
            return_state=return_last_state,
        )
    else:
        if delta_bias is not None:
            delta = delta + delta_bias
        delta = F.softplus(delta) if delta_softplus else delta
        output, state = selective_scan(
            u, delta, A, write, read, D, initial_state=initial_state, return_state=return_last_state
        )
        output = output if z is None else output * F.silu(z.transpose(1, 2))
    output = output.transpose(1, 2)
    if state is None:
        return output
    return output, state


def mamba_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token ``hidden_states, dt, z (B, D)``, ``B, C (B, N)`` after ``state (B, D, N)``, which takes it in."""
    refuse_packed(kwargs)
    if dt_softplus and D is not None and step_kernels.serves(hidden_states, dt, A, B, C, D, dt_bias, z, state):
        output = step_kernels.selective_scan(hidden_states, dt, A, B, C, D, dt_bias, z, state)
        return output.to(hidden_states.dtype)
    output, after = mamba_selective_scan(
        hidden_states[..., None],
        dt[..., None],
        A,
        B[..., None],
        C[..., None],
        D=D,
        z=None if z is None else z[..., None],
        delta_bias=dt_bias,
        delta_softplus=dt_softplus,
        return_last_state=True,
        initial_state=state,
    )
    state.copy_(after)
    return output[..., 0]


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's scan of ``hidden_states (B, T, H, P)``, ``dt (B, T, H)``, ``B, C (B, T, G, N)``; float32 comes back.

    The state is ``(B, H, P, N)``. The length of the chunks is ours to choose.
    """
    refuse_packed(kwargs)
    output, state = ssd(
        hidden_states,
        _step(dt, dt_bias, dt_softplus, dt_limit),
        A,
        B.to(hidden_states.dtype),
        C.to(hidden_states.dtype),
        D,
        initial_state=initial_states,
        return_state=return_final_states,
    )
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if state is None:
        return output
    return output, state


def _step(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float] | None) -> Tensor:
    """Steps in float32 at least: a sum rounded to bfloat16 would lose the small ones."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if bias is not None:
        dt = dt + bias
    if softplus:
        dt = F.softplus(dt)
    return dt if limit is None else dt.clamp(limit[0], limit[1])


def mamba2_selective_state_update(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """One token ``hidden_states (B, H, P)`` after ``state (B, H, P, N)``, which takes it in.

    ``dt, dt_bias, D`` and A are spread over the channels of a head, and over N.
    """
    refuse_packed(kwargs)
    plain = dt_softplus and z is None
    if plain and D is not None and step_kernels.serves(hidden_states, dt, A, B, C, D, dt_bias, state):
        bias = None if dt_bias is None else dt_bias[:, 0]
        output = step_kernels.ssd(hidden_states, dt[..., 0], A[:, 0, 0], B, C, D[:, 0], bias, state)
        return output.to(hidden_states.dtype)
    step = _step(dt[..., 0], None if dt_bias is None else dt_bias[..., 0], dt_softplus, None)
    output, after = ssd(
        hidden_states[:, None],
        step[:, None],
        A[:, 0, 0],
        B[:, None].to(hidden_states.dtype),
        C[:, None].to(hidden_states.dtype),
        None if D is None else D[:, 0],
        initial_state=state,
        return_state=True,
    )
    assert after is not None
    state.copy_(after)
    output = output[:, 0]
    return output if z is None else (output * F.silu(z)).to(hidden_states.dtype)


def _delta_rule(op: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of a delta rule, for prompts and for single tokens alike: transformers has one for each.

    Layers name all arguments after ``value``. As in transformers everything is computed in float32, the output has the
    query's dtype, and a given state is kept as it is: one that is returned is another.
    """

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_packed(kwargs)
        dtype = query.dtype
        query, key, value, g, beta = (x.to(torch.float32) for x in (query, key, value, g, beta))
        one = query.shape[1] == 1 and output_final_state
        if one and initial_state is not None and step_kernels.serves(query, key, value, g, beta, initial_state):
            state = initial_state.clone(memory_format=torch.contiguous_format)
            token = (x[:, 0] for x in (query, key, value, g, beta))
            return step_kernels.delta(*token, state, normalize=use_qk_l2norm_in_kernel)[:, None].to(dtype), state
        if use_qk_l2norm_in_kernel:
            query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        if key.shape[2] != value.shape[2]:
            query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in (query, key))
        start = None if initial_state is None else initial_state.to(torch.float32)
        output, last = op(query, key, value, g, beta, initial_state=start, return_state=output_final_state)
        return output.to(dtype), last

    return rule


#: Of ``query, key (B, T, Hk, K)``, ``value (B, T, Hv, V)``, ``g, beta (B, T, Hv)``.
gated_delta = _delta_rule(gated_delta_rule)
#: The same with a decay ``g (B, T, H, K)`` per key channel.
kimi_delta = _delta_rule(kda)
