# Development of splatc. `make help` lists the targets; each installs what it needs into .venv first.
#
#   PYTHON=python3.12 make install    another interpreter (3.10 to 3.13)
#   make test ARGS="-k window -x"     more options for pytest

PYTHON ?= python3
ARGS   ?=
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
SOURCE := $(wildcard splatc tests examples)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu sanitize lint format types golden bench docs-pictures clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with splatc and all that its tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	  echo "make: splatc needs Python 3.10 to 3.13, and '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | head -1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu it needs: apt install python3-venv" >&2; exit 1; }; fi
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,cuda,jax,transformers,plot,test,dev]'
	@touch $@

demo: install  ## compile and run a few masks, and check them
	@$(VENV)/bin/splatc demo

test: install  ## all tests that need no GPU (stops after 80 minutes)
	timeout 4800 $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not gpu" $(ARGS)

test-gpu: install  ## the tests that need a GPU
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal -m gpu $(ARGS)

# Of each kind of kernel a few small cases.
SANITIZED := tests/test_gpu_attention.py::test_head_dims tests/test_gpu_attention.py::test_per_head_patterns \
  tests/test_gpu_nm.py::test_which_keys_are_kept tests/test_gpu_gradients.py::test_other_head_dims \
  tests/test_gpu_wide_gradients.py::test_softcap tests/test_gpu_terms.py::test_a_part_of_the_terms_may_learn \
  tests/test_gpu_products.py::test_head_dims_on_a_gpu tests/test_gpu_dfss.py::test_any_scale \
  tests/test_gpu_portable_gradients.py::test_sinks tests/test_cuda_kernel.py::test_head_dims
TOOL ?= memcheck

sanitize: install  ## small GPU tests under compute-sanitizer; TOOL=racecheck for races
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 SPLATC_LINE_INFO=1 compute-sanitizer --tool $(TOOL) --kernel-regex kns=splatc \
	  --report-api-errors no --error-exitcode 3 $(PY) -m pytest -m gpu -q -p no:cacheprovider \
	  $(if $(filter racecheck,$(TOOL)),--every-lane) $(SANITIZED) $(ARGS)

lint: install  ## ruff: style, imports, formatting
	$(PY) -m ruff check $(SOURCE)

format: install  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix $(SOURCE)

types: install  ## mypy --strict
	$(PY) -m mypy

golden: install  ## rewrite the golden files of the tests; review them with git diff
	$(PY) -m pytest --update-golden -m "not gpu" $(ARGS)

bench: install  ## the benchmarks
	@$(VENV)/bin/splatc bench $(ARGS)

docs-pictures: install  ## redraw the pictures of the documentation
	$(PY) docs/pictures.py

clean:  ## delete .venv and everything that a tool has left; keeps the kernel cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find splatc tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
