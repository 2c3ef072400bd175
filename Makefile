# make demo, make test: each works on a fresh machine. A machine that has its own torch: make demo PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
RUN = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

.PHONY: demo test test_long lint paper paper_base gpu

demo: $(if $(VENV),$(VENV)/ready)
	@rm -rf out/demo
	$(RUN) -m paper.toy --out out/demo
	$(RUN) train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
	$(RUN) sample.py out/demo/hf --prompt "reverse a c b d"
	@$(RUN) -m paper.toy --score out/demo

# The paper in miniature: every table and figure of paper/README.md. Stop it when you like; the same line goes on.
paper: $(if $(VENV),$(VENV)/ready)
	$(RUN) -m paper $(if $(CRLFT_ASSETS),--assets $(CRLFT_ASSETS))

# What moves Table 2's order: random weights instead of the pre-trained base, the learning rate, three times the steps.
paper_base: $(if $(VENV),$(VENV)/ready)
	$(RUN) -m paper.base

test: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m pytest -q -rs -m "not long" tests

test_long: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m pytest -q -rs tests

lint: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

# On a machine with a GPU: every kernel checked on it, then kernels and whole steps timed against their peers; results/*.json grow case by case.
gpu: $(if $(VENV),$(VENV)/dev)
	@mkdir -p results
	$(RUN) -m pytest -q -m gpu --junitxml=results/gpu.xml tests; checked=$$?; $(RUN) -m kernels.bench && $(RUN) -m paper.step --model 7b --rounds 1 \
	  && $(RUN) -m paper.step --model 13b --rounds 1 && exit $$checked

ifneq ($(VENV),)
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $(VENV)/ready

$(VENV)/dev: $(VENV)/ready requirements-dev.txt
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $(VENV)/dev
endif
