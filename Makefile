# Two commands matter: `make demo` and `make test`. Each first makes $(VENV) with everything in requirements.lock
# (every file checked against its SHA-256); the next run finds it ready and starts at once.
#
# On Linux the locked PyTorch carries its CUDA libraries, several GB. Without a GPU, and without the lock's hashes,
# a smaller set-up does: python3 -m venv .venv, then PyTorch's CPU build as its own web page says, then
#   .venv/bin/pip install -e '.[vision,policy,simulators,fused,tensorboard,dev]' && touch .venv/.driftfield-ready

VENV   ?= .venv
PYTHON ?= python3
# More words for `make lock`, e.g. LOCK_FLAGS='--upgrade-package numpy'; without any, versions that still fit are kept.
LOCK_FLAGS ?=

RUN   := $(VENV)/bin/python
PIP   := $(RUN) -m pip --disable-pip-version-check --no-input
READY := $(VENV)/.driftfield-ready

.PHONY: help demo test lint test-slow lock clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train a one-step generator on real images, from nothing, in about two minutes
	@echo 'source $(VENV)/bin/activate'
	@echo 'python -m vision.train'
	@$(RUN) -m vision.train

test: export OMP_NUM_THREADS = 1 # two processes of one thread each
test: lint ## linter, type checker, tests, doctests
	$(RUN) -m pytest -n 2 --dist loadfile -m 'not slow'

lint: $(READY) ## linter and type checker alone
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test-slow: $(READY) ## the tests that take minutes each
	$(RUN) -m pytest -m slow

lock: $(READY) ## write requirements.lock anew from pyproject.toml
	$(RUN) -m uv pip compile --quiet --universal --generate-hashes --no-emit-index-url \
	  --custom-compile-command 'make lock' --extra vision --extra policy --extra simulators --extra fused \
	  --extra tensorboard --extra dev \
	  --output-file requirements.lock $(LOCK_FLAGS) pyproject.toml

clean: ## remove the virtual environment and all caches; runs/ and data/ stay
	rm -rf $(VENV) build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("driftfield needs Python 3.11 or newer, found %d.%d; name another: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

# setuptools goes in first, by its hash: a requirement that is published as source alone is then built with it,
# and not in an isolated environment, whose contents pip takes from the network without checking them.
$(READY): requirements.lock pyproject.toml | $(RUN)
	@awk '/^[a-z]/ { wanted = /^setuptools==/ } wanted' requirements.lock > $(VENV)/setuptools.lock
	$(PIP) install --require-hashes --no-deps -r $(VENV)/setuptools.lock
	$(PIP) install --require-hashes --no-deps --no-build-isolation -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $(READY)
