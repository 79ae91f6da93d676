"""Every family: sites are found, conversion by the identity changes nothing, and what is saved is what is loaded."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from subquad import convert
from subquad.models.cache import StateLayer
from tests.convert.cases import CAUSAL, NAMES, output_of, source, tokens

LIGER = {"window": 5}


def left_padded(ids, pad=4):
    """The same rows, the second of them padded in front, and their mask."""
    mask = torch.ones(2, ids.shape[1] + pad, dtype=torch.long)
    mask[1, :pad] = 0
    longer = tokens(1, ids.shape[1] + pad, seed=5)
    return torch.cat([longer, torch.nn.functional.pad(ids[:1], (pad, 0))]), mask


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_the_attention_layers_with_their_widths(name):
    model = source(name)
    sites = convert.find_sites(model)
    assert [site.layer for site in sites] == [0, 1, 2]
    site, config = sites[1], model.config
    assert site.num_heads == 4
    assert site.num_key_value_heads == (getattr(config, "num_key_value_heads", None) or 4)
    assert site.head_dim == (getattr(config, "head_dim", None) or 8)
    assert site.scale == pytest.approx(site.head_dim**-0.5)
    assert site.sliding_window == (9 if name == "mistral" else None)


@pytest.mark.parametrize("name", CAUSAL)
def test_softmax_in_the_place_of_softmax_leaves_logits_as_they_were(name):
    ids = tokens()
    padded, mask = left_padded(ids)
    model = source(name)
    before, before_padded = output_of(model, input_ids=ids), output_of(model, input_ids=padded, attention_mask=mask)
    # the regression test of every family: the window branch alone, wide enough to see all
    liger = convert.swap(source(name), "liger", mix=(0, 1), window=64)
    convert.swap(model, "identity")
    for converted in (model, liger):
        torch.testing.assert_close(output_of(converted, input_ids=ids), before, rtol=0, atol=2e-5)
        after = output_of(converted, input_ids=padded, attention_mask=mask)
        torch.testing.assert_close(after[mask.bool()], before_padded[mask.bool()], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_saved_is_what_is_loaded_and_a_cache_changes_nothing(name, tmp_path):
    model = convert.swap(source(name), "liger", layers=[0, 2], **LIGER)
    assert set(model.state_dict()) == set(source(name).state_dict())  # nothing is added
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.subquad == model.config.subquad
    ids = tokens()
    assert torch.equal(output_of(loaded, input_ids=ids), output_of(model, input_ids=ids))
    padded, mask = left_padded(ids, pad=3)
    length = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    for beams in (1, 2):
        with_cache, without = (
            loaded.generate(padded, attention_mask=mask, num_beams=beams, use_cache=use, **length)
            for use in (True, False)
        )
        assert with_cache.tolist() == without.tolist()
    alone = loaded.generate(ids[:1], num_beams=2, **length)
    assert with_cache[1, 3:].tolist() == alone[0].tolist()


def test_the_state_goes_into_the_cache_and_kept_layers_keep_theirs():
    model = convert.swap(source("llama"), "liger", layers=[0, 2], **LIGER)
    whole = output_of(model, input_ids=tokens())
    given = DynamicCache(config=model.config)
    first = output_of(model, input_ids=tokens()[:, :9], cache=given, use_cache=True)
    rest = [output_of(model, input_ids=t[:, None], cache=given, use_cache=True) for t in tokens()[:, 9:].unbind(1)]
    torch.testing.assert_close(torch.cat([first, *rest], 1), whole, rtol=0, atol=2e-5)
    assert [isinstance(layer, StateLayer) for layer in given.layers] == [True, False, True]
    assert given.get_seq_length() == 23
    assert given.layers[0].state.window.keys.shape[1] == 4
    used = DynamicCache(config=source("llama").config)
    source("llama")(input_ids=tokens(), cache=used, use_cache=True)
    with pytest.raises(TypeError, match="already in use"):
        model(input_ids=tokens()[:, :1], cache=used, use_cache=True)
    with pytest.raises(ValueError, match="does not apply"):
        model.generate(tokens(), max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_sequences_equal_separate_ones(name):
    model = convert.swap(source(name), "liger", layers=[0, 1], **LIGER)
    a, b = tokens(1, 11), tokens(1, 7, seed=1)
    positions = torch.cat([torch.arange(11), torch.arange(7)])[None]
    packed = output_of(model, input_ids=torch.cat([a, b], 1), position_ids=positions, use_cache=False)
    separate = torch.cat([output_of(model, input_ids=x) for x in (a, b)], 1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=2e-5)


def test_layers_that_are_not_named_stay_bitwise():
    kept = {}
    for name, model in (("before", source("qwen3")), ("after", convert.swap(source("qwen3"), "liger", layers=[2]))):
        hidden = model(input_ids=tokens(), output_hidden_states=True).hidden_states
        kept[name] = hidden[:3]  # what enters layers 0, 1 and 2
    assert all(map(torch.equal, kept["before"], kept["after"]))


def test_tools_that_never_import_subquad_find_the_line_that_does(tmp_path):
    convert.swap(source("llama"), "liger").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "subquad_llama"
    assert config["subquad"]["recipe"] == "liger"
    module, name = config["auto_map"]["AutoModelForCausalLM"].split(".")
    assert f"import SubquadLlamaConfig, SubquadLlamaModel, {name}" in (tmp_path / f"{module}.py").read_text()
    assert AutoConfig.from_pretrained(tmp_path).subquad["options"]["window"] == 64
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "SubquadLlamaModel"


def test_bfloat16_and_a_copy_work_as_the_original():
    import copy

    model = convert.swap(source("llama"), "liger", **LIGER).to(torch.bfloat16)
    ids = tokens()
    logits = output_of(model, input_ids=ids)
    assert logits.dtype == torch.bfloat16
    assert torch.equal(output_of(copy.deepcopy(model), input_ids=ids), logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert.swap(source("llama"), "ligr"), "liger"),
        (lambda: convert.swap(source("llama"), "liger", widnow=3), "window"),
        (lambda: convert.swap(source("llama"), "liger", layers=[3]), "0 to 2"),
        (lambda: convert.swap(source("llama"), "liger", layers="every:1"), "every:n"),
        (lambda: convert.swap(source("llama"), "liger", window=0), "window must be an integer >= 1"),
        (lambda: convert.swap(source("bert"), "liger"), "for causal language models"),
        (lambda: convert.swap(convert.swap(source("llama"), "liger"), "liger"), "converted already"),
        (lambda: convert.swap(torch.nn.Linear(2, 2), "liger"), "families: llama"),
    ],
)
def test_what_cannot_be_converted_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_alibi_is_named():
    from transformers import BloomConfig, BloomForCausalLM

    with pytest.raises(ValueError, match="ALiBi"):
        convert.swap(BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)), "liger")
