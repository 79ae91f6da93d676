"""The whole way: stages, resume, what is refused, and a folder that is there whole or not at all."""

import dataclasses
import errno
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from subquad import convert, tasks
from subquad.cli import app
from subquad.convert.attention import converted_layers
from subquad.convert.recipes import RECIPES, Transfer
from subquad.convert.stages import LayerTransfer, NextTokens, TrainedPart, add_adapters, core_parameters, trainable
from subquad.convert.swapping import swap
from subquad.training.data import Batch
from tests.convert.cases import output_of, source, tokens

QUIET = Console(quiet=True)
BYTES = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
SETTINGS = convert.ConvertSettings(
    context=48,
    batch_size=2,
    transfer_steps=9,
    adapt_steps=10,
    learning_rate=1e-2,
    save_every=3,
    windows=4,
    contexts=(32,),
)
LEARNT = dataclasses.replace(RECIPES["liger"], transfer=Transfer("output", 3e-2))  # with something to transfer
OPTIONS = {"window": 5, "learn_mix": True, "mix": (0.3, 0.7)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of bytes with its tokenizer, as a user has it."""
    place = tmp_path_factory.mktemp("models") / "llama"
    source("llama", **BYTES, initializer_range=0.05).save_pretrained(place)
    tasks.byte_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def text():
    words = [f"line {n}: the sum of {n} and {n + 1} is {2 * n + 1}.\n" for n in range(400)]
    return tasks.TextData.from_documents(["".join(words).encode()], "sums")


def run(folder, text, out, **changes):
    arguments = {"layers": [0, 2], "options": OPTIONS, "settings": SETTINGS, "console": QUIET, **changes}
    return convert.run(folder, LEARNT, text, out, **arguments)


@pytest.fixture(scope="module")
def whole(folder, text, tmp_path_factory):
    return run(folder, text, tmp_path_factory.mktemp("out") / "whole")


def test_the_folder_is_an_ordinary_one_and_its_report_has_all_stages(whole, folder):
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    AutoTokenizer.from_pretrained(whole.folder)
    added = {name for name, _ in core_parameters(model)}
    assert set(model.state_dict()) - set(AutoModelForCausalLM.from_pretrained(folder).state_dict()) == added
    assert len(added) == 2
    record = json.loads((whole.folder / "conversion.json").read_text())
    assert list(record["stages"]) == ["source", "swapped", "transfer", "converted"]
    assert record["stages"]["converted"]["quality"]["perplexity"] < record["stages"]["swapped"]["quality"]["perplexity"]
    assert record["stages"]["source"]["costs"]["32"]["state bytes"] == 3 * 2 * 2 * 8 * 32 * 4  # layers, k and v, heads
    assert whole.plan.added == record["plan"]["added parameters"] == 2 * 2 * 4
    assert "converted by liger" in (whole.folder / "conversion.html").read_text()
    assert not list(whole.folder.parent.glob("*.converting"))


@pytest.mark.parametrize("stops", [(4, 9, 17), (1,)])
def test_stopped_and_resumed_ends_with_the_same_weights(whole, folder, text, tmp_path, stops, monkeypatch):
    """``stops``: batches, counted over both stages, at which the run dies; what it did since a checkpoint is lost."""
    asked, windows = [], tasks.TextData.windows

    def dying(self, split, length, batch_size, *, seed, index):
        asked.append(index)
        if len(asked) in stops:
            raise MemoryError
        return windows(self, split, length, batch_size, seed=seed, index=index)

    monkeypatch.setattr(tasks.TextData, "windows", dying)
    out = tmp_path / "resumed"
    for _ in stops:
        with pytest.raises(MemoryError):
            run(folder, text, out)
        assert not out.exists()
    run(folder, text, out)
    first, second = (load_file(place / "model.safetensors") for place in (whole.folder, out))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_begun_conversion_is_not_continued(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr("subquad.convert.pipeline.add_adapters", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, text, tmp_path / "out")
    with pytest.raises(ValueError, match="begun with another options"):
        run(folder, text, tmp_path / "out", options={**OPTIONS, "window": 6})


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_later(whole, folder, text, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match=r"out could not be written: No space left on device; what was done so far"):
            run(folder, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(folder, text, tmp_path / "out")
    first, second = (load_file(place / "model.safetensors") for place in (whole.folder, tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_transfer_trains_each_layer_by_itself_and_leaves_the_source_alone():
    model = source("llama")
    before = output_of(model, input_ids=tokens())
    swap(model, LEARNT, **OPTIONS)
    parameters = [parameter for _, parameter in core_parameters(model)]
    objective = LayerTransfer(model, "output")
    batch = Batch(tokens(), tokens())
    loss, _ = objective(TrainedPart(core_parameters(model)), batch)
    gradients = torch.autograd.grad(2 * loss, parameters)
    # layer 1 alone: with other parameters in layers 0 and 2 its gradient stays what it is, to the bit
    with torch.no_grad():
        parameters[0].add_(1.0)
        parameters[2].sub_(1.0)
    loss, _ = objective(TrainedPart(core_parameters(model)), batch)
    again = torch.autograd.grad(2 * loss, parameters)
    assert torch.equal(gradients[1], again[1])
    assert not torch.equal(gradients[0], again[0])
    with convert.as_source(model):
        assert torch.equal(output_of(model, input_ids=tokens(), use_cache=False), before)
    with torch.no_grad(), convert.as_source(model), pytest.raises(ValueError, match="without a cache"):
        model(input_ids=tokens(), use_cache=True)


def test_the_gradient_of_transfer_is_that_of_its_loss():
    model = swap(source("llama"), LEARNT, **OPTIONS).double()
    parameter = core_parameters(model)[0][1]
    objective, batch = LayerTransfer(model, "output"), Batch(tokens(), tokens())
    (gradient,) = torch.autograd.grad(objective(None, batch)[0], [parameter])
    step = 1e-5 * torch.ones_like(parameter)
    with torch.no_grad():
        parameter.add_(step)
        above = objective(None, batch)[0]
        parameter.sub_(2 * step)
        below = objective(None, batch)[0]
    torch.testing.assert_close((gradient * step).sum(), (above - below) / 2, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "opt"])
def test_merging_adapters_changes_no_logit_and_adapts_converted_layers_alone(name):
    model = swap(source(name), "liger", layers=[0, 2], window=5)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    adapter = add_adapters(model, RECIPES["liger"].adapt, convert.FAMILIES[name], seed=0)
    assert all("lora_" in key for key, _ in trainable(model))
    with torch.no_grad():
        for key, parameter in trainable(model):
            parameter.normal_(0.0, 0.1) if "lora_B" in key else None
    loss, _ = NextTokens(model)(None, Batch(tokens(), tokens()))
    logits = output_of(model, input_ids=tokens())
    merged = adapter.merge_and_unload()
    torch.testing.assert_close(
        output_of(merged, input_ids=tokens()), logits, rtol=0, atol=1e-5 * float(logits.abs().max())
    )
    assert torch.isfinite(loss)
    changed = [key for key, value in merged.state_dict().items() if not torch.equal(value, weights[key])]
    layers = {layer.rpartition(".")[0] for layer, _ in converted_layers(merged)}
    assert set(merged.state_dict()) == set(weights)
    assert {
        key.partition(".attn")[0].partition(".self_attn")[0].partition(".attention")[0] for key in changed
    } == layers


def test_the_plan_of_a_folder_reads_no_weights(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    planned = convert.plan_folder(tmp_path, "liger", layers="every:3")
    assert planned.added == 0
    assert planned.layers == (0, 1)
    assert planned.adapted == 2 * 8 * ((32 + 32) + 2 * (32 + 16))
    before, after = planned.state_bytes[8192]
    assert before == 3 * 2 * 16 * 8192 * 4
    assert after == before // 3 + 2 * 4 * (4 * 8 * 8 + 2 * 16 * 63 + 2 * 63)


def broken(folder, tmp_path, change):
    import shutil

    place = tmp_path / "model"
    shutil.copytree(folder, place)
    change(place)
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda place: (place / "config.json").unlink(), "is no model: it has no config.json"),
        (lambda place: (place / "config.json").write_text("{"), "its configuration cannot be read"),
        (lambda place: (place / "model.safetensors").write_bytes(b"short"), "its weights cannot be read"),
        (lambda place: (place / "model.safetensors").unlink(), "its weights cannot be read"),
        (lambda place: [path.unlink() for path in place.glob("token*")], "has no tokenizer"),
        (
            lambda place: (place / "config.json").write_text(json.dumps({"model_type": "t5"})),
            "family 't5' are not converted: its attention adds relative-position biases",
        ),
    ],
)
def test_a_broken_folder_gets_one_sentence_and_nothing_is_written(folder, tmp_path, change, message):
    place = broken(folder, tmp_path, change)
    words = tmp_path / "words.txt"
    words.write_text("some text\n" * 300)
    arguments = ["convert", str(place), "--to", "liger", "--data", str(words), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "words.txt"]


def test_the_command_plans_converts_and_refuses_what_is_there(folder, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(300)))
    common = ["convert", str(folder), "--to", "liger", "--option", "window=4", "--data", str(words)]
    size = ["--context", "32", "--batch-size", "2", "--steps", "2", "--contexts", "32"]
    result = CliRunner().invoke(app, [*common, *size, "--plan"])
    assert result.exit_code == 0, result.output
    assert "0 parameters added" in result.output
    assert "converted, untrained: perplexity" in result.output
    result = CliRunner().invoke(app, [*common, *size, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").is_file()
    for arguments, message in (
        ([*common, *size, "-o", str(tmp_path / "out")], "exists already"),
        ([*common, "-o", str(tmp_path / "new"), "--context", "5000"], "tokens to train on"),
        ([*common[:-2], "--plan", "--option", "windw=3"], "window"),
        ([*common[:-2], "--plan", "--option", "window"], "name=value"),
        (["convert", str(tmp_path / "out"), "--to", "liger", "--plan"], "converted already, by recipe 'liger'"),
        (["convert", "/no/such/folder", "--to", "liger", "--plan"], "there is no folder"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
