# `make demo` trains a small model and shows it; `make test` runs the linters and all tests. Both first make a
# virtual environment and install the package with everything they need into it.
#
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"   another torch (this one: CPU only)
#   make test PYTHON=python3.12 VENV=/tmp/venv                                  another Python, another place

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
PYTEST_ARGS ?= -n auto --maxprocesses 4

# Without a GPU no CUDA kernels are installed: tests run them under an emulator, and compile them on their own.
export NATTEN_EXT_CUDA ?= $(if $(wildcard /dev/nvidia0),,0)

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := setup.py pyproject.toml natten_ext/version.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test bench install clean

demo: $(INSTALLED)
	$(BIN)/python -m gans.demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.attn_bench

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch, ninja and pybind11 come first: the compiled parts are built against them. Torch for CUDA brings its own Triton.
$(INSTALLED): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja pybind11
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[gans,bench,test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info natten_ext/*.so natten_ext/cuda_resources.txt
