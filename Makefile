# Everything runs in .venv, which the targets set up. TORCH chooses the build of PyTorch, for example
#   make test TORCH=torch==2.13.0
# It is repeated in every install command, because a package that wants torchvision would replace it without a word.
PYTHON ?= python3
TORCH  ?= torch
PIP     = .venv/bin/python -m pip install --quiet --disable-pip-version-check
RUN     = .venv/bin/python
JOBS   ?= 2

.PHONY: help test check demo clean

help:
	@echo "make test    set up .venv and run the tests        (TORCH=torch==2.13.0 chooses PyTorch)"
	@echo "make check   lint, formatting, types and layering"
	@echo "make demo    set up .venv, explain, verify and train a small model through the backend"
	@echo "make clean   remove .venv and build products"

# A stamp per choice of torch: a second run installs nothing, another TORCH or a changed pyproject.toml does.
STAMP = .venv/.installed-$(subst /,_,$(TORCH))

$(STAMP): pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip "setuptools>=77"
	$(PIP) "$(TORCH)" numpy
	$(PIP) "$(TORCH)" --no-build-isolation --editable ".[test,dev]"
	rm -f .venv/.installed-*
	touch "$@"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -c tests/pytest.ini --rootdir . -n $(JOBS) --dist loadfile tests

check: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports

demo: $(STAMP)
	$(RUN) examples/demo.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
