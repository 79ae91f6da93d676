"""Models with sparse feed-forward layers: the same logits and tokens, saved and loaded, one clear refusal."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from subquad.compress.sparse_feedforward import (
    SparseDownProjection,
    SparseGatedFeedForward,
    load_sparse,
    save_sparse,
    sparsify,
)
from subquad.evaluation import sparsity

TOKENS = torch.randint(32, (1, 12), generator=torch.Generator().manual_seed(0))


def llama(activation="relu", **fields):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=2, hidden_act=activation, **{**shape, **fields})
    return LlamaForCausalLM(config).eval()


def opt():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize("build", [llama, opt])
def test_relu_models_are_unchanged(build):
    model = build()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(TOKENS).logits
        tokens = model.generate(TOKENS, max_new_tokens=8, do_sample=False)
    assert len(sparsify(model)) == 2
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=8, do_sample=False), tokens)


def test_thresholds_truncate_as_they_were_measured():
    model = llama("silu")
    windows = [TOKENS]
    thresholds = sparsity.cett_thresholds(model, windows, 0.3)
    measured = sparsity.measure(model, windows, sparsity.truncation(thresholds))
    sparsify(model, thresholds.by_neuron)
    assert sparsity.measure(llama("silu"), windows).dense_loss != measured.loss
    with torch.no_grad():
        logits = model(TOKENS).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, TOKENS[0, 1:])
    assert float(loss) == pytest.approx(measured.loss, abs=1e-5)


@pytest.mark.parametrize("build", [llama, opt])
def test_folders_keep_the_thresholds(build, tmp_path):
    model = build()
    thresholds = sparsity.cett_thresholds(model, [TOKENS], 0.2)
    sparsify(model, thresholds.by_neuron, gate_threshold=0.01 if build is llama else 0.0)
    save_sparse(model, tmp_path)
    again = load_sparse(tmp_path)
    assert any(isinstance(m, SparseGatedFeedForward | SparseDownProjection) for m in again.modules())
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits)
        dense = AutoModelForCausalLM.from_pretrained(tmp_path)  # any other tool
        torch.testing.assert_close(dense(TOKENS).logits, build()(TOKENS).logits)


def test_refusals_leave_the_model_as_it_was():
    model = llama()
    with pytest.raises(ValueError, match="only"):
        sparsify(model, {"model.layers.0.mlp": torch.ones(48)})
    with pytest.raises(ValueError, match="negative"):
        sparsify(model, gate_threshold=-1.0)
    with pytest.raises(ValueError, match="biases"):
        sparsify(llama(mlp_bias=True))
    with pytest.raises(TypeError, match="Conv1D"):
        sparsify(GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, activation_function="relu")))
    with pytest.raises(ValueError, match="none of relu"):
        sparsify(llama("quick_gelu"))
    with pytest.raises(ValueError, match="no gate"):
        sparsify(opt(), gate_threshold=0.1)
    with pytest.raises(ValueError, match="sparsify"):
        save_sparse(model, "nowhere")
    with pytest.raises(ValueError, match="save_sparse"):
        load_sparse("nowhere")
    assert not any(isinstance(m, SparseGatedFeedForward) for m in model.modules())
