# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install lint test quickstart results clean

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml $(wildcard patches/*.patch)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set it by make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	$(BIN)/openclip-otco patch
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare quickstart --out runs/quickstart

results: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare scenes --out runs/scenes

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
