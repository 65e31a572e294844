# Set-up, demo and tests. Everything lands in .venv and out/.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint bench clean

demo: $(READY)
	mkdir -p out
	$(BIN)/odsora-compile examples/open_sora/stdit3.py --passes tdtm,cidl \
	    -o out/stdit3.odsora --force
	$(BIN)/odsora-run out/stdit3.odsora --example -o out/v.safetensors --force

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/compile.py

$(READY): setup.cfg pyproject.toml constraints.txt $(wildcard plugins/*/setup.cfg)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --editable '.[test]' --editable plugins/odsora-palettize
	touch $(READY)

clean:
	rm -rf .venv out
