# make quickstart   environment in .venv, install, the main job with its report
# make test         the same environment, install, the fast suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow pages format clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call free; a change of the requirements installs again.
$(VENV)/installed: $(BIN)/python setup.cfg pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/lowres run recipes/quickstart.yaml

# What compares times runs by itself, when the rest is over.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -m alone

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

# Tables of the pages, from the records that are there.
pages: $(VENV)/installed
	$(BIN)/python -m benchmarks.pages

format: $(VENV)/installed-test
	$(BIN)/ruff format lowres tests benchmarks recipes
	$(BIN)/ruff check --fix lowres tests benchmarks recipes

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
