# make demo: the chat page with the embedded model.   make test: every test.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test setup weights lint clean
demo: setup
	$(BIN)/python app.py

test: setup weights .venv/dev-installed lint
	$(BIN)/python -m pytest

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

setup: .venv/installed

weights: setup
	@$(BIN)/python -m minigpt4 download nano

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || \
		{ echo "On Debian and Ubuntu, first: sudo apt-get install python3-venv"; rm -rf .venv; exit 1; }

.venv/installed: requirements.txt requirements-train.txt .venv/bin/python
	$(BIN)/python -m pip install --progress-bar on \
		-r requirements.txt -r requirements-train.txt
	@touch $@

.venv/dev-installed: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
