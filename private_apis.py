# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Interfaces of TensorFlow and Sonnet that are used, but are not public.

An upgrade may remove them. So each is used in one function here, with a test in
`tests/private_apis_test.py` that fails by its name. In and out: objects of
these libraries.
"""

import contextlib

import tensorflow.compat.v1 as tf


def make_convolution_variables(convolution, in_channels):
  """Makes the variables of an `snt.Conv2D` without calling it.

  Uses `snt.Conv2D._initialize`.
  """
  convolution._initialize(tf.TensorSpec([None, None, None, in_channels]))


def make_lstm_variables(lstm, num_features):
  """Makes the variables of an `snt.LSTM` without calling it.

  Uses `snt.LSTM._initialize`.
  """
  lstm._initialize(tf.TensorSpec([None, num_features]))


def replace_control_inputs(op, control_inputs):
  """Replaces the control inputs of a `tf.Operation`.

  Uses `tf.Operation._remove_all_control_inputs` and `_add_control_inputs`.
  """
  op._remove_all_control_inputs()
  op._add_control_inputs(control_inputs)


def cache_summary_writer(logdir, writer):
  """Makes `tf.summary.FileWriterCache.get` return a writer for a folder.

  Uses `tf.summary.FileWriterCache._cache` and `_lock`.
  """
  with tf.summary.FileWriterCache._lock:
    tf.summary.FileWriterCache._cache[logdir] = writer


def wrap_session_run(session, wrap):
  """Has every run of a `tf.Session` go through a function.

  Uses `tf.Session._call_tf_sessionrun`.

  Args:
    session: `tf.Session`.
    wrap: function of the method that runs, and of its arguments.
  """
  run = session._call_tf_sessionrun
  session._call_tf_sessionrun = lambda *args: wrap(run, *args)


@contextlib.contextmanager
def read_once():
  """Has each variable of the graph read once, however often it is used within.

  A learner gets what it reads of variables of other learners by the network.

  Uses `_cached_value` of resource variables.
  """
  variables = []

  def cache(variable):
    variable._cached_value = variable.value()
    variables.append(variable)
    return variable

  def creator(next_creator, **kwargs):
    return cache(next_creator(**kwargs))

  for variable in tf.global_variables():
    cache(variable)
  try:
    with tf.variable_creator_scope(creator):
      yield
  finally:
    for variable in variables:
      variable._cached_value = None
