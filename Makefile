# make setup | demo | test | bench | bench-gpu; each needs only Python 3.11+ (with venv) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-faults slow bench bench-gpu clean

setup: $(STAMP)

# venv + pip, not uv: pip honours the machine's own index and constraint settings
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: jkoflow needs Python 3.11 or newer; run make with PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(STAMP)

demo: setup
	$(BIN)/jkoflow demo

# a file of tests stays in one process; a thread each, so that they leave each other their cores
test: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# damages and kills by the thousand; an hour on two cores
test-faults: setup
	$(BIN)/python -m tests.faults

slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	for file in tests/benchmarks/bench_*.py; do \
		$(BIN)/python -m tests.benchmarks.$$(basename $$file .py) || exit 1; done

# images, latents and features per second, on the best device of this machine
bench-gpu: setup
	$(BIN)/python -m tests.benchmarks.throughput

clean:
	rm -rf $(VENV)
