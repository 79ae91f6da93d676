"""Models from a path: a folder, one GGUF file, and what is neither; the commands that read them."""

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from subquad.bench.transformers_families import FAMILIES
from subquad.cli import app
from subquad.inference.pretrained import load, skeleton

LETTERS = [chr(code) for code in range(32, 126)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Mamba in bfloat16 with a tokenizer of single letters."""
    path = tmp_path_factory.mktemp("model")
    vocabulary = {token: n for n, token in enumerate([*LETTERS, "<pad>", "<end>"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>").save_pretrained(path)
    FAMILIES["mamba"].build().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A Llama of one layer of width 8, as llama.cpp stores it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, generator = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *LETTERS, "ab"]
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(LETTERS) + 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(tokens), 8),
        "output": (len(tokens), 8),
        "output_norm": (8,),
        **{f"blk.0.{n}": (8, 8) for n in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{n}": (16, 8) for n in ("ffn_gate", "ffn_up")},
        "blk.0.ffn_down": (8, 16),
        **{f"blk.0.{n}": (8,) for n in ("attn_norm", "ffn_norm")},
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_a_folder_keeps_its_dtype(folder):
    model, tokenizer = load(folder)
    assert model.dtype == torch.bfloat16
    assert tokenizer("ab").input_ids == [65, 66]
    bare = skeleton(folder)
    assert {x.device.type for x in bare.parameters()} == {"meta"}


def test_a_gguf_file_is_a_model(gguf_file):
    model, tokenizer = load(gguf_file)
    assert type(model).__name__ == "LlamaForCausalLM"
    ids = tokenizer("a", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2
    assert "nothing to replace" in run("doctor", "--model", gguf_file).stdout


def test_generate_optimises_unless_told_not_to(folder):
    arguments = ("generate", folder, "--prompt", "hello", "--max-new-tokens", 4, "--temperature", 0)
    ours, plain = run(*arguments), run(*arguments, "--no-optimize")
    assert "2 x MambaMixer replaced by short_convolution, selective_scan" in ours.stderr.replace("\n", " ")
    assert "replaced" not in plain.stderr
    for result in (ours, plain):
        assert result.exit_code == 0
        assert "4 tokens in" in result.stderr
        assert "tokens/s" in result.stderr


def test_doctor_says_what_would_change(folder):
    result = run("doctor", "--model", folder)
    assert result.exit_code == 0
    assert "2 x MambaMixer would be replaced by" in result.stdout


def test_what_is_no_model_gets_a_sentence(folder, gguf_file):
    for path, sentence in (
        (folder / "nowhere", "is no folder"),
        (folder / "config.json", "is no folder"),
        (gguf_file.parent, "holds no config.json; it holds tiny.gguf: give that file"),
    ):
        with pytest.raises(ValueError, match=sentence):
            load(path)
        with pytest.raises(ValueError, match=sentence):
            skeleton(path)
