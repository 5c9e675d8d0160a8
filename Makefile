# VENV says where the virtual environment lives; hand in another folder to share one: make test VENV=/path
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export PROMPT ?= a blue square and an orange circle

.PHONY: environment demo test fast lint clean

# Nothing to do while the packages are those that were installed, whatever the files' times say.
environment:
	@cmp -s requirements.txt $(VENV)/installed || { \
		set -ex; \
		$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV); \
		$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt; \
		cp requirements.txt $(VENV)/installed; \
	}

# Both in one process, which imports once.
demo: environment
	$(BIN)/python -c 'import sys; from txt2img import main; \
		sys.exit(main([*sys.argv[1:], "--dpt", "none", "--outdir", "outputs/demo/without"]) \
		or main([*sys.argv[1:], "--outdir", "outputs/demo/with"]))' --model shapes --prompt "$$PROMPT"

test: environment
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

fast: environment
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
