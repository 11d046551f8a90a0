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

.PHONY: demo test quick check lint format types docs coverage reliability oldest newest test-mpi mpi-jobs test-clients
.PHONY: clients test-chainer test-gpu bench bench-mpi bench-gpu on-gpu peers communication.md ready clean

# One thread, as in the tests: with more, the demo takes more than twice as long on a busy machine.
demo: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python examples/digits/train_digits.py --out result

# A process per core, each with one thread: small arrays gain nothing from more.
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto

# In less than a minute: style, types, and the tests of each wing by itself.
quick: lint types
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto tests/batches tests/window tests/state tests/observations tests/test_source.py

check: lint types docs demo coverage reliability test-clients oldest newest

format: $(READY)
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

lint: $(READY)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY)
	$(RUN) mypy

# A warning is an error.
docs: $(READY)-for-docs
	$(RUN) pytest tests/docs
	rm -rf build/docs
	$(RUN) sphinx -W --keep-going -q docs build/docs

# Lines and branches that no test runs. It fails if their share grows; setup.cfg has the limit.
coverage: $(READY)
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --cov --cov-report=term:skip-covered

# Kills, exceptions, memory limits, damaged snapshots, bad inputs, random programs and interrupts, and how many of each.
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

# A folder for each rank: pytest's own folder for temporary files is not for several at a time.
mpi-jobs: $(READY)
	mkdir -p $(VENV)/tmp
	for ranks in 2 4; do \
		MPIEXEC_TIMEOUT=300 OMP_NUM_THREADS=1 $(VENV)/bin/mpiexec -n $$ranks sh -c \
			'exec $(RUN) pytest --basetemp=$(VENV)/tmp/$$$$ -p no:cacheprovider --capture=sys tests/mpi' || exit; \
	done
	OMP_NUM_THREADS=1 $(RUN) pytest tests/examples/test_example_chainermn.py

# Chainer's own tests, of the checkout that CHAINER names, with what some of them ask for.
test-chainer:
	$(MAKE) ready VENV=.venvs/chainer REQUIREMENTS="scipy h5py mock pillow pytest-timeout"
	OMP_NUM_THREADS=1 MPLBACKEND=agg .venvs/chainer/bin/python tools/test_chainer.py \
		"$(or $(CHAINER),$(error name a checkout of Chainer: make test-chainer CHAINER=/path/to/chainer))" \
		-n auto --timeout 300

# Programs and libraries that others made for Chainer, on a Python that has removed some of what they look up.
test-clients:
	$(MAKE) clients VENV=.venvs/clients PYTHON="$(or $(PYTHON),$$(tools/pythons.sh | grep '3\.1[23]' | tail -n 1))"

clients: $(READY)-with-clients
	CHAINER_ACCUM_COMPAT=all OMP_NUM_THREADS=1 $(RUN) pytest -n auto -W ignore -o markers="gpu: of ChainerCV" tests/clients

# For a machine with a GPU, in an environment that has CuPy: these two install nothing, and take the interpreter as it is.
# Without NVIDIA_TF32_OVERRIDE=0, cuDNN may round float32 to 10 bits.
ON_GPU = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" NVIDIA_TF32_OVERRIDE=0 $(or $(PYTHON),python3)

# Tests that were written for the host and hold on a device.
ANYWHERE = running_statistics cached_gradients exponential_moving_average iterators keep_random_state training \
	mixed_precision nonfinite out_of_memory prefetching schedules sizes snapshots transparency updater

test-gpu: on-gpu
	$(ON_GPU) -m pytest --device=@cupy:0 tests/gpu $(foreach name,$(ANYWHERE),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))

# The table that is there is replaced only by a whole one.
bench-gpu: on-gpu
	$(ON_GPU) benchmarks/gpu.py >benchmarks/gpu.md.new || { rm -f benchmarks/gpu.md.new; exit 1; }
	if [ -s benchmarks/gpu.md.new ]; then mv benchmarks/gpu.md.new benchmarks/gpu.md; else rm benchmarks/gpu.md.new; fi

on-gpu:
	@$(ON_GPU) -W ignore -c 'import chainer_accum, chainer, hypothesis, pytest' || { \
		echo "test-gpu and bench-gpu need chainer, pytest and hypothesis, and a CuPy for a GPU; install them, as in" >&2; \
		echo "PIP_CONSTRAINT=build-constraints.txt PIP_BUILD_CONSTRAINT=build-constraints.txt \\" >&2; \
		echo "  $(or $(PYTHON),python3) -m pip install chainer pytest hypothesis 'cupy-cuda12x[ctk]'" >&2; \
		exit 1; }

# One thread, so that what is compared does not depend on what else the machine does.
bench: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/overhead.py >benchmarks/overhead.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/weight_gradients.py >benchmarks/weight_gradients.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/memory.py >benchmarks/memory.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/growth.py >benchmarks/growth.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/lockstep.py >benchmarks/lockstep.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/auto.py >benchmarks/auto.md
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/lengths.py >benchmarks/lengths.md
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

clean:
	rm -rf .venv .venvs .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist result
	find . -name __pycache__ -prune -exec rm -rf {} +

# The compiler is one that compiles nothing: ChainerCV's only module in C is for GPUs, and no new Python can compile it.
$(READY)-with-clients: $(READY) tests/clients/requirements.txt tests/clients/clients.txt
	$(RUN) pip install --disable-pip-version-check --quiet --requirement tests/clients/requirements.txt
	CC=true LDSHARED=true $(RUN) pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation \
		--requirement tests/clients/clients.txt
	touch $@

# Only those who build the documentation need Sphinx.
$(READY)-for-docs: $(READY)
	$(RUN) pip install --disable-pip-version-check --quiet --editable '.[docs]'
	touch $@

$(READY): setup.py setup.cfg pyproject.toml build-constraints.txt $(CONSTRAINTS) tools/make_venv.sh
	REQUIREMENTS="$(REQUIREMENTS)" tools/make_venv.sh $(VENV) "$(PYTHON)" $(addprefix --constraint ,$(CONSTRAINTS))
	touch $@
