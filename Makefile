# make run    set up, then train on the built-in corpus and replay a step of that run
# make test   set up, then lint, types and tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := setup.py pyproject.toml $(wildcard _ext/*.pyx _ext/*.pxi _ext/kernels/*.pxi _ext/include/*.h)
# Two processes, each a file at a time, since the fixtures of a file are shared in it.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: run phase-19-train test test-long lint types bench clean

RUN := runs/$(shell date +%Y-%m-%d-%H%M%S)
run: .stamps/installed
	$(BIN)/minitrain train --out-dir $(RUN)
	$(BIN)/minitrain replay $(RUN) --step 500

# seed=42 injection=scale injection_step=500 make phase-19-train; minitrain train --injection help lists the names
seed ?= 42
injection ?= none
injection_step ?= 500
phase-19-train: .stamps/installed
	$(BIN)/minitrain train --seed $(seed) --injection $(injection) --injection-step $(injection_step) \
		--out-dir $(RUN)-$(injection)

test: lint types
	$(PYTEST) -m "not long"

test-long: .stamps/installed
	$(PYTEST)

lint: .stamps/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the map of top-level folders into the package, so it gets a tree of links.
types: .stamps/installed
	rm -rf build/tree && mkdir -p build/tree/minitrain
	ln -s $(CURDIR)/minitrain/* $(CURDIR)/_ext $(CURDIR)/replay build/tree/minitrain/
	MYPYPATH=build/tree $(BIN)/mypy -p minitrain

bench: .stamps/installed
	$(BIN)/python benchmarks/run.py

.stamps/installed: $(ENGINE)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minitrain needs Python 3.11 or newer; make PYTHON=python3.12 names another")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=77" "cython>=3.1"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	mkdir -p .stamps && touch $@

clean:
	rm -rf build .stamps $(VENV) _ext/*.so *.egg-info
