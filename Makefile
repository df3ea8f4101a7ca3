# make run    install, then harvest, train, evaluate and report on the embedded model and corpus (FRESH=1 starts anew)
# make test   install with the development extras, then lint, type check and test
# make torture  kills, damage, full disks and two at once, some minutes; TORTURE="--trials 50 --seed 1" for more
# make paper  the paper's table and questions into docs/results, about an hour on two cores
# make planted  what SAEs recover of planted features into docs/results/planted.md, about an hour on two cores
# make clean  remove the environment, the build and the run's data

PYTHON ?= python3
BIN := .venv/bin
CHAIN = harvest $(if $(FRESH),--fresh) train $(if $(FRESH),--fresh) eval report
# The editable install is a tree of links, one per file: it is made again when the list of files changes.
SOURCES := $(shell find . -path ./.venv -prune -o -path ./build -prune -o -path ./tests -prune -o -name "*.py" -print) $(wildcard py.typed evaluate/report/page/* paper/*.j2 data/embedded/* data/README.md)
LISTING := .venv/listing

.PHONY: run test fast torture lint types paper planted clean

run: .venv/installed
	$(BIN)/tcsae $(CHAIN)
	@echo "The store: data/activations.zarr. The SAE and its evaluation: data/runs. The report: data/report/index.html. Next:"
	@echo "  $(BIN)/tcsae inspect                                                 what was harvested and trained"
	@echo "  $(BIN)/tcsae feature --id 1                                          one feature in the terminal"
	@echo "  $(BIN)/tcsae train --preset topk eval report                         its twin without the temporal term"
	@echo "  $(BIN)/tcsae train --preset written-run3 eval report                 the paper's equations"

test: .venv/installed-dev lint types
	$(BIN)/pytest -n 2 --dist loadfile

paper: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m tcsae paper

planted: .venv/installed
	$(BIN)/tcsae planted

fast: .venv/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --hypothesis-profile=fast

torture: .venv/installed-dev
	$(BIN)/python tests/torture/run.py $(TORTURE)

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
	rm -rf .venv build *.egg-info data/activations.zarr data/runs data/report data/paper data/planted
