# Two commands: make train, make test. Each target runs one command.
PYTHON ?= python3
RUN = .venv/bin/python
PIP = .venv/bin/pip install --quiet --disable-pip-version-check
MAP ?= 3m
ALGO ?= qmix

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/: [^#]*## /\t/' | expand -t 18

install: .venv/installed  ## a virtual environment in .venv with all that is needed
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@# ma-gym, on Python 3.10 and 3.11: its gym 0.20 cannot be built with today's setuptools and wheel
	@printf 'setuptools<66\nwheel<0.40\n' > .venv/to-build-gym
	@if $(RUN) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
		PIP_CONSTRAINT=.venv/to-build-gym $(PIP) ma-gym==0.0.14 \
		|| echo "ma-gym could not be installed; only the tests that compare with it are skipped"; fi
	@touch $@

install-smac: .venv/installed  ## StarCraft's smac, beside the rest; docs/environments.md tells how to get the game
	$(PIP) tensorboard==2.20.0 pysc2==4.0.0 protobuf==3.20.3 git+https://github.com/oxwhirl/smac.git@d6aab33
	.venv/bin/pip uninstall --quiet --yes enum34

install-envs: .venv/installed  ## mpe2, lbforaging and rware, beside the rest: see docs/environments.md
	$(PIP) mpe2==1.1.1 lbforaging==2.0.0 rware==2.0.0

train: .venv/installed  ## QMIX on Checkers, against the known optimum
	$(RUN) qmix.py --env checkers --algo qmix

test: .venv/installed  ## every test
	$(RUN) -m pytest -q

smoke: .venv/installed  ## under a minute: every algorithm, every built-in environment
	$(RUN) -m pytest -q -k smoke

two-step: .venv/installed  ## under a minute: the paper's two-step game, six algorithms, their tables
	$(RUN) -m extras.two_step

skirmish: .venv/installed  ## QMIX on skirmish:MAP (make skirmish MAP=2s3z): the paper's maps without StarCraft II
	$(RUN) qmix.py --env skirmish:$(MAP) --algo $(ALGO)

smac: .venv/installed  ## QMIX on smac:MAP (make smac MAP=3m): the real thing, after make install-smac
	$(RUN) qmix.py --env smac:$(MAP) --algo $(ALGO)

bench: .venv/installed  ## what is how fast: learner, environments, whole runs; writes docs/bench.md
	$(RUN) -m extras.bench

plot: .venv/installed  ## redraws the figures in docs/ from their CSVs
	$(RUN) -m extras.plot

lint: .venv/installed  ## ruff: the rules and the format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:           ## removes .venv and caches; runs/ stays
	rm -rf .venv __pycache__ .pytest_cache .ruff_cache

.PHONY: help install install-smac install-envs train test smoke two-step skirmish smac bench plot lint clean
