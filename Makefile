# make train [ARGS="--algo grpo"]   environment, then the main job on the embedded default
# make test                         the test suite          make test-slow   the slow ones too
# make reproduce                    full paths, RPO, the paper's rule, ablations: 6 hours; -quick: a quarter of one
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: train test test-slow reproduce reproduce-quick

train: .venv/ready
	$(RUN) train.py @presets/tiny.args $(ARGS)

test: .venv/ready-test
	$(RUN) -m pytest -q -m "not slow" test_rpo.py $(ARGS)

test-slow: .venv/ready-test
	$(RUN) -m pytest -q test_rpo.py $(ARGS)

reproduce: .venv/ready
	$(RUN) benchmarks/reproduce.py $(ARGS)

reproduce-quick: .venv/ready
	$(RUN) benchmarks/reproduce.py --quick $(ARGS)

# made anew where requirements.txt changed
.venv/ready: requirements.txt
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-test: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check pytest==9.2.0
	touch $@
