"""Options: what is refused, with a sentence that says what is needed."""

import dataclasses

import pytest

from subquad.training import TrainingOptions

GOOD = {"steps": 10, "batch_size": 4, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be an integer >= 1; got 0"),
        ({"steps": 10.0}, TypeError, "steps must be an integer >= 1; got 10.0"),
        ({"steps": True}, TypeError, "steps must be an integer"),
        ({"batch_size": -2}, ValueError, "batch_size must be an integer >= 1"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"save_every": 0}, ValueError, "save_every must be an integer >= 1 or None; got 0"),
        ({"eval_every": "2"}, TypeError, "eval_every"),
        ({"keep": 0}, ValueError, "keep"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be a number > 0; got 0"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be a number > 0; got nan"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a number >= 0"),
        ({"clip": 0.0}, ValueError, "clip must be a number > 0 or None"),
        ({"max_seconds": -1}, ValueError, "max_seconds"),
        ({"betas": 0.9}, TypeError, "betas must be two numbers; got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\); got 1.0"),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of .* got 'cosin'; did you mean 'cosine'"),
        ({"precision": "bf61"}, ValueError, "did you mean 'bf16'"),
        ({"device": "gpu"}, ValueError, "device must be one of 'auto', 'cpu'"),
        ({"warmup_steps": 10}, ValueError, "warmup_steps must be less than steps = 10; got 10"),
        ({"schedule": "one_cycle"}, ValueError, "'one_cycle' rises for warmup_steps"),
        ({"final_learning_rate": 0.2}, ValueError, "final_learning_rate must be at most learning_rate"),
        ({"final_learning_rate": 0.01, "schedule": "constant"}, ValueError, "belongs to schedule 'cosine'"),
        ({"tensorboard": "yes"}, TypeError, "tensorboard must be True or False"),
        ({"find_unused_parameters": 1}, TypeError, "find_unused_parameters"),
    ],
)
def test_bad_options_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        TrainingOptions(**(GOOD | change))


def test_options_are_frozen_and_lists_become_tuples():
    options = TrainingOptions(**GOOD, betas=[0.8, 0.9])
    assert options.betas == (0.8, 0.9)
    assert hash(options) == hash(TrainingOptions(**GOOD, betas=(0.8, 0.9)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.steps = 3


def test_fp16_needs_a_gpu(tiny_model, counted_data, options, quiet_train):
    with pytest.raises(ValueError, match="'fp16' needs a GPU"):
        quiet_train(tiny_model(), counted_data(), options(precision="fp16", device="cpu"))
