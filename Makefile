# `make demo` and `make test` set up everything themselves in .venv; the other targets build on them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test thorough lint types bench clean

demo: $(VENV)/installed
	$(BIN)/llorch-jax generate "Once upon a time" --max-new-tokens 120 --temperature 0.8 --top-k 50 --seed 46 --timings

# SlipCover counts lines at next to no cost; coverage.py takes half as long again with Python 3.11.
test: lint types
	$(BIN)/python -m slipcover --source llorch_jax --out $(VENV)/coverage.txt -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	@echo "Lines of llorch_jax, lines not run by the tests, and percentage run; by file in $(VENV)/coverage.txt:"
	@tail -n 1 $(VENV)/coverage.txt

# Hours rather than minutes: new examples in every run, whole soaks, programs compiled as users' are (tests/profiles.py).
# What computes runs a second time without the native kernels, by their twins.
thorough: lint types
	LLORCH_TESTS=thorough $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	LLORCH_TESTS=thorough LLORCH_JAX_KERNELS=off $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		tests/cache tests/decoding tests/engine tests/text tests/test_oracle.py

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
