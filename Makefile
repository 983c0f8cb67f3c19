# make demo    compress the embedded model with several recipes: table, checkpoint, report, picture
# make test    format, lint, types and the whole test suite
# make bench   timed cases on this machine
# make test-gpu, sanitize-gpu, bench-gpu   the same for the fused kernels, on a machine with a CUDA GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo test lint unit bench docs clean test-gpu sanitize-gpu bench-gpu

demo: $(VENV)/.ready-demo
	rm -rf demo-out
	$(BIN)/tnc demo --out demo-out

test: lint unit

lint: $(VENV)/.ready-test
	$(BIN)/ruff format --check tnc tests benchmarks examples
	$(BIN)/ruff check tnc tests benchmarks examples
	$(BIN)/mypy

unit: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto

bench: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.run

docs: $(VENV)/.ready-test
	$(BIN)/pip install --quiet -e ".[docs]" -c constraints.txt
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out results

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -e ".[hf,plot]" -c constraints.txt
	touch $@

$(VENV)/.ready-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -e ".[test]" -c constraints.txt
	touch $@ $(VENV)/.ready-demo

test-gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 8 tests/gpu tests/kernels -k "gpu or triton or words or tuned"

sanitize-gpu: $(VENV)/.ready-test
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -k sanitizer
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -k sanitizer

bench-gpu: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.gpu
