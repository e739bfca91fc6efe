# The verbs that people try first. Everything installs itself; a second run reuses .venv.
# Needs: Python 3.12 (or any Python 3 with pip: uv then finds or fetches 3.12), make, a C compiler.

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
STAMP    := $(VENV)/.installed
RUN      ?= demo
UV_VERSION := 0.13.9

# One torch thread a process, nothing fetched from a hub.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo test test-slow parity parity-ci kernel-gates te-check bench check learning doctor rehearsal clean

help:
	@echo "make setup | demo | test | test-slow | parity | parity-ci | kernel-gates | te-check | bench | check | learning | doctor | rehearsal | clean"

setup: $(STAMP)

.uv/bin/uv:
	$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv==$(UV_VERSION)

$(STAMP): requirements.txt requirements-cpu.txt requirements-dev.txt requirements-override.txt pyproject.toml | .uv/bin/uv
	@test -x $(BIN)/python || .uv/bin/uv venv --quiet --python 3.12 $(VENV)
	.uv/bin/uv pip install --python $(VENV) -r requirements-cpu.txt -r requirements-dev.txt \
		--override requirements-override.txt
	.uv/bin/uv pip install --quiet --python $(VENV) --no-deps -e .
	@touch $@

# The embedded task and the tiny model, from scratch, in seconds.
data/digits/sft.parquet models/tiny_qwen2_5_vl/config.json &: $(STAMP)
	$(BIN)/python -m megatron_mmr1.data.digits --out data/digits --model models/tiny_qwen2_5_vl

# Cold start, GRPO with VAS, held-out accuracy before and after, report. A few minutes.
demo: $(STAMP) data/digits/sft.parquet models/tiny_qwen2_5_vl/config.json
	@rm -rf outputs/digits_sft/$(RUN) outputs/digits/$(RUN)
	$(BIN)/python -m megatron_mmr1.sft run=$(RUN)
	$(BIN)/python -m megatron_mmr1.train run=$(RUN) model.path=outputs/digits_sft/$(RUN)/hf

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Every layout against Hugging Face, on CPU processes; rewrites docs/parity.md and docs/parity.html.
parity: $(STAMP)
	$(BIN)/python tools/check_parity.py --matrix docs

# The part of it that takes a few minutes.
parity-ci: $(STAMP)
	$(BIN)/python tools/check_parity.py --matrix outputs/parity --ci

# Registers, spills, accesses, instructions, bytes and launches of the Triton kernels against their
# limits, without a GPU; rewrites docs/kernel_gates.md.
kernel-gates: $(STAMP)
	$(BIN)/python tools/check_kernel_gates.py --markdown docs/kernel_gates.md

# Transformer Engine's real modules at published sizes and many layouts, held against the local layers and Hugging Face,
# without a GPU. The first time it compiles Transformer Engine into .venv-te: 15 to 40 minutes on one core.
# An environment of its own: where it is installed, Megatron-Core takes its norms and optimizers everywhere.
te-check: .venv-te/.installed
	PYTHONPATH=. LD_LIBRARY_PATH="$$(ls -d $(CURDIR)/.venv-te/lib/python3.12/site-packages/nvidia/*/lib | tr '\n' ':')" \
		.venv-te/bin/python -W ignore tests/te_cases.py

.venv-te/.installed: requirements.txt requirements-te.txt requirements-te-build.txt | .uv/bin/uv
	tools/build_te.sh .uv/bin/uv
	@touch $@

# What can be measured on a CPU: packing and balance; the sampler; the verifier; the memory of the output layer (5 GB); the
# converters against plain copies (6 GB of disk); the memory that large images take; a step's throughput, and beside TRL's.
bench: $(STAMP)
	$(BIN)/python tools/measure_packing.py
	$(BIN)/python tools/measure_sampling.py
	$(BIN)/python tools/measure_diversity.py
	$(BIN)/python tools/measure_verifier.py
	$(BIN)/python tools/measure_head_memory.py
	$(BIN)/python tools/measure_conversion.py
	$(BIN)/python tools/measure_image_memory.py --rows 1500 --used 300
	@test -d outputs/digits_sft/demo/hf || $(MAKE) demo
	$(BIN)/python tools/benchmark_throughput.py experiment=digits --strong 1 2 --out outputs/throughput
	$(BIN)/python tools/compare_trl.py --json outputs/throughput/trl.json

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

# The README's table: three seeds of cold start + GRPO. Ten minutes on two cores.
learning: $(STAMP) data/digits/sft.parquet models/tiny_qwen2_5_vl/config.json
	$(BIN)/python tools/measure_learning.py

# Is this machine ready? Each line OK or what to do; also where nothing is installed yet.
doctor:
	@$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/doctor.py

# Two nodes made of network namespaces: launches, checks between nodes, a killed node, Slurm. Needs
# root and iproute2; the part with Slurm also slurm-wlm and munge.
rehearsal: $(STAMP)
	$(BIN)/python -m pytest -s tests/test_nodes.py tests/test_slurm.py tests/test_rehearsal.py

clean:
	rm -rf data models outputs
