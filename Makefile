# `make` lists the targets. Each does its own set-up: a .venv of the pinned versions, made once.
# Needs git, make and Python >= 3.11; another Python than python3: make PYTHON=python3.12 …

PYTHON ?= python3
PROFILE ?= toybox
SEEDS ?= 1
FAMILIES ?= uno ipap
ENGINE ?= local

# Where this is set (containers often do), every process compiles what it imports anew, which doubles an import of torch
# and diffusers.
unexport PYTHONDONTWRITEBYTECODE

python := .venv/bin/python
ready := .venv/.ready

# uv from the PATH, or else from pip inside the .venv.
ifeq ($(shell command -v uv),)
uv := $(python) -m uv
make_venv = $(PYTHON) -m venv .venv && $(python) -m pip install --quiet uv
else
uv := uv
make_venv = uv venv --quiet --allow-existing --python $(PYTHON) .venv
endif

.DEFAULT_GOAL := help
.PHONY: help lab reproduce reference test test-ray processors older-processors data lint format strip bench toybox-weights lock clean

help: ## List the targets
	@echo "FocusDPO reproduction kit: make <target>"
	@sed -n 's/^\([a-z.-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F '|' '{printf "%-18s %s\n", $$1, $$2}'

reproduce: $(ready) ## Run every notebook and print Tables 1 and 2 (PROFILE=toybox SEEDS=1 FAMILIES=uno ENGINE=ray)
	$(python) -m focusdpo_lib.batch.reproduce --profile "$(PROFILE)" --seeds "$(SEEDS)" --families $(FAMILIES) \
	  --engine "$(ENGINE)"

# JupyterLab saves what it shows by itself: on copies, so that the kit's own notebooks stay as they are in git.
lab: $(ready) ## Open JupyterLab on your own copies of the notebooks, in my_notebooks/
	@mkdir -p my_notebooks/.kit
	@for book in notebooks/*.ipynb; do \
	  mine=my_notebooks/$${book##*/} before=my_notebooks/.kit/$${book##*/}; \
	  if test ! -e $$mine; then cp $$book $$mine && cp $$book $$before; \
	  elif ! cmp -s $$book $$before; then echo "$$book has changed since $$mine was made: delete that to get it anew"; fi; \
	done
	$(python) -m jupyterlab my_notebooks

reference: $(ready) ## Make results/reference/ anew: three seeds of everything, its tables, figures and pages
	$(python) -m focusdpo_lib.batch.reproduce --seeds 3 --reference results/reference

data: $(ready) ## Fetch DreamBench's photos into data/dreambench (112 MB, checked; or set DREAMBENCH_DIR to a copy)
	$(python) -m focusdpo_lib.evaluation.dreambench

# One thread a process: the tests' tensors are small, and threads would only wait for each other. A file stays with one
# worker, for its tests share what they make, and the longest come first (tests/conftest.py).
pytest := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(python) -m pytest -q
workers := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint ## Lint and test (within 10 minutes; downloads nothing but the packages)
	$(pytest) $(workers) $(alone:%=--ignore %)

# Ray gives up a node that takes 30 seconds to start, which it may where anything runs beside it.
alone := tests/test_engine_ray.py tests/test_faults.py tests/test_dip_faults.py

test-ray: $(ready) ## Test the engine ray on a cluster of pretend GPUs, and faults (long; on a machine that does nothing else)
	$(pytest) $(alone)

# What computes, as on other processors: older instruction sets, bfloat16 arithmetic of their own or none.
numbers := masks objectives backbone_flux_uno backbone_sdxl_ip both_families training_loop training_pairs bench \
  bench_count grade generation evaluation_encoders toybox_encoders toybox_pipelines toybox_transformer
older := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
as = $(1) $(pytest) $(workers) --bfloat16 $(2) $(numbers:%=tests/test_%.py)

processors: older-processors ## Test what computes as on other processors: older ones, and this one with and without bf16
	$(call as,,no)
	$(call as,,yes)

older-processors: $(ready) ## Of that, the older ones (numbers="masks objectives": these files alone)
	$(call as,$(older),no)
	$(call as,$(older),yes)

lint: $(ready) ## Check style, format, and that notebooks are committed without outputs
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) tests/check_notebooks.py notebooks

format: $(ready) ## Correct what `make lint` can correct by itself
	$(python) -m ruff check --fix
	$(python) -m ruff format

strip: $(ready) ## Clear the outputs of the notebooks, as they are committed
	$(python) -m nbstripout --drop-empty-cells notebooks/*.ipynb

bench: $(ready) ## What a step costs, a start, scoring, and the engine ray (30 minutes; full size on a GPU)
	$(python) -m focusdpo_lib.bench
	$(python) -m focusdpo_lib.bench.starts
	$(python) -m focusdpo_lib.bench.scoring
	$(python) -m focusdpo_lib.batch.engines.cost

toybox-weights: $(ready) ## Train every toybox model from nothing (hours on a CPU; resumable)
	$(python) -m focusdpo_lib.toybox.recipe

lock: $(ready) ## Resolve pyproject.toml and constraints.txt anew into requirements.txt
	$(uv) pip compile pyproject.toml --extra dev --constraints constraints.txt --output-file requirements.txt \
	  --upgrade --universal --fork-strategy fewest --python-version 3.11 \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet

.venv: $(ready) ## Make the .venv only

clean: ## Remove the .venv and caches; results/, build/ and my_notebooks/ stay
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: a set-up that was interrupted is done again.
$(ready): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: install a newer Python, or name it: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up .venv (once, about a minute) …"
	@test -x $(python) && $(uv) --version >/dev/null 2>&1 || { $(make_venv); }
	@$(uv) pip install --quiet --python $(python) -r requirements.txt
	@$(uv) pip install --quiet --python $(python) --no-deps --no-build-isolation -e .
	@touch $(ready)
