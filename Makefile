# `make demo` and `make test` create the virtual environment they need; nothing has to be installed first.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py requirements.txt $(wildcard csrc/*)

.PHONY: demo test clean

demo: $(READY)
	$(VENV)/bin/python examples/digits.py

test: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info ntdne_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
