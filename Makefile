# make demo       train, evaluate and picture a small model on the CPU
# make test       lint and the tests: every pair of options, nothing slow;  make test-all: every combination, everything,
#                 and what needs timm, transformers and peft, which it installs into the environment
# make env        only the environment: .venv, made when missing, brought up to date when its files have changed
# make lint
#
# PYTHON=python3.11   the interpreter to make the environment with (3.10 to 3.12)
# STACK=onedl         use the maintained fork of the OpenMMLab packages, in an environment of its own (.venv-onedl)
# JOBS=2              test processes; each takes about 1.5 GB
# PYTEST_ARGS='-k mona -x'

STACK ?= official
JOBS ?= 2
PYTEST_ARGS ?=

ifeq ($(STACK),official)
VENV := .venv
REQUIREMENTS := requirements.txt
CONSTRAINTS := requirements/constraints.txt
# Not `pip install --editable`: openmim looks for mona_mm/ beside the metadata, which pip puts elsewhere.
INSTALL_MONA_MM = $(BIN)/python -W ignore setup.py --quiet develop --no-deps
else ifeq ($(STACK),onedl)
VENV := .venv-onedl
REQUIREMENTS := requirements/onedl.txt
CONSTRAINTS := requirements/constraints-onedl.txt
# Not `develop`: onedl-mim understands only what pip notes down.
INSTALL_MONA_MM = $(PIP) install --no-deps --editable .
else
$(error STACK=$(STACK): there are two, official and onedl)
endif

# Without a PYTHON of the user's, the first of these that is fit.
ifdef PYTHON
CANDIDATES := $(PYTHON)
else
CANDIDATES := python3 python3.12 python3.11 python3.10
endif

BIN := $(VENV)/bin
STAMP := $(VENV)/.current
EXTRAS := $(VENV)/.extras
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: env demo test test-all lint
.DELETE_ON_ERROR:

env: $(STAMP)

demo: env
	$(BIN)/python tools/demo.py

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: lint $(EXTRAS)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The last step is for machines without libGL, where only the headless opencv can be imported.
$(STAMP): $(BIN)/python $(REQUIREMENTS) $(CONSTRAINTS) requirements/test.txt pyproject.toml setup.py
	@$(BIN)/python -m ensurepip >/dev/null
	@df -Pk . | awk 'NR == 2 && $$4 < 10 * 1024 * 1024 { printf "only %.1f GB are free here: torch for CUDA takes" \
	  " 6 GB in $(VENV), and pip up to 4 GB beside it\n", $$4 / 1024 / 1024 }' >&2
	$(PIP) install -r $(REQUIREMENTS) -r requirements/test.txt -c $(CONSTRAINTS)
	$(INSTALL_MONA_MM)
	@$(BIN)/python -c 'import cv2' 2>/dev/null || { \
	  echo 'opencv-python cannot be imported here (no libGL?): installing the headless build over it'; \
	  $(PIP) install --no-deps --force-reinstall opencv-python-headless -c $(CONSTRAINTS); }
	@touch $@

$(EXTRAS): $(STAMP) requirements/extras.txt
	$(PIP) install -r requirements/extras.txt -c $(CONSTRAINTS)
	@touch $@

$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null; then \
	    echo "$$python -m venv --clear $(VENV)"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo 'mona_mm needs Python 3.10, 3.11 or 3.12 with its venv module. Tried: $(CANDIDATES)' >&2; \
	for python in $(CANDIDATES); do \
	  echo "  $$python: $$($$python --version 2>&1 | head -n 1)" >&2; \
	done; \
	echo 'Name one with: make env PYTHON=/path/to/python3.11' >&2; \
	exit 1
