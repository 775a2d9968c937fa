PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEMO = demo
MODEL = fixtures/tiny/llama

.PHONY: attack demo test test-all lint types contract tables parity-ci defects layouts bench bench-conversion bench-engine docs clean

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

attack: $(READY)  ## hostile files of every kind, 10000 each (INPUTS=…): refused, accepted, slowest, memory
	MBX_ATTACK_INPUTS=$(or $(INPUTS),10000) $(BIN)/python -m pytest -s tests/attack

layouts: $(READY)  ## every family through TP 1, 2, 4 x PP 1, 2 x EP 1, 2 and back, byte for byte
	$(BIN)/python -m pytest -n 2 tests/tables/test_family_layouts.py

docs: $(READY)  ## write docs/models.md again, from the tables and the measured figures
	$(BIN)/python -m mbx.catalogue.models_page docs/models.md
	$(BIN)/python -m benchmarks.figures docs/performance.md docs/training.md
	$(BIN)/python -m benchmarks.parity_figures docs/parity.md
	$(BIN)/python -m benchmarks.layout_figures docs/training.md

bench: $(READY)  ## what is promised of speed, beside cp -r and cat on two cores; SIZE=8b: all cores too
	$(BIN)/python -m benchmarks.speed --json fixtures/measured/speed.json $(if $(SIZE),--all-cores $(SIZE))

bench-conversion: $(READY)  ## time and memory of conversions with and without waiting for the disk, and of planning
	$(BIN)/python -m benchmarks.conversion --size 1b --plan

bench-engine: $(READY)  ## two cores, casts, 1 to 40 GB, hard memory limits, checks: 60 GB of disk, half an hour
	$(BIN)/python -m benchmarks.engine two-cores casts curve limits verify stages --json engine.json

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
