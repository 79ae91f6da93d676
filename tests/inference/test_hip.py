"""HiP as the attention of transformers models: exact where all keys fit, and the op's choice where they do not."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache

from subquad.inference import hip_attention as room
from subquad.inference.hip_attention import HipCacheLayer, hip

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "mistral": (MistralForCausalLM, MistralConfig),
}
SPARSE = {"budget": 16, "window": 16, "block_q": 8, "sinks": 4, "dense_layers": (0,)}
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def build(family="llama", **changes):
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(**{**SMALL, **({"sliding_window": None} if family == "mistral" else {}), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def prompt(batch=2, time=90):
    """Ids without the padding token, the second row padded on the left by 20."""
    ids = torch.randint(1, 50, (batch, time), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :20] = 0
    return ids * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_model_s_own_attention_where_all_keys_fit(family):
    model, (ids, mask) = build(family), prompt()
    logits = model(ids, attention_mask=mask).logits
    generated = model.generate(ids, attention_mask=mask, **GREEDY)
    with hip(model, budget=64, window=64, dense_layers=()):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
        assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), generated)
    with hip(model, **{**SPARSE, "dense_layers": (0, 1, -1)}):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
    assert torch.equal(model(ids, attention_mask=mask).logits, logits)


@pytest.mark.parametrize("shared", [False, True])
def test_every_backend_reads_the_same_keys(shared):
    model, (ids, mask) = build(), prompt()
    dense = model(ids, attention_mask=mask).logits[mask.bool()]
    results = []
    for backend in ("cpu", "reference"):
        with hip(model, **SPARSE, shared=shared, backend=backend):
            results.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0], dense, atol=1e-2)


def test_rows_pieces_and_steps_are_what_they_are_alone():
    """A left-padded row, a prompt read in pieces, and tokens generated one by one with a search at each."""
    model, (ids, mask) = build(), prompt()
    with hip(model, **SPARSE, refresh=1):
        whole = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, 20:]).logits
        torch.testing.assert_close(whole[1:, 20:], alone, rtol=1e-4, atol=1e-4)
        cache = Cache(layer_class_to_replicate=HipCacheLayer)
        pieces = [model(ids[:1, a : a + 24], cache=cache).logits for a in range(0, 90, 24)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole[:1], rtol=1e-4, atol=1e-4)
        both = model.generate(ids, attention_mask=mask, **GREEDY)
        assert torch.equal(both[1:, 90:], model.generate(ids[1:, 20:], **GREEDY)[:, 70:])
        assert torch.equal(model.generate(ids[:1], num_beams=1, **GREEDY), both[:1])
        assert model.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).shape == (2, 100)


def test_a_choice_serves_so_many_steps(monkeypatch):
    model, (ids, _) = build(), prompt(1)
    searched = []
    original = room.hip_mask
    monkeypatch.setattr(room, "hip_mask", lambda q, *a, **k: searched.append(q.shape[1]) or original(q, *a, **k))
    for refresh, searches in ((1, 9), (4, 3)):
        with hip(model, **SPARSE, refresh=refresh):
            searched.clear()
            model.generate(ids, **GREEDY)  # one token comes from the prompt, nine from steps; two sparse layers
        assert searched == [90, 90] + [1] * 2 * searches


def test_a_cache_that_moves_forgets_its_choice():
    model, (ids, _) = build(), prompt(1)
    with hip(model, **SPARSE):
        cache = Cache(layer_class_to_replicate=HipCacheLayer)
        model(ids, cache=cache)
        for move in (
            lambda layer: layer.crop(-1),
            lambda layer: layer.reorder_cache(torch.tensor([0])),
            lambda layer: layer.batch_repeat_interleave(1),
            lambda layer: layer.batch_select_indices(torch.tensor([0])),
        ):
            model(torch.tensor([[7]]), cache=cache)
            assert cache.layers[1].choice is not None
            move(cache.layers[1])
            assert cache.layers[1].choice is None
            cache.layers[1].choice = None


def test_recall_is_measured_per_layer():
    model, (ids, mask) = build(), prompt()
    with hip(model, **SPARSE) as handle:
        first, *others = handle.recall(ids, mask)
        assert first is None
        assert all(0.2 < share < 1 for share in others)
        wider = hip_recall(model, handle, ids, mask)
    assert all(a > b for a, b in zip(wider, others))


def hip_recall(model, handle, ids, mask):
    handle.undo()
    with hip(model, **{**SPARSE, "budget": 48}) as wider:
        return wider.recall(ids, mask)[1:]


def test_gradients_flow():
    model, (ids, _) = build(), prompt()
    with hip(model, **SPARSE):
        model.train()
        model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_undo_leaves_nothing_and_touches_no_other_model(tmp_path):
    model, (ids, mask) = build(), prompt()
    other, before = copy.deepcopy(model), set(vars(model))
    handle = hip(model, **SPARSE)
    assert torch.equal(other(ids).logits, build()(ids).logits)
    model.save_pretrained(tmp_path)
    handle.undo()
    handle.undo()
    assert set(vars(model)) == before
    assert model.config._attn_implementation == other.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with hip(loaded) as again:
        assert again.options.budget == 16
        assert again.options.dense_layers == (0,)
        sparse = loaded(ids, attention_mask=mask).logits
    with hip(model, **SPARSE):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, sparse)


def test_layers_with_a_window_of_their_own_keep_it():
    model, (ids, mask) = build("mistral", sliding_window=24), prompt()
    logits = model(ids, attention_mask=mask).logits
    with hip(model, **SPARSE):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buget": 3}, "unknown options"),
        ({"dense_layers": (3,)}, "layers of the model's 3"),
        ({"refresh": 0}, "refresh must be"),
        ({"window": 8}, "window must be at least block_q 32"),
        ({"budget": 3}, "multiple of block_k"),
        ({"sinks": -1}, "sinks"),
        ({"representative": "middle"}, "representative"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        hip(build(), **options)


def test_models_that_cannot_are_refused():
    small = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="no layers of causal softmax attention"):
        hip(MambaForCausalLM(small))
    with pytest.raises(TypeError, match="transformers model"):
        hip(torch.nn.Linear(1, 1))
    model, (ids, _) = build(), prompt()
    with hip(model, **SPARSE), pytest.raises(ValueError, match="undo what was applied"):
        hip(model)
    model.set_attn_implementation("subquad_hip")
    with pytest.raises(ValueError, match=r"subquad.inference.hip\(model\)"):
        model(ids)
