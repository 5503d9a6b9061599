# make demo   sets up .venv and makes an image: native and staged sampling side by side, on the embedded model
# make test   sets up .venv and runs everything that must hold: lint, types, tests
# make coverage  the tests once more, counting the branches that they run
#
# make docs   builds the documentation as a site, in site/
# make oldest tests what touches diffusers with the oldest version that is supported, in an environment that is kept
#
# All need Python 3.10 or newer and make; PYTHON=python3.12 chooses one, PIP_ARGS="--index-url ..." goes to pip.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
PIP_ARGS ?=
PROMPT ?= a red striped circle and a blue star over green hills under an orange sky, the word FLOW
WORK ?= runs/demo

CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mrflow

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
# What says which packages an environment has.
ASKED := pyproject.toml dependencies.txt constraints.txt
CORE_COVERAGE := 95
# Processes that share the tests, a file of them each. With one thread of torch: two wait for each other on small tensors.
WORKERS ?= 2
# Holds no code of ours, so it serves every checkout until a pin or the Python changes.
OLDEST := $(CACHE)/oldest-$(shell $(PYTHON) -c 'import sys, zlib; print("%d.%d-%08x" % (*sys.version_info[:2], zlib.crc32(open("requirements-oldest.txt", "rb").read())))')

.PHONY: demo test coverage docs oldest lint types train figures clean

demo: $(VENV)/.demo
	$(BIN)/mrflow compare "$(PROMPT)" --out $(OUT)
	@echo "The image is $(OUT)/compare.png"

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# Takes half as long again as the tests alone.
coverage: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--cov=mrflow_sched --cov-report=term --cov-fail-under=$(CORE_COVERAGE) $(PYTEST_ARGS)

# The site, in site/: every link, anchor and name of the reference must hold.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Everything but the WebUI, whose hosts bring diffusers of their own or none, the building of packages, the benches, and
# what uses no library whose version is pinned: plans, image files, solvers, training; and the sweep, whose page is of the newest.
# Two processes share it, about half each.
HALF := tests/engines tests/methods tests/measure tests/demo tests/upscaling tests/docs
oldest: $(OLDEST)/.made
	printf '%s\n' "$(HALF) --ignore=tests/engines/test_every_pipeline.py" "tests $(HALF:%=--ignore=%) \
		--ignore=tests/webui --ignore=tests/test_packaging.py --ignore=tests/test_watch.py --ignore=tests/plan \
		--ignore=tests/images --ignore=tests/sampling --ignore=tests/bench --ignore=tests/tools" | \
		PYTHONPATH=. OMP_NUM_THREADS=1 xargs -P $(WORKERS) -I PART \
		sh -c '$(OLDEST)/bin/python -m pytest -q -p no:cacheprovider PART $(PYTEST_ARGS)'

$(OLDEST)/.made:
	@echo "Installing into $(OLDEST); the first time takes some minutes."
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q $(PIP_ARGS) -r requirements-oldest.txt
	@touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/ruff check --preview --select D,DOC501 --ignore D105,D107 mrflow_sched
	$(BIN)/pydoclint --quiet mrflow_sched

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, for example: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python $(ASKED)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python $(ASKED)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(BIN)/python $(ASKED)
	$(PIP) -e '.[docs]'
	@touch $@

# Trains the embedded model again, from nothing, in six to seven hours on two CPU cores; WORK needs 12 GB.
train: $(VENV)/.dev
	$(BIN)/python -m tools.train --work $(WORK)

# Images and tables of docs/, from the weights and the training record in WORK.
figures: $(VENV)/.dev
	$(BIN)/python -m tools.figures --work $(WORK)

clean:
	rm -rf $(VENV) $(OUT) build dist site .pytest_cache .ruff_cache .coverage
