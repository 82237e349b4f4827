# What a developer runs is what CI runs. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
MODEL := smollm2-135m-instruct
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: install check test test-embed test-vllm postgres demo bench bench-peers release clean

install: .venv/installed
.venv/installed: pyproject.toml constraints.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(BIN)/python -m factory.kernels
	@touch $@

# Formatting, lint, types, import rules.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

test: install model postgres
	$(BIN)/python -m pytest

# The server for the tests of a ledger in PostgreSQL; without the right to install it they are skipped, and say so.
postgres:
	@if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null 2>&1 || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then :; else \
		echo "installing Debian's postgresql for the tests" && apt-get update -qq && apt-get install -y -qq postgresql >/dev/null; fi

# The embedder by sentence-transformers, which brings torch: apart from the rest, as it weighs more than all of it.
test-embed: install
	$(BIN)/python -m pip install --quiet -c constraints.txt torch sentence-transformers
	$(BIN)/python -m pytest tests/factory/test_embed.py

# The vllm teacher against a real vLLM on the CPU, in an environment of its own (3.9 GB, made once).
test-vllm: install model
	PYTHON=$(PYTHON) tests/vllm_environment.sh .vllm
	GRISTMILL_VLLM_PYTHON=$(CURDIR)/.vllm/bin/python $(BIN)/python -m pytest -vv -s -m vllm tests/generators/test_vllm.py

# The embedded teacher: 98 MB, fetched once, kept in the user's cache.
.PHONY: model
model: install
	@$(BIN)/gristmill teachers fetch $(MODEL)

# 40 real seeds in, a versioned dataset out, and the proof on a student.
demo: install model
	$(BIN)/gristmill run examples/bank-intents
	$(BIN)/gristmill release examples/bank-intents
	$(BIN)/python bench/probe.py --seeds examples/bank-intents/seeds.jsonl --version mill/datasets/bank-intents --dev bench/data/banking77_dev.jsonl

# Two hours; writes bench/results/*.json.
bench: install model
	$(BIN)/python bench/startup.py --json bench/results/startup.json
	$(BIN)/python bench/gateway.py --json bench/results/gateway.json
	$(BIN)/python bench/crash.py --json bench/results/crash.json
	$(BIN)/python bench/plan.py --json bench/results/plan.json
	$(BIN)/python bench/dedup.py --json bench/results/dedup.json
	$(BIN)/python bench/rules.py --json bench/results/rules.json
	$(BIN)/python bench/faults.py --json bench/results/faults.json
	$(BIN)/python bench/loop.py --json bench/results/loop.json
	$(BIN)/python bench/demo.py --seeds 0 1 --json bench/results/demo.json

# The gateway beside other engines, each in an environment of its own (2 GB); goes on where it stopped.
bench-peers: install
	$(BIN)/python bench/gateway.py --peers --resume --json bench/results/gateway.json

# A wheel and an sdist, checked.
release: check test
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
