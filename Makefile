# Two commands: `make demo` shows the method at work, `make test` proves it. Each sets up .venv first.
# To use another interpreter (3.11 to 3.13): make demo PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
  $(p) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $(p))))
BIN := .venv/bin
SEEDS ?= 1
OUT ?= runs/demo

.PHONY: demo test check format clean

demo: .venv/.installed
	$(BIN)/trl-kd demo --seeds $(SEEDS) --output_dir $(OUT)

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(TESTS)

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An existing .venv is kept, and what it lacks is installed into it.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "trl-kd needs Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf runs build dist .pytest_cache .mypy_cache .ruff_cache
