"""The language model as a transformers model: saving, loading, losses, packing, Trainer, peft, classification."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from subquad import SubquadConfig, SubquadForCausalLM, SubquadForMaskedLM, SubquadForSequenceClassification
from subquad.layers.chunked_loss import linear_cross_entropy
from subquad.models import language
from subquad.models.presets import PRESETS
from tests.models.cases import NAMES, config, model, prompt

names = pytest.mark.parametrize("name", NAMES)
FULL = ["linear", "norm_attention", "diag_attention", "softmax", "inline"]


@names
def test_saved_and_loaded_gives_equal_logits(name, tmp_path):
    lm, ids = model(name), prompt()
    lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SubquadForCausalLM
    assert torch.equal(loaded.eval()(ids).logits, lm(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).mixers == lm.config.mixers
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize(
    "order", ["import subquad, transformers", "import transformers, subquad", "import transformers"]
)
def test_loads_in_either_import_order_and_without_ours(order, tmp_path):
    model("gla").save_pretrained(tmp_path)
    code = f"""{order}
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
print(type(model).__name__, type(model).__module__)"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**_environment(), **environment}
    )
    assert "SubquadForCausalLM subquad.models.language" in done.stdout, done.stderr[-2000:]


def _environment():
    import os

    return dict(os.environ)


def test_importing_is_light():
    code = "import sys, subquad; print([m for m in ('transformers', 'numba', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@names
def test_packed_rows_stay_apart(name):
    lm, first, second = model(name), prompt(9), prompt(6, seed=1)
    packed = torch.cat([first, second], 1)
    places = torch.cat([torch.arange(9), torch.arange(6)])[None]
    by_positions = lm(packed, position_ids=places).logits
    by_offsets = lm(packed, cu_seq_lens_q=torch.tensor([0, 9, 15], dtype=torch.int32)).logits
    separate = torch.cat([lm(first).logits, lm(second).logits], 1)
    torch.testing.assert_close(by_positions, separate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_offsets, separate, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["none", "sinusoidal", "learned", "rope"])
def test_positions_count_real_tokens(positions):
    lm, short = model("softmax", positions=positions), prompt(7)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1)
    mask = (padded != 0).long()
    torch.testing.assert_close(lm(padded, attention_mask=mask).logits[:, 4:], lm(short).logits, rtol=1e-4, atol=1e-4)
    stepped = lm(padded[:, :8], attention_mask=mask[:, :8], use_cache=True)
    rest = lm(padded[:, 8:], attention_mask=mask, cache=stepped.cache)
    torch.testing.assert_close(rest.logits, lm(short).logits[:, 4:], rtol=1e-4, atol=1e-4)


def test_hybrids_by_pattern_list_and_place():
    lm = model("gla", mixers="gla*2+softmax", num_hidden_layers=4)
    assert [type(m).__name__ for m in lm.model.mixers()] == [
        "GatedLinearAttention",
        "GatedLinearAttention",
        "SoftmaxAttention",
        "GatedLinearAttention",
    ]
    ids = prompt()
    greedy = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(lm.generate(ids, **greedy), lm.generate(ids, use_cache=False, **greedy))


@names
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointed in (False, True):
        lm = model(name).train()
        if checkpointed:
            lm.gradient_checkpointing_enable()
        lm(prompt(), labels=prompt()).loss.backward()
        gradients.append({n: p.grad for n, p in lm.named_parameters()})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][n], gradient, rtol=1e-4, atol=1e-6)


def test_loss_is_cross_entropy_of_the_next_token(monkeypatch):
    lm, ids = model("gla").train(), prompt(20)
    labels = ids.clone()
    labels[0, :5] = -100
    out = lm(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(out.loss, expected)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(lm.loss_from_labels(ids, shifted), expected)
    halved = lm(ids, labels=labels, num_items_in_batch=2 * 15).loss
    torch.testing.assert_close(2 * halved, expected)
    monkeypatch.setattr("subquad.layers.chunked_loss.CHUNK_ELEMENTS", 150)
    monkeypatch.setattr(language, "CHUNK_ELEMENTS", 150)
    chunked = lm(ids, labels=labels)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunked_loss_equals_whole_in_value_and_gradient(reduction, monkeypatch):
    hidden, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, :3] = -100
    expected = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction=reduction
    )
    monkeypatch.setattr("subquad.layers.chunked_loss.CHUNK_ELEMENTS", 44)
    actual = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(actual.flatten(), expected.flatten())
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (actual, expected))):
        torch.testing.assert_close(a, b)


