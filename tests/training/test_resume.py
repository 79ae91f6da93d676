"""A run that was stopped and resumed is the uninterrupted one, bit for bit: weights, optimizer, schedule, metrics."""

import random
import signal
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from subquad.training import Batch, from_task, from_text


class Stop(Exception):
    """Ends a run from inside its data, as an error or a kill would, without a checkpoint."""


def stopping_after(data, number):
    """``data`` that raises when batch ``number`` is asked for."""
    original = data.batch

    def batch(index):
        if index == number:
            raise Stop
        return original(index)

    data.batch = batch
    return data


def tensors(value):
    """Every tensor and number of a nest, with its path."""
    if isinstance(value, dict):
        return {f"{key}/{path}": leaf for key, inner in value.items() for path, leaf in tensors(inner).items()}
    if isinstance(value, (list, tuple)):
        return tensors(dict(enumerate(value)))
    return {"": value}


def assert_same_run(one: Path, other: Path, step: int) -> None:
    for name in ("metrics.jsonl", "metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    folders = [folder / "checkpoints" / f"step-{step:08d}" for folder in (one, other)]
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    states = [tensors(torch.load(folder / "state.pt", weights_only=True)) for folder in folders]
    for first, second in (weights, states):
        assert first.keys() == second.keys()
        assert len(first) > 3
        for key, value in first.items():
            same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
            assert same, key


SETTINGS = {
    "cosine": {"final_learning_rate": 0.001},
    "constant": {"schedule": "constant", "clip": None, "weight_decay": 0.0},
    "one_cycle": {"schedule": "one_cycle"},
    "accumulate": {"accumulate": 3, "log_every": 2},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resumed_equals_uninterrupted(setting, tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = options(save_every=2, eval_every=4, **SETTINGS[setting])

    def evaluate(model):
        assert not model.training
        noise = torch.rand(()) + numpy.random.rand() + random.random()  # noqa: NPY002
        return {"weight": float(model.hidden.weight.sum()), "noise": float(noise)}

    model = tiny_model()
    quiet_train(model, counted_data(), chosen, out=tmp_path / "whole", evaluate=evaluate)

    for cut in (1, 6, 11):
        out = tmp_path / f"cut at {cut}"
        data = stopping_after(counted_data(), cut * chosen.accumulate)
        with pytest.raises(Stop):
            quiet_train(tiny_model(), data, chosen, out=out, evaluate=evaluate)
        torch.manual_seed(99)  # what happened before must not matter, nor what the model is before it is loaded
        data, twin = counted_data(), tiny_model() if cut == 1 else tiny_model(seed=5)
        result = quiet_train(twin, data, chosen, out=out, resume=True, evaluate=evaluate)
        assert data.asked[0] == cut // 2 * 2 * chosen.accumulate, "it goes on after the last checkpoint"
        assert_same_run(tmp_path / "whole", out, chosen.steps)
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, twin.state_dict()[name])
        assert twin.head.weight is twin.embedding.weight
        assert result.history[-1]["step"] == chosen.steps


@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.1, attn_pdrop=0.1)
        ),
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=11,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=1,
                num_attention_heads=2,
                attention_dropout=0.1,
            )
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_hugging_face_models_resume_exactly(build, tmp_path, counted_data, options, quiet_train):
    chosen = options(steps=6, save_every=3, warmup_steps=1)
    torch.manual_seed(0)
    model = build()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    quiet_train(model, counted_data(), chosen, out=tmp_path / "whole")
    twin = build()
    twin.load_state_dict(start)
    with pytest.raises(Stop):
        quiet_train(twin, stopping_after(counted_data(), 4), chosen, out=tmp_path / "resumed")
    quiet_train(build(), counted_data(), chosen, out=tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", chosen.steps)


@pytest.fixture
def interruptible():
    """Shells start what runs in their background with SIGINT ignored; training leaves an ignored signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_save_at_the_step_boundary(number, error, tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = options()
    quiet_train(tiny_model(), counted_data(), chosen, out=tmp_path / "whole")

    class Interrupting(counted_data):
        def batch(self, index):
            if index == 4:
                signal.raise_signal(number)
            return super().batch(index)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(error) as caught:
        quiet_train(tiny_model(), Interrupting(), chosen, out=tmp_path / "stopped")
    if number == signal.SIGTERM:
        assert caught.value.code == 143
    else:
        assert "step" in str(caught.value)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    saved = sorted((tmp_path / "stopped" / "checkpoints").iterdir())
    assert [path.name for path in saved] in (["step-00000005"], ["step-00000006"])
    quiet_train(tiny_model(), counted_data(), chosen, out=tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", chosen.steps)


def test_time_budget_stops_cleanly_and_can_be_resumed(tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(), out=tmp_path / "whole")
    result = quiet_train(tiny_model(), counted_data(), options(max_seconds=1e-9), out=tmp_path / "short")
    assert (result.stopped, result.step) == ("time", 1)
    assert result.checkpoint.name == "step-00000001"
    result = quiet_train(tiny_model(), counted_data(), options(), out=tmp_path / "short", resume=True)
    assert (result.stopped, result.step) == ("finished", 12)
    assert_same_run(tmp_path / "whole", tmp_path / "short", 12)


def test_a_finished_run_resumes_to_itself(tmp_path, tiny_model, counted_data, options, quiet_train):
    first = quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    data, model = counted_data(), tiny_model(seed=3)
    again = quiet_train(model, data, options(), out=tmp_path, resume=True)
    assert data.asked == []
    assert again.history == first.history
    assert (again.step, again.loss, again.tokens, again.checkpoint) == (12, first.loss, first.tokens, first.checkpoint)
    assert torch.equal(model.hidden.weight, load_file(again.checkpoint / "model.safetensors")["hidden.weight"])


def test_a_constant_schedule_can_be_prolonged(tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = {"schedule": "constant", "save_every": 4}
    quiet_train(tiny_model(), counted_data(), options(steps=16, **chosen), out=tmp_path / "whole")
    quiet_train(tiny_model(), counted_data(), options(steps=8, **chosen), out=tmp_path / "longer")
    quiet_train(tiny_model(), counted_data(), options(steps=16, **chosen), out=tmp_path / "longer", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "longer", 16)


def test_task_and_text_adapters_ask_for_the_batch_by_number():
    class Task:
        def batch(self, batch_size, *, seed, index, split="train", length=None):
            return Batch((batch_size, seed, index, split, length), None)

        def windows(self, split, length, batch_size, *, seed, index):
            return Batch((batch_size, seed, index, split, length), None)

    for data in (from_task(Task(), 4, 7, length=9), from_text(Task(), 9, 4, 7)):
        assert data.batch(3).inputs == (4, 7, 3, "train", 9)
    assert from_task(Task(), 4, 7, split="valid").batch(0).inputs == (4, 7, 0, "valid", None)
