# Every target creates the virtual environment it needs; nothing has to be installed first.
#   make check   before a commit: style, types, and the tests of the core that are not slow; some three minutes
#   make test    everything
#   make lowest  the core's tests with the lowest versions that the package supports, and nothing that an extra installs
#   make hooks   run style and types at each commit, and look at its subject
#   make demo    the example on scanned digits
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py requirements.txt $(wildcard csrc/*)
LOWEST := .venv-lowest
CORE := $(addprefix tests/,ops test_functional.py test_label_index.py test_bank.py test_user_warning.py)
# Each worker has one thread: more would wait for each other. WORKERS=0 runs all in one process, one test after the other.
RUN_TESTS = -m pytest --numprocesses $(WORKERS) --dist worksteal
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python $(RUN_TESTS) --doctest-modules

.PHONY: demo lint check test lowest hooks clean

demo: $(READY)
	$(VENV)/bin/python examples/digits.py

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

check: lint
	$(PYTEST) -m "not slow" $(CORE) tests/test_loss.py ntdne_kernels

test: lint
	$(PYTEST)

$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

# In a copy of the tree: the libraries are built with the lowest torch too, and those in the tree stay as they are.
lowest:
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check --no-cache-dir -r requirements-lowest.txt
	git ls-files -z | xargs -0 cp --parents --target-directory $(LOWEST)/
	cd $(LOWEST) && bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	cd $(LOWEST) && OMP_NUM_THREADS=1 bin/python $(RUN_TESTS) -k "not aot" $(CORE)  # its counts are of one triton

hooks: $(READY)
	$(VENV)/bin/pre-commit install

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info ntdne_kernels/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
