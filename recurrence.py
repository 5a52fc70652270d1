# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The recurrence of an LSTM, faster than TensorFlow's operations.

With TensorFlow's, each step is some 30 small operations, most of which take
longer to start than to compute. On processors with AVX2, all steps are one
operation of our own (`recurrence_ops.cc`, built by `make ops`), and their
gradients another. Elsewhere, and on GPUs, they consist of TensorFlow's
operations. The results of both differ in rounding. For graphs, not for eager
execution.
"""

import ctypes
import functools

import tensorflow.compat.v1 as tf

import native


def _library():
  """Returns the `native.Library` of the operations; None if it isn't built.

  Raises:
    ImportError: it is there, but doesn't load.
  """
  return native.load_library(
    'recurrence_ops', 'learning takes the LSTM three to six times as long'
  )


@functools.cache
def available():
  """Returns whether `lstm` uses our own operations on this machine."""
  if tf.config.list_physical_devices('GPU') or _library() is None:
    return False
  return _library().function('ImpalaRecurrenceSupported', ctypes.c_bool)()


def lstm(sums, done, hidden, cell, weights, by_tensorflow=False):
  """Runs an LSTM over a sequence, resetting it where another one begins.

  Of a step, what depends on the step before is computed here. The products with
  the inputs, which don't, are made by the caller, for all steps at once.

  Args:
    sums: products of the inputs, and biases, float32 [T, B, 4 * units], T > 0,
      of the input gate, the forget gate, the cell and the output gate; or of a
      single step, [B, 4 * units].
    done: bool [T, B] or [B], whether a sequence begins: then the state before
      is zero.
    hidden: state before the first step, float32 [B, units].
    cell: the same.
    weights: recurrent weights, float32 [units, 4 * units].
    by_tensorflow: whether to use TensorFlow's operations in any case.

  Returns:
    Hidden part and cells of the state after each step, float32 [T, B, units] or
    [B, units].
  """
  if by_tensorflow or not (available() and weights.shape[0] % 64 == 0):
    if done.shape.rank == 1:
      return _step(sums, done, hidden, cell, weights)
    return _scan(sums, done, hidden, cell, weights)
  outputs = _library().ops.lstm_recurrence(sums, done, hidden, cell, weights)
  return outputs.hidden, outputs.cell


@tf.RegisterGradient('LstmRecurrence')
def _lstm_gradient(op, hidden_gradient, cell_gradient, *_):
  _, done, _, first_cell, weights = op.inputs
  _, cell, hidden_before, gates = op.outputs
  results = _library().ops.lstm_recurrence_gradient(
    hidden_gradient, cell_gradient, done, first_cell, weights, cell, gates
  )
  return (
    results.sums_gradient,
    None,
    results.first_hidden_gradient,
    results.first_cell_gradient,
    _weights_gradient(hidden_before, results.sums_gradient),
  )


def _weights_gradient(hidden_before, sums_gradient):
  """Returns the sum of all steps' and rows' products."""
  factors, others = (
    tf.reshape(t, [-1, t.shape[-1]]) for t in (hidden_before, sums_gradient)
  )
  return tf.matmul(factors, others, transpose_a=True)


def _step(sums, done, hidden, cell, weights):
  hidden, cell = (_reset(state, done) for state in (hidden, cell))
  i, f, g, o = tf.split(sums + tf.matmul(hidden, weights), 4, axis=1)
  cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
  return tf.sigmoid(o) * tf.tanh(cell), cell


def _reset(state, done):
  """Returns a state, [..., units], with zeros where `done`, [...]."""
  return tf.where_v2(done[..., tf.newaxis], 0.0, state)


def _scan(sums, done, hidden, cell, weights):
  # The static shape of a loop's state must not change.
  batch_size = hidden.shape[0]
  sums.set_shape([None, batch_size, None])
  done.set_shape([None, batch_size])

  @tf.custom_gradient
  def recur(sums, first_hidden, first_cell, weights):
    # Their gradient isn't summed up step by step.
    constant_weights = tf.stop_gradient(weights)
    hidden, cell = tf.scan(
      lambda state, inputs: _step(*inputs, *state, constant_weights),
      (sums, done),
      (first_hidden, first_cell),
    )

    def gradient(hidden_gradient, cell_gradient):
      sums_gradient, *first_gradients = tf.gradients(
        [hidden, cell],
        [sums, first_hidden, first_cell],
        [hidden_gradient, cell_gradient],
      )
      before = tf.concat([first_hidden[tf.newaxis], hidden[:-1]], axis=0)
      weights_gradient = _weights_gradient(_reset(before, done), sums_gradient)
      return sums_gradient, *first_gradients, weights_gradient

    return (hidden, cell), gradient

  return recur(sums, hidden, cell, weights)
