"""Which functions and layers of transformers are replaced, each known by the digest of its source in 5.24."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad.inference.optimize import functions, own_layers, steps


@dataclass(frozen=True)
class SharedFunction:
    """A function that many modeling modules hold under one name.

    Attributes:
        ours: what takes its place.
        digests: of the sources that it equals.
        companions: functions of the same module that it calls, with their digests.
        op: the operation of ours that computes it.
    """

    ours: Callable[..., Any]
    digests: tuple[str, ...]
    op: str
    companions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


NORM = {"l2norm": ("c961b87a7261c231", "de9ce72ed0e8eb47")}
FUNCTIONS = {
    "causal_conv1d_fn": SharedFunction(functions.causal_conv1d_fn, ("369aa57ae2fc347a",), "short_convolution"),
    "causal_conv1d_update": SharedFunction(functions.causal_conv1d_update, ("cc4232b999319658",), "short_convolution"),
    "mamba_inner_fn": SharedFunction(functions.mamba_inner_fn, ("55bf834e35c652dd",), "selective_scan"),
    "mamba_selective_scan": SharedFunction(functions.mamba_selective_scan, ("177c9fd39e2da99f",), "selective_scan"),
    "mamba_selective_state_update": SharedFunction(
        functions.mamba_selective_state_update, ("dd0f547fd7b976cb",), "selective_scan"
    ),
    "mamba2_split_conv1d_scan_combined": SharedFunction(
        functions.mamba2_split_conv1d_scan_combined, ("c4a8d500c3f041fa",), "ssd"
    ),
    "mamba2_chunk_scan": SharedFunction(functions.mamba2_chunk_scan, ("5422e21ce883e801",), "ssd"),
    "mamba2_selective_state_update": SharedFunction(
        functions.mamba2_selective_state_update, ("b7c8369bfce13006",), "ssd"
    ),
    "torch_chunk_gated_delta_rule": SharedFunction(
        functions.gated_delta, ("8aa518a1a727ffae",), "gated_delta_rule", NORM
    ),
    "torch_recurrent_gated_delta_rule": SharedFunction(
        functions.gated_delta, ("622cdad2a1a10388",), "gated_delta_rule", NORM
    ),
    "chunk_kimi_delta_attention": SharedFunction(functions.kimi_delta, ("3bbf50d805dbee4b",), "kda", NORM),
    "recurrent_kimi_delta_attention": SharedFunction(functions.kimi_delta, ("c0bf9f75ea818949",), "kda", NORM),
}


@dataclass(frozen=True)
class OwnLayer:
    """A layer with code of its own: per method the digests of the known sources, and ours."""

    methods: dict[str, tuple[tuple[str, ...], Callable[..., Any]]]
    ops: tuple[str, ...]
    wants_index: bool = False


#: By the name of the class.
LAYERS = {
    "RecurrentGemmaRglru": OwnLayer({"_rnn_scan": (("3144279b81fb7078",), own_layers.rg_lru_scan)}, ("diagonal_scan",)),
    "RecurrentGemmaRecurrentBlock": OwnLayer(
        {"forward": (("8c31b8bfa1d7e0df",), own_layers.recurrent_gemma_block)}, ("short_convolution",), wants_index=True
    ),
    "MiniMaxLightningAttention": OwnLayer(
        {"forward": (("cd4125e20756b66f",), own_layers.minimax_attention)}, ("lightning_attention",)
    ),
    "RwkvSelfAttention": OwnLayer({"forward": (("bb6e482747c39d68",), own_layers.rwkv_attention)}, ("wkv",)),
    "RwkvFeedForward": OwnLayer({"forward": (("c0364c1ceeb4f368",), own_layers.rwkv_feed_forward)}, ("wkv",)),
    "xLSTMBackend": OwnLayer({"forward": (("b36fa25c389f640c",), own_layers.xlstm_backend)}, ("mlstm",)),
}

#: By the digest of a layer's ``forward``: one token through the parts between its projections.
STEPS: dict[str, Callable[..., Any]] = {
    "18988d622e78c66f": steps.mamba,  # MambaMixer
    "5c187349fae423cb": steps.mamba,  # FalconMambaMixer
    "b14fecf81a1816da": steps.mamba,  # JambaMambaMixer
    "dd4fb13ba4ac3615": steps.zamba,  # ZambaMambaMixer
    "23e4965d27abbae0": steps.mamba2,  # Mamba2Mixer, BambaMixer, GraniteMoeHybridMambaLayer, NemotronH, Zamba2
    "f33768edcbffdebe": steps.falcon_h1,  # FalconH1Mixer
    "8a8dd6b95ae5996a": steps.qwen3_next,  # Qwen3NextGatedDeltaNet
    "3be85a0f8201a60c": steps.qwen3_5,  # Qwen3_5GatedDeltaNet and its MoE, LaraMini, Qwen4ExpText
    "7e99305a17d7ff7b": steps.olmo_hybrid,  # OlmoHybridGatedDeltaNet
    "d70003af88e60f31": steps.kimi,  # KimiLinearDeltaAttention, Glm5NextTextLinearAttention
    "50d5246573fe7b9d": steps.bailing,  # BailingHybridDeltaAttention
}

#: Why a model without a layer of ours needs none.
NOTHING_TO_REPLACE = "no layer of it is recurrent, or none that is known"
