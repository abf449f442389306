# Everything a newcomer runs. `make` alone lists the targets; requirements/setup.sh keeps .venv current for all of them.
.DEFAULT_GOAL := help
.PHONY: help setup train test test-gpu lint docs venv

PYTHON ?=
TORCH_INDEX_URL ?=
PIP_ARGS ?=
CONFIG ?= configs/quickstart.yaml
ARGS ?=

# 1 where an NVIDIA GPU is seen; DS_ACCELERATOR=cpu in the environment has the last word for training.
GPU := $(shell (ls /dev/nvidia[0-9]* || nvidia-smi -L) >/dev/null 2>&1 && echo 1)
DS_ACCELERATOR ?= $(if $(GPU),,cpu)
LAUNCH_ARGS ?= $(if $(filter cpu,$(DS_ACCELERATOR)),--num_gpus 2)

# The virtual environment first on PATH, as if it were activated: launchers start further programs by name.
ACTIVATE = export PATH="$(CURDIR)/.venv/bin:$$PATH"

help:
	@echo 'make setup                build or update .venv (every target below does this first)'
	@echo 'make train [ARGS="..."]   train configs/quickstart.yaml on this machine: all GPUs, or two processes on the CPU'
	@echo '                          ARGS="--train.steps=50 --train.run_dir=runs/x" changes fields of the configuration'
	@echo '                          CONFIG=configs/NAME.yaml   LAUNCH_ARGS="--num_gpus 4" (any option of deepspeed)'
	@echo 'make test [ARGS="..."]    run the tests; ARGS="-k router -x" goes to pytest'
	@echo 'make test-gpu             run the tests that need an NVIDIA GPU, on it'
	@echo 'make lint                 ruff check, ruff format --check, mypy'
	@echo 'make docs                 build the pages of docs/ into build/docs; every warning is an error'
	@echo 'make help                 this list'
	@echo
	@echo 'For the set-up, also as part of another target:'
	@echo '  PYTHON=python3.12       interpreter (default: python3, else python3.13, python3.12, python3.11; 3.11 or newer)'
	@echo '  TORCH_INDEX_URL=URL     where torch comes from. Default: with an NVIDIA GPU the build for its driver; not on'
	@echo '                          Linux what pip finds;'
	@echo '                          otherwise the small CPU build (pip, then https://download.pytorch.org/whl/cpu).'
	@echo '                          On a login node without a GPU: TORCH_INDEX_URL=https://pypi.org/simple'
	@echo '  PIP_ARGS="..."          further arguments of pip install'

setup: venv
	@echo '.venv is ready'

venv:
	@PYTHON='$(PYTHON)' TORCH_INDEX_URL='$(TORCH_INDEX_URL)' PIP_ARGS='$(PIP_ARGS)' GPU='$(GPU)' sh requirements/setup.sh

# `exec` and the pid of make: when make ends, in whatever way, so does everything that was started.
train: venv
	@$(ACTIVATE) $(if $(DS_ACCELERATOR),DS_ACCELERATOR=$(DS_ACCELERATOR)); \
	exec .venv/bin/python -m moe_train.launch.local --parent $$PPID -- \
	    $(LAUNCH_ARGS) launch/train.py --config $(CONFIG) $(ARGS)

# On the CPU, also where there are GPUs: the tests fork processes, which CUDA does not survive.
# Two files of tests at once, with one thread each; with -m slow one, for those tests start several ranks and hosts each.
WORKERS ?= $(if $(findstring slow,$(ARGS)),0,2)
test: venv
	@$(ACTIVATE); export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=; \
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# One file after the other: each takes the GPU.
test-gpu: venv
	@$(ACTIVATE); DS_ACCELERATOR=cuda .venv/bin/python -m pytest -n 0 -m gpu $(ARGS)

lint: venv
	@status=0; \
	.venv/bin/ruff check . || status=1; \
	.venv/bin/ruff format --check . || status=1; \
	.venv/bin/mypy || status=1; \
	exit $$status

# Its tools are not needed for anything else, and come with the first call.
docs: venv
	@.venv/bin/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
	    .venv/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -c requirements/constraints.txt \
	    --no-build-isolation -e '.[docs]'
	@.venv/bin/python docs/make_reference.py --check
	@.venv/bin/python docs/make_scaling.py --check
	@.venv/bin/python docs/make_architecture.py --check
	@.venv/bin/python -m sphinx -W --keep-going -q docs build/docs
	@echo 'build/docs/index.html'
