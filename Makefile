# One environment, made on first use; every target works on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests share their machine: two workers, one thread pool each.
WORKERS ?= 2
NEWEST ?= python3.13

.PHONY: demo test test-long test-slow test-full test-faults test-engines docs-faults test-newest parity foreign gym rehearsals docs-pods docs-models notebooks lint bench bench-sweep bench-decoder bench-gpu clean

$(VENV)/.made: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,test]'
	touch $@

$(VENV)/.parity: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	touch $@

$(VENV)/.notebooks: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	touch $@

$(VENV)/.foreign: $(VENV)/.made tests/foreign/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r tests/foreign/requirements.txt
	touch $@

$(VENV)/.gym: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[gym]'
	touch $@

$(VENV)/.engines: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --editable '.[ray,slurm]'
	touch $@

demo: $(VENV)/.made
	$(BIN)/python -m experiments.demo

# Most of the time would go into optimizing programs that run once. Numbers, FLOPs and
# memory are decided before that; the other suites run what users run.
test: $(VENV)/.made
	XLA_FLAGS="$(XLA_FLAGS) $$($(BIN)/python tests/quick_flags.py)" \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q --durations 25

# Whole runs and packs, as users start them: what changes one of their parts is tried here.
test-long: $(VENV)/.made
	XLA_FLAGS="$(XLA_FLAGS) $$($(BIN)/python tests/quick_flags.py)" \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q \
	-m 'long and not slow and not timing and not faults' --durations 25

# Whole runs, minutes long, of what cheaper tests show in its parts; SLOW names files.
test-slow: $(VENV)/.made
	XLA_FLAGS="$(XLA_FLAGS) $$($(BIN)/python tests/quick_flags.py)" \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q \
	-m 'slow and not timing and not parity and not faults and not foreign and not gym' --durations 25 $(SLOW)

test-full: $(VENV)/.made
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -q -m 'not parity and not faults and not foreign'

# Whatever may happen to a run or a sweep.
test-faults: $(VENV)/.made
	$(BIN)/python -m pytest -n $(WORKERS) -m faults

# Packs that Ray and submitit carry to other processes, some of which are killed.
test-engines: $(VENV)/.engines
	$(BIN)/python -m pytest -q -m faults tests/engines

# The table in docs/faults.md, from a run of every test that stands for a fault. (With
# "=": pytest would take a file for the place of the tests, and not know the option.)
docs-faults: $(VENV)/.made
	$(BIN)/python -m pytest -m 'faults or fault' --write-fault-table=docs/faults.md

# The other end of the version range: the newest jax and flax need Python 3.12 or later.
test-newest:
	$(MAKE) test test-long PYTHON=$(NEWEST) VENV=.venv-newest

parity: $(VENV)/.parity
	$(BIN)/python -m pytest -n $(WORKERS) -q -m parity tests/parity

# Models of other packages, adapted as they are.
foreign: $(VENV)/.foreign
	$(BIN)/python -m pytest -n $(WORKERS) -q -m foreign tests/foreign

# Tasks and verifiers of reasoning-gym itself.
gym: $(VENV)/.gym
	$(BIN)/python -m pytest -n $(WORKERS) -q -m gym tests/gym

# Steps compiled for slices of a TPU pod, by the libtpu that belongs to this jax. It lies
# beside the environment: where it is installed, JAX looks for a TPU.
build/libtpu/.made: $(VENV)/.made
	$(BIN)/python -m pip install --quiet --no-deps --target build/libtpu "$$($(BIN)/python -c \
	"import importlib.metadata as m; print(next(r.split(';')[0] for r in m.requires('jax') if r.startswith('libtpu')))")"
	touch $@

rehearsals: build/libtpu/.made
	PYTHONPATH="$(CURDIR)/build/libtpu" TPU_SKIP_MDS_QUERY=1 \
	$(BIN)/python -m pytest -n $(WORKERS) -q -m rehearsal tests/rehearsals

# The tables in docs/pods.md: minutes each.
docs-pods: build/libtpu/.made
	PYTHONPATH="$(CURDIR)/build/libtpu" TPU_SKIP_MDS_QUERY=1 \
	$(BIN)/python -m experiments.rehearsal_tables

# The table in docs/models.md, from the same suite.
docs-models: $(VENV)/.foreign
	$(BIN)/python -m pytest -q -m foreign tests/foreign --write-model-table=docs/models.md

# Every notebook, cell by cell, on a made-up sweep; what they show is in build/notebooks.
notebooks: $(VENV)/.notebooks
	$(BIN)/python notebooks/execute.py

lint: $(VENV)/.made
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.parity
	$(BIN)/python -m experiments.bench

# Many short trials: a process each, one by one, packed, halved, and PEFT.
bench-sweep: $(VENV)/.parity
	$(BIN)/python -m experiments.bench.sweep

# A language model's training step and generation beside PEFT and transformers.
bench-decoder: $(VENV)/.parity
	$(BIN)/python -m experiments.bench.decoder

# A step of LoRA on billion-sized shapes beside PEFT, for a machine with an NVIDIA GPU:
# SHAPE=8b for the larger one.
bench-gpu: $(VENV)/.parity
	$(BIN)/python -m pip install --quiet --editable '.[parity,cuda]'
	$(BIN)/python -m experiments.bench.gpu --model $(or $(SHAPE),1b)

clean:
	rm -rf $(VENV) build dist
