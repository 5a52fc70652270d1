PYTHON ?= python3
CXX ?= g++
OPS = dynamic_batching_ops.so py_process_ops.so

ops: $(OPS)

%.so: %.cc
	$(CXX) -std=c++17 -O2 -Wall -Wno-deprecated-declarations -shared -fPIC $< -o $@.tmp \
	  $$($(PYTHON) -c 'import tensorflow as tf; print(*tf.sysconfig.get_compile_flags(), *tf.sysconfig.get_link_flags())' 2>/dev/null)
	mv $@.tmp $@
