# `make` lists what there is to make. Everything is installed into .venv here, and nothing outside it is touched.

PYTHON ?= python3
# cuda12, cuda13 or tpu: install JAX for that accelerator.
EXTRA ?=
# For pytest: the number of processes; with "-k sampling" some tests in one process.
# Each process takes a half of the list, so that tests which share a run follow each other in one of them.
PYTEST_ARGS ?= -n 2 --dist worksteal
# More for the resolver: --upgrade takes the newest releases, --upgrade-package=jax those of one package.
LOCK_ARGS ?=

suffix = $(if $(EXTRA),-$(EXTRA))
lock = requirements$(suffix).lock
installed = .venv/.installed$(suffix)
python = .venv/bin/python
# The longest that one slow test may take, in seconds.
slow = --timeout=14400

.DEFAULT_GOAL := help
.PHONY: help install lint test test-all test-notebook test-device demo fidelity lock clean distclean check-python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "With PYTHON=python3.12 another interpreter, with EXTRA=cuda12, cuda13 or tpu an accelerator, with PYTEST_ARGS='-k sampling' some of the tests."

install: $(installed) ## .venv with the locked packages and fdm_jax itself

# Kept out of the stamp's prerequisites, as a phony one would reinstall each time.
check-python:
	@command -v "$(PYTHON)" > /dev/null || { echo "There is no $(PYTHON): install Python 3.11 to 3.14, or name one, as in: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { echo "fdm_jax needs Python 3.11 to 3.14, and $(PYTHON) is $$("$(PYTHON)" --version 2>&1): name another, as in: make PYTHON=python3.12" >&2; exit 1; }

$(installed): $(lock) setup.cfg pyproject.toml | check-python
	"$(PYTHON)" -m venv .venv
	@echo "Installing the packages of $(lock) into .venv; the first time takes some minutes."
	$(python) -m pip install --disable-pip-version-check -q --require-hashes --no-deps -r $(lock)
	$(python) -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	@touch $@

lint: $(installed) ## ruff and mypy
	$(python) -m ruff check .
	$(python) -m mypy

test: lint ## ruff, mypy and the tests
	$(python) -m pytest $(PYTEST_ARGS)

test-all: lint ## the same with the slow tests
	$(python) -m pytest -m "" $(slow) $(PYTEST_ARGS)

test-notebook: $(installed) ## run the Colab notebook, on the CPU with a tiny model
	$(python) -m pytest -n 0 -m "" tests/launch/test_notebook.py

test-device: $(installed) ## golden numbers and more on this machine's GPU or TPU: with EXTRA
	JAX_PLATFORMS= $(python) -m pytest -n 0 -m "device and not slow"

demo: $(installed) ## train a small model on digits and sample from it, into demo_run
	$(python) -m fdm_jax demo --workdir=demo_run

fidelity: $(installed) ## train on the digits as the original did, and compare
	XLA_FLAGS=--xla_backend_optimization_level=3 $(python) -m pytest -m slow $(slow) -s tests/test_digits_runs.py

compile = .venv-lock/bin/uv pip compile setup.cfg --python=.venv-lock/bin/python --python-version=3.11 --universal \
	--generate-hashes --custom-compile-command="make lock" --quiet --extra=dev $(LOCK_ARGS)

lock: check-python ## write requirements*.lock anew from setup.cfg
	"$(PYTHON)" -m venv .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check -q "uv>=0.9,<1"
	$(compile) --output-file=requirements.lock
	for extra in cuda12 cuda13 tpu; do \
	  $(compile) --no-annotate --extra=$$extra --constraint=requirements.lock --output-file=requirements-$$extra.lock || exit; \
	done

clean: ## remove what tests, tools and the demo left
	rm -rf build dist *.egg-info .jax_cache .mypy_cache .pytest_cache .ruff_cache .venv-lock demo_run
	find fdm_jax configs launch tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv
	rm -rf .venv
