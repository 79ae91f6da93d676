"""Checkpoints of other libraries as Subquad models: per format, a table of names and a reading of the configuration.

Read are flash-linear-attention's GLA, DeltaNet, gated DeltaNet and RetNet, the released TransNormerLLM files, and Mamba
as transformers and as its own repository write it. The weights are renamed, never changed; what a format can say and
Subquad cannot is refused by name.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from subquad.layers.registry import unknown_name
from subquad.models.config import SubquadConfig
from subquad.models.language import SubquadForCausalLM

Renaming = list[tuple[str, str]]
Foreign = Mapping[str, Any]

FLA_MODEL: Renaming = [
    (r"model\.embeddings\.", "model.embed_tokens."),
    (r"model\.layers\.(\d+)\.attn_norm\.", r"model.layers.\1.mixer_norm."),
    (r"model\.layers\.(\d+)\.mlp_norm\.", r"model.layers.\1.feedforward_norm."),
    (r"model\.layers\.(\d+)\.mlp\.", r"model.layers.\1.feedforward."),
    (r"model\.layers\.(\d+)\.attn\.([qkv])_conv1d\.", r"model.layers.\1.mixer.convolutions.\2."),
    (r"model\.layers\.(\d+)\.attn\.(g_norm_swish_gate|g_norm)\.", r"model.layers.\1.mixer.o_norm."),
    (r"model\.layers\.(\d+)\.attn\.a_proj\.", r"model.layers.\1.mixer.gate.proj."),
    (r"model\.layers\.(\d+)\.attn\.(A_log|dt_bias)$", r"model.layers.\1.mixer.gate.\2"),
    (r"model\.layers\.(\d+)\.attn\.", r"model.layers.\1.mixer."),
]
TRANSNORMER: Renaming = [
    (r"model\.final_norm\.", "model.norm."),
    (r"model\.layers\.(\d+)\.token_norm\.", r"model.layers.\1.mixer_norm."),
    (r"model\.layers\.(\d+)\.channel_norm\.", r"model.layers.\1.feedforward_norm."),
    (r"model\.layers\.(\d+)\.channel_mixer\.l1\.", r"model.layers.\1.feedforward.gate_proj."),
    (r"model\.layers\.(\d+)\.channel_mixer\.l2\.", r"model.layers.\1.feedforward.up_proj."),
    (r"model\.layers\.(\d+)\.channel_mixer\.l3\.", r"model.layers.\1.feedforward.down_proj."),
    (r"model\.layers\.(\d+)\.token_mixer\.out_proj\.", r"model.layers.\1.mixer.o_proj."),
    (r"model\.layers\.(\d+)\.token_mixer\.norm\.", r"model.layers.\1.mixer.o_norm."),
    (r"model\.layers\.(\d+)\.token_mixer\.", r"model.layers.\1.mixer."),
]
MAMBA: Renaming = [
    (r"backbone\.embeddings?\.", "model.embed_tokens."),
    (r"backbone\.norm_f\.", "model.norm."),
    (r"backbone\.layers\.(\d+)\.norm\.", r"model.layers.\1.mixer_norm."),
    (r"backbone\.layers\.(\d+)\.mixer\.", r"model.layers.\1.mixer."),
]


def load_foreign(folder: str | Path) -> SubquadForCausalLM:
    """The model in a folder written by another library (``config.json`` and safetensors or ``pytorch_model.bin``).

    Args:
        folder: of a checkpoint whose ``model_type`` is a key of :data:`FORMATS`, or of Mamba's own repository.

    Returns:
        The model in evaluation mode, float32 unless the checkpoint says otherwise; ``save_pretrained`` writes it in the
        ordinary format.

    Raises:
        ValueError: an unknown format, an option that Subquad does not have, or weights that are missing or left over.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json: not a model folder")
    foreign = json.loads((path / "config.json").read_text())
    model = convert(foreign, _read_weights(path))
    return model.eval()


def convert(foreign: Foreign, weights: Mapping[str, Tensor]) -> SubquadForCausalLM:
    """A model from the configuration and the state dict of another library; see :func:`load_foreign`."""
    kind = str(foreign.get("model_type", "mamba_ssm" if {"d_model", "n_layer", "ssm_cfg"} <= set(foreign) else None))
    if kind not in FORMATS:
        raise unknown_name("checkpoint format (model_type)", kind, FORMATS)
    configure, renaming = FORMATS[kind]
    config = configure(foreign)
    renamed = dict(_rename(weights, renaming, config))
    model = SubquadForCausalLM(config)
    if config.tie_word_embeddings:
        renamed.setdefault("lm_head.weight", renamed["model.embed_tokens.weight"])
    own = set(model.state_dict())
    derived = {name for name in own if name.endswith(".slope")}  # computed from the configuration
    missing, unexpected = own - set(renamed) - derived, set(renamed) - own
    if missing or unexpected:
        raise ValueError(
            f"the weights do not fit a {kind} model as configured; "
            f"missing: {_some(missing)}; left over: {_some(unexpected)}"
        )
    model.load_state_dict(renamed, strict=False)
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= load_file(file)
    for file in sorted(path.glob("pytorch_model*.bin")) if not weights else []:
        weights |= torch.load(file, map_location="cpu", weights_only=True)
    if not weights:
        raise ValueError(f"{path} holds no weights: neither *.safetensors nor pytorch_model*.bin")
    return weights


