# Two commands start from nothing but Python 3.10 or newer:
#   make demo    set up .venv, then train, evaluate, export and infer    (DATA=manifest.csv for your own images)
#   make test    set up .venv, then lint, type check and test

PYTHON ?= python3
VENV   ?= .venv
# your own images get a folder of their own: a run belongs to one manifest
ifdef DATA
OUT    ?= demo-data
else
OUT    ?= demo
DATA   := $(OUT)/phantoms/manifest.csv
endif
EPOCHS ?= 12
BIN    := $(VENV)/bin
MAGSD  := $(BIN)/magsd

.PHONY: demo test test-all lint clean

demo: $(VENV)/installed
	@$(MAGSD) --version
	@if [ "$(DATA)" = "$(OUT)/phantoms/manifest.csv" ]; then $(MAGSD) phantoms --out $(OUT)/phantoms --count 150 --keep; fi
	$(MAGSD) train --data "$(DATA)" --out $(OUT)/run --resume --fold 0 --epochs $(EPOCHS) \
	    --backbone tf_efficientnet_lite0 --size 160 --batch-size 16 --schedule cosine
	$(MAGSD) evaluate $(OUT)/run --data "$(DATA)" --out $(OUT)/report --force
	$(MAGSD) export $(OUT)/run --out $(OUT)/bundle --evaluation $(OUT)/report --force
	$(MAGSD) verify $(OUT)/bundle
	$(BIN)/python -c 'import csv, sys; print(*[r["path"] for r in csv.DictReader(open(sys.argv[1]))][:8], sep="\n")' \
	    $(OUT)/report/predictions.csv | $(MAGSD) infer - --bundle $(OUT)/bundle --out $(OUT)/results || test $$? -eq 3
	@echo
	@echo "Look at $(OUT)/report/report.html and the overlays in $(OUT)/results"

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dicom,train,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUT)
