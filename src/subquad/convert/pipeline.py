"""The whole way from a pretrained model to a converted folder: load, swap, transfer, adapt, merge, save, verify.

Work in progress lies in ``OUT.converting`` beside the folder that is asked for: checkpoints of the trained stages, and
what was measured. A run that was stopped or killed goes on from there, and ends with the same weights. ``OUT`` itself
appears by one rename, whole, when all is done.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from subquad.convert import measures
from subquad.convert.planning import Plan, plan
from subquad.convert.recipes import Recipe, recipe
from subquad.convert.report import write_report
from subquad.convert.settings import ConvertSettings
from subquad.convert.sites import family_of
from subquad.convert.stages import (
    LayerTransfer,
    NextTokens,
    TrainedPart,
    add_adapters,
    core_parameters,
    trainable,
)
from subquad.convert.swapping import swap
from subquad.training.checkpoint import flush_to_disk, write_atomically
from subquad.training.data import from_text
from subquad.training.loop import train
from subquad.training.options import TrainingOptions

WORKING = ".converting"
REPORT = "conversion"


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        folder: the model, its tokenizer, and ``conversion.json`` and ``conversion.html`` about it.
        plan: what was to be done.
        record: what was measured: see ``conversion.json``.
    """

    folder: Path
    plan: Plan
    record: dict[str, Any]


def run(
    model: str | os.PathLike[str],
    to: str | Recipe,
    data: Any,
    out: str | os.PathLike[str],
    *,
    layers: str | Sequence[int] = "all",
    options: Mapping[str, Any] | None = None,
    settings: ConvertSettings | None = None,
    console: Console | None = None,
) -> Conversion:
    """Converts a pretrained causal language model and saves it as a folder that ``from_pretrained`` loads.

    Called again after an interruption, with the same arguments, it goes on where it stopped.

    Args:
        model: a local folder, or a name that transformers can resolve.
        to: a recipe, or its name.
        data: :class:`subquad.tasks.TextData` in bytes; its train split trains, its test split measures.
        out: the folder to write; it must not exist.
        layers, options: see :func:`subquad.convert.swap`.
        settings: see :class:`ConvertSettings`.
        console: where progress goes; stderr if not given.

    Raises:
        ValueError: a model, tokenizer, recipe, option or data that does not serve; an ``out`` that exists, or that was
            begun with other settings.
        OSError: ``out`` cannot be written, or the disk is full. Nothing half-written stands in its place.
        ArithmeticError: the converted model is not what was trained (verification).
    """
    settings = settings or ConvertSettings()
    console = console or Console(stderr=True)
    chosen = (recipe(to) if isinstance(to, str) else to).with_learning_rates(
        settings.transfer_learning_rate, settings.learning_rate
    )
    target = Path(out)
    if target.exists():
        raise ValueError(f"{target} exists already: name a folder that does not, or remove it")
    source, tokenizer = load_source(model), load_tokenizer(model)
    if torch.accelerator.is_available():  # where the loop of training trains
        source.to(torch.accelerator.current_accelerator())
    planned = plan(source, chosen, layers=layers, **(options or {}))
    text = _tokens(data, tokenizer, settings)
    work = _Work(target, _identity_of(planned, chosen, text, settings, options or {}, source), console)
    started = time.monotonic()
    try:
        converted = _train(source, chosen, layers, options or {}, text, tokenizer, settings, work)
        probe = torch.from_numpy(text.tokens("test")[None, : min(64, settings.context)].astype(np.int64))
        with torch.no_grad():
            expected = converted(input_ids=probe.to(converted.device), use_cache=False).logits.cpu()
        folder = work.folder / "finished"
        shutil.rmtree(folder, ignore_errors=True)
        converted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del converted, source
        work.results["verification"] = verify(folder, probe, expected)
        work.results["minutes"] = work.results.get("minutes", 0.0) + (time.monotonic() - started) / 60
        record = {**work.results, "plan": _plan_record(planned), "settings": settings.record()}
        write_report(record, folder / f"{REPORT}.html")
        (folder / f"{REPORT}.json").write_text(json.dumps(record, indent=1))
        for file in folder.iterdir():
            flush_to_disk(file)
        os.replace(folder, target)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise OSError(
            f"{target} could not be written: {reason}; what was done so far is kept in {work.folder}: "
            "the same command goes on from there"
        ) from error
    shutil.rmtree(work.folder, ignore_errors=True)
    return Conversion(target, planned, record)


def plan_folder(
    model: str | os.PathLike[str], to: str | Recipe, *, layers: str | Sequence[int] = "all", **options: Any
) -> Plan:
    """The plan for a model by its folder; weights are not read."""
    from transformers import AutoModelForCausalLM

    config = load_config(model)
    with torch.device("meta"):
        source = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return plan(source, to, layers=layers, **options)


