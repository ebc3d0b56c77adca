## make test             build what changed and run the tests (minutes), on all cores where pytest-xdist is there
## make test-all         with the tests that it leaves out: long ones, and most cases of the emulated GPU kernels
## make bench            build, then GPU-015: fill the cache of a 7B model, read it back, decode with it (a rehearsal without a GPU)
## make bench-all        every benchmark, then the report drawn from their results
## make report           draw the tables and charts from bench/results
## make docs             build/docs/index.html: README, docs/ and API pages of the docstrings; a warning is an error
## make build            build the extension in place
##
## make check-kernels    every kernel by plain nvcc for every architecture: warnings, spills, registers, wide loads
## make check-cuda-build build the whole CUDA extension, with or without a GPU, and import it
## make coverage         a tiny model of every family of transformers on an Fp16Cache, and the table in docs/transformers.md
## make soak             100,000 random calls against a plain NumPy model (ARGS="--steps 10000 --device cuda --seed 1")
## make sanitize         every kernel under sanitizers: the CPU's, and on a GPU machine the GPU's under compute-sanitizer
## make check-barriers   leave out every barrier of every GPU kernel, one at a time: the tests must miss it
## make lint             ruff and clang-format, changing nothing
## make format           ruff and clang-format, changing files
## make typecheck        mypy
## make install-hooks    run `make lint` and `make typecheck` before every commit
## make clean            remove what was built, but not .venv
##
## What is missing is installed first: into the virtual environment that PYTHON belongs to, else into .venv.
##
## ARGS="..."            arguments for pytest or the benchmark:  make test ARGS="-k ring"
## PYTHON=python3        the interpreter to begin with; with torch and the tools in it, it is used as it is
## TORCH=torch==2.13.0   what pip installs where there is no torch
## KVCACHE_EXT_CUDA=0    a CPU build; 1: a CUDA build; unset: CUDA when torch has it and a toolkit is found

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

.NOTPARALLEL:
.PHONY: help build test test-all bench bench-all report docs check-kernels check-cuda-build coverage soak sanitize check-barriers lint format typecheck install-hooks clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

build test test-all bench bench-all report docs check-kernels check-cuda-build coverage soak sanitize check-barriers lint format typecheck install-hooks:
	@$(PYTHON) tools/bootstrap.py --torch="$(TORCH)" $@ -- $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f kvcache_ext/_C*.so kvcache_ext/_build_info.py
	find kvcache_ext tests bench tools _build -name __pycache__ -type d -prune -exec rm -rf {} +
