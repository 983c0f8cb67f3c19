# make demo    compress the embedded model with several recipes: table, checkpoint, report, picture
# make test    format, lint, types and the whole test suite
# make bench   timed cases on this machine
# make test-gpu    the suite of the fused kernels on a CUDA GPU, then (make sanitize-gpu) under compute-sanitizer if it is there
# make bench-gpu   every time of docs/kernels.md on this GPU, into results/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash
SANITIZER ?= $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda*/bin/compute-sanitizer))

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
	@if [ -n "$(SANITIZER)" ]; then $(MAKE) sanitize-gpu; else echo "no compute-sanitizer here: memcheck and racecheck did not run"; fi

# a cudaMalloc for each tensor, so that memcheck sees where each one ends
sanitize-gpu: $(VENV)/.ready-test
	@for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(or $(SANITIZER),compute-sanitizer) --tool $$tool --error-exitcode 1 \
	    $(BIN)/python -m pytest tests/gpu/test_small_on_gpu.py || exit 1; done

bench-gpu: $(VENV)/.ready-test
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu_layers
	$(BIN)/python -m benchmarks.gpu_moe
	$(BIN)/python -m benchmarks.gpu_rotations