def untrained_cost(
    model: str | os.PathLike[str],
    to: str | Recipe,
    data: Any,
    *,
    layers: str | Sequence[int] = "all",
    options: Mapping[str, Any] | None = None,
    settings: ConvertSettings | None = None,
) -> dict[str, dict[str, float]]:
    """Held-out figures of a model and of its conversion before any training: what stands to be won back."""
    settings = settings or ConvertSettings()
    source, tokenizer = load_source(model), load_tokenizer(model)
    text = _tokens(data, tokenizer, settings)

    def look(subject: Any) -> dict[str, float]:
        return measures.quality(subject, text, None, context=settings.context, windows=settings.windows)

    return {
        "source": look(source),
        "converted, untrained": look(swap(source, to, layers=layers, seed=settings.seed, **(options or {}))),
    }


def load_source(model: str | os.PathLike[str]) -> Any:
    """The pretrained causal language model at ``model`` in float32, in evaluation mode.

    Raises:
        ValueError: there is none, or it is broken; one sentence says which file or field.
    """
    from transformers import AutoModelForCausalLM

    name = os.fspath(model)
    load_config(name)

    def read() -> Any:
        loaded, about = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        missing = sorted(about["missing_keys"])
        if missing:
            raise ValueError(f"its files lack {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1)))
        return loaded

    return _loaded(name, "its weights", read).eval()


def load_config(model: str | os.PathLike[str]) -> Any:
    """The configuration of a causal language model that can be converted.

    Raises:
        ValueError: there is none, it cannot be read, or it is of a model that is not converted.
    """
    from transformers import AutoConfig

    name = os.fspath(model)
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no folder {name}")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name} is no model: it has no config.json")
    config = _loaded(name, "its configuration", lambda: AutoConfig.from_pretrained(name))
    family = family_of(config)
    if not family.causal:
        raise ValueError(
            f"{name} is an encoder ({family.name}): this command converts causal language models; "
            "encoders are converted from Python, see the documentation of convert"
        )
    if str(config.model_type).startswith("subquad_"):
        raise ValueError(f"{name} is converted already, by recipe {config.subquad['recipe']!r}")
    return config


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    name = os.fspath(model)
    if Path(name).is_dir() and not any(Path(name).glob("*token*")) and not any(Path(name).glob("vocab*")):
        raise ValueError(f"{name} has no tokenizer (tokenizer.json and tokenizer_config.json): copy the source's there")
    return _loaded(name, "its tokenizer", lambda: AutoTokenizer.from_pretrained(name))


def _loaded(name: str, what: str, read: Callable[[], Any]) -> Any:
    """Any failure of another library to read a folder, as one sentence."""
    try:
        return read()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{name} cannot be loaded: {what} cannot be read ({reason})") from error


def _tokens(data: Any, tokenizer: Any, settings: ConvertSettings) -> Any:
    text = data.tokenized(tokenizer)
    need = settings.batch_size * settings.context
    if len(text.train) < need:
        raise ValueError(
            f"{data.source} has {len(text.train):,} tokens to train on; one step takes {need:,}: "
            "give more text, or a smaller context or batch"
        )
    if len(text.test) <= settings.context:
        raise ValueError(
            f"{data.source} holds out {len(text.test):,} tokens, fewer than one row of {settings.context}: "
            "give more text, or a smaller context"
        )
    return text


