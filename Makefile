# Targets set up what they need in .venv, gpu alone takes the active python; nothing else on the machine is changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# The tests of what runs on Triton kernels: a second time under the interpreter, which shows the kernels on the CPU.
KERNEL_TESTS := tests/test_adaptive_margin.py tests/test_batch_invariance.py tests/test_certified.py \
	tests/test_derivatives.py tests/test_diagnostics.py tests/test_from_logps.py tests/test_given_logps.py \
	tests/test_gradients.py tests/test_kl.py \
	tests/test_linear_logps.py tests/test_loss.py tests/test_low_rank.py tests/test_methods.py \
	tests/test_numerics.py tests/test_pair_loss.py tests/test_parallel_heads.py tests/test_rows.py \
	tests/test_schedules.py
# They need no GPU. In `make test` for sm_80 and sm_90; the other architectures are slow.
COMPILE_TESTS := tests/test_compile.py tests/test_launch_resources.py

# Packages are byte-compiled when they are first imported, and that is kept: installing takes 35 s instead of 90.
demo test reproduce report lint: export PYTHONDONTWRITEBYTECODE :=

# Where other processes want the cores too, threads that spin at every barrier cost several times the work.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test gpu reproduce lint clean

# DeepSpeed, which the tests bring and transformers imports, would warn that there is no GPU for it.
demo: export DS_ACCELERATOR ?= cpu
demo: $(VENV)/ready
	$(RUN) examples/quickstart.py

# The papers' figures, and their methods side by side: 12 minutes on 2 cores.
reproduce: $(VENV)/ready
	$(RUN) examples/reproduce.py

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile $(COMPILE_TESTS:%=--ignore %)
	@if $(RUN) -c "import triton" 2> /dev/null; then \
		echo "Triton kernels, compiled for GPUs:"; \
		$(RUN) -m pytest -n auto --dist loadgroup $(COMPILE_TESTS) && \
		echo "Triton kernels on the CPU, through the interpreter:" && \
		TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadfile $(KERNEL_TESTS); \
	else \
		echo "No triton on this platform: the kernels were not tested."; \
	fi

# The kernels on each release of Triton that the launch table holds for, installed over .venv: 16 minutes on
# 2 cores for all, and `make test-triton-3.9.0` for one.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0
OVERLAYS := $(TRITONS:%=.tritons/%/ready)

.PHONY: test-tritons $(TRITONS:%=test-triton-%)
test-tritons: $(TRITONS:%=test-triton-%)

$(TRITONS:%=test-triton-%): test-triton-%: .tritons/%/ready
	@echo "Triton $*: compiles the kernels for GPUs, then runs them in the interpreter; 4 minutes on 2 cores."
	PYTHONPATH=$(CURDIR)/.tritons/$* $(RUN) -m pytest -n auto --dist loadgroup -m "slow or not slow" tests/test_compile.py
	PYTHONPATH=$(CURDIR)/.tritons/$* TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(RUN) -m pytest -n auto --dist loadfile $(KERNEL_TESTS)

# The interpreter of Triton 3.6 fails with numpy 2.4.
$(OVERLAYS): .tritons/%/ready: $(VENV)/ready
	$(RUN) -m pip install --quiet --no-deps --upgrade --target .tritons/$* \
		triton==$* $(if $(filter 3.6.0,$*),'numpy<2.4')
	@touch $@

# On a machine with a CUDA device, with whatever python is active there: 8 minutes, nothing is installed.
# Its options: make gpu GPU_ARGS="--minutes 4 --out somewhere"; all of them: make gpu GPU_ARGS=--help.
GPU_ARGS ?=
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

.PHONY: report
# The numbers and plots of README.md and docs, from benchmarks/results and `focalkern plan`.
report: $(VENV)/ready
	$(RUN) benchmarks/report.py

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "focalkern needs Python 3.10 or later: make PYTHON=python3.12 ..."; exit 1; }
	@# Debian's python3 comes without ensurepip: then the pip beside it, if any, installs one.
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || \
		{ $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install --quiet pip; } || \
		{ echo "Could not make a virtual environment with pip; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up $(VENV): about 2 GB with PyTorch for CPUs, more with CUDA."
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	@# compat: a plain path, so that a script beside the checkout does not take the checkout for the package.
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --config-settings editable_mode=compat --editable ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) .tritons build dist *.egg-info
