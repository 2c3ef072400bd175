# make demo, make test: each works on a fresh machine.
# A machine that has its own torch: make demo PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
RUN = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))

.PHONY: demo test test_long lint paper paper_details real gpu gpu_check gpu_bench gpu_tune gpu_step

demo: $(if $(VENV),$(VENV)/ready)
	rm -rf out/demo
	$(RUN) -m paper.toy --out out/demo
	$(RUN) train.py --data out/demo/train.safetensors --model toy --out out/demo --steps 1500
	$(RUN) sample.py out/demo/hf --prompt "reverse a c b d"
	$(RUN) -m paper.toy --score out/demo

# The paper in miniature: every table and figure of paper/README.md. Stop it when you like; the same
# line goes on.
paper: $(if $(VENV),$(VENV)/ready)
	$(RUN) -m paper $(if $(CRLFT_ASSETS),--assets $(CRLFT_ASSETS))

# Each detail of the method with what it is worth (docs/details.md), and what later papers say.
paper_details: $(if $(VENV),$(VENV)/ready)
	$(RUN) -m paper.details
	$(RUN) -m paper.claims

# Real answers on a real base: an hour on two cores. DATA="FILE.." names the conversations, FLAGS
# what else paper/real.py knows, as FLAGS="--steps 20".
DATA ?= $(if $(CRLFT_ASSETS),$(CRLFT_ASSETS)/conversations/mixed_quality.jsonl)

real: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m paper.real $(DATA) $(FLAGS)

# two tests at a time: most are a process of one thread
test: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m pytest -q -rs --durations=20 -n 2 --dist worksteal -m "not long" tests

test_long: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m pytest -q -rs tests

lint: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest -q tests/test_style.py

# On a machine with a GPU, without a network: `make gpu VENV= PYTHON=python3 OUT=results`. Each part
# keeps to its own clock (MINUTES=), writes into OUT as it goes, and leaves at most four flat files.
# CHECK=1 tries the scripts on a CPU: nothing is timed or written.
OUT ?= results
TRY = $(if $(CHECK),--check)

gpu:
	@failed=0; \
	for part in gpu_check gpu_bench gpu_tune gpu_step; do \
	  $(MAKE) --no-print-directory $$part || failed=1; \
	done; \
	exit $$failed

# facts of the machine, every kernel checked on it, a search for races
gpu_check: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m kernels.gpu --out $(OUT) --minutes $(or $(MINUTES),5) $(TRY)

# every kernel beside its peers
gpu_bench: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m kernels.bench --out $(OUT)/bench.json --minutes $(or $(MINUTES),6) $(TRY)

# tiles, warps and blocks
gpu_tune: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m kernels.tune --out $(OUT)/gpu_tune.json --minutes $(or $(MINUTES),5) $(TRY)

# a training step of 8 layers of 7B and 13B, beside transformers
gpu_step: $(if $(VENV),$(VENV)/dev)
	$(RUN) -m paper.step --out $(OUT) --model 7b,13b --micro 4 --rounds 1 \
	  --minutes $(or $(MINUTES),3) $(TRY)

ifneq ($(VENV),)
$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $(VENV)/ready

$(VENV)/dev: $(VENV)/ready requirements-dev.txt
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $(VENV)/dev
endif
