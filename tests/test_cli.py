"""The command line as a person meets it: help with examples, wrong names and inputs, and each command once."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from subquad import SubquadConfig, SubquadForCausalLM, tasks
from subquad.cli import app

COMMANDS = [
    "compare",
    "train",
    "convert",
    "generate",
    "sparsity",
    "rectify",
    "claims",
    "bench",
    "analyze",
    "doctor",
    "catalog list",
    "catalog show",
]


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: subquad {command.split()[0]}" in re.sub(r"[\s│]+", " ", result.output).replace("`", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["catalog", "show", "deltarule"], "did you mean 'delta_rule'"),
        (["claims", "glaa"], "did you mean 'gla'"),
        (["bench", "delta"], "did you mean 'delta_rule'"),
        (["compare"], "give your text with --data"),
        (["compare", "--data", "nowhere.txt"], "nowhere.txt"),
        (["compare", "--demo", "--data", "x.txt"], "brings its own text"),
        (["generate", "nowhere", "--prompt", "x"], "no folder"),
        (["train", "--data", "nowhere.txt", "--out", "x"], "nowhere.txt"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments, sentence):
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


def test_amounts_that_cannot_be_read_get_a_sentence(tmp_path):
    (tmp_path / "text.txt").write_text("words " * 2000)
    data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert "20m" in run("compare", *data, "--budget", "soon").stderr
    assert "2M" in run("compare", *data, "--params", "2Q").stderr
    assert "did you mean 'gla'" in run("compare", *data, "--mixers", "gla,glaa").stderr
    refused = run("compare", *data, "--mixers", "gla,inline").stderr
    assert "'inline' has no causal form; it serves non-causal cross-attention, non-causal self-attention" in refused
    assert not (tmp_path / "out").exists()


def test_all_mixers_are_the_causal_ones_and_the_others_are_named(tmp_path):
    arguments = ["compare", "--data", str(tmp_path), "--mixers", "all"]
    assert "left out, without a causal form: inline" in run(*arguments).stderr


def test_catalog_lists_and_shows():
    assert "DeltaNet" in run("catalog", "list", "--built").output
    assert "HaloNet" not in run("catalog", "list", "--built").output
    shown = run("catalog", "show", "06").output
    assert "Gated Linear Attention Transformers" in shown
    assert "subquad claims 06" in shown


def test_claims_without_a_name_lists_them():
    result = run("claims")
    assert result.exit_code == 0
    assert "negative_eigenvalues" in result.output


def test_bench_times_an_op():
    result = run("bench", "linear_attention", "--lengths", "32", "--heads", "1", "--width", "8", "--threads", "1")
    assert result.exit_code == 0
    assert "linear_attention" in result.output


def test_train_then_generate(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    common = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--hidden-size", "32"]
    small = ["--layers", "1", "--heads", "2", "--context", "64", "--batch-size", "2", "--warmup-steps", "1"]
    first = run(*common, *small, "--steps", "4", "--mixers", "gla")
    assert first.exit_code == 0, first.output
    assert "bits per byte" in first.output
    again = run(*common, *small, "--steps", "4")
    assert again.exit_code == 2
    assert "resume" in again.stderr
    written = run("generate", str(tmp_path / "run/model"), "--prompt", "the", "--max-new-tokens", "5")
    assert written.exit_code == 0
    assert "tokens/s" in written.stderr
    assert json.loads((tmp_path / "run/model/config.json").read_text())["mixers"] == ["gla"]


def test_generate_refuses_an_empty_prompt(tmp_path):
    torch.manual_seed(0)
    tokenizer = tasks.byte_tokenizer()
    config = SubquadConfig(mixers="gla", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    SubquadForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "empty" in run("generate", str(tmp_path), "--prompt", "").stderr
    assert "at least 1" in run("generate", str(tmp_path), "--prompt", "x", "--max-new-tokens", "0").stderr


def test_sparsity_measures_and_saves(tmp_path):
    tokenizer = tasks.byte_tokenizer()
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    SubquadForCausalLM(SubquadConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("many small words stand here, one after the other\n" * 200)
    data = ["--data", str(tmp_path / "text.txt"), "--tokens", "128", "--context", "64", "--out", str(tmp_path / "out")]
    result = run("sparsity", str(tmp_path / "model"), *data, "--save", str(tmp_path / "sparse"))
    assert result.exit_code == 0, result.stderr
    assert "of its neurons for a perplexity within 1%" in re.sub(r"\s+", " ", result.output)
    figures = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert 0 < figures["ratio"] < 1
    assert (tmp_path / "out" / "sparsity.png").stat().st_size > 1000
    assert (tmp_path / "sparse" / "sparse_feedforward.safetensors").is_file()
    again = run("sparsity", str(tmp_path / "model"), *data, "--save", str(tmp_path / "sparse"))
    assert again.exit_code == 2
    assert "exists already" in again.stderr


def test_rectify_learns_a_value_and_shows_its_price(tmp_path):
    tokenizer = tasks.byte_tokenizer()
    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    SubquadForCausalLM(SubquadConfig(vocab_size=len(tokenizer), mixers="gla", **fields)).save_pretrained(
        tmp_path / "lm"
    )
    tokenizer.save_pretrained(tmp_path / "lm")
    (tmp_path / "reward.py").write_text("def reward(text):\n    return -float(any(c.isupper() for c in text))\n")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n\nthree\n")
    common = [
        "rectify",
        str(tmp_path / "lm"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "-o",
        str(tmp_path / "value"),
    ]
    sizes = ["--continuations", "8", "--max-new-tokens", "4", "--steps", "3", "--width", "8"]
    result = run(*common, "--reward", str(tmp_path / "reward.py"), *sizes)
    assert result.exit_code == 0, result.stderr
    assert "the model alone" in result.output
    assert (tmp_path / "value" / "dead_end_value.safetensors").is_file()
    (tmp_path / "empty.py").write_text("")
    again = run(*common[:-1], str(tmp_path / "other"), "--reward", str(tmp_path / "empty.py"))
    assert again.exit_code == 2
    assert "defines no function reward" in again.stderr
