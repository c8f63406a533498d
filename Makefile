# make demo: the chat page with the embedded model.   make test: every test.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Python compiles what it imports and keeps that; pip would compile everything, for a minute.
INSTALL := -m pip install --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ray setup weights mini-weights lint types lock claims clean
demo: setup
	$(BIN)/python app.py

# Downloads, lint and types run side by side. The tests run in the order of their files: sorted by
# their number, files with few and long tests would come last, alone. Two processes would leave two
# cores idle a third of the time.
test: setup
	@$(MAKE) --no-print-directory --jobs --output-sync=target \
		mini-weights node_modules/installed lint types
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# A Ray cluster on this machine. Its environment is separate, as Ray changes the server's packages.
test-ray: setup weights .venv-ray/installed
	.venv-ray/bin/python -m pytest tests/test_serve_ray.py

lint: .venv/dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev-installed
	$(BIN)/mypy

# Exact versions into requirements*.txt, as installed here, of what pyproject.toml names.
lock: .venv/dev-installed
	$(BIN)/python scripts/lock

setup: .venv/installed

weights: setup
	@$(BIN)/python -m minigpt4 download nano

# Tests that need them are skipped where they cannot be had.
mini-weights: weights
	@-$(BIN)/python -m minigpt4 download mini

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv || \
		{ echo "On Debian and Ubuntu, first: sudo apt-get install python3-venv"; rm -rf .venv; exit 1; }

.venv/installed: requirements.txt requirements-train.txt .venv/bin/python
	$(BIN)/python $(INSTALL) --progress-bar on \
		-r requirements.txt -r requirements-train.txt
	$(BIN)/python $(INSTALL) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev-installed: requirements-dev.txt .venv/installed
	$(BIN)/python $(INSTALL) -r requirements-dev.txt
	@touch $@

.venv-ray/installed: requirements-ray.txt .venv/dev-installed
	$(PYTHON) -m venv .venv-ray
	@echo "$(CURDIR)/$$(ls -d .venv/lib/python3.*/site-packages)" > \
		$$(ls -d .venv-ray/lib/python3.*/site-packages)/minigpt4.pth
	.venv-ray/bin/python $(INSTALL) -r requirements-ray.txt
	@touch $@

# The paper's experiments on nano; their tables are written into docs/evaluation.md.
# DATA: a folder with stage1/val-00000.tar, stage1/train-*.tar and stage2/. N: number of pictures.
# STEPS: training steps of each variant. JUDGE: options that name a judge of abilities.
DATA ?= DATA
N ?= 50
STEPS ?= 100
EVALUATE := $(BIN)/python -m minigpt4 evaluate
INTO := --limit $(N) --markdown docs/evaluation.md
claims: setup weights
	$(EVALUATE) $(DATA)/stage1/val-00000.tar --experiment stages $(INTO)
	$(EVALUATE) $(DATA)/stage1/val-00000.tar --experiment pope $(INTO)
	$(EVALUATE) $(DATA)/stage1/val-00000.tar --experiment captions $(INTO)
	$(EVALUATE) --experiment abilities --drawn $(JUDGE) --markdown docs/evaluation.md
	$(BIN)/python -m research.architecture $(DATA)/stage1/val-00000.tar $(INTO) --steps $(STEPS) \
		--train '$(DATA)/stage1/train-*.tar' --described $(DATA)/stage2

# axe-core checks the page's accessibility. Without it that test is skipped and says what to do.
node_modules/installed: package.json
	@{ command -v npm >/dev/null && npm install --no-package-lock --no-audit --no-fund && \
		touch $@; } || echo "axe-core could not be installed: is npm there?"

clean:
	rm -rf .venv .venv-ray node_modules .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
