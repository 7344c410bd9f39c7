# Everything runs in the project's own .venv, made on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export MPLBACKEND := Agg

.PHONY: help demo test lint format soak wheel clean bench bench-exactness bench-denoisers bench-data bench-processes \
  bench-guidance-hopper bench-updates bench-peer-sac bench-planning bench-maze bench-scoreboards

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: Python 3.11 or newer is needed, and '$(PYTHON)' is not: install it, or name one with make PYTHON=python3.12." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: Python's venv module is missing: install it (Debian and Ubuntu: apt install python3-venv)." >&2; exit 2; }
	@echo "installing into $(VENV) (once; about 1.5 GB with PyTorch for CPUs, several more with CUDA)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Collect, train, plan, evaluate, report: the main job in one go
	@$(BIN)/offline-cai demo

test: $(READY)  ## The whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

soak: $(READY)  ## Kill, damage and stop trainings, and compare what is resumed (about a quarter of an hour)
	@OMP_NUM_THREADS=1 $(BIN)/python eval/soak.py
	@OMP_NUM_THREADS=1 $(BIN)/python eval/soak_environments.py

bench: bench-exactness bench-denoisers bench-data bench-processes bench-updates bench-peer-sac bench-guidance-hopper bench-planning bench-maze bench-scoreboards  ## All benchmarks

bench-exactness: $(READY)  ## Exactness of the inference core, and of guided sampling against it
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_exactness.py

bench-denoisers: $(READY)  ## The temporal U-Net against an MLP, for equal training time
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_denoisers.py

bench-data: $(READY)  ## Speed and memory of the data layer, against what it replaces
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_data.py

bench-processes: $(READY)  ## What sharing a step between two processes costs
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_processes.py

bench-updates: $(READY)  ## Updates of SAC and IQL next to Stable-Baselines3's (which it installs)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_updates.py

bench-peer-sac: $(READY)  ## What Stable-Baselines3's SAC learns, beside our scoreboard (an hour; goes on where it was)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_peer_sac.py

bench-planning: $(READY)  ## Maze plans and their training next to the original Diffuser's (an hour; goes on where it was)
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_planning.py

bench-maze: $(READY)  ## What the maze planner reaches beside its references, goals, an obstacle, two ways (trains once)
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_maze.py

bench-scoreboards: $(READY)  ## All trainings behind README's tables of scores (hours; goes on where it was)
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_scoreboards.py

bench-guidance-hopper: $(READY)  ## Guided plans of hopper against a brute-force reweighting (collects and trains once)
	@OMP_NUM_THREADS=1 $(BIN)/python eval/bench_guidance_hopper.py

wheel: $(READY)  ## Build dist/*.whl
	@rm -rf dist build
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build dist *.egg-info
