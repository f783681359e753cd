# One environment in .venv, made once; every target works in a fresh clone that has python3 (with venv) and make.
#   PYTHON  the interpreter that .venv is made with
#   TORCH   what pip installs for torch where there is no NVIDIA driver. On Linux the plain wheel brings CUDA along:
#           TORCH="torch --index-url URL" with the URL of PyTorch's CPU wheels saves 2 GB.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet

GPU := $(shell nvidia-smi -L 2>/dev/null)
ifeq ($(GPU),)
TORCH ?= torch==2.13.0
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench bench-convert bench-quality bench-peers comfy-core comfy-layers comfyui check-cpu bench-peers-cpu kernel-report findings runtimes compatibility classes pipelines wheel

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)

demo: $(STAMP) ## the whole job on the embedded model: images, metrics, report in svdq-demo/
	$(BIN)/svdq demo -o svdq-demo --overwrite

test: $(STAMP) ## the tests
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal

lint: $(STAMP) ## ruff, pyright, the floors of the architecture, and how the package is built in numbers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m tools.house

bench: $(STAMP) ## speed of converted layers on this machine
	$(BIN)/python -m svdq_cli bench

bench-convert: $(STAMP) ## what --plan predicts against what conversions take, and they against reading and SVD
	$(BIN)/python -m tools.plan_accuracy
	$(BIN)/python -m tools.streaming

# The version that ComfyUI 0.38.1 requires; eager operators only, so that no GPU is needed
KITCHEN := build/comfy-kitchen
comfy-core: $(STAMP) ## files for ComfyUI read by the real comfy-kitchen and run by its operators (five minutes)
	@test -d $(KITCHEN)/comfy_kitchen || $(PIP) --no-deps --target $(KITCHEN) comfy-kitchen==0.2.36
	$(BIN)/python -m tools.comfy_core --kitchen $(KITCHEN)

CTQ := build/convert-to-quant
comfy-layers: $(STAMP) ## layers of comfy-core files beside comfy-kitchen's own quantizer and convert-to-quant (five minutes)
	@test -d $(KITCHEN)/comfy_kitchen || $(PIP) --no-deps --target $(KITCHEN) comfy-kitchen==0.2.36
	@test -d $(CTQ)/convert_to_quant || $(PIP) --no-deps --target $(CTQ) convert-to-quant==1.3.4 prodigy-plus-schedule-free
	$(BIN)/python -m tools.comfy_layers --kitchen $(KITCHEN) --ctq $(CTQ)

# A checkout of ComfyUI, and a Python with what its requirements.txt asks for
COMFYUI ?= ../ComfyUI
COMFYUI_PYTHON ?= $(COMFYUI)/.venv/bin/python
comfyui: $(STAMP) ## files for ComfyUI in ComfyUI's own loader, and with its LoRA, merge and save nodes (COMFYUI=FOLDER COMFYUI_PYTHON=...; fifteen minutes)
	$(BIN)/python -m tools.comfyui --checkout $(COMFYUI) --python $(COMFYUI_PYTHON)
	$(BIN)/python -m tools.comfyui_uses --checkout $(COMFYUI) --python $(COMFYUI_PYTHON)

bench-quality: $(STAMP) ## what each step of the search is worth, on the embedded model (half an hour)
	$(BIN)/python -m tools.bench_quality

bench-peers: $(STAMP) ## data-free, then calibrated conversion beside other tools on the same weights (two minutes, then half an hour)
	$(BIN)/python -m tools.bench_peers
	$(BIN)/python -m tools.bench_calibrated

# The same 60 random layers on every instruction set, and under the sanitizers: equal digests, no report. NEON runs in
# qemu-user where Debian's g++-aarch64-linux-gnu and qemu-user are installed. Then 10,000 layers against the reference
# backend, and 1,000 calls on other numbers of threads.
CASES ?= 60
check-cpu: $(STAMP) ## the CPU engine on every instruction set that is here, under ThreadSanitizer and AddressSanitizer, and on 10,000 random layers
	sh kernels/cpu/check.sh "$(CASES)"
	$(BIN)/python -m tools.cpu_layers

# ggml as it comes with stable-diffusion.cpp, built for this processor; our layers and torch's beside it in one run
GGML := build/ggml
PEER_SOURCES := stable-diffusion-cpp-python==0.4.7
PEERS ?= --shapes pixart-sigma --precision int4 --rank 32
bench-peers-cpu: $(STAMP) ## the CPU engine beside ggml's Q4_0 and Q8_0 (builds ggml: cmake, a C++ compiler, minutes)
	@test -e $(GGML)/src/libggml-cpu.so || sh tools/build_ggml.sh $(BIN)/python "$(PEER_SOURCES)" $(GGML)
	SVDQ_GGML=$(GGML)/src $(BIN)/python -m svdq_cli bench --device cpu $(PEERS)

kernel-report: $(STAMP) ## the CUDA kernels' main loops, counted in machine code: no GPU (a minute)
	$(BIN)/python -m tools.kernel_report

classes: $(STAMP) ## what becomes of every transformer that diffusers has, with the results of make pipelines: docs/families/classes.md (five minutes)
	$(BIN)/python -m tools.model_classes

pipelines: $(STAMP) ## every class converted, every tiny pipeline from calibration to an image, into the same page (nightly; half an hour; some need torchvision)
	$(BIN)/python -m tools.class_conversions

runtimes: $(STAMP) ## files of svdq in vLLM-Omni's and SGLang's own loaders, from their wheels (ten minutes, 6 GB)
	$(BIN)/python -m tools.runtimes

compatibility: $(STAMP) ## other libraries' models read by svdq, and how they round: tables of docs/compatibility.md (ten minutes, 3 GB)
	$(BIN)/python -m tools.compatibility

findings: ## the surprises about other software in findings/, each with pinned packages of its own (half an hour)
	@failed=0; for script in findings/*.sh; do echo "== $$script"; sh "$$script" || failed=1; done; exit $$failed

wheel: $(STAMP) ## sdist, and the wheel built from it, in dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# Made again when pyproject.toml changes. pip keeps the torch that is there as long as it is new enough.
$(STAMP): pyproject.toml
	@echo "installing svdq into $(VENV) (a few minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH),$(PIP) $(TORCH))
	@$(PIP) --editable '.[dev]'
	@touch $@
