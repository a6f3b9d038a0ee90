# make demo [SEED=0]   train a tiny model by SFT and GRPO, and measure it before and after
# make test            the fast tests;  make test-slow: the rest;  make lint: style
# Each target sets up its own environment in .venv the first time.

PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/demo
	$(BIN)/python -m trl_dllm.scripts.demo --seed $(SEED) --output_dir runs/demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow tests

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and pinned: that exact version has a CPU build, an open range would bring gigabytes of CUDA.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[plots]"
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) runs build dist *.egg-info
