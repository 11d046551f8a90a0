# Each target works on a fresh checkout: what it needs is installed in a virtual environment of this checkout first.
# To choose the interpreter: make PYTHON=python3.12 test
PYTHON =
VENV = .venv
CONSTRAINTS =
REQUIREMENTS =
MPI = mpich mpi4py~=4.0
RUN = $(VENV)/bin/python -m

# Named for the interpreter, so that asking for another one makes the environment anew.
READY = $(VENV)/made-with-$(or $(subst /,-,$(PYTHON)),default)

.PHONY: demo test test-mpi mpi-jobs check lint types docs reliability oldest newest coverage bench bench-mpi peers
.PHONY: communication.md ready clean

demo: $(READY)
	$(VENV)/bin/python examples/digits/train_digits.py --out result

# A process per core, each with one thread: small arrays gain nothing from more.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto

check: lint types docs demo reliability oldest newest

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY)
	$(RUN) mypy

# A warning is an error.
docs: $(READY)-for-docs
	$(RUN) pytest tests/test_readme.py tests/test_docs.py
	rm -rf build/docs
	$(RUN) sphinx -W --keep-going -q docs build/docs

# Kills, exceptions, memory limits, damaged snapshots, bad inputs and random cases, and how many of each.
reliability: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/reliability

# The ends of the range of Pythons that this machine has, the lower one with the oldest NumPy.
oldest:
	$(MAKE) test VENV=.venvs/oldest PYTHON="$$(tools/pythons.sh | head -n 1)" CONSTRAINTS=oldest-constraints.txt

newest: $(READY)
	newest="$$(tools/pythons.sh | tail -n 1)"; \
	[ "$$("$$newest" -V)" = "$$($(VENV)/bin/python -V)" ] || $(MAKE) test VENV=.venvs/newest PYTHON="$$newest"

# The tests with ChainerMN, with an MPI from the package registry: on new versions of all, and on NumPy 1 with mpi4py 3.
test-mpi:
	$(MAKE) mpi-jobs VENV=.venvs/mpi REQUIREMENTS="$(MPI)"
	$(MAKE) mpi-jobs VENV=.venvs/mpi-oldest REQUIREMENTS="mpich mpi4py~=3.1" \
		PYTHON="$$(tools/pythons.sh | head -n 1)" CONSTRAINTS=oldest-constraints.txt

mpi-jobs: $(READY)
	for ranks in 2 4; do \
		MPIEXEC_TIMEOUT=300 OMP_NUM_THREADS=1 $(VENV)/bin/mpiexec -n $$ranks \
			$(RUN) pytest -p no:cacheprovider --capture=sys tests/mpi || exit; \
	done
	OMP_NUM_THREADS=1 $(RUN) pytest tests/test_example_chainermn.py

# One thread, so that what is compared does not depend on what else the machine does.
bench: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/overhead.py >benchmarks/overhead.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/weight_gradients.py >benchmarks/weight_gradients.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/memory.py >benchmarks/memory.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/growth.py >benchmarks/growth.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/auto.py >benchmarks/auto.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/prefetch.py >benchmarks/prefetch.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/noise_scale.py >benchmarks/noise_scale.md
	$(MAKE) peers

# PyTorch and what is built on it are large: they are in an environment of their own.
peers:
	$(MAKE) ready VENV=.venvs/peers REQUIREMENTS=-rbenchmarks/peers-requirements.txt
	OMP_NUM_THREADS=1 .venvs/peers/bin/python benchmarks/peers.py >benchmarks/peers.md

ready: $(READY)

bench-mpi:
	$(MAKE) communication.md VENV=.venvs/mpi REQUIREMENTS="$(MPI)"

communication.md: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/mpiexec -n 2 $(VENV)/bin/python benchmarks/communication.py >benchmarks/$@

coverage: $(READY)
	$(RUN) coverage run -m pytest
	$(RUN) coverage report

clean:
	rm -rf .venv .venvs .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist result
	find . -name __pycache__ -prune -exec rm -rf {} +

# Only those who build the documentation need Sphinx.
$(READY)-for-docs: $(READY)
	$(RUN) pip install --disable-pip-version-check --quiet --editable '.[docs]'
	touch $@

$(READY): setup.py setup.cfg build-constraints.txt $(CONSTRAINTS) tools/make_venv.sh
	REQUIREMENTS="$(REQUIREMENTS)" tools/make_venv.sh $(VENV) "$(PYTHON)" $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@
