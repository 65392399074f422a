# make setup | demo | test | soak | gpu | vllm | mlflow | s3 | format | build
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: setup demo test soak gpu vllm mlflow s3 format build clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,benchmarks]'
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

test: setup
	scripts/check
	$(BIN)/pytest --numprocesses=$(shell expr $$(nproc) + 1) --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

soak: setup
	$(BIN)/python scripts/soak.py

gpu: setup
	$(BIN)/pytest -m gpu tests/test_gpu.py

vllm: setup
	PYTHON=$(PYTHON) scripts/vllm

mlflow: setup
	PYTHON=$(PYTHON) scripts/mlflow

s3: setup
	PYTHON=$(PYTHON) scripts/s3

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: setup
	$(BIN)/python -m build

clean:
	rm -rf .venv .vllm-venv .mlflow-venv .s3-venv .demo build dist *.egg-info
