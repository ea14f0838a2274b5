# Two commands: `make demo` and `make test`.  Each installs what it needs into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint install clean

# one thread: the network is too small to gain from more, and threads that wait for each other lose much on busy machines
demo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python examples/demo.py --out runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

# torch and torchvision come together, so that their builds fit; torchattacks pins old versions of what others need
# newer, so it comes without its dependencies (it is only imported by one test file, which is skipped without it)
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("hsat needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet -e ".[dev]" pytorch-metric-learning scikit-learn scipy requests
	$(BIN)/python -m pip install --quiet --no-deps torchattacks
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs build *.egg-info