def _rename(weights: Mapping[str, Tensor], renaming: Renaming, config: SubquadConfig) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in weights.items():
        for pattern, replacement in renaming:
            renamed, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                name = renamed
                break
        if name.endswith("mixer.qkvu_proj.weight"):
            for part, rows in zip(("q", "k", "v", "gate"), tensor.chunk(4)):
                yield name.replace("qkvu_proj", f"{part}_proj"), rows
        elif name.endswith("lrpe.theta"):
            yield name, tensor.reshape(config.num_attention_heads, -1)
        elif ".convolutions." in name or name.endswith(".conv1d.weight"):  # (channels, 1, width)
            yield name, tensor.flatten(1)
        else:
            yield name, tensor


def _refuse(foreign: Foreign, **supported: Any) -> None:
    """Options whose value must be one that Subquad computes."""
    for name, value in supported.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in foreign and foreign[name] not in values:
            raise ValueError(f"the checkpoint has {name}={foreign[name]!r}; supported: {', '.join(map(repr, values))}")


def _fla(foreign: Foreign, mixer: dict[str, Any], **fields: Any) -> SubquadConfig:
    _refuse(foreign, attn=None, hidden_act="swish", attnres_block_size=None, use_output_gate=True, conv_bias=False)
    dim = foreign["hidden_size"]
    hidden = foreign.get("intermediate_size")
    if hidden is None:
        hidden = 256 * -(-int(dim * (foreign.get("hidden_ratio") or 4) * 2 / 3) // 256)
    conv = foreign.get("conv_size", 4) if foreign.get("use_short_conv", fields.pop("convolves", False)) else 0
    takes_conv = mixer["name"] != "retention"
    return SubquadConfig(
        mixers={**mixer, "norm_eps": foreign.get("norm_eps", 1e-6), **({"conv_size": conv} if takes_conv else {})},
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=foreign["num_hidden_layers"],
        num_attention_heads=foreign["num_heads"],
        vocab_size=foreign["vocab_size"],
        rms_norm_eps=foreign.get("norm_eps", 1e-6),
        tie_word_embeddings=foreign.get("tie_word_embeddings", False),
        positions="none",
        pad_token_id=foreign.get("pad_token_id"),
        bos_token_id=foreign.get("bos_token_id"),
        eos_token_id=foreign.get("eos_token_id"),
    )


def _gla(foreign: Foreign) -> SubquadConfig:
    _refuse(foreign, feature_map=None, clamp_min=None, use_gk=True, use_gv=False)
    options = {"expand_k": foreign.get("expand_k", 0.5), "expand_v": foreign.get("expand_v", 1.0)}
    if foreign.get("num_kv_heads"):
        options["num_key_value_heads"] = foreign["num_kv_heads"]
    return _fla(foreign, {"name": "gla", **options})


def _delta_net(foreign: Foreign) -> SubquadConfig:
    _refuse(foreign, use_beta=True, qk_activation=("silu", "relu", "identity"))
    return _fla(
        foreign,
        {
            "name": "delta_net",
            "expand_k": foreign.get("expand_k", 1),
            "expand_v": foreign.get("expand_v", 1),
            "qk_activation": foreign.get("qk_activation", "silu"),
            "qk_norm": foreign.get("qk_norm", "l2"),
            "output_gate": foreign.get("use_gate", False),
            "eigenvalues": [-1, 1] if foreign.get("allow_neg_eigval") else [0, 1],
        },
        convolves=True,
    )


def _gated_delta_net(foreign: Foreign) -> SubquadConfig:
    heads, width, dim = foreign["num_heads"], foreign.get("head_dim", 256), foreign["hidden_size"]
    value_heads = foreign.get("num_v_heads") or heads
    return _fla(
        foreign,
        {
            "name": "gated_delta_net",
            "num_value_heads": value_heads,
            "expand_k": heads * width / dim,
            "expand_v": value_heads * int(width * foreign.get("expand_v", 2)) / dim,
            "output_gate": foreign.get("use_gate", True),
            "eigenvalues": [-1, 1] if foreign.get("allow_neg_eigval") else [0, 1],
        },
        convolves=True,
    )


def _retention(foreign: Foreign) -> SubquadConfig:
    _refuse(foreign, feature_map=None, use_short_conv=False, num_kv_heads=(None, foreign["num_heads"]))
    options = {"expand_k": foreign.get("expand_k", 1), "expand_v": foreign.get("expand_v", 2)}
    return _fla(foreign, {"name": "retention", **options})


def _transnormer(foreign: Foreign) -> SubquadConfig:
    """The released configuration: lightning attention with ALiBi slopes, a linear gate, LRPE where its list says."""
    _refuse(foreign, linear_act_fun=("silu", "swish"), bias=False, norm_type=("simplermsnorm", "simplermsnorm_triton"))
    layers, dim = foreign["decoder_layers"], foreign["decoder_embed_dim"]
    lrpe = foreign.get("linear_use_lrpe_list") or [foreign.get("linear_use_lrpe", 0)] * layers
    common = {"name": "lightning", "gate": "linear", "norm": "simple_rms", "value_activation": "identity"}
    return SubquadConfig(
        mixers=[{**common, "lrpe": bool(use)} for use in lrpe],
        feedforward="sglu",
        norm="simple_rms",
        positions="none",
        hidden_size=dim,
        intermediate_size=dim if foreign["glu_dim"] == -1 else foreign["glu_dim"],
        num_hidden_layers=layers,
        num_attention_heads=foreign["decoder_attention_heads"],
        vocab_size=foreign["vocab_size"],
        scale_embeddings=not foreign.get("no_scale_embedding", False),
        tie_word_embeddings=foreign.get("tie_word_embeddings", False),
        pad_token_id=foreign.get("pad_token_id"),
        bos_token_id=foreign.get("bos_token_id"),
        eos_token_id=foreign.get("eos_token_id"),
    )


def _mamba(foreign: Foreign) -> SubquadConfig:
    _refuse(foreign, hidden_act="silu")
    rank = foreign.get("time_step_rank", "auto")
    return _mamba_config(
        {
            "expand": foreign.get("expand", 2),
            "state_size": foreign.get("state_size", 16),
            "conv_size": foreign.get("conv_kernel", 4),
            "step_rank": None if rank == "auto" else rank,
            "bias": foreign.get("use_bias", False),
            "conv_bias": foreign.get("use_conv_bias", True),
        },
        hidden_size=foreign["hidden_size"],
        num_hidden_layers=foreign["num_hidden_layers"],
        vocab_size=foreign["vocab_size"],
        rms_norm_eps=foreign.get("layer_norm_epsilon", 1e-5),
        tie_word_embeddings=foreign.get("tie_word_embeddings", True),
        pad_token_id=foreign.get("pad_token_id"),
        bos_token_id=foreign.get("bos_token_id"),
        eos_token_id=foreign.get("eos_token_id"),
    )


def _mamba_ssm(foreign: Foreign) -> SubquadConfig:
    """The original repository's configuration, which names no model type; its vocabulary is padded with rows."""
    _refuse(foreign, rms_norm=True, d_intermediate=0, attn_layer_idx=([], None))
    cell = foreign["ssm_cfg"]
    _refuse(cell, layer="Mamba1")
    rank, multiple = cell.get("dt_rank", "auto"), foreign.get("pad_vocab_size_multiple", 8)
    return _mamba_config(
        {
            "expand": cell.get("expand", 2),
            "state_size": cell.get("d_state", 16),
            "conv_size": cell.get("d_conv", 4),
            "step_rank": None if rank == "auto" else rank,
            "bias": cell.get("bias", False),
            "conv_bias": cell.get("conv_bias", True),
        },
        hidden_size=foreign["d_model"],
        num_hidden_layers=foreign["n_layer"],
        vocab_size=-(-foreign["vocab_size"] // multiple) * multiple,
        rms_norm_eps=1e-5,
        tie_word_embeddings=foreign.get("tie_embeddings", True),
    )


def _mamba_config(options: dict[str, Any], **fields: Any) -> SubquadConfig:
    return SubquadConfig(
        mixers={"name": "mamba", **options}, feedforward=None, positions="none", num_attention_heads=1, **fields
    )


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") if shown else "nothing"


FORMATS: dict[str, tuple[Callable[[Foreign], SubquadConfig], Renaming]] = {
    "gla": (_gla, FLA_MODEL),
    "delta_net": (_delta_net, FLA_MODEL),
    "gated_deltanet": (_gated_delta_net, FLA_MODEL),
    "retnet": (_retention, FLA_MODEL),
    "transnormer": (_transnormer, TRANSNORMER),
    "mamba": (_mamba, MAMBA),
    "mamba_ssm": (_mamba_ssm, MAMBA),
}
