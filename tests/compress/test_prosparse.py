"""A SwiGLU model made a sparse ReLU one: an ordinary folder, the threshold kept, the quality measured."""

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from subquad.compress.prosparse import substitute_relu, to_prosparse
from subquad.compress.sparse_feedforward import load_sparse
from subquad.evaluation import sparsity
from subquad.training import Batch, TrainingOptions


class Counting:
    def batch(self, index):
        tokens = (torch.arange(17) + torch.arange(index, index + 4)[:, None]) % 16
        return Batch(tokens[:, :-1], tokens[:, 1:])


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, **shape))


def test_substitution_is_a_relu_model_of_the_same_weights():
    model, expected = llama().eval(), llama().eval()
    substitute_relu(model)
    for layer in expected.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    tokens = Counting().batch(0).inputs
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert model.config.hidden_act == "relu"


@pytest.mark.parametrize("threshold", [0.02, None])
def test_the_whole_way(tmp_path, threshold):
    model = llama()
    windows = [Counting().batch(99).inputs]
    options = TrainingOptions(steps=60, batch_size=4, learning_rate=1e-2)
    result = to_prosparse(
        model,
        Counting(),
        options,
        [(0.0, 20), (0.3, 50), (0.3, 60)],
        windows,
        tmp_path,
        threshold=threshold,
        console=Console(quiet=True),
    )
    assert result.before.ratio == pytest.approx(1, abs=1e-3)  # SiLU is never zero
    assert result.final.ratio <= result.trained.ratio < 0.5
    assert result.final.loss < result.before.loss
    again = load_sparse(tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    loss = sparsity.measure(dense, windows, sparsity.fat(result.threshold)).loss
    with torch.no_grad():
        logits = again(windows[0]).logits[:, :-1].flatten(0, 1)
    found = torch.nn.functional.cross_entropy(logits, windows[0][:, 1:].flatten())
    assert float(found) == pytest.approx(loss, abs=1e-4) == pytest.approx(result.final.loss, abs=1e-4)
    if threshold is None:
        assert result.final.perplexity_increase <= 1.0
