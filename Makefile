.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
LOCK := requirements/cpu.lock

.PHONY: help setup demo check test multihost bench lock clean

help: ## List the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.installed ## Make .venv from the lock

.venv/.installed: $(LOCK) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

demo: setup ## Run the main job on The Complete Journey
	$(BIN)/liftyard run pipelines/complete_journey.yaml

check: setup ## Lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## Check, then run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore=tests/multihost

multihost: setup ## Run the tests over hosts made of network namespaces (as root)
	$(BIN)/python -m pytest --timeout=900 tests/multihost

# Modules there that only help one have no main of their own.
bench: setup ## Run every benchmark against its peers (long); results go to bench/
	mkdir -p bench
	set -e; for file in $$(grep -l '^if __name__ == "__main__":' benchmarks/*.py); do \
		name=$$(basename $$file .py); \
		$(BIN)/python -m benchmarks.$$name --json bench/$$name.json; \
	done

# A resolver run, nothing is installed.
lock: setup ## Resolve requirements/cpu.lock and gpu.lock anew
	$(BIN)/pip install --quiet --dry-run --ignore-installed --report - '.[demo,dev]' \
		| $(BIN)/python requirements/lock.py > requirements/cpu.lock.new
	$(BIN)/pip install --quiet --dry-run --ignore-installed --report - '.[demo,dev,gpu]' \
		| $(BIN)/python requirements/lock.py > requirements/gpu.lock.new
	mv requirements/cpu.lock.new requirements/cpu.lock
	mv requirements/gpu.lock.new requirements/gpu.lock

clean: ## Remove what setup and the tests made
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build bench
