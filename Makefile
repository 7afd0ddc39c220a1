# Needs Python 3.11 or newer, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Ends with what to say where a variable is not given.
need = @test -n "$($(1))" || { echo 'Name $(2): make $@ $(1)=DIR'; exit 2; }

.PHONY: install patch lint browser test test-matrix test-openclip-main versions compatibility peer-tests docs flags quickstart results study page study-calibrated study-cleaned study-quick bench step-cost scaling screenshots clean

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
	$(BIN)/lint-imports --no-cache --no-logo

# For the tests of the pages. Without one, and without the right to install Debian's, these are skipped and say so.
browser:
	@for program in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do \
		if command -v $$program >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; echo 'Installing a headless Chromium for the tests of the pages'; \
		apt-get -qq update; \
		apt-get -qq install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null || \
			apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core >/dev/null || \
			echo 'No Chromium can be installed here: the tests that need one will be skipped'; \
	else echo 'No Chromium here: the tests that need one will be skipped'; fi

test: install browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# Every cell, where `make test` runs a covering design.
test-matrix: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_matrix.py -m training -n 0 -o timeout=3600

# OPENCLIP names a checkout of OpenCLIP's main, as docs/install.md says.
test-openclip-main: install
	$(call need,OPENCLIP,a clone of OpenCLIP at its main)
	OPENCLIP=$(abspath $(OPENCLIP)) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_openclip_main.py

# The runs of docs/compatibility.md. What has a line in runs/compatibility is not run again. OPENCLIP names a clone of
# OpenCLIP; without one the cells of its main are not run.
COMPATIBILITY := runs/compatibility
versions: install
	@mkdir -p $(COMPATIBILITY)
	$(BIN)/python benchmarks/versions.py $(COMPATIBILITY)/versions.jsonl $(if $(OPENCLIP),--openclip $(OPENCLIP))

# OPENCLIP names a clone of OpenCLIP, whose own tests are run.
compatibility: install
	$(call need,OPENCLIP,a clone of OpenCLIP)
	@mkdir -p $(COMPATIBILITY)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/compatibility.py $(OPENCLIP) --out $(COMPATIBILITY)/compatibility.jsonl

# POT and GEOMLOSS name clones of them, whose own tests are run.
peer-tests: install
	$(call need,POT,a clone of POT)
	$(call need,GEOMLOSS,a clone of geomloss at v0.3.1)
	$(BIN)/python -m pip install --progress-bar off -e '.[bench]'
	@mkdir -p $(COMPATIBILITY)
	$(BIN)/python benchmarks/peer_tests.py --pot $(POT) --geomloss $(GEOMLOSS) --out $(COMPATIBILITY)/peer-tests.jsonl

# The site, in build/site; what it warns of is an error.
docs: install
	$(BIN)/python -m pip install --progress-bar off -e '.[docs]'
	$(BIN)/mkdocs build --strict

# The page of all flags, from the parsers.
flags: install
	HF_HUB_OFFLINE=1 $(BIN)/python docs/flags.py

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare quickstart --out runs/quickstart

results: install
	for study in scenes-recipe scenes-baselines; do \
		HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare $$study --out runs/scenes || exit 1; \
		cp runs/scenes/results.jsonl runs/scenes/$$study.jsonl; done

study-quick: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare study-quick --out runs/study-quick --jobs 2

# Flickr8k lies where the environment variable OPENCLIP_OTCO_FLICKR8K says. Runs that two studies share are made once.
study: install
	for study in tuning frozen near oracle baselines ablations; do \
		HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare flickr8k-$$study --out runs/flickr8k --jobs 2 || exit 1; \
		cp runs/flickr8k/results.jsonl runs/flickr8k/flickr8k-$$study.jsonl; done

# The pages that have numbers, README among them, after the files NAME.jsonl of the studies above were put into docs/results.
page: install
	$(BIN)/openclip-otco results docs/results --figures
	$(BIN)/openclip-otco results docs/results --template audit.md.jinja --out docs/audit.md --figures
	$(BIN)/openclip-otco results docs/results --template calibrate.md.jinja --out docs/calibrate.md
	$(BIN)/openclip-otco results docs/results --template compatibility.md.jinja --out docs/compatibility.md
	$(BIN)/openclip-otco results docs/results --template quickstart.md.jinja --out docs/quickstart.md
	$(BIN)/openclip-otco results docs/results --template readme.md.jinja --out README.md

# After `make study`: search with its checkpoints, calibrated by plans and by the inverted softmax.
study-calibrated: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/calibrate.py runs/flickr8k --epsilon 0.1 --pairs 4096 \
		--jsonl runs/flickr8k/calibrate.jsonl

# After `make study`: what audits of its data find, and plain CLIP on the shards that they keep.
study-cleaned: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/audit_figures.py runs/flickr8k --truth "$$OPENCLIP_OTCO_FLICKR8K" \
		--jsonl runs/flickr8k/audit.jsonl --write-clean
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare flickr8k-cleaned --out runs/flickr8k --jobs 2
	cp runs/flickr8k/results.jsonl runs/flickr8k/flickr8k-cleaned.jsonl

bench: install
	$(BIN)/python -m pip install --progress-bar off -e '.[bench]'
	$(BIN)/python benchmarks/solvers.py --out runs/bench

# On a quiet machine: seconds per step of OTCO, MoCo and SimCLR beside CLIP's.
step-cost: install
	HF_HUB_OFFLINE=1 $(BIN)/openclip-otco compare step-cost --out runs/step-cost

scaling: install
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/scaling.py --out runs/scaling

# From the quickstart's run, whose last lines are the commands used here; scenes are ours to publish.
SHOWN := runs/quickstart/runs/mismatch-40--otco--s0
screenshots: quickstart browser
	$(BIN)/openclip-otco audit --checkpoint $(SHOWN)/checkpoints/epoch_6.pt --out $(SHOWN)/audit \
		--data 'runs/quickstart/data/mismatch-40/train/{0000..0007}.tar'
	$(BIN)/openclip-otco inspect $(SHOWN)
	$(BIN)/python benchmarks/screenshots.py $(SHOWN)/audit/gallery.html --height 1100
	$(BIN)/python benchmarks/screenshots.py $(SHOWN)/inspect.html --height 1900

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
