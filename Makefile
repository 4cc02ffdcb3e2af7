# `make demo` and `make test` need nothing but Python >= 3.10 and the network: .venv is made once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo benchmark zoo test smoke test-faults soak test-gpu test-slurm lint docs clean

setup: $(STAMP)

$(STAMP): setup.py constraints.txt tools/install_detectron2.py
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: no '$(PYTHON)' here; install Python >= 3.10 or say which: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$("$(PYTHON)" -V 2>&1) is too old; Python >= 3.10 is needed: make PYTHON=python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: this Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch torchvision
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python tools/install_detectron2.py
	@touch $@

demo: $(STAMP)
	$(BIN)/python tools/sweep.py --config configs/sweeps/demo.py --jobs 1 --wait

benchmark: $(STAMP)
	$(BIN)/python tools/sweep.py --config configs/sweeps/shapes_quick.py --jobs 2 --wait

# Small weights of every method in output/zoo, with cards; "zoo://NAME" loads them.
zoo: $(STAMP)
	$(BIN)/python tools/sweep.py --config configs/sweeps/zoo.py --jobs 2 --wait
	$(BIN)/python tools/sweep.py zoo output/sweeps/zoo

# One thread a process: several of two threads on two cores are much slower than one after the other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations 30 -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --ignore=tests/slurm

# The installed wheel, from regions to a sweep; with another Python: make smoke PYTHON=python3.13 VENV=.venv-3.13
smoke: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_packaging.py

# Killed processes, signals, changed data, damaged files; also part of `make test`.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile tests/faults

# Kills tiny runs of all methods at random moments, e.g. make soak KILLS=50 STEPS=5000 SEED=1
KILLS ?= 200
STEPS ?= 20000
soak: $(STAMP)
	$(BIN)/python tests/faults/soak.py --kills $(KILLS) --steps $(STEPS) $(if $(SEED),--seed $(SEED))

# On a real slurmctld and two slurmd of this machine: apt-get install slurm-wlm munge
test-slurm: $(STAMP)
	REQUIRE_SLURM=1 $(BIN)/python -m pytest -q tests/slurm

# On a CUDA GPU; the tests of two GPUs are listed as not run where there is one.
test-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  "error: make test-gpu needs a GPU, and PyTorch finds none (try nvidia-smi)")'
	$(BIN)/python -m pytest -q -m gpu tests/gpu

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m black --check --quiet --diff .

# A site in site/; warnings are errors.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist *.egg-info
