# VENV says where the virtual environment lives; hand in another folder to share one: make test VENV=/path
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
export PROMPT ?= a blue square and an orange circle

.PHONY: demo test fast lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	cp requirements.txt $@

demo: $(VENV)/installed
	$(BIN)/python txt2img.py --model shapes --dpt none --prompt "$$PROMPT" --outdir outputs/demo/without
	$(BIN)/python txt2img.py --model shapes --prompt "$$PROMPT" --outdir outputs/demo/with

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

fast: $(VENV)/installed
	$(BIN)/python -m pytest -q -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
