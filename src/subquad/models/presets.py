"""Configurations of published language models, as data. A list of mixers is given by its pattern over the layers."""

from typing import Any

_TRANSNORMER_LLM = {
    "feedforward": "sglu",
    "norm": "simple_rms",
    "positions": "none",
    "scale_embeddings": True,
    "tie_word_embeddings": False,
    "vocab_size": 64_000,
}
_TRANSNORMER_LLM_MIXER = {"name": "lightning", "gate": "linear", "norm": "simple_rms", "value_activation": "identity"}
_TNL = {"mixers": "lightning", "feedforward": "sglu", "norm": "rms", "positions": "none", "tie_word_embeddings": False}
_TRANSNORMER = {"feedforward": "gelu", "norm": "layer", "positions": "learned"}


def _sizes(dim: int, layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden,
    }


def _transnormer_llm(dim: int, layers: int, heads: int, hidden: int) -> dict[str, Any]:
    mixers = {"first": {**_TRANSNORMER_LLM_MIXER, "lrpe": True}, "rest": _TRANSNORMER_LLM_MIXER}
    return {**_TRANSNORMER_LLM, **_sizes(dim, layers, heads, hidden), "mixers": mixers}


def _based(dim: int, layers: int, linear: tuple[int, ...], linear_mixer: str = "taylor_linear") -> dict[str, Any]:
    """A window follows each global layer; all others are convolutions. The window is the released models': 128 keys
    back and the token itself."""
    entries: list[Any] = ["base_conv"] * layers
    for layer in linear:
        entries[layer] = linear_mixer
        entries[layer + 1] = {"name": "sliding_window", "window_size": 129}
    return {
        **_sizes(dim, layers, 16, 2 * dim),
        "mixers": {"pattern": entries},
        "positions": "none",
        "vocab_size": 50_264,
        "rms_norm_eps": 1e-5,
        "initializer_range": (2 / (5 * dim)) ** 0.5,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Qin et al. 2023, table of configurations, and the released configuration files
    "transnormer_llm_385m": _transnormer_llm(1024, 24, 8, 2816),
    "transnormer_llm_1b": _transnormer_llm(2048, 16, 16, 5632),
    "transnormer_llm_7b": _transnormer_llm(4096, 30, 32, 11_008),
    # Qin et al. 2024 (TNL), section 5
    "tnl_385m": {**_TNL, **_sizes(1024, 24, 8, 2816)},
    "tnl_1b": {**_TNL, **_sizes(2048, 16, 16, 5632)},
    "tnl_7b": {**_TNL, **_sizes(4096, 30, 32, 11_008)},
    # Qin et al. 2022: blocks in the first half of the layers, normed linear attention in the second
    "transnormer_t1": {
        **_TRANSNORMER,
        **_sizes(512, 6, 8, 2048),
        "mixers": {
            "first_half": {"name": "diag_attention", "weights": "relu", "norm": "gated_rms"},
            "second_half": {"name": "norm_attention", "feature_map": "elu", "norm": "gated_rms"},
        },
    },
    "transnormer_t2": {
        **_TRANSNORMER,
        **_sizes(512, 6, 8, 2048),
        "mixers": {"first_half": "diag_attention", "second_half": "norm_attention"},
    },
    # Yang et al. 2024, section 5
    "gla_340m": {"mixers": "gla", "positions": "none", **_sizes(1024, 24, 4, 2816)},
    "gla_1b": {"mixers": "gla", "positions": "none", **_sizes(2048, 24, 4, 5632)},
    # Yang et al. 2024b, section 4
    "delta_net_340m": {"mixers": "delta_net", "positions": "none", **_sizes(1024, 24, 8, 2816)},
    "delta_net_1b": {"mixers": "delta_net", "positions": "none", **_sizes(2048, 24, 16, 5632)},
    # Arora et al. 2024 (Based), the released configurations
    "based_360m": _based(1024, 27, (1, 6, 11, 16, 21)),
    "based_1b": _based(1792, 36, (1, 6, 11, 16, 21, 27, 33)),
    # Arora et al. 2024b (JRT): Based with prefix linear attention, a layer fewer for its second projections
    "jrt_360m": {**_based(1024, 26, (1, 6, 11, 16, 21), "jrt"), "prefix_lm": True},
}
