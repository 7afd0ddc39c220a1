# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install patch lint test quickstart results study study-quick bench scaling clean

install: patch

$(STAMP): setup.cfg pyproject.toml $(wildcard patches/*.patch)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set it by make PYTHON=python3.11")'
	@# Debian's python3 comes without ensurepip; there the venv gets its pip from the pip outside.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	@touch $@

# Apart from the installation, and each time: somebody may have reverted it, and it costs a tenth of a second.
patch: $(STAMP)
	@$(BIN)/openclip-otco patch

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

study-quick: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare study-quick --out runs/study-quick --jobs 2

# Flickr8k lies where the environment variable OPENCLIP_OTCO_FLICKR8K says. Runs that two studies share are made once.
study: install
	for study in flickr8k-tuning flickr8k-frozen flickr8k-baselines flickr8k-ablations; do \
		HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare $$study --out runs/flickr8k --jobs 2 || exit 1; \
		for file in results.jsonl table.md rsum.png recalls.png noise.png cost.png; do \
			test ! -e runs/flickr8k/$$file || cp runs/flickr8k/$$file runs/flickr8k/$$study-$$file; done; done

bench: install
	$(BIN)/python -m pip install --progress-bar off -e '.[bench]'
	$(BIN)/python benchmarks/solvers.py --out runs/bench

scaling: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/scaling.py --out runs/scaling

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
