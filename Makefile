# make demo   trains, samples and scores the digits; FRESH=1 trains anew
# make test   the whole test suite on CPU
# make test-web  the page in a real browser (installs gradio and chromium)
# make dist   the wheel and the source archive in dist/, tried from an empty folder
# make bench  the short benchmarks; writes docs/benchmarks.md
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported: most never are.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile
unexport PYTHON  # the launch scripts read it, too
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_ENABLE_ONEDNN_OPTS ?= 0

.PHONY: demo test test-slow test-web dist bench lint setup clean

# Measured on 2 cores: as one device the CPU keeps 1.5 of them busy, as two 1.8;
# and a quarter of that went into giving memory back and asking for it anew.
demo: export JAX_NUM_CPU_DEVICES ?= 2
demo: export MALLOC_MMAP_MAX_ ?= 0
demo: export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
demo: .venv/demo
	$(BIN)/python -m diffit_jax.demo $(if $(FRESH),--fresh)

test: .venv/test
	$(BIN)/python -m pytest

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

test-web: .venv/web
	$(BIN)/python -m pytest -m web -n 0 -s tests/web

dist: .venv/test
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	DIST=dist $(BIN)/python -m pytest -n 0 -m slow tests/test_package.py

bench: .venv/test
	$(BIN)/python -m benchmarks

lint: .venv/test
	$(BIN)/python -m ruff check .

setup: .venv/test

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo: setup.py constraints.txt | .venv/bin/python
	$(PIP) --constraint constraints.txt --editable .
	touch $@

.venv/test: setup.py constraints.txt | .venv/bin/python
	$(PIP) --constraint constraints.txt --editable '.[test,plan]'
	touch $@ .venv/demo

.venv/web: setup.py constraints.txt | .venv/bin/python
	$(PIP) --constraint constraints.txt --editable '.[test-web,plan,web]'
	test -x /usr/bin/chromium || test "$$(id -u)" != 0 || \
	  apt-get install -y chromium
	touch $@ .venv/test .venv/demo

clean:
	rm -rf .venv runs data build dist *.egg-info