def test_logits_to_keep():
    lm, ids = model("gla"), prompt()
    torch.testing.assert_close(lm(ids, logits_to_keep=2).logits, lm(ids).logits[:, -2:])
    assert lm(ids, skip_logits=True).logits is None


@names
def test_trainer_overfits_twenty_lines_packed(name, tmp_path):
    """Twenty lines of twelve tokens, each begun by its own token: below 0.1 nats a token, rows packed into one."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randint(21, 50, (20, 12), generator=generator)
    lines[:, 0] = torch.arange(1, 21)
    rows = [{"input_ids": line.tolist()} for line in lines]
    lm = model(name, initializer_range=0.02, hidden_size=64).train()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=150,
        per_device_train_batch_size=10,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        remove_unused_columns=False,
    )
    Trainer(lm, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening()).train()
    lm.eval()
    with torch.no_grad():
        assert lm(lines, labels=lines).loss < 0.1


@pytest.mark.parametrize("name", ["gla", "gated_delta_net"])
def test_lora_trains_and_merges(name):
    from peft import LoraConfig, get_peft_model

    lm, ids = model(name), prompt()
    before = lm(ids).logits
    adapted = get_peft_model(lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = adapted.eval()(input_ids=ids).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(trained, before)


@pytest.mark.parametrize("name", FULL)
def test_masked_language_model(name, tmp_path):
    lm = SubquadForMaskedLM(config(name, causal=False)).eval()
    ids = prompt()
    out = lm(ids, labels=ids)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[0], ids[0]))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.int64)], 1)
    masked = lm(padded, attention_mask=(padded != 0).long()).logits
    torch.testing.assert_close(masked[:, :13], out.logits, rtol=1e-4, atol=1e-4)
    lm.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(ids).logits, out.logits)
    with pytest.raises(ValueError, match="causal=False"):
        SubquadForMaskedLM(config(name))
    with pytest.raises(ValueError, match="SubquadForMaskedLM"):
        SubquadForCausalLM(config(name, causal=False))


@pytest.mark.parametrize("causal", [True, False])
def test_classifier_reads_real_tokens_only(causal, tmp_path):
    classifier = SubquadForSequenceClassification(config("linear", causal=causal, num_labels=3)).eval()
    short = prompt(7)
    for padded in (
        torch.cat([torch.zeros(1, 4, dtype=torch.int64), short], 1),
        torch.cat([short, torch.zeros(1, 4, dtype=torch.int64)], 1),
    ):
        logits = classifier(padded, attention_mask=(padded != 0).long()).logits
        torch.testing.assert_close(logits, classifier(short).logits, rtol=1e-4, atol=1e-4)
    assert classifier(short, labels=torch.tensor([2])).loss > 0
    classifier.save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 3
    assert AutoModel.from_pretrained(tmp_path)(short).last_hidden_state.shape == (1, 7, 32)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_small_and_count_as_published(preset):
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    lm = SubquadForCausalLM(SubquadConfig.preset(preset, vocab_size=50, **small)).eval()
    assert lm(prompt()).logits.isfinite().all()


def test_transnormer_llm_385m_has_its_papers_parameters():
    with torch.device("meta"):
        lm = SubquadForCausalLM(SubquadConfig.preset("transnormer_llm_385m"))
    expected = 64_000 * 1024 * 2 + 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024
    assert sum(p.numel() for p in lm.parameters()) == expected


def test_hidden_states_and_tuples():
    lm, ids = model("gla"), prompt()
    out = lm(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    torch.testing.assert_close(lm.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(lm(ids, return_dict=False)[0], out.logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": "deltanet"}, "did you mean 'delta_net'"),
        ({"mixers": ["gla"]}, "1 entries for 2 layers"),
        ({"mixers": "gla*x"}, "pattern"),
        ({"mixers": {"head": "gla"}}, "first_half"),
        ({"mixer": "gla"}, "did you mean 'mixers'"),
        ({"positions": "rotary"}, "unknown positions"),
        ({"feedforward": "swigl"}, "did you mean 'swiglu'"),
        ({"norm_place": "before"}, "norm_place"),
        ({"hidden_size": 30}, "multiple of the number of heads"),
        ({"num_hidden_layers": 0}, "at least 1"),
    ],
)
def test_bad_configurations_get_a_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        model("gla", **fields)


def test_bad_calls_get_a_sentence():
    lm = model("gla")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        lm(torch.tensor([[50]]))
    with pytest.raises(ValueError, match="exactly one"):
        lm()
    with pytest.raises(ValueError, match="nothing empty"):
        lm(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_mask must be"):
        lm(prompt(), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="raise max_position_embeddings"):
        model("gla", positions="learned", max_position_embeddings=8)(prompt())
