"""lm-eval's ``hf`` model on a folder of ours: its log-likelihoods are ours."""

import json

import pytest
import torch

from subquad import tasks
from tests.models.cases import model


@pytest.mark.parametrize("name", ["gla", "softmax"])
def test_log_likelihoods_equal_ours(name, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    lm, tokenizer = model(name, vocab_size=259, pad_token_id=256, eos_token_id=258), tasks.byte_tokenizer()
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"question": "one plus one is", "choices": [" two", " three"], "answer": 0},
        {"question": "the sun is", "choices": [" hot and bright", " cold"], "answer": 0},
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path}/data/test.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
    )
    results = evaluator.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "model"), "trust_remote_code": True, "dtype": "float32"},
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    for row, sample in zip(rows, results["samples"]["tiny"]):
        for choice, response in zip(row["choices"], sample["filtered_resps"]):
            question = tokenizer(row["question"]).input_ids
            ids = torch.tensor([question + tokenizer(choice).input_ids])
            with torch.no_grad():
                scores = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert response[0] == pytest.approx(float(scores[len(question) - 1 :].sum()), abs=1e-4)
