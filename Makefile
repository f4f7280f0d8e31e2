# Two commands: `make demo` shows the method at work, `make test` proves it. Each sets up .venv first.
# To use another interpreter (3.11 to 3.13): make demo PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
  $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
SEEDS ?= 1
OUT ?= runs/demo

.PHONY: demo test test-oldest test-wheel faults check format clean

demo: .venv/.installed
	$(BIN)/trl-kd demo --seeds $(SEEDS) --output_dir $(OUT)

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

# A part of the tests with the lower bounds of pyproject.toml
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadgroup -m oldest $(TESTS)

# Every command is killed some hundred times more than in `make test`; stopped and started again, it goes on. docs/reliability.md
faults: .venv/.installed
	TRL_KD_FAULTS=long $(BIN)/python -m pytest tests/faults $(TESTS)

# The package as users get it, in an environment that has nothing else
test-wheel: .venv/.installed
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --no-compile -c constraints.txt build/wheel/*.whl
	cd build/wheel && venv/bin/trl-kd --help && venv/bin/python -c "from trl_kd import *"

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An existing environment is kept, and what it lacks is installed into it.
.venv/.installed: EXTRA := dev
.venv/.installed: constraints.txt
.venv-oldest/.installed: EXTRA := test
.venv-oldest/.installed: constraints-oldest.txt
.venv/.installed .venv-oldest/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "trl-kd needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c $(filter constraints%,$^) -e ".[$(EXTRA)]"
	@touch $@

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
