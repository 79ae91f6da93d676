"""Checkpoints on disk: whole or absent, verified, pruned; and what a full disk or an impossible folder does."""

import json
import resource
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from subquad.training import CheckpointError, read_metrics


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@contextmanager
def files_no_larger_than(size):
    """The file system refuses to grow a file beyond ``size`` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_shared_tensors_are_stored_once(tmp_path, tiny_model, counted_data, options, quiet_train):
    result = quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    stored = load_file(result.checkpoint / "model.safetensors")
    assert len({"embedding.weight", "head.weight"} & stored.keys()) == 1
    assert {"hidden.weight", "hidden.bias", "norm.weight", "norm.bias"} < stored.keys()
    details = json.loads((result.checkpoint / "checkpoint.json").read_text())
    assert details["step"] == 12
    assert details["details"]["next_batch"] == 12
    assert details["details"]["options"]["learning_rate"] == 0.02


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(keep, tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(save_every=2, keep=keep), out=tmp_path)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (8, 10, 12)[-keep:]]


def corrupt_by_one_bit(checkpoint):
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def corrupt_by_truncation(checkpoint):
    path = checkpoint / "state.pt"
    path.write_bytes(path.read_bytes()[:100])


def corrupt_by_deletion(checkpoint):
    (checkpoint / "state.pt").unlink()


def corrupt_the_manifest(checkpoint):
    (checkpoint / "checkpoint.json").write_text("[1, 2")


CORRUPTIONS = [corrupt_by_one_bit, corrupt_by_truncation, corrupt_by_deletion, corrupt_the_manifest]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    corrupt, tmp_path, tiny_model, counted_data, options, quiet_train
):
    model = tiny_model()
    quiet_train(model, counted_data(), options(save_every=5), out=tmp_path)
    corrupt(tmp_path / "checkpoints" / "step-00000012")
    data, twin = counted_data(), tiny_model(seed=1)
    with pytest.warns(UserWarning, match=r"step-00000012 is damaged.*falling back"):
        quiet_train(twin, data, options(save_every=5), out=tmp_path, resume=True)
    assert data.asked[0] == 10
    assert torch.equal(model.hidden.weight, twin.hidden.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the damaged one has been replaced
        quiet_train(tiny_model(), counted_data(), options(save_every=5), out=tmp_path, resume=True)


def test_no_usable_checkpoint_is_an_error(tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(save_every=6), out=tmp_path)
    for step in (6, 12):
        corrupt_by_one_bit(tmp_path / "checkpoints" / f"step-{step:08d}")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match=r"every checkpoint.*step-00000012, step-00000006"),
    ):
        quiet_train(tiny_model(), counted_data(), options(save_every=6), out=tmp_path, resume=True)


def test_leftovers_of_killed_writes_are_cleared(tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    for leftover in (".writing-step-00000099", ".removing-step-00000001"):
        (tmp_path / "checkpoints" / leftover).mkdir()
        (tmp_path / "checkpoints" / leftover / "model.safetensors").write_bytes(b"half")
    result = quiet_train(tiny_model(), counted_data(), options(), out=tmp_path, resume=True)
    assert result.step == 12
    assert names(tmp_path) == ["step-00000012"]


def test_a_full_disk_is_one_sentence_and_leaves_the_last_checkpoint(
    tmp_path, tiny_model, counted_data, options, quiet_train
):
    class FillingUp(counted_data):
        def batch(self, index):
            if index == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
            return super().batch(index)

    model = tiny_model(width=32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint of step 8 could not be written.*File too large.*step-00000004 is"
        ) as e:
            quiet_train(model, FillingUp(), options(save_every=4), out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert e.value.__cause__ is not None
    assert names(tmp_path) == ["step-00000004"]
    twin = tiny_model(width=32, seed=1)
    result = quiet_train(twin, counted_data(), options(save_every=4), out=tmp_path, resume=True)
    again = tiny_model(width=32)
    quiet_train(again, counted_data(), options(save_every=4), out=tmp_path / "whole")
    assert torch.equal(again.hidden.weight, twin.hidden.weight)
    assert [record["step"] for record in result.history] == list(range(1, 13))


def test_a_full_disk_while_recording_keeps_whole_records(tmp_path, tiny_model, counted_data, options, quiet_train):
    chosen = options(steps=40)
    with files_no_larger_than(2000), pytest.raises(OSError, match=r"a record could not be added.*File too large"):
        quiet_train(tiny_model(), counted_data(), chosen, out=tmp_path)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert 5 < len(records) < 40


def test_a_folder_that_cannot_be_made(tmp_path, tiny_model, counted_data, options, quiet_train):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"folder .*file/run cannot be made: Not a directory"):
        quiet_train(tiny_model(), counted_data(), options(), out=tmp_path / "file" / "run")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    with pytest.raises(ValueError, match=r"already holds a run, at step-00000012: pass resume=True"):
        quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    assert len(read_metrics(tmp_path)) == 12


def test_other_options_or_another_model_do_not_continue_a_run(tmp_path, tiny_model, counted_data, options, quiet_train):
    quiet_train(tiny_model(), counted_data(), options(), out=tmp_path)
    with pytest.raises(
        ValueError, match=r"do not continue .*learning_rate is 0.5 and was 0.02; steps is 24 and was 12"
    ):
        quiet_train(tiny_model(), counted_data(), options(learning_rate=0.5, steps=24), out=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="does not fit this TinyModel"):
        quiet_train(tiny_model(width=16), counted_data(), options(), out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="needs out"):
        quiet_train(tiny_model(), counted_data(), options(), out=None, resume=True)
    frozen = tiny_model()
    frozen.hidden.requires_grad_(False)
    with pytest.raises(CheckpointError, match="other parameters"):
        quiet_train(frozen, counted_data(), options(), out=tmp_path, resume=True)


def test_views_of_one_tensor_survive(tmp_path, counted_data, options, quiet_train):
    """Two parameters that are slices of one memory block, as a fused projection makes them."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            block = torch.randn(2, 11, 11)
            self.first, self.second = nn.Parameter(block[0]), nn.Parameter(block[1])

    def objective(model, batch):
        logits = (model.first + model.second)[batch.inputs]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()), {}

    model = Sliced()
    quiet_train(model, counted_data(), options(), out=tmp_path, objective=objective)
    twin = Sliced()
    quiet_train(twin, counted_data(), options(), out=tmp_path, objective=objective, resume=True)
    assert torch.equal(model.first, twin.first)
    assert torch.equal(model.second, twin.second)
