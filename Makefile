# Everything a newcomer types. `make train` and `make test` share one `make install`.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# Every GPU there is, or two processes on a CPU.
NPROC  ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 2)

.PHONY: train test test-long test-matrix test-pythons test-sky test-llama test-openvino test-hosts families \
  chaos chaos-hosts soak mutants lint install benchmark clean

train: install  ## The main job: learn to write Python from the standard library's source
	$(BIN)/python -m trainer experiment=stdlib nproc=$(NPROC)

# Two at a time: most tests wait for processes of one core. A file stays together, with its fixtures.
# Long files come first, by tests/conftest.py.
test: install lint  ## What CI runs: lint, types, tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: install  ## The tests that take over 15 s each
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

test-matrix: install  ## Every strategy at 1 to 4 ranks, resumed from every other
	$(BIN)/python -m pytest -m matrix tests/trainer/test_matrix.py

test-hosts: install  ## Machines of their own on one kernel, whose links break; needs root on Linux
	$(BIN)/python -m pytest -n 2 --dist load -m hosts tests/hosts

families: install  ## Every family of models in every column, beside transformers; writes docs/models.md
	$(BIN)/python -m tests.families

chaos-hosts: install  ## 60 faults of machines, links, disks and supervisors, from a seed; needs root on Linux
	$(BIN)/python -m tests.hosts.chaos

chaos: install  ## Hundreds of kills, stops and damages, from a seed; writes a page about them
	$(BIN)/python -m tests.chaos

soak: install  ## An hour of all that clients do, against a server of a small random model
	$(BIN)/python -m tests.serving.soak

mutants: install  ## Breaks the code in 30 places and shows which test catches each
	$(BIN)/python -m tests.mutants

PYTHONS ?= python3.11 python3.12 python3.13
# Index of CPU builds of torch for them; the default index has builds of gigabytes.
TORCH_INDEX ?=
# An environment without torch leaves out what needs it, and says so; so does one without a Python.
test-pythons:  ## The same order, data, checkpoints and plans under every Python that is there
	@for python in $(PYTHONS); do \
	  $$python -c '' 2>/dev/null || { echo "$$python is not there: left out"; continue; }; \
	  venv=.pythons-venv/$$(basename $$python); \
	  test -e $$venv/installed || { $$python -m venv $$venv && \
	    $$venv/bin/python -c "import tomllib; wanted = \
	tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']; \
	print(*(name for name in wanted if not name.startswith(('torch', 'accelerate'))), sep='\n')" \
	      > $$venv/wanted && \
	    $$venv/bin/python -m pip install --quiet --constraint constraints.txt \
	      --requirement $$venv/wanted pytest pytest-timeout && \
	    { test -z "$(TORCH_INDEX)" || $$venv/bin/python -m pip install --quiet \
	      --constraint constraints.txt --index-url $(TORCH_INDEX) torch; } && \
	    touch $$venv/installed; } || exit 1; \
	  echo "under $$($$venv/bin/python --version):"; \
	  $$venv/bin/python -m pytest -q $(TESTS_OF_PYTHONS) || exit 1; \
	done
TESTS_OF_PYTHONS := tests/trainer/data tests/trainer/test_order_of_runs.py \
  tests/trainer/test_checkpoint.py tests/launch/plan

SKY_VENV ?= .sky-venv
test-sky: install  ## The real SkyPilot, in an environment of its own, with random price lists
	test -x $(SKY_VENV)/bin/sky || { $(PYTHON) -m venv $(SKY_VENV) && \
	  $(SKY_VENV)/bin/python -m pip install --quiet 'skypilot[aws,gcp]==0.14.1' \
	    'moto[server]==5.2.5'; }
	SPOTFORGE_SKY_PYTHON=$(abspath $(SKY_VENV))/bin/python $(BIN)/python -m pytest -m sky \
	  tests/launch/place/test_sky.py

LLAMA_VENV ?= .llama-venv
test-llama: install  ## Packed files in a real llama.cpp, in an environment of its own
	test -x $(LLAMA_VENV)/bin/python || { $(PYTHON) -m venv $(LLAMA_VENV) && \
	  $(LLAMA_VENV)/bin/python -m pip install --quiet 'xllamacpp==2026.10.11549'; }
	SPOTFORGE_LLAMA_PYTHON=$(abspath $(LLAMA_VENV))/bin/python $(BIN)/python -m pytest -m llama \
	  tests/compression/targets/test_llama_cpp.py

OPENVINO_VENV ?= .openvino-venv
# torchvision, which optimum-intel asks for and text needs not, breaks the import of a CPU torch.
test-openvino: install  ## The real OpenVINO, in an environment of its own
	test -e $(OPENVINO_VENV)/installed || { $(PYTHON) -m venv $(OPENVINO_VENV) && \
	  $(OPENVINO_VENV)/bin/python -m pip install --quiet torch==2.13.0 openvino==2026.4.1 \
	    openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0 nncf==3.4.0 \
	    optimum-intel==2.2.0 optimum==2.3.0 transformers==5.5.4 && \
	  $(OPENVINO_VENV)/bin/python -m pip uninstall --quiet --yes torchvision && \
	  touch $(OPENVINO_VENV)/installed; }
	SPOTFORGE_OPENVINO_PYTHON=$(abspath $(OPENVINO_VENV))/bin/python $(BIN)/python -m pytest \
	  -m openvino tests/compression/targets/test_openvino.py \
	  tests/serving/test_openvino_engine.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python lint/docstrings.py

install: $(VENV)/installed
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[compression,deepspeed,queue,wandb,dev]'
	touch $@

benchmark: install  ## Our loop beside a plain PyTorch loop and the Hugging Face Trainer
	$(BIN)/python -m benchmarks.bench_training

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
