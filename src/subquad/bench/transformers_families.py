"""A random model of every family of transformers that has recurrent layers or short convolutions, tiny or larger.

Configurations take settings that they do not know, so one set serves all; each family adds what it lacks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TINY = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 2,
    "num_local_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "chunk_size": 16,
    "mamba_chunk_size": 16,
    "num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "q_lora_rank": 16,
}
FULL = {"layer_types": ["linear_attention", "full_attention"]}
#: A size at which projections cost what they cost in a real model; for timings.
LARGER = TINY | {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "chunk_size": 64,
    "mamba_chunk_size": 256,
    "num_heads": 16,
    "n_mamba_heads": 2,
    "mamba_n_heads": 16,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_num_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_head_dim": 64,
    "q_lora_rank": 128,
}
KIMI = {**FULL, "num_key_value_heads": 4}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """How to build a model: its type in transformers, and what the common settings lack or must not hold."""

    name: str
    extras: dict[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def build(self, seed: int = 0, settings: dict[str, Any] = TINY) -> PreTrainedModel:
        """The model in float32, ready to evaluate; matrices are scaled so that every part shows in the logits."""
        settings = {key: value for key, value in settings.items() if key not in self.drop} | self.extras
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._model(settings)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.normal_(0, parameter.shape[-1] ** -0.5)
        return model.float().eval()

    def _model(self, settings: dict[str, Any]) -> PreTrainedModel:
        if self.name == "glm5_next":
            text = {key: value for key, value in settings.items() if key != "head_dim"}
            vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "out_hidden_size": settings["hidden_size"]}
            config = transformers.Glm5NextConfig(text_config=text, vision_config=vision)
            return transformers.Glm5NextForConditionalGeneration(config)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(self.name, **settings))


FAMILIES = {
    family.name: family
    for family in (
        Family("mamba"),
        Family("falcon_mamba"),
        Family("jamba", {"attn_layer_offset": 1}),
        Family("zamba", ZAMBA),
        Family("mamba2"),
        Family("bamba", {"attn_layer_indices": [1]}),
        Family("falcon_h1"),
        Family("granitemoehybrid", FULL),
        Family("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention"], "num_hidden_layers": 3}),
        Family("zamba2", ZAMBA),
        Family("qwen3_next", FULL),
        Family("qwen3_5_text", FULL),
        Family("qwen3_5_moe_text", FULL),
        Family("lara_mini", FULL),
        Family("olmo_hybrid", FULL),
        Family(
            "qwen4_exp_text",
            FULL
            | {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 64,
                "indexer_budget": 64,
                "indexer_compress_ratio": 16,
            },
        ),
        Family("kimi_linear", KIMI),
        Family("bailing_hybrid", KIMI),
        Family("glm5_next", KIMI),
        Family("lfm2", CONVOLUTION),
        Family("lfm3", CONVOLUTION),
        Family("lfm2_moe", CONVOLUTION),
        Family("inkling_text", {"swa_head_dim": 16}),
        Family("inkling2_text", {"swa_head_dim": 16, "unpadded_vocab_size": 96}),
        Family(
            "inkling2_loop_text",
            {
                "swa_head_dim": 16,
                "unpadded_vocab_size": 96,
                "loop_layer_index_start": 1,
                "loop_layer_index_end": 2,
                "n_layers_per_attn_res_block": 1,
            },
        ),
        Family("recurrent_gemma", {"num_hidden_layers": 3}),
        Family("minimax", FULL),
        Family("rwkv", drop=("pad_token_id",)),
        Family("xlstm", {"qk_dim_factor": 1.0}),
        Family("zaya"),
    )
}
