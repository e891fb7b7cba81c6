# `make demo` and `make test` set up everything themselves in .venv; the other targets build on them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test thorough coverage lint types bench clean

demo: $(VENV)/installed
	$(BIN)/llorch-jax generate "Once upon a time" --max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 46 --timings

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadscope

# Hours rather than minutes: new examples in every run, whole soaks, programs compiled as users' are (tests/profiles.py).
thorough: lint types
	LLORCH_TESTS=thorough $(BIN)/python -m pytest -n 2 --dist loadscope

# Apart from `make test`, because counting lines takes a third more time with Python 3.11.
coverage: $(VENV)/tools
	$(BIN)/python -m pytest -n 2 --dist loadscope --cov=llorch_jax --cov-report=term:skip-covered

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tools
	$(BIN)/mypy

bench: $(VENV)/tools
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py $(wildcard native/*.txt native/src/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,train]'
	touch $@
