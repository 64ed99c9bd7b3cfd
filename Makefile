# `make help` lists the targets. Set-up happens once, and again when a pyproject.toml or a pinned version changes.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# `make compare` leaves the other plug-ins out, which would take it from five minutes to twenty: ROUTERS=..., or
# `moerouters compare` for all of them.
ROUTERS ?= topk,loss-controlled,loss-controlled:alpha=0.1,loss-free,bip
PYTEST_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PLUGINS := $(wildcard plugins/*/pyproject.toml)
PLUGIN_FOLDERS := $(patsubst %/pyproject.toml,./%,$(PLUGINS))
SUITE := conformance/pyproject.toml
# A file's tests stay in one process, which share its module fixtures: an environment, a trained model, a compiler's cache.
# In the order of collection: by number of tests, the longest file (two tests, a minute) would start last and alone.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PIP_INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install compare test test-all gpu lint type docs docs-models docs-composition docs-ecosystems docs-benchmarks dist clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.dev  ## Set up .venv with everything that tests and tools need

compare: $(VENV)/.compare  ## Train one small model under five routers; ROUTERS=bip,topk ARGS="--seeds 3"
	$(BIN)/moerouters compare --routers '$(ROUTERS)' $(ARGS)

test: lint type  ## Check style and types, run the fast tests, demand 95% line coverage
	$(PYTEST) -m "not slow and not gpu" --cov --cov-report=term $(PYTEST_ARGS)

test-all: lint type  ## The same with the slow tests
	$(PYTEST) -m "not gpu" --cov --cov-report=term $(PYTEST_ARGS)

gpu: $(VENV)/.dev  ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.dev  ## Check types
	$(BIN)/mypy

docs: $(VENV)/.dev  ## Write the generated parts of README.md and docs/ from docs/benchmarks and the rules
	$(BIN)/python -m moerouters.lab.showcase render docs/benchmarks/compare-tiny.json README.md docs/images/compare-tiny.svg
	$(BIN)/python -m moerouters.lab.results_page docs
	$(BIN)/python -m moerouters.lab.cold_start render docs/benchmarks/cold-start.json docs/images/cold-start.svg
	$(BIN)/python -m moerouters_ds_moe render docs/benchmarks/ds-moe.json docs/images/ds-moe.svg
	PYTHONPATH=tests $(BIN)/python -m support.routers_page render docs
	$(BIN)/python -m moerouters.leaking.page render docs
	$(BIN)/python -m moerouters.planning.scale_page render docs
	$(BIN)/python -m moerouters.planning.ppmoe_page render docs
	$(BIN)/python -m moerouters.study.page render docs
	PYTHONPATH=tests $(BIN)/python -m support.pipeline_page docs/pipeline.md
	$(BIN)/python -m moerouters_conformance.docs docs
	$(BIN)/python -m tests.swap.survey_page docs
	$(BIN)/python -m tests.dispatch.composition_page docs
	$(BIN)/python -m tests.ecosystems.page docs
	PYTHONPATH=tests $(BIN)/python -m support.expert_parallel_page render docs
	$(BIN)/python -m moerouters.bench.page docs

docs-models: $(VENV)/.dev  ## Try every router class of the installed transformers, and write docs/models.md (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.swap.survey docs

docs-composition: $(VENV)/.dev  ## Try every dispatcher with everything else on four ranks, for docs/distributed.md (2 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.dispatch.composition docs

docs-ecosystems: $(VENV)/.dev  ## Run routers in the other frameworks' packages, for docs/ecosystems.md (fetches 400 MB, 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ecosystems.survey docs

docs-benchmarks: $(VENV)/.dev  ## Measure what docs/benchmarks.md shows, on an idle machine; ARGS="--device cuda"
	$(BIN)/python -m moerouters.bench.record docs $(ARGS)

dist: $(VENV)/.dev  ## Build and check wheel and sdist of every distribution into dist/
	rm -rf dist
	for folder in . ./conformance $(PLUGIN_FOLDERS); do $(BIN)/python -m build --no-isolation --outdir dist $$folder || exit 1; done
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove everything that the other targets made
	rm -rf $(VENV) build dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "moerouters needs Python 3.11 or newer, and '$(PYTHON)' is not." >&2; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.compare: pyproject.toml constraints.txt $(SUITE) $(PLUGINS) | $(BIN)/python
	@echo "Installing into $(VENV), which takes some minutes the first time."
	$(PIP_INSTALL) -e '.[lab]' -e ./conformance $(addprefix -e ,$(PLUGIN_FOLDERS))
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt requirements-dev.txt $(SUITE) $(PLUGINS) | $(BIN)/python
	@echo "Installing into $(VENV), which takes some minutes the first time."
	$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@ $(VENV)/.compare
