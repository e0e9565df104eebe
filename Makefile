# vitdist: `make help` lists what can be made. Needs Python 3.11 or newer, make and a package index.

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full check slurm lock peers

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## install everything into .venv (once)

# Bytecode is compiled here, once: four ranks that start together would each compile all of torch.
.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vitdist needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Use: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setting up .venv (some 5 GB, mostly torch) ..."
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

shards/digits/val/index.json: | setup
	@$(BIN)/vitdist digits data/digits
	@$(BIN)/vitdist pack data/digits shards/digits

demo: setup shards/digits/val/index.json  ## digits from pixels to a report, on this machine, in minutes
	@$(BIN)/python launch/submit.py --nodes 4 --config configs/demo.yaml --cluster local

check: setup  ## lint, types and unit tests, under 2 minutes
	@$(BIN)/ruff check --quiet . slurm/dev-cluster
	@$(BIN)/ruff format --quiet --check . slurm/dev-cluster
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q -m "not processes and not slurm and not full"

# The tests on SLURM wait for its clocks most of their time: they run beside the others, then some of these with them, and
# are told after them.
BESIDE := tests/vitdist/test_train.py tests/vitdist/test_interrupted.py

test: setup slurm  ## everything that CI holds, under 15 minutes on 2 cores
	@$(BIN)/ruff check --quiet . slurm/dev-cluster
	@$(BIN)/ruff format --quiet --check . slurm/dev-cluster
	@$(BIN)/mypy
	@{ $(BIN)/python -m pytest -m "slurm and not full" -p no:cacheprovider && \
	   $(BIN)/python -m pytest -m "not full" -p no:cacheprovider $(BESIDE); } > .beside.log 2>&1 & beside=$$!; \
	trap "kill $$beside" INT TERM; \
	$(BIN)/python -m pytest -m "not slurm and not full" $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$beside; code=$$?; cat .beside.log; exit $$((rest || code))

test-full: setup slurm  ## whole matrices, in hours; the outcome is recorded in benchmarks/results
	@$(BIN)/python -m pytest --record tests

# A real SLURM for the tests, where it can be had; without it they say how to enable them.
slurm:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then slurm/dev-cluster install >&2; \
	else command -v slurmctld >/dev/null || echo "SLURM tests are skipped: run 'sudo slurm/dev-cluster install' to enable them" >&2; fi

peers: .venv-peers/ready  ## an environment with what benchmarks/loader.py compares with

.venv-peers/ready: .venv/ready
	@$(PYTHON) -m venv --clear .venv-peers
	@$(BIN)/uv pip install --quiet --python .venv-peers/bin/python --compile-bytecode \
	  torch==2.15.0 torchvision==0.29.2 webdataset==1.0.2 mosaicml-streaming==0.13.0 pillow numpy
	@touch $@

lock: setup  ## pin anew the newest versions that pyproject.toml admits
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-emit-index-url --no-annotate --no-header \
	  pyproject.toml -o requirements.lock
