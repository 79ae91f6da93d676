"""Recipes with new parameters: LoLCATs and Hedgehog on decoders and encoders, transfer, saving and generating."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from subquad import convert
from subquad.convert.recipes import RECIPES
from subquad.convert.stages import HiddenStates, LayerTransfer, TrainedPart, add_adapters, core_parameters
from subquad.training.data import Batch
from tests.convert.cases import ENCODERS, output_of, source, tokens


def transfer(model, loss, steps=12, rate=3e-2):
    """A few steps of Adam on the cores; the losses."""
    part = TrainedPart(core_parameters(model))
    optimizer, objective, losses = torch.optim.Adam(part.parameters(), rate), LayerTransfer(model, loss), []
    for step in range(steps):
        ids = tokens(4, 23, seed=step)
        value, _ = objective(part, Batch(ids, ids))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    ("name", "recipe", "options"),
    [
        ("llama", "lolcats", {"window": 5}),
        ("gpt2", "lolcats", {"window": 4, "form": "terraced"}),
        ("qwen3", "lolcats", {"window": 5, "share_kv_maps": True, "feature_dim": 8}),
        ("gemma", "hedgehog", {}),
        ("gpt_neox", "linear", {}),
    ],
)
def test_new_parameters_are_saved_and_caches_change_nothing(name, recipe, options, tmp_path):
    model = convert.swap(source(name), recipe, layers=[0, 2], **options)
    with torch.no_grad():
        for _, parameter in core_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    assert torch.equal(output_of(loaded, input_ids=ids), output_of(model, input_ids=ids))
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[1, :3] = 0
    padded = torch.cat([tokens(1, 26, seed=5), torch.nn.functional.pad(ids[:1], (3, 0))])
    length = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": 2, "do_sample": False}
    both = [loaded.generate(padded, attention_mask=mask, use_cache=use, **length).tolist() for use in (True, False)]
    assert both[0] == both[1]
    assert both[0][1][3:] == loaded.generate(ids[:1], **length)[0].tolist()
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for _, p in core_parameters(low)} <= {torch.float32}
    assert output_of(low, input_ids=ids).dtype == torch.bfloat16


@pytest.mark.parametrize(("recipe", "loss"), [("lolcats", "output"), ("hedgehog", "weights")])
def test_transfer_brings_layers_nearer_to_softmax(recipe, loss):
    model = convert.swap(source("llama"), recipe, **({"window": 4} if recipe == "lolcats" else {}))
    before = output_of(source("llama"), input_ids=tokens())
    apart = (output_of(model, input_ids=tokens()) - before).square().mean()
    losses = transfer(model, loss)
    assert losses[-1] < losses[0]
    assert (output_of(model, input_ids=tokens()) - before).square().mean() < apart
    with convert.as_source(model):
        assert torch.equal(output_of(model, input_ids=tokens(), use_cache=False), before)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_see_both_ways_and_no_padding(name, tmp_path):
    model = convert.swap(source(name), "hedgehog")
    ids, mask = tokens(2, 17), torch.ones(2, 17, dtype=torch.long)
    mask[1, 11:] = 0
    hidden = output_of(model, input_ids=ids, attention_mask=mask)
    alone = output_of(model, input_ids=ids[1:, :11])
    torch.testing.assert_close(hidden[1:, :11], alone, rtol=0, atol=2e-5)
    changed = output_of(model, input_ids=torch.cat([ids[1:, :10], ids[:1, 10:11]], 1))
    assert not torch.allclose(changed[:, :5], alone[:, :5])
    losses = transfer(model, "weights")
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(output_of(loaded, input_ids=ids), output_of(model, input_ids=ids))


def test_an_encoder_is_adapted_to_the_hidden_states_of_its_source():
    ids = tokens(4, 13)
    wanted = output_of(source("bert"), input_ids=ids)
    model = convert.swap(source("bert"), "hedgehog")
    adapter = add_adapters(model, RECIPES["hedgehog"].adapt, convert.FAMILIES["bert"], seed=0)
    objective, trained = HiddenStates(model, adapter), [p for p in model.parameters() if p.requires_grad]
    first, _ = objective(None, Batch({"input_ids": ids}, torch.zeros(4)))
    torch.testing.assert_close(first, (output_of(model, input_ids=ids) - wanted).square().mean())
    optimizer = torch.optim.Adam(trained, 1e-2)
    for _ in range(8):
        loss, _ = objective(None, Batch({"input_ids": ids}, torch.zeros(4)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < first
    merged = adapter.merge_and_unload()
    assert set(merged.state_dict()) == set(model.state_dict())


def test_the_mimicry_loss_refuses_packed_rows_and_unknown_losses_are_named():
    model = convert.swap(source("llama"), "hedgehog")
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None]
    ids = tokens(1, 18)
    with pytest.raises(ValueError, match="packed"):
        LayerTransfer(model, "weights")(None, Batch({"input_ids": ids, "position_ids": positions}, ids))
    with pytest.raises(ValueError, match="output"):
        LayerTransfer(model, "outputs")
