PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
DEMO = demo
MODEL = fixtures/tiny/llama

# The other Megatron Core that the tests run with: its package alone, over the environment that is there already.
CORE = 0.19.2
OVERLAY = $(VENV)/core-$(CORE)
# The libraries that quantise, and what importing them takes, beside the environment that is there already.
QUANTISERS = compressed-tensors==0.20.1 bitsandbytes==0.50.2 nvidia-modelopt==0.47.0 torchao==0.18.0 \
  loguru nvidia-ml-py omegaconf pulp requests urllib3 idna certifi charset-normalizer scipy
CODECS = $(VENV)/codecs
# NVIDIA's resiliency extension, which Megatron Core 0.19 does not import beside, and so apart as well.
RESILIENCY = $(VENV)/resiliency
NVRX = nvidia-resiliency-ext==0.4.1 defusedxml nvidia-ml-py pynvml
# What touches Megatron Core, its names or its checkpoints.
CORE_TESTS = tests/unit/test_releases.py tests/parity tests/train tests/adapters tests/tables tests/api \
  tests/formats/test_layouts.py tests/formats/test_legacy.py tests/formats/test_fsdp_dtensor.py \
  tests/formats/test_reshard.py tests/formats/test_sidecars.py tests/formats/test_planned.py tests/cli/test_reports.py \
  tests/formats/test_model_class.py
# Of these, a minute's worth for every run of CI.
CORE_SMOKE = tests/unit/test_releases.py tests/parity/test_hybrid_oracle.py tests/parity/test_sparse_oracle.py \
  tests/train/test_two_releases.py tests/train/test_muon.py

# Two workers, which take whole files in the order that tests/conftest.py gives.
PYTEST = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# What CI checks beside the tests, the longest first.
CHECKS = smoke-core types parity-ci site tables contract lint
TOGETHER = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

.PHONY: checks site pictures notebooks attack kills codecs resiliency mutants demo test test-all test-core smoke-core lint types contract tables measure parity-ci defects train-matrix layouts bench bench-conversion bench-engine docs clean

demo: $(READY)  ## convert the shipped checkpoint both ways and prove it
	@rm -rf $(DEMO)
	$(BIN)/mbx convert hf-to-mcore $(MODEL) $(DEMO)/mcore --tp 2
	$(BIN)/mbx convert mcore-to-hf $(DEMO)/mcore $(DEMO)/hf
	$(BIN)/mbx verify parity $(MODEL) $(DEMO)/mcore --forward
	@diff -r --exclude=mbx_manifest.json $(MODEL) $(DEMO)/hf && echo "$(DEMO)/hf equals $(MODEL), byte for byte"

test: checks  ## everything CI runs
	$(PYTEST) -m "not gpu and not slow"

test-all: checks test-core  ## also the tests that take minutes
	$(PYTEST) -m "not gpu"

checks: $(READY)  ## what is checked beside the tests, two at a time; what each prints stays together
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 $(TOGETHER) $(CHECKS)

test-core: $(OVERLAY)/.ready  ## the tests that touch Megatron Core, under another release (CORE=0.19.2)
	MBX_OTHER_PYTHON=$(BIN)/python $(OVERLAY)/bin/python -m pytest -n 2 --dist loadfile -m "not gpu and not slow" $(CORE_TESTS)

smoke-core: $(OVERLAY)/.ready  ## a minute's worth of them
	MBX_OTHER_PYTHON=$(BIN)/python $(OVERLAY)/bin/python -m pytest -m "not gpu and not slow" $(CORE_SMOKE)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@test ! -x $(BIN)/hadolint || $(BIN)/hadolint docker/*.Dockerfile  # there is none for every platform

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

resiliency: $(RESILIENCY)/.ready  ## slow ranks and restarts in process, by NVIDIA's resiliency extension
	PYTHONPATH=$(RESILIENCY) $(BIN)/python -m pytest -rs tests/train/test_stragglers.py \
	  tests/train/test_in_process.py

mutants: $(READY)  ## try every table one step from a shipped one, and print which no leg finds
	$(BIN)/python -m pytest -v tests/tables/test_mutants.py

attack: $(READY)  ## hostile files of every kind, 10000 each (INPUTS=…): refused, accepted, slowest, memory
	MBX_ATTACK_INPUTS=$(or $(INPUTS),10000) $(BIN)/python -m pytest -s tests/attack

kills: $(READY)  ## a run of four ranks that are killed and stopped, its disk full, its mount gone; KILLS=30, SEED=…
	MBX_KILLS=$(or $(KILLS),30) MBX_KILLS_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/train/test_kills.py

codecs: $(CODECS)/.ready  ## folders that compressed-tensors, bitsandbytes and Model Optimizer quantise, against what they decode; and ours
	PYTHONPATH=$(CODECS) $(BIN)/python -m pytest -rs tests/formats/test_quantised_by_libraries.py \
	  tests/formats/test_fresh_by_libraries.py tests/formats/test_calibrated.py tests/formats/test_channel_scales.py

train-matrix: $(READY)  ## `verify training` for every family that trains on a CPU, with adapters and without, TP 1, TP 2, PP 2
	$(BIN)/python -m pytest -v tests/train/test_proof_families.py tests/train/test_modules_to_save.py \
	  tests/train/test_lora_head.py -k "every_family or the_proof_passes or two_shares"

layouts: $(READY)  ## every family through TP 1, 2, 4 x PP 1, 2 x EP 1, 2 and back, byte for byte
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/tables/test_family_layouts.py

measure: $(READY)  ## forward passes, on this CPU, of the families whose table changed since; 5 to 25 s each
	$(BIN)/python tests/gpu/run_forward.py --device cpu --jobs 1 --limit-s 3000 --stale --record --out build/measured

docs: $(READY)  ## write again what is made: docs/models.md, the figures, docs/reference
	$(BIN)/python -m mbx.catalogue.models_page docs/models.md
	$(BIN)/python -m benchmarks.figures docs/performance.md docs/training-figures.md
	$(BIN)/python -m benchmarks.parity_figures docs/parity.md
	$(BIN)/python -m benchmarks.layout_figures docs/training-figures.md
	$(BIN)/python -m benchmarks.bridge_figures docs/formats.md
	$(BIN)/python -m pages.commands docs/reference/commands.md
	$(BIN)/python -m pages.recipe_keys docs/reference/recipe-keys.md
	$(BIN)/python -m pages.python_names docs/reference/python.md

notebooks: $(VENV)/.notebooks  ## run the notebooks of examples/
	$(BIN)/python -m pytest -v tests/docs/test_examples.py -k notebook

pictures: $(READY)  ## the pictures of docs/ that are taken of real pages; needs chromium
	$(BIN)/python -m pages.pictures docs/assets

site: $(READY)  ## docs/ as a site, in build/site: no warning is let through
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

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

$(VENV)/.notebooks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[notebooks]"
	@touch $@

$(OVERLAY)/.ready: $(READY) tests/another_core.py
	$(BIN)/python tests/another_core.py $(CORE) $(OVERLAY)
	@touch $@

$(CODECS)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(CODECS) $(QUANTISERS)
	@touch $@

$(RESILIENCY)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(RESILIENCY) $(NVRX)
	@touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info
