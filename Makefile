# What a developer runs is what CI runs. `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
MODEL := smollm2-135m-instruct
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 2

.PHONY: install check test test-embed demo bench release clean

install: .venv/installed
.venv/installed: pyproject.toml constraints.txt Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# Formatting, lint, types, import rules.
check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

test: install model
	$(BIN)/python -m pytest

# The embedder by sentence-transformers, which brings torch: apart from the rest, as it weighs more than all of it.
test-embed: install
	$(BIN)/python -m pip install --quiet -c constraints.txt torch sentence-transformers
	$(BIN)/python -m pytest tests/factory/test_embed.py

# The embedded teacher: 98 MB, fetched once, kept in the user's cache.
.PHONY: model
model: install
	@$(BIN)/gristmill teachers fetch $(MODEL)

# 40 real seeds in, a versioned dataset out, and the proof on a student.
demo: install model
	$(BIN)/gristmill run examples/bank-intents
	$(BIN)/gristmill release examples/bank-intents
	$(BIN)/python bench/probe.py --seeds examples/bank-intents/seeds.jsonl --version mill/datasets/bank-intents --dev bench/data/banking77_dev.jsonl

# Minutes to half an hour; writes bench/results/*.json.
bench: install model
	$(BIN)/python bench/startup.py --json bench/results/startup.json
	$(BIN)/python bench/demo.py --seeds 0 1 --json bench/results/demo.json

# A wheel and an sdist, checked.
release: check test
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
