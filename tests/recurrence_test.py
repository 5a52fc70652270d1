# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of recurrence.py and its ops against an LSTM written out in NumPy."""

import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import native
import recurrence

needs_ops = pytest.mark.skipif(
  not recurrence.available(), reason='needs `make ops` and AVX2'
)
either_way = pytest.mark.parametrize(
  'by_tensorflow', [pytest.param(False, marks=needs_ops), True]
)

# Of steps, rows and units. None: a single step, without that dimension.
SIZES = [
  *((None, 1, 64), (None, 2, 64), (None, 7, 256), (1, 1, 64), (1, 5, 128)),
  *((2, 3, 64), (9, 1, 64), (20, 8, 256), (4, 37, 64)),
]


def random_arrays(seed, num_steps, batch_size, units):
  """Returns arguments of `recurrence.lstm`, and gradients of its results."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  leading = (batch_size,) if num_steps is None else (num_steps, batch_size)
  inputs = (
    normal(*leading, 4 * units),
    rng.random(leading) < 0.3,
    normal(batch_size, units),
    normal(batch_size, units),
    normal(units, 4 * units) / np.float32(units**0.5),
  )
  return inputs, [normal(*leading, units) for _ in range(2)]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def numpy_lstm(inputs, gradients):
  """Returns hidden and cells after each step, and the gradients, in float64.

  These are of the sums, the initial state and the weights.
  """
  sums, done, hidden, cell, weights = (
    x if x.dtype == bool else x.astype(np.float64) for x in inputs
  )
  is_step = done.ndim == 1
  if is_step:
    sums, done = sums[np.newaxis], done[np.newaxis]
    gradients = [gradient[np.newaxis] for gradient in gradients]
  steps, hiddens, cells = [], [], []
  for x, begins in zip(sums, done, strict=True):
    keeps = ~begins[:, np.newaxis]
    hidden, cell = keeps * hidden, keeps * cell
    i, f, g, o = np.split(x + hidden @ weights, 4, axis=1)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    before = hidden, cell
    cell = f * cell + i * g
    hidden = o * np.tanh(cell)
    steps.append((keeps, *before, i, f, g, o, np.tanh(cell)))
    hiddens.append(hidden)
    cells.append(cell)
  of_hidden, of_cell = np.zeros_like(hidden), np.zeros_like(cell)
  of_weights, of_sums = np.zeros_like(weights), []
  for step, *later in zip(
    reversed(steps), *(gradient[::-1] for gradient in gradients), strict=True
  ):
    keeps, hidden_before, cell_before, i, f, g, o, squashed = step
    of_hidden = of_hidden + later[0]
    of_cell = of_cell + later[1] + of_hidden * o * (1 - squashed**2)
    of_gates = np.concatenate(
      [
        of_cell * g * i * (1 - i),
        of_cell * cell_before * f * (1 - f),
        of_cell * i * (1 - g**2),
        of_hidden * squashed * o * (1 - o),
      ],
      axis=1,
    )
    of_sums.insert(0, of_gates)
    of_weights += hidden_before.T @ of_gates
    of_hidden, of_cell = keeps * (of_gates @ weights.T), keeps * of_cell * f
  of_sequence = [np.stack(x) for x in (hiddens, cells, of_sums)]
  if is_step:
    of_sequence = [x[0] for x in of_sequence]
  return *of_sequence, of_hidden, of_cell, of_weights


def differentiate(inputs, gradients, by_tensorflow=False):
  """Returns the tensors of what `numpy_lstm` returns."""
  results = recurrence.lstm(*inputs, by_tensorflow=by_tensorflow)
  sums, _, *others = inputs
  return *results, *tf.gradients(results, [sums, *others], gradients)


def run(function, *nests, unknown=False, config=None):
  """Returns what a function of nests of tensors gives for nests of arrays.

  Args:
    unknown: whether sizes of the batch and of the sequence aren't known before.
  """

  def placeholder(array):
    shape = array.shape
    if unknown and array is not nests[0][-1]:  # The weights.
      last = [None] if array.dtype == bool else shape[-1:]
      shape = [*[None] * (array.ndim - 1), *last]
    return tf.placeholder(array.dtype, shape)

  with tf.Graph().as_default():
    placeholders = tf.nest.map_structure(placeholder, nests)
    fetches = function(*placeholders)
    feeds = dict(
      zip(tf.nest.flatten(placeholders), tf.nest.flatten(nests), strict=True)
    )
    with tf.Session(config=config) as session:
      return session.run(fetches, feeds)


def assert_close(actual, expected, tolerance=2e-5):
  """Their difference is small beside the size of the expected numbers."""
  assert actual.shape == expected.shape
  scale = np.sqrt(np.mean(np.square(expected))) + 1e-6
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@needs_ops
@pytest.mark.parametrize('leading', [(), (3,)])
def test_shapes_are_known_before(leading):
  with tf.Graph().as_default():
    sums, done = tf.zeros([*leading, 2, 256]), tf.zeros([*leading, 2], tf.bool)
    others = tf.zeros([2, 64]), tf.zeros([2, 64]), tf.zeros([64, 256])
    results = recurrence.lstm(sums, done, *others)
    assert {result.op.type for result in results} == {'LstmRecurrence'}
    assert {(*result.shape,) for result in results} == {(*leading, 2, 64)}
    gradients = tf.gradients(results, [sums, *others])
    assert [g.shape for g in gradients] == [x.shape for x in (sums, *others)]


@either_way
@pytest.mark.parametrize('size', SIZES)
def test_states_and_gradients(size, by_tensorflow):
  inputs, gradients = random_arrays(1, *size)
  results = run(
    lambda *nests: differentiate(*nests, by_tensorflow), inputs, gradients
  )
  for result, expected in zip(
    results, numpy_lstm(inputs, gradients), strict=True
  ):
    assert_close(result, expected)


@either_way
@pytest.mark.parametrize('begins', [False, True])
def test_all_or_no_sequences_begin(begins, by_tensorflow):
  (sums, done, *others), gradients = random_arrays(2, 3, 5, 64)
  inputs = (sums, np.full_like(done, begins), *others)
  results = run(
    lambda *nests: differentiate(*nests, by_tensorflow), inputs, gradients
  )
  expected = numpy_lstm(inputs, gradients)
  for result, right in zip(results, expected, strict=True):
    assert_close(result, right)
  # Of what came before, nothing is left.
  assert any(x.any() for x in results[-3:]) != begins


@either_way
def test_state_that_is_reset_may_be_nan(by_tensorflow):
  (sums, done, hidden, cell, weights), gradients = random_arrays(3, 4, 3, 64)
  done[:] = False
  done[0, 1] = done[2, 2] = True
  hidden[1] = cell[1] = np.nan
  sums[1, 2] = np.nan
  inputs = sums, done, hidden, cell, weights
  results = run(
    lambda *nests: differentiate(*nests, by_tensorflow), inputs, gradients
  )
  # Another number instead of NaN makes no difference elsewhere.
  expected = numpy_lstm([np.nan_to_num(x) for x in inputs], gradients)
  for result, right in zip(results[:2], expected[:2], strict=True):
    assert np.isnan(result[1, 2]).all()
    result[1, 2] = right[1, 2]
    assert_close(result, right)


@needs_ops
def test_gates_are_exact_where_they_saturate_and_near_zero():
  x = np.concatenate(
    [np.linspace(-120, 120, 3001), np.logspace(-30, 1, 500), [0, 1e30, -1e30]]
  )
  x = np.resize(x, [64 * -(-x.size // 64)]).reshape(-1, 64).astype(np.float32)
  zeros, one = np.zeros_like(x), np.full_like(x, 30)
  for sums, expected in [
    # The cell: with open gates, first the candidate, then that of the input.
    ([one, zeros, x, zeros], np.tanh(x.astype(np.float64))),
    ([x, zeros, one, zeros], sigmoid(np.float64(np.clip(x, -87, None)))),
  ]:
    inputs = (
      np.concatenate(sums, axis=1),
      np.ones(len(x), bool),
      *(zeros, zeros, np.zeros([64, 256], np.float32)),
    )
    _, cell = run(lambda *inputs: recurrence.lstm(*inputs), *inputs)
    np.testing.assert_allclose(cell, expected, rtol=4e-7, atol=1e-37)


@needs_ops
@pytest.mark.parametrize('place', range(5))
def test_nan_is_not_hidden(place):
  """The learner reports it."""
  inputs, _ = random_arrays(4, 2, 2, 64)
  inputs[1][:] = False
  if place == 1:
    inputs[2][:] = np.inf  # Times weights of both signs.
  else:
    inputs[place].flat[0] = np.nan
  hidden, cell = run(lambda *inputs: recurrence.lstm(*inputs), *inputs)
  assert np.isnan(hidden[-1]).any()
  assert np.isnan(cell[-1]).any()


@either_way
@pytest.mark.parametrize('size', [(None, 3, 64), (5, 3, 64)])
def test_sizes_that_are_known_late(size, by_tensorflow):
  inputs, gradients = random_arrays(5, *size)
  results = run(
    lambda *nests: differentiate(*nests, by_tensorflow),
    *(inputs, gradients),
    unknown=True,
  )
  for result, expected in zip(
    results, numpy_lstm(inputs, gradients), strict=True
  ):
    assert_close(result, expected)


@needs_ops
@pytest.mark.parametrize('size', [(None, 40, 256), (3, 40, 64)])
def test_a_row_is_the_same_whatever_is_beside_it(size):
  """Also with others before it, alone, and with more threads."""
  inputs, gradients = random_arrays(6, *size)
  *sequences, of_hidden, of_cell, _ = run(differentiate, inputs, gradients)
  expected = [np.moveaxis(x, -2, 0) for x in (*sequences, of_hidden, of_cell)]
  with tf.Graph().as_default():
    begin, end = tf.placeholder(tf.int32, []), tf.placeholder(tf.int32, [])
    sums, done, hidden, cell, weights = map(tf.constant, inputs)
    part = [
      *(x[..., begin:end, :] for x in (sums, done[..., tf.newaxis])),
      *(x[begin:end] for x in (hidden, cell)),
    ]
    part[1] = tf.squeeze(part[1], -1)
    *results, _ = differentiate(
      (*part, weights), [tf.constant(g)[..., begin:end, :] for g in gradients]
    )
    with tf.Session() as session:
      for batch_size in range(1, 41):
        for first in {0, 40 - batch_size, (40 - batch_size) // 3}:
          last = first + batch_size
          values = session.run(results, {begin: first, end: last})
          for value, right in zip(values, expected, strict=True):
            np.testing.assert_array_equal(
              np.moveaxis(value, -2, 0), right[first:last]
            )


@needs_ops
def test_results_do_not_depend_on_threads():
  inputs, gradients = random_arrays(7, 30, 33, 128)
  first, *others = (
    run(
      differentiate,
      inputs,
      gradients,
      config=tf.ConfigProto(intra_op_parallelism_threads=threads),
    )[:-1]  # The weights' gradient is TensorFlow's product.
    for threads in (1, 2, 5)
  )
  for other in others:
    for result, expected in zip(other, first, strict=True):
      np.testing.assert_array_equal(result, expected)


@needs_ops
def test_nothing_to_compute():
  for num_steps, batch_size in [(None, 0), (3, 0), (0, 2)]:
    inputs, gradients = random_arrays(8, num_steps, batch_size, 64)
    results = run(differentiate, inputs, gradients)
    assert not any(result.any() for result in results)


def test_other_numbers_of_units_are_left_to_tensorflow():
  inputs, gradients = random_arrays(9, 3, 2, 40)
  results = run(differentiate, inputs, gradients)
  for result, expected in zip(
    results, numpy_lstm(inputs, gradients), strict=True
  ):
    assert_close(result, expected)


# --- Wrong inputs -----------------------------------------------------------

SHAPES = {
  'sums': (3, 2, 256),
  'done': (3, 2),
  'first_hidden': (2, 64),
  'first_cell': (2, 64),
  'weights': (64, 256),
}
GRADIENT_SHAPES = {
  'hidden_gradient': (3, 2, 64),
  'cell_gradient': (3, 2, 64),
  'done': (3, 2),
  'first_cell': (2, 64),
  'weights': (64, 256),
  'cell': (3, 2, 64),
  'gates': (3, 2, 256),
}


def call(name, shapes):
  """Runs an operation with zeros of some shapes, which it only sees then."""
  with tf.Graph().as_default(), tf.Session() as session:
    arrays = {
      key: np.zeros(shape, bool if key == 'done' else np.float32)
      for key, shape in shapes.items()
    }
    inputs = {k: tf.placeholder(a.dtype) for k, a in arrays.items()}
    operation = getattr(recurrence._library().ops, name)
    return session.run(
      operation(**inputs), {inputs[k]: a for k, a in arrays.items()}
    )


WRONG = [
  ((3, 2, 255), 'sums'),
  ((3, 3, 256), 'sums'),
  ((2, 256), 'sums'),
  ((256,), 'sums'),
  ((), 'done'),
  ((2,), 'done'),
  ((1, 3, 2), 'done'),
  ((2, 3), 'done'),
  ((3, 64), 'first_hidden'),
  ((2, 32), 'first_hidden'),
  ((64,), 'first_hidden'),
  ((1, 64), 'first_cell'),
  ((2, 3, 64), 'first_cell'),
  ((), 'weights'),
  ((64, 64), 'weights'),
  ((256, 64), 'weights'),
  ((0, 0), 'weights'),
  ((64, 256, 1), 'weights'),
]


@needs_ops
@pytest.mark.parametrize(('shape', 'name'), WRONG)
def test_op_refuses_wrong_shapes(shape, name):
  assert len(call('lstm_recurrence', SHAPES)) == 4
  with pytest.raises(tf.errors.InvalidArgumentError, match='not \\['):
    call('lstm_recurrence', {**SHAPES, name: shape})


@needs_ops
@pytest.mark.parametrize(
  ('shape', 'name'),
  [
    *[(shape, name) for shape, name in WRONG if name in GRADIENT_SHAPES],
    ((3, 2, 32), 'hidden_gradient'),
    ((2, 64), 'hidden_gradient'),
    ((3, 1, 64), 'cell_gradient'),
    ((2, 2, 64), 'cell'),
    ((3, 2, 64), 'gates'),
    ((3, 2), 'gates'),
  ],
)
def test_gradient_op_refuses_wrong_shapes(shape, name):
  assert len(call('lstm_recurrence_gradient', GRADIENT_SHAPES)) == 3
  with pytest.raises(tf.errors.InvalidArgumentError, match='not \\['):
    call('lstm_recurrence_gradient', {**GRADIENT_SHAPES, name: shape})


@needs_ops
def test_op_refuses_units_that_are_no_multiple_of_64():
  units = {'first_hidden': (2, 32), 'first_cell': (2, 32), 'weights': (32, 128)}
  with pytest.raises(
    tf.errors.InvalidArgumentError, match=r'64 divides .* not \[32,128\]'
  ):
    call('lstm_recurrence', {**SHAPES, 'sums': (3, 2, 128), **units})


# --- The library ------------------------------------------------------------


@needs_ops
def test_own_operations_are_used_where_linux_says_they_can_be():
  with open('/proc/cpuinfo') as file:
    flags = set(
      re.search(r'^flags\s*:(.*)', file.read(), re.MULTILINE)[1].split()
    )
  assert {'avx2', 'fma'} <= flags


def test_without_the_library_tensorflow_computes_with_a_warning(
  tmp_path, monkeypatch, caplog
):
  monkeypatch.setattr(native, 'FOLDER', str(tmp_path))
  # Without what they remember.
  native.warn_not_built.cache_clear()
  monkeypatch.setattr(native, 'load_library', native.load_library.__wrapped__)
  monkeypatch.setattr(recurrence, 'available', recurrence.available.__wrapped__)
  inputs, gradients = random_arrays(10, 3, 2, 64)
  results = run(differentiate, inputs, gradients)
  for result, expected in zip(
    results, numpy_lstm(inputs, gradients), strict=True
  ):
    assert_close(result, expected)
  (message,) = caplog.messages
  assert message.startswith('recurrence_ops.so is not built: learning')
