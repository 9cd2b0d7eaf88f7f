# make demo   trains, samples and scores the digits; FRESH=1 trains anew
# make test   the whole test suite on CPU
# make test-web  the page in a real browser (installs Gradio and Chromium)
# make dist   the wheel and the source archive in dist/, tried from an empty folder
# make docs   the documents as a site, in docs/_build/html
# make bench  the short benchmarks; writes docs/benchmarks.md
PYTHON ?= python3
BIN := .venv/bin
# By uv, which takes a fifth of pip's time. It does not read pip's settings:
# where these name a mirror that uv is not told of, pip does it after all.
# Neither compiles modules: most are never imported.
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile
PACKAGE = --constraint constraints.txt --editable '.$(EXTRAS)'
BY_UV := $(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python
INSTALL = $(BY_UV) $(PACKAGE) || $(PIP) $(PACKAGE)
unexport PYTHON  # the launch scripts read it, too
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2
export TF_ENABLE_ONEDNN_OPTS ?= 0

.PHONY: demo test test-slow test-web dist docs bench lint setup clean

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
	$(BIN)/python -m pytest -m web -rP tests/web

dist: .venv/test
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	DIST=dist $(BIN)/python -m pytest -n 0 -m slow tests/test_package.py

# What is broken or missing in a document ends it.
docs: .venv/docs docs/_build/static/mermaid.min.js
	$(BIN)/python -m sphinx -W --keep-going -q -j 2 docs docs/_build/html
	@echo "site: docs/_build/html/index.html"

bench: .venv/test
	$(BIN)/python -m benchmarks

lint: .venv/test
	$(BIN)/python -m ruff check .

setup: .venv/test

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/bin/uv: | .venv/bin/python
	$(PIP) --constraint constraints.txt uv

.venv/demo: setup.py constraints.txt | .venv/bin/uv
	$(INSTALL)
	touch $@

.venv/test: EXTRAS := [test,plan]
.venv/test: setup.py constraints.txt | .venv/bin/uv
	$(INSTALL)
	touch $@ .venv/demo

.venv/web: EXTRAS := [test-web,plan,web]
.venv/web: setup.py constraints.txt | .venv/bin/uv
	$(INSTALL)
	test -x /usr/bin/chromium-headless-shell || test -x /usr/bin/chromium || \
	  test "$$(id -u)" != 0 || apt-get install -y chromium-headless-shell
	touch $@ .venv/test .venv/demo

.venv/docs: EXTRAS := [docs]
.venv/docs: setup.py constraints.txt | .venv/bin/uv
	$(INSTALL)
	touch $@ .venv/demo

# Draws the diagrams in the reader's browser, who is to ask nobody else for it.
docs/_build/static/mermaid.min.js: | .venv/docs
	mkdir -p $(@D)
	cd $(@D) && $(CURDIR)/$(BIN)/npm pack --silent mermaid@11.12.1
	tar xzf $(@D)/mermaid-*.tgz -C $(@D) --strip-components=2 \
  package/dist/mermaid.min.js
	rm $(@D)/mermaid-*.tgz

clean:
	rm -rf .venv runs data build dist docs/_build docs/api *.egg-info
