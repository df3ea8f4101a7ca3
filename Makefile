# make run    install, harvest, train the default and its plain twin, evaluate, report, compare (FRESH=1 starts anew)
# make test   install with the development extras, then lint, type check and test
# make torture  kills, damage, full disks and two at once, some minutes; TORTURE="--trials 50 --seed 1" for more
# make paper  the paper's table and questions into docs/results, in 80 minutes on two cores
# make methods  every temporal method on one store, in one table into docs/results, under two hours on two cores
# make real-lm  the temporal presets on SmolLM2-135M (from pip's index) into docs/results, two hours on two cores
# make gpu    every stage on a GPU against the CPU, and how fast, into docs/results/gpu.md; one line where there is none
# make planted  what SAEs recover of planted features into docs/results/planted.md, under an hour on two cores
# make clean  remove the environment, the build and the run's data

PYTHON ?= python3
BIN := .venv/bin
# Fewer steps than the default of `train`: with the installation 5 to 10 minutes of two cores.
STEPS ?= 1250
TWINS = train --preset temporal-topk-centred --preset topk --steps $(STEPS) $(if $(FRESH),--fresh)
CHAIN = harvest $(if $(FRESH),--fresh) $(TWINS) eval report compare --run temporal-topk-centred --with topk
# The editable install is a tree of links, one per file: it is made again when the list of files changes.
SOURCES := $(shell find . -path ./.venv -prune -o -path ./build -prune -o -path ./tests -prune -o -name "*.py" -print) $(wildcard py.typed evaluate/report/page/* evaluate/report/script/* paper/pages/*.j2 data/embedded/* data/README.md)
LISTING := .venv/listing

.PHONY: run test fast torture lint types paper methods real-lm planted gpu clean

run: .venv/installed
	$(BIN)/tcsae $(CHAIN)

test: .venv/installed-dev lint types
	$(BIN)/pytest -n 2 --dist loadfile

paper: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m tcsae paper

planted: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m tcsae planted

fast: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --hypothesis-profile=fast

torture: .venv/installed-dev
	$(BIN)/python tests/torture/run.py $(TORTURE)

methods: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m tcsae methods

real-lm: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=strict -e '.[real-lm]'
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m tcsae real-lm

gpu: .venv/installed
	$(BIN)/python tests/gpu/run.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy -p tcsae

.venv/installed: .venv/bin/python pyproject.toml constraints.txt $(LISTING)
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=strict -e .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt $(LISTING)
	$(BIN)/python -m pip install -q -c constraints.txt --config-settings editable_mode=strict -e '.[dev]'
	@touch $@ .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

$(LISTING): .venv/bin/python FORCE
	@echo "$(sort $(SOURCES))" | cmp -s - $@ || echo "$(sort $(SOURCES))" > $@

.PHONY: FORCE
FORCE:

clean:
	rm -rf .venv build *.egg-info data/activations.zarr data/runs data/report data/paper data/methods data/real-lm data/planted