class _Work:
    """The folder of a conversion in progress, and what was measured so far.

    Raises:
        ValueError: the folder was begun with other settings.
    """

    def __init__(self, target: Path, identity: dict[str, Any], console: Console) -> None:
        self.folder, self.console = target.with_name(target.name + WORKING), console
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {"stages": {}}
        begun = self.folder / "begun.json"
        identity = json.loads(json.dumps(identity))
        if begun.exists():
            earlier = json.loads(begun.read_text())
            other = [name for name in identity if identity[name] != earlier.get(name)]
            if other:
                raise ValueError(
                    f"{self.folder} holds a conversion that was begun with another {', '.join(other)}: "
                    "give the same settings to go on, or remove that folder"
                )
            if (self.folder / "results.json").exists():
                self.results = json.loads((self.folder / "results.json").read_text())
            console.print(f"going on with the conversion begun in {self.folder}", style="dim", highlight=False)
        else:
            write_atomically(begun, lambda path: path.write_text(json.dumps(identity)))

    def measured(self, stage: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` gives, once: a run that goes on does not measure again."""
        stages = self.results["stages"]
        if stage not in stages:
            stages[stage] = measure()
            write_atomically(self.folder / "results.json", lambda path: path.write_text(json.dumps(self.results)))
        figures = stages[stage].get("quality", {})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.console.print(f"{stage}: {shown}", highlight=False)
        return stages[stage]


def _identity_of(
    planned: Plan, chosen: Recipe, text: Any, settings: ConvertSettings, options: Mapping[str, Any], source: Any
) -> dict[str, Any]:
    """What must be the same for a run to go on with what another began."""
    weights = next(p for p in source.parameters() if p.ndim == 2).detach()
    return {
        "source": [planned.source, planned.parameters, float(weights.double().sum())],
        "recipe": [chosen.name, repr(chosen.transfer), repr(chosen.adapt)],
        "layers": planned.layers,
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in chosen.checked(options).items()},
        "data": [text.source, len(text.train), len(text.test), int(text.train.astype(np.int64).sum())],
        "settings": settings.record(),
    }


def _train(
    source: Any,
    chosen: Recipe,
    layers: str | Sequence[int],
    options: Mapping[str, Any],
    text: Any,
    tokenizer: Any,
    settings: ConvertSettings,
    work: _Work,
) -> Any:
    """The stages, each measured when it is done; the merged model."""

    def look(model: Any, *, whole: bool = False) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "quality": measures.quality(
                model, text, tokenizer if whole else None, context=settings.context, windows=settings.windows
            )
        }
        if whole:
            figures["costs"] = measures.costs(model, settings.contexts)
            figures["prompt"], figures["text"] = measures.continuation(model, text, tokenizer)
        return figures

    work.measured("source", lambda: look(source, whole=True))
    family = family_of(source)
    model = swap(source, chosen, layers=layers, seed=settings.seed, **options)
    work.measured("swapped", lambda: look(model))
    batches = from_text(text, settings.context, settings.batch_size, settings.seed)
    if chosen.transfer is not None and core_parameters(model) and settings.transfer_steps:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for _, parameter in core_parameters(model):
            parameter.requires_grad_(True)
        _stage(
            TrainedPart(core_parameters(model)),
            LayerTransfer(model, chosen.transfer.loss),
            batches,
            settings.transfer_steps,
            chosen.transfer.learning_rate,
            settings,
            work,
            "transfer",
        )
        work.measured("transfer", lambda: look(model))
    if chosen.adapt is not None and settings.adapt_steps:
        adapter = add_adapters(model, chosen.adapt, family, settings.seed)
        part = TrainedPart(trainable(model))
        rate = chosen.adapt.learning_rate
        _stage(part, NextTokens(model), batches, settings.adapt_steps, rate, settings, work, "adapt")
        model = adapter.merge_and_unload()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    work.measured("converted", lambda: look(model, whole=True))
    return model


def _stage(
    part: TrainedPart,
    objective: Any,
    batches: Any,
    steps: int,
    learning_rate: float,
    settings: ConvertSettings,
    work: _Work,
    name: str,
) -> None:
    one_cycle = steps >= 8
    training = TrainingOptions(
        steps=steps,
        batch_size=settings.batch_size,
        learning_rate=learning_rate,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        schedule="one_cycle" if one_cycle else "constant",
        warmup_steps=max(2, round(0.3 * steps)) if one_cycle else 0,
        save_every=settings.save_every,
        seed=settings.seed,
        tensorboard=False,
    )
    train(part, batches, training, out=work.folder / name, resume=True, objective=objective, console=work.console)


@torch.no_grad()
def verify(folder: Path, probe: Tensor, expected: Tensor) -> dict[str, float]:
    """Loads a saved model and compares: its logits with those expected, and a cached decode with a whole reading.

    Returns:
        The largest differences, each over the largest logit.

    Raises:
        ArithmeticError: they differ by more than 1e-4.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = float(expected.abs().max())
    reloaded = float((model(input_ids=probe, use_cache=False).logits - expected).abs().max()) / size
    half = probe.shape[1] // 2
    output = model(input_ids=probe[:, :half], use_cache=True)
    steps = [output.logits]
    for token in probe[:, half:].unbind(1):
        output = model(input_ids=token[:, None], cache=output.cache, use_cache=True)
        steps.append(output.logits)
    decoded = float((torch.cat(steps, 1) - expected).abs().max()) / size
    for what, difference in (("saved and loaded again", reloaded), ("read token by token", decoded)):
        if not difference <= 1e-4:
            raise ArithmeticError(f"{what}, the converted model's logits differ by {difference:.1e} of the largest")
    return {"reloaded": reloaded, "decoded": decoded}


def _plan_record(planned: Plan) -> dict[str, Any]:
    return {
        "source": planned.source,
        "recipe": planned.recipe,
        "summary": planned.summary,
        "attention layers": len(planned.sites),
        "converted layers": list(planned.layers),
        "parameters": planned.parameters,
        "added parameters": planned.added,
        "trained in transfer": planned.transferred,
        "trained in adaptation": planned.adapted,
        "state bytes": {str(context): list(sizes) for context, sizes in planned.state_bytes.items()},
    }
