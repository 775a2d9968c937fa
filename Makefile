PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEMO = demo
MODEL = fixtures/tiny/llama

.PHONY: demo test test-all lint types contract tables parity-ci defects bench docs clean

demo: $(READY)  ## convert the shipped checkpoint both ways and prove it
	@rm -rf $(DEMO)
	$(BIN)/mbx convert hf-to-mcore $(MODEL) $(DEMO)/mcore --tp 2
	$(BIN)/mbx convert mcore-to-hf $(DEMO)/mcore $(DEMO)/hf
	$(BIN)/mbx verify parity $(MODEL) $(DEMO)/mcore --forward
	@diff -r --exclude=mbx_manifest.json $(MODEL) $(DEMO)/hf && echo "$(DEMO)/hf equals $(MODEL), byte for byte"

test: lint types contract tables parity-ci  ## everything CI runs
	$(BIN)/python -m pytest -n 2 -m "not gpu and not slow"

test-all: lint types contract tables parity-ci  ## also the tests that take minutes
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

contract: $(READY)
	$(BIN)/lint-imports

tables: $(READY)
	$(BIN)/mbx models check

parity-ci: $(READY)  ## the conversion checks of mbx-ci.toml, as a user's own CI runs them
	$(BIN)/mbx verify ci mbx-ci.toml

defects: $(READY)  ## plant every defect of the catalogue and print which leg found it
	$(BIN)/python -m pytest -v tests/parity/test_defects.py

docs: $(READY)  ## write docs/models.md again, from the tables and the measured figures
	$(BIN)/python -m mbx.models_page docs/models.md
	$(BIN)/python -m benchmarks.figures docs/performance.md

bench: $(READY)  ## time and memory of conversions against cp -r
	$(BIN)/python -m benchmarks.convert --size 1b --plan

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
