# One line per target. `make help` lists them; every target sets up what it needs.
PYTHON ?= python3
TARGET ?= all
VERSION ?= 0.0.0
RECIPE ?= examples/digits/recipe.toml
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e
.DEFAULT_GOAL := help
.PHONY: help setup setup-tensorflow deploy release docs test lint types bench clean

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

setup: .venv/dev.stamp  ## everything that deploy, test, lint and types need, in .venv

setup-tensorflow: .venv/tensorflow.stamp  ## TensorFlow as well: the independent judge of TFLite artifacts in the tests

deploy: .venv/deploy.stamp  ## RECIPE=... to checked artifacts; TARGET=onnxruntime|tflite|all, ARGS="--force ..."
	$(BIN)/edgeship deploy '$(RECIPE)' $(patsubst %,--target %,$(filter-out all,$(TARGET))) $(ARGS)

release: .venv/deploy.stamp  ## RECIPE=... VERSION=1.2.0, deployed, verified and packed into dist/ with its report
	$(BIN)/edgeship deploy '$(RECIPE)' $(patsubst %,--target %,$(filter-out all,$(TARGET))) --out build/release --set 'release.version="$(VERSION)"' $(ARGS)
	$(BIN)/edgeship verify build/release/9-release
	mkdir -p dist && tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --transform 's,^9-release,release-$(VERSION),' -C build/release -c 9-release | gzip -n9 > dist/release-$(VERSION).tar.gz
	cp build/release/report.html dist/report-$(VERSION).html && cp build/release/junit.xml dist/gates-$(VERSION).xml

docs: .venv/dev.stamp  ## the documentation as a site, in build/site; any warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -n docs build/site && echo "open build/site/index.html"

test: .venv/dev.stamp  ## the test suite; ARGS="-k ..."; EDGESHIP_DATA=DIR adds the tests on real models
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

lint: .venv/dev.stamp  ## ruff, formatting, import directions
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

types: .venv/dev.stamp .cache/import-root/edgeship  ## mypy, strict
	MYPYPATH=.cache/import-root $(BIN)/mypy -p edgeship

bench: .venv/dev.stamp  ## the figures of the README; EDGESHIP_DATA=DIR adds those on real models
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## remove what the other targets made, but .venv
	rm -rf build dist .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache edgeship.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("edgeship needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "==> making .venv with $$($(PYTHON) --version)" && $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/deploy.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "==> installing edgeship and its runtimes into .venv (once; about 1.2 GB, most of it PyTorch)" && $(INSTALL) '.[torch,tflite,release]' && touch $@

.venv/dev.stamp: .venv/deploy.stamp
	@echo "==> installing the development tools into .venv" && $(INSTALL) '.[torch,tflite,train,release,examples,dev]' && touch $@

.venv/tensorflow.stamp: .venv/dev.stamp
	@echo "==> installing TensorFlow into .venv (about 2 GB)" && $(INSTALL) '.[tensorflow]' && touch $@

.cache/import-root/edgeship:
	mkdir -p $@ && ln -sfn ../../../pipeline ../../../targets ../../../calibration $@/
