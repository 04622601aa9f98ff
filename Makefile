# One place for the commands that people, CI and pre-commit share. `make` alone lists them.
# PYTHON=python3.12 make test   chooses the interpreter that makes .venv
# make demo ARGS="--help"       passes arguments on (demo, the tests, notebook, bench, compare)

SHELL := bash
PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Threads that wait for each other spin only briefly. torch's default (to spin on) makes training here
# 10 times slower as soon as another program wants the same cores; this costs nothing when none does.
export GOMP_SPINCOUNT ?= 10000

SHORT_BENCHMARKS := $(addprefix benchmarks/,fuser_init.py modules_memory.py modules_speed.py \
	modules_against.py streaming.py)

PAGES := README.md benchmarks/README.md $(wildcard docs/*.md)
COG := $(BIN)/cog -I benchmarks -p "import gpu_report, tables" -P

NUMERIC_TESTS := $(addprefix tests/,layers models checkpoints evaluation training deploy)

.DEFAULT_GOAL := help
.PHONY: help install demo announce-demo test test-slow test-isa fuzz test-oldest check release-check docs figures numbers models notebook bench compare lerobot format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.dev  ## make .venv with everything that the other targets need

demo: announce-demo $(VENV)/.demo  ## train on bundled images, draw where the tokens look
	$(BIN)/tokenlearner demo $(ARGS)

announce-demo:
	@[ -e $(VENV)/.demo ] || echo "make demo installs into $(VENV), trains a small ViT with and without learned tokens, and draws what they look at: 2 minutes each."

test: $(VENV)/.dev  ## run the tests, without the slow ones
	$(BIN)/python -m pytest -n auto $(ARGS)

# Exit code 5 means that no test is marked slow; that is no failure.
test-slow: $(VENV)/.dev  ## run the slow tests
	$(BIN)/python -m pytest -n auto -m slow $(ARGS) || [ $$? -eq 5 ]

# Numbers must not depend on the processor: the same tests with the kernels of two others.
test-isa: $(VENV)/.dev  ## run the numeric tests with the kernels of other processors
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		$(BIN)/python -m pytest -n auto -q $(NUMERIC_TESTS) $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(BIN)/python -m pytest -n auto -q $(NUMERIC_TESTS) $(ARGS)

fuzz: $(VENV)/.dev  ## give damaged files to every reader, an hour or ARGS="--minutes 1"
	$(BIN)/python tests/fuzzing.py $(ARGS)

test-oldest: $(VENV)/.dev  ## run the tests of hosts with the oldest timm and transformers
	$(BIN)/python scripts/oldest.py -q -n auto $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, spelling, numbers, the project's own rules, known holes in packages
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m ruff check
	$(BIN)/python -m pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_project.py
	$(BIN)/codespell
	$(COG) --check --diff --verbosity=0 --check-fail-msg="make numbers writes the tables of results/ anew" $(PAGES)
	$(BIN)/check-jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema -q --builtin-schema vendor.github-workflows $(wildcard .github/workflows/*.yml)
	$(BIN)/zizmor -q --offline .github/workflows
	$(BIN)/python scripts/audit.py

release-check: $(VENV)/.dev  ## build the wheel and use it in bare environments, as a release is
	$(BIN)/python scripts/release_check.py $(ARGS)

docs: $(VENV)/.dev  ## build the documentation into site/ and check every link
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python scripts/check_site.py site

# Those of measurements are drawn from benchmarks/results; maps need models, and commands of docs/maps.md.
figures: $(VENV)/.dev  ## draw the schemes and charts of the documentation anew
	$(BIN)/python scripts/draw_docs.py
	$(BIN)/python benchmarks/figures.py $(ARGS)

# Between two comments of a page stands what a function of benchmarks/tables.py or gpu_report.py prints.
numbers: $(VENV)/.dev  ## write the tables of benchmarks/results into the pages anew
	$(COG) -r --verbosity=1 $(PAGES)

models: $(VENV)/.demo  ## train the small models of a release into build/models: 10 minutes
	$(BIN)/python scripts/make_models.py $(ARGS)

notebook: $(VENV)/.dev  ## execute the notebook and keep what it shows
	$(BIN)/python scripts/run_notebook.py $(ARGS)

bench: $(VENV)/.dev  ## run the scripts in benchmarks/ that take minutes
	@for script in $(SHORT_BENCHMARKS); do \
		echo "$(BIN)/python $$script $(ARGS)"; $(BIN)/python $$script $(ARGS) || exit 1; \
	done

compare: $(VENV)/.demo  ## compare ways to reduce tokens: two hours, goes on where it was cut off
	$(BIN)/python benchmarks/compare.py $(ARGS)

# LeRobot and this project's own environment want different versions of torch.
lerobot:  ## try examples/lerobot beside LeRobot, in build/lerobot; needs Python 3.12
	$(PYTHON) -m venv build/lerobot
	build/lerobot/bin/python -m pip install . ./examples/lerobot
	HF_HUB_OFFLINE=1 build/lerobot/bin/python examples/lerobot/try_policy.py

format: $(VENV)/.dev  ## format the code and fix what ruff can fix
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

clean:  ## remove caches, builds and demo output (.venv stays)
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis tokenlearner-demo
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# pip exists only when a virtual environment was made to its end.
$(BIN)/pip:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "'$(PYTHON)' was not found. Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "tokenlearner needs Python 3.10 or newer, '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# Shows the larger downloads and how it ended; pip writes its errors to stderr, past the filter.
define pip_install
@set -o pipefail; index="$$($(BIN)/python scripts/cpu_torch.py)"; \
	echo "Installing tokenlearner[$(1)] into $(VENV): about 2 minutes, $$([ -n "$$index" ] && echo 'PyTorch for CPUs' || echo 'and up to 6 GB on Linux (PyTorch with CUDA)')."; \
	$(BIN)/python -m pip install $$index -e '.[$(1)]' | \
	{ grep --line-buffered -E '(Downloading|Using cached) .* [MG]B\)|^Installing collected|^Successfully installed' || true; }
endef

$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(call pip_install,demo)
	@touch $@

# dev holds all of demo, so the demo needs no second installation.
$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(call pip_install,dev)
	@touch $(VENV)/.demo $@
