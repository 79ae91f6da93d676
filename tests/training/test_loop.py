"""What one step computes, what a run leaves behind, and what the loop says to data and models that do not fit."""

import io
import random
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from subquad.training import Batch, next_token, train


class Split:
    """The rows of ``data``'s batches, ``parts`` batches for each of its own."""

    def __init__(self, data, parts):
        self.data, self.parts = data, parts

    def batch(self, index):
        batch = self.data.batch(index // self.parts)
        return Batch(*(tensor.chunk(self.parts)[index % self.parts] for tensor in batch))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_batches_are_one_large_batch(parts, tiny_model, counted_data, options, quiet_train):
    """Also where the parts have different numbers of targets: the loss is the mean over all targets of the step.

    float64 weights, so that the order of summation shows at the 1e-16 level, times the amplification of 12 AdamW steps:
    an error e in a gradient moves a weight by at most rate * e / (|gradient| + eps) per step.
    """
    whole, split = (tiny_model(dropout=0.0, dtype=torch.float64) for _ in range(2))
    result = quiet_train(whole, counted_data(), options())
    again = quiet_train(split, Split(counted_data(), parts), options(batch_size=4 // parts, accumulate=parts))
    for one, other in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert [r["loss"] for r in result.history] == pytest.approx([r["loss"] for r in again.history], rel=1e-6)
    assert result.tokens == again.tokens == 12 * 4 * 6


def test_first_step_is_adamw_on_the_mean_loss(tiny_model, counted_data, options, quiet_train):
    model, twin = tiny_model(dropout=0.0), tiny_model(dropout=0.0)
    result = quiet_train(model, counted_data(), options(steps=1, warmup_steps=0, weight_decay=0.0, clip=None))
    inputs, labels = counted_data().batch(0)
    loss = nn.functional.cross_entropy(twin(inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
    optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    record = result.history[0]
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["gradient_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_clipping_bounds_the_gradient(tiny_model, counted_data, options, quiet_train):
    """Plain gradient descent moves the weights by rate * norm: the clipped norm, while the record has the true one."""
    model = tiny_model(dropout=0.0, dtype=torch.float64)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = quiet_train(
        model,
        counted_data(),
        options(steps=1, warmup_steps=0, clip=0.01),
        optimizer=lambda model, options: torch.optim.SGD(model.named_parameters(), lr=1.0),
    )
    moved = torch.stack([(p - b).square().sum() for p, b in zip(model.parameters(), before)]).sum().sqrt()
    # torch divides by norm + 1e-6
    norm = result.history[0]["gradient_norm"]
    assert moved.item() == pytest.approx(0.01 * norm / (norm + 1e-6), rel=1e-6)
    assert norm > 0.1


def test_a_tiny_model_learns(tiny_model, counted_data, options, quiet_train):
    result = quiet_train(tiny_model(width=16, dropout=0.0), counted_data(), options(steps=150))
    assert result.history[0]["loss"] > 2
    assert result.loss < 0.1


def test_the_caller_gets_its_world_back(tiny_model, counted_data, options, quiet_train):
    """Random state, the model's mode and forward, and an Accelerator of another precision."""
    outer = Accelerator(cpu=True, mixed_precision="no")
    random.seed(1)
    numpy.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    expected = random.random(), numpy.random.rand(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1)
    numpy.random.seed(2)  # noqa: NPY002
    model = tiny_model().eval()
    torch.manual_seed(3)
    quiet_train(model, counted_data(), options(precision="bf16"))
    assert (random.random(), numpy.random.rand(), float(torch.rand(()))) == expected  # noqa: NPY002
    assert not model.training
    assert "forward" not in vars(model)
    assert model(torch.zeros(1, 1, dtype=torch.int64)).logits.dtype == torch.float32
    assert outer.mixed_precision == "no"
    assert outer.num_processes == 1


def test_frozen_parameters_stay(tiny_model, counted_data, options, quiet_train):
    model = tiny_model()
    model.hidden.requires_grad_(False)
    before, norm = model.hidden.weight.clone(), model.norm.weight.clone()
    quiet_train(model, counted_data(), options())
    assert torch.equal(model.hidden.weight, before)
    assert not torch.equal(model.norm.weight, norm)


def test_objectives_of_ones_own_with_metrics(tiny_model, options, quiet_train):
    """Real labels count as rows; metrics are averaged like the loss."""

    class Regression:
        def batch(self, index):
            x = torch.full((2, 3), float(index))
            return Batch({"x": x, "rows": [torch.arange(2)]}, 2 * x[:, 0])

    def squared_error(model, batch):
        prediction = model(batch.inputs["x"])[:, 0]
        error = prediction - batch.labels
        return error.square().mean(), {"bias": error.mean(), "index": batch.labels.mean() / 2, "rows": 2}

    result = quiet_train(
        nn.Linear(3, 1),
        Regression(),
        options(batch_size=2, accumulate=2, steps=4, warmup_steps=0),
        objective=squared_error,
    )
    assert [record["index"] for record in result.history] == [0.5, 2.5, 4.5, 6.5]
    assert {record["rows"] for record in result.history} == {2}
    assert "bias" in result.history[0]
    assert result.tokens == 4 * 2 * 2


def test_next_token_uses_the_models_own_loss_where_it_has_one():
    model = SimpleNamespace(loss_from_labels=lambda inputs, labels: inputs.sum() - labels.sum())
    loss, metrics = next_token(model, Batch(torch.tensor([5.0]), torch.tensor([3])))
    assert (float(loss), metrics) == (2.0, {})


def test_next_token_ignores_labels_and_survives_none(tiny_model, counted_data):
    model, (inputs, labels) = tiny_model().eval(), counted_data().batch(3)
    assert (labels == -100).any()
    log_p = model(inputs).logits.log_softmax(-1)
    terms = [-log_p[b, t, labels[b, t]] for b in range(4) for t in range(6) if labels[b, t] != -100]
    torch.testing.assert_close(next_token(model, Batch(inputs, labels))[0], torch.stack(terms).mean())
    nothing, _ = next_token(model, Batch(inputs, torch.full_like(labels, -100)))
    assert nothing == 0
    nothing.backward()
    assert torch.equal(model.hidden.weight.grad, torch.zeros(8, 8))


def test_evaluations_are_recorded_when_due_and_at_the_end(tiny_model, counted_data, options, quiet_train):
    calls = []

    def evaluate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        calls.append(len(calls))
        return {"calls": len(calls)}

    result = quiet_train(tiny_model(), counted_data(), options(eval_every=5, log_every=4), evaluate=evaluate)
    assert [record["step"] for record in result.history] == [4, 5, 8, 10, 12]
    assert [record.get("evaluation/calls") for record in result.history] == [None, 1, None, 2, 3]
    assert result.checkpoint is None


def test_progress_is_some_lines_where_there_is_no_terminal(tiny_model, counted_data, options):
    console = Console(file=io.StringIO(), width=40)
    train(tiny_model(), counted_data(), options(steps=40), out=None, console=console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("step 2/40  loss ")
    assert "tokens/s" in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_progress_is_a_bar_on_a_terminal(tiny_model, counted_data, options):
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    train(tiny_model(), counted_data(), options(), out=None, console=console)
    text = console.file.getvalue()
    assert "12/12" in text
    assert "tokens/s" in text


class Returning:
    def __init__(self, value):
        self.value = value

    def batch(self, index):
        return self.value


TOKENS = torch.zeros(4, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((TOKENS, TOKENS), TypeError, r"data.batch\(0\) must return an object with inputs and labels; got tuple"),
        (Batch(TOKENS, [1, 2]), TypeError, "the labels of data.batch.0. must be a tensor; got list"),
        (Batch(TOKENS[:2], TOKENS[:2]), ValueError, r"must have batch_size = 4 rows; its labels have shape \(2, 6\)"),
        (Batch(TOKENS[:2], TOKENS), ValueError, r"must have the same rows; got \(2, 6\) and \(4, 6\)"),
        (Batch(TOKENS, TOKENS[:, :5]), ValueError, r"logits must be .* \(4, 5\); they are \(4, 6, 11\)"),
        (Batch(TOKENS, TOKENS - 100), ValueError, "step 1 has nothing to learn"),
    ],
)
def test_batches_that_do_not_fit(value, error, message, tiny_model, options, quiet_train):
    with pytest.raises(error, match=message):
        quiet_train(tiny_model(), Returning(value), options())


def test_arguments_of_the_wrong_kind(tiny_model, counted_data, options, quiet_train):
    with pytest.raises(TypeError, match="model must be a torch module; got function"):
        quiet_train(tiny_model, counted_data(), options())
    with pytest.raises(TypeError, match="options must be TrainingOptions; got dict"):
        quiet_train(tiny_model(), counted_data(), {"steps": 3})
    with pytest.raises(TypeError, match=r"data must have a method batch\(index\); got list"):
        quiet_train(tiny_model(), [], options())
    with pytest.raises(TypeError, match=r"must return \(loss, metrics\); got Tensor"):
        quiet_train(tiny_model(), counted_data(), options(), objective=lambda m, b: m(b.inputs).logits.sum())
    with pytest.raises(ValueError, match=r"must be a scalar, .* its shape is \(4, 6, 11\)"):
        quiet_train(tiny_model(), counted_data(), options(), objective=lambda m, b: (m(b.inputs).logits, {}))
    with pytest.raises(TypeError, match="evaluate must return a dictionary of numbers; got float"):
        quiet_train(tiny_model(), counted_data(), options(), evaluate=lambda model: 1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_gpu_run_learns_and_resumes(precision, tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = {"precision": precision, "schedule": "constant", "learning_rate": 0.01}
    model = tiny_model(width=16, dropout=0.0)
    quiet_train(model, counted_data(), options(steps=100, **chosen), out=tmp_path)
    assert model.hidden.weight.is_cuda
    twin = tiny_model(width=16, dropout=0.0, seed=1)
    result = quiet_train(twin, counted_data(), options(steps=200, **chosen), out=tmp_path, resume=True)
    assert [record["step"] for record in result.history] == list(range(1, 201))
    assert result.loss < 0.3
