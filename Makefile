# Two commands on a fresh machine (Python 3.11 or newer, make): `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= data

.PHONY: demo test slow lint docs clean

demo: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m jaxlm run --config=configs/demo.py --workdir=runs/demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup --durations=20

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A stamp for each set of extras, so that installing runs again only when pyproject.toml changes.
$(VENV)/installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
