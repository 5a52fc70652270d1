# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of interfaces that are not public: an upgrade may lack one."""

import numpy as np
import sonnet as snt
import tensorflow.compat.v1 as tf

import private_apis

snt.Module()  # See agent.py.


def test_sonnets_convolution_makes_its_variables():
  with tf.Graph().as_default():
    convolution = snt.Conv2D(16, 3)
    private_apis.make_convolution_variables(convolution, 4)
    assert convolution.w.shape == (3, 3, 4, 16)
    assert convolution.b.shape == (16,)


def test_sonnets_lstm_makes_its_variables():
  with tf.Graph().as_default():
    lstm = snt.LSTM(16)
    private_apis.make_lstm_variables(lstm, 4)
    assert lstm.input_to_hidden.shape == (4, 64)
    assert lstm.hidden_to_hidden.shape == (16, 64)
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      bias = session.run(lstm.b)
  # Of the forget gate, the second, 1.
  np.testing.assert_array_equal(bias, np.repeat([0, 1, 0, 0], 16))


def test_control_inputs_of_an_operation_are_replaced():
  with tf.Graph().as_default():
    before, after = tf.no_op(), tf.no_op()
    with tf.control_dependencies([before]):
      op = tf.no_op()
    private_apis.replace_control_inputs(op, [after])
    assert op.control_inputs == [after]


def test_runs_of_a_session_go_through_a_function():
  runs = []

  def wrap(run, *args):
    runs.append(args)
    return run(*args)

  with tf.Graph().as_default(), tf.Session() as session:
    x = tf.placeholder(tf.float32, [])
    private_apis.wrap_session_run(session, wrap)
    assert session.run(2 * x, {x: 3}) == 6
    assert np.isclose(session.make_callable(tf.constant(2.0))(), 2)
  assert len(runs) == 2


def test_variables_are_read_once():
  with tf.Graph().as_default() as graph:
    old = tf.Variable(2.0)
    with private_apis.read_once():
      new = tf.Variable(3.0)
      product = old * old * new * new
      gradients = tf.gradients(product, [old, new])
    again = old * old
    needed = tf.graph_util.extract_sub_graph(
      graph.as_graph_def(), [tensor.op.name for tensor in gradients]
    )
    reads = [node for node in needed.node if node.op == 'ReadVariableOp']
    assert len(reads) == 2
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      assert session.run([product, *gradients]) == [36, 36, 24]
      # Later reads see what was assigned.
      session.run(old.assign(5.0))
      assert session.run(again) == 25
