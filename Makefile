# Set-up, demo and tests. Everything lands in .venv and out/.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/ready
PROMPT ?= a red circle moving left
SEED ?= 7
export PROMPT SEED

.PHONY: demo test lint bench quality clean

demo: $(READY)
	mkdir -p out
	$(BIN)/odsora-compile examples/shapes/pipeline.py --passes tdtm,lpl,cidl \
	    -o out/shapes.odsora --force
	$(BIN)/odsora-run out/shapes.odsora --prompt "$$PROMPT" --seed "$$SEED" \
	    -o out/film.mp4 --force
	$(BIN)/odsora-run out/shapes.odsora --prompt "$$PROMPT" --seed "$$SEED" \
	    -o out/film.png --force

test: $(READY)
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/compile.py

quality: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python benchmarks/quality.py --plot docs/quality.png

$(READY): setup.cfg pyproject.toml constraints.txt $(wildcard plugins/*/setup.cfg)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    --editable '.[test]' --editable plugins/odsora-palettize
	touch $(READY)

clean:
	rm -rf .venv out
