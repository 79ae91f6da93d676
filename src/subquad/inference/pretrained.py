"""Pretrained models from a path: a Hugging Face folder, or one GGUF file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

CONFIGURATION = "config.json"


def load(path: str | Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The causal language model of a folder or GGUF file in its stored dtype, to evaluate, and its tokenizer.

    Raises:
        ValueError: no such folder or file, or a folder without ``config.json``.
        ImportError: a GGUF file, and the package ``gguf`` is missing.
    """
    place = _place(path)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    return AutoModelForCausalLM.from_pretrained(**place, dtype="auto").eval(), tokenizer


def skeleton(path: str | Path) -> nn.Module:
    """The same model without memory for its weights, on the meta device: its layers, in no time.

    Raises:
        ValueError, ImportError: as :func:`load`.
    """
    config = AutoConfig.from_pretrained(**_place(path))
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def _place(path: str | Path) -> dict[str, str]:
    place = Path(path)
    if place.is_file() and place.suffix.lower() == ".gguf":
        return {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name}
    if not place.is_dir():
        raise ValueError(
            f"{path} is no folder; give the folder that holds config.json and the weights, or a .gguf file"
        )
    if not (place / CONFIGURATION).is_file():
        files = sorted(file.name for file in place.glob("*.gguf"))
        hint = f"; it holds {', '.join(files)}: give that file" if files else ""
        raise ValueError(f"{path} holds no {CONFIGURATION}{hint}")
    return {"pretrained_model_name_or_path": str(place)}
