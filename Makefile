# Two commands: make train, make test. Each target runs one command, which README.md shows too.
PYTHON ?= python3
RUN = .venv/bin/python
MAP ?= 3m
ALGO ?= qmix

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/: [^#]*## /\t/' | expand -t 18

install: .venv/installed  ## a virtual environment in .venv with all that is needed
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@if $(RUN) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		$(MAKE) install-ma-gym || echo "ma-gym could not be installed; only the test that compares with it is skipped"; fi
	@touch $@

install-ma-gym:  ## ma-gym, on Python 3.10 and 3.11 (make install does it there)
	.venv/bin/pip install --quiet --disable-pip-version-check 'setuptools<66' 'wheel<0.40'
	.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation gym==0.20.0
	.venv/bin/pip install --quiet --disable-pip-version-check ma-gym==0.0.14
	.venv/bin/pip install --quiet --disable-pip-version-check 'setuptools>=77' -r requirements.txt

train: .venv/installed  ## QMIX on Checkers, against the known optimum
	$(RUN) qmix.py --env checkers --algo qmix

test: .venv/installed  ## every test
	$(RUN) -m pytest -q

skirmish: .venv/installed  ## QMIX on skirmish:MAP (make skirmish MAP=2s3z): the paper's maps without StarCraft II
	$(RUN) qmix.py --env skirmish:$(MAP) --algo $(ALGO)

smac: .venv/installed  ## QMIX on smac:MAP (make smac MAP=3m): the real thing, after make install-smac
	$(RUN) qmix.py --env smac:$(MAP) --algo $(ALGO)

install-smac: .venv/installed  ## StarCraft's smac, beside the rest; README.md tells how to get the game and the maps
	.venv/bin/pip install --quiet --disable-pip-version-check tensorboard==2.20.0 pysc2==4.0.0 protobuf==3.20.3 \
		git+https://github.com/oxwhirl/smac.git@d6aab33
	.venv/bin/pip uninstall --quiet --yes enum34

smoke: .venv/installed  ## under a minute: every algorithm on every built-in environment
	$(RUN) -m pytest -q -k smoke

two-step: .venv/installed  ## under a minute: the paper's two-step game, six algorithms, their tables
	$(RUN) docs/two_step.py

plot: .venv/installed  ## redraws the figures in docs/ from their CSVs
	$(RUN) docs/plot.py

bench: .venv/installed  ## what is how fast: learner, environments, whole runs; writes docs/bench.md
	$(RUN) docs/bench.py

lint: .venv/installed  ## ruff
	.venv/bin/ruff check .

clean:           ## removes .venv and caches; runs/ stays
	rm -rf .venv __pycache__ .pytest_cache .ruff_cache

.PHONY: help install install-ma-gym install-smac train test skirmish smac smoke two-step plot bench lint clean
