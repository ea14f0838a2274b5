# Two commands: `make demo` and `make test`.  Each first installs what it needs into an environment of its own.
#   make test                  the committed versions (constraints.txt), in .venv
#   make test CONSTRAINTS=     the newest releases, in .venv-newest
#   make test VENV=/tmp/hsat   another place;  PYTHON=python3.12: another interpreter for a new environment
#   make lock                  write constraints.txt anew from the newest releases
PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
CONSTRAINTS := constraints.txt
VENV := .venv$(if $(CONSTRAINTS),,-newest)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(or $(notdir $(basename $(CONSTRAINTS))),newest)
QUIET := --quiet
PIP := $(BIN)/python -m pip install $(QUIET) $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo test lint install lock clean announce
.NOTPARALLEL:

# one thread: the network is too small to gain from more, and threads that wait for each other lose much on busy machines
demo: announce $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m hsat demo --out runs/demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(STAMP)

# sizes of the committed versions, measured on Linux with Python 3.13; GPU libraries are 2.2 of 3.2 GB, torch with triton 0.8
announce:
	@if $(MAKE) --question --no-print-directory $(STAMP) 2>/dev/null; \
	then echo "$(VENV) is complete: nothing is downloaded."; \
	else echo "First pip puts the packages into $(VENV), quietly.  On Linux, where torch brings its GPU libraries, that is"; \
	     echo "3.2 GB to download and 6 GB on the disk: about 5 minutes at 100 Mbit/s.  Elsewhere it is about 0.4 GB."; \
	     echo "torch without GPU libraries: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"; fi
	@echo "Then the demo takes a few minutes on two cores; it downloads nothing."

# torch and torchvision come in one call, so that their builds fit; torchattacks pins old versions of what others need
# newer, so it comes without its dependencies (only tests import it, and they are skipped without it)
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("hsat needs Python 3.11 or later, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed*
	$(PIP) --upgrade pip setuptools
	$(PIP) --upgrade --upgrade-strategy eager --no-warn-conflicts --no-build-isolation torch torchvision -e ".[dev]"
	$(PIP) --upgrade --no-deps torchattacks
	touch $(STAMP)

lock:
	$(PYTHON) tests/packaging/lock.py --pythons $(PYTHONS)

clean:
	rm -rf .venv .venv-newest* .venv-oldest* .venv-lock* runs build *.egg-info
