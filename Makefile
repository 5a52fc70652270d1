# make train   sets everything up, trains on ViZDoom, tests the agent, makes
#              videos of it before and after, draws a learning curve (GPU=1: with
#              TensorFlow's CUDA build)
# make plot    draws the learning curves of trainings: LOGDIR=<logdir>, several
#              in quotes
# make test    sets everything up, checks the style, runs all tests
# make sanitize  runs the tests of the compiled parts under GCC's sanitizers of
#              addresses and of undefined behaviour, in logs/sanitize
# make benchmark   measures, on an idle machine, how fast all is, in 10 minutes
# make ops     builds the TensorFlow operations
#
# The set-up is a virtual environment in .venv. To use a Python of your own that
# has requirements.txt installed, say so: make ops PYTHON=python3

VENV = .venv
ifeq ($(origin PYTHON), undefined)
PYTHON = $(VENV)/bin/python
INSTALLED = $(VENV)/installed$(if $(GPU),-gpu)
endif

REQUIREMENTS = $(if $(GPU),requirements-gpu.txt,requirements.txt)
OPS = convolution_ops.so dynamic_batching_ops.so py_process_ops.so \
  recurrence_ops.so py_process_callee.so
# The package of the compiler; one that is set by CXX needs none.
COMPILER = $(filter g++,$(CXX))
LOGDIR := logs/$(shell date +%Y%m%d-%H%M%S)

# The same settings serve training and test.
QUICK_START = --flagfile=flagfiles/quick_start
TEST = $(PYTHON) experiment.py $(QUICK_START) --logdir=$(LOGDIR) --mode=test \
  --video_dir=$(LOGDIR)/videos

.PHONY: train plot test sanitize benchmark ops lint clean
.DELETE_ON_ERROR:

train: ops
	$(PYTHON) experiment.py $(QUICK_START) --logdir=$(LOGDIR)
	test ! -e $(LOGDIR)/model.ckpt-0.index || $(TEST) --test_num_episodes=1 \
	  --checkpoint=$(LOGDIR)/model.ckpt-0
	$(TEST)
	$(PYTHON) plot.py $(LOGDIR)

plot: $(INSTALLED)
	$(PYTHON) plot.py $(LOGDIR)

test: ops lint
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The libraries of both sanitizers have to be there before Python is, with what
# throws exceptions. Python itself frees little at its end, and the memory that a
# test limits is the sanitizer's as well. Where GCC checks for null, it refuses
# Abseil's headers; without, null is an address like any other.
SANITIZED = logs/sanitize
SANITIZER = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined \
  -fno-sanitize=vptr,null,nonnull-attribute,returns-nonnull-attribute \
  -fno-sanitize-recover=undefined
SANITIZED_PYTHON = $(abspath $(shell command -v $(PYTHON)))
library = $(shell $(CXX) -print-file-name=$(1))

sanitize: $(INSTALLED)
	rm -rf $(SANITIZED)
	mkdir -p $(SANITIZED)
	cp -r Makefile pyproject.toml tests *.py *.cc $(SANITIZED)
	$(MAKE) -C $(SANITIZED) ops PYTHON=$(SANITIZED_PYTHON) \
	  CXXFLAGS="$(SANITIZER)"
	cd $(SANITIZED) && PYTHONMALLOC=malloc \
	  LD_PRELOAD="$(call library,libasan.so) $(call library,libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:abort_on_error=1 \
	  UBSAN_OPTIONS=abort_on_error=1:print_stacktrace=1 \
	  $(SANITIZED_PYTHON) -m pytest tests/convolution_test.py \
	  tests/dynamic_batching_test.py tests/py_process_test.py \
	  tests/py_process_fuzz_test.py tests/recurrence_test.py --deselect \
	  tests/convolution_test.py::test_too_little_memory_fails_the_operation_alone

benchmark: SHELL = /bin/bash -o pipefail
benchmark: ops
	mkdir -p logs/benchmark
	{ for question in vtrace batching convolution recurrence py_process; \
	do \
	  echo; echo "## $$question"; $(PYTHON) -m benchmarks.$$question || exit; \
	done; for question in throughput scaling; do \
	  echo; echo "## $$question"; $(PYTHON) -m benchmarks.$$question \
	    --plot=logs/benchmark/$$question.png || exit; \
	done; } | tee logs/benchmark/table.md

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	PATH=$(VENV)/bin:$$PATH clang-format --dry-run --Werror *.cc

ops: $(OPS)

# Built anew after an installation: it may have brought another TensorFlow. With
# less than -O3, convolutions take twice the time.
%.so: %.cc $(INSTALLED)
	@./system_packages.sh $(COMPILER)
	$(CXX) -std=c++17 -O3 -Wall -Wno-deprecated-declarations -shared -fPIC \
	  $(CXXFLAGS) $< -o $@.tmp $(shell $(PYTHON) -c $(FLAGS) 2>/dev/null)
	mv $@.tmp $@

FLAGS = "import tensorflow as tf; \
  flags = tf.sysconfig.get_compile_flags() + tf.sysconfig.get_link_flags(); \
  print(' '.join(flags).replace('-I', '-isystem '))"

# Knows Python and NumPy, but not TensorFlow, which comes with Python's headers.
py_process_callee.so: FLAGS = "import numpy, tensorflow as tf; \
  print('-isystem', numpy.get_include(), '-isystem', tf.sysconfig.get_include() \
  + '/external/local_config_python/python_include')"

CHECK_PYTHON = python3 -c 'import sys; v = sys.version_info[:2]; \
  sys.exit(None if (3, 10) <= v <= (3, 13) else \
  "Python 3.10 to 3.13 is needed, python3 is %d.%d: put another python3 first " \
  "in PATH." % v)'

# First of all what an installation of some minutes would miss in the end.
$(VENV)/installed $(VENV)/installed-gpu: requirements.txt requirements-dev.txt requirements-gpu.txt
	@! command -v python3 >/dev/null || $(CHECK_PYTHON)
	@./system_packages.sh $(COMPILER) python3-venv
	@$(CHECK_PYTHON)
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check \
	  -r $(REQUIREMENTS) -r requirements-dev.txt
	touch $@

clean:
	rm -f $(OPS)
