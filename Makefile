PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two OpenMP threads on two busy cores can be far slower than one.
export OMP_NUM_THREADS ?= 1

.PHONY: setup setup-dev quickstart check test bench bench-eval bench-merge clean

setup: $(VENV)/installed
setup-dev: $(VENV)/installed-dev

# torch first: what depends on it would otherwise choose its own build
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[test,dev]'
	touch $@

quickstart: setup
	$(BIN)/python studies/quickstart_models.py
	$(BIN)/optuna-merge run-study studies/quickstart.yaml $(if $(N_TRIALS),--n-trials $(N_TRIALS))

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

test: setup-dev
	$(BIN)/python -m pytest

bench: bench-eval bench-merge

bench-eval: setup-dev
	$(BIN)/python benchmarks/eval_speed.py

bench-merge: setup-dev
	$(BIN)/python benchmarks/merge_speed.py

clean:
	rm -rf $(VENV) studies/quickstart_models studies/quickstart_study
