# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of convolution.py and its ops against sums written out in NumPy."""

import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import convolution

needs_ops = pytest.mark.skipif(
  not convolution.available(), reason='needs `make ops` and AVX-512'
)


def random_arrays(seed, batch_size, height, width, in_channels, out_channels):
  """Returns frames, weights, biases and a residual."""
  rng = np.random.default_rng(seed)
  shapes = [
    (batch_size, height, width, in_channels),
    (3, 3, in_channels, out_channels),
    (out_channels,),
    (batch_size, height, width, out_channels),
  ]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def shifted(frames):
  """Returns 3x3 places and what is there around each pixel."""
  _, height, width, _ = frames.shape
  padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))
  for y, x in itertools.product(range(3), repeat=2):
    yield (y, x), padded[:, y : y + height, x : x + width]


def numpy_convolve(frames, weights, biases, relu, residual):
  frames = frames.astype(np.float64)
  if relu:
    frames = np.maximum(frames, 0)
  output = biases.astype(np.float64)
  for place, around in shifted(frames):
    output = output + around @ weights[place]
  return output if residual is None else output + residual


def numpy_gradients(frames, weights, relu, gradient):
  """Returns those of frames, weights and biases."""
  gradient = gradient.astype(np.float64)
  positive = frames > 0 if relu else np.ones_like(frames)
  weights_gradient = np.empty(weights.shape)
  for place, around in shifted(frames * positive):
    weights_gradient[place] = np.tensordot(around, gradient, [[0, 1, 2]] * 2)
  # A pixel is above and left of those whose upper left neighbour it is.
  frames_gradient = sum(
    around @ weights[2 - y, 2 - x].T for (y, x), around in shifted(gradient)
  )
  return frames_gradient * positive, weights_gradient, gradient.sum((0, 1, 2))


def pooled_size(size):
  """Returns the outputs of a pool, and what is before its first window."""
  # TensorFlow's rule for 'SAME': an odd pixel of padding is at the end.
  outputs = (size + 1) // 2
  return outputs, ((outputs - 1) * 2 + 3 - size) // 2


def numpy_windows(frames):
  """Returns the 9 numbers of each window, [9, N, height, width, channels].

  What is outside of the picture is -inf.
  """
  (height, above), (width, left) = map(pooled_size, frames.shape[1:3])
  padded = np.pad(
    frames,
    ((0, 0), (above, 3), (left, 3), (0, 0)),
    constant_values=-np.inf,
  )
  return np.stack(
    [
      padded[:, y : y + 2 * height : 2, x : x + 2 * width : 2]
      for y, x in itertools.product(range(3), repeat=2)
    ]
  )


def numpy_pool_gradient(gradient, places, size):
  """Returns the gradient of what a pool of `places` of windows took."""
  (_, above), (_, left) = map(pooled_size, size)
  batch_size, height, width, channels = gradient.shape
  padded = np.zeros((batch_size, size[0] + 4, size[1] + 4, channels))
  for number, (y, x) in enumerate(itertools.product(range(3), repeat=2)):
    padded[:, y : y + 2 * height : 2, x : x + 2 * width : 2] += gradient * (
      places == number
    )
  return padded[:, above : above + size[0], left : left + size[1]]


def assert_close(actual, expected):
  """Their difference is small beside the size of the expected numbers."""
  assert actual.shape == expected.shape
  scale = np.sqrt(np.mean(np.square(expected))) + 1e-6
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-4 * scale)


def run(function, arrays, config=None):
  """Returns what a function of tensors gives for arrays."""
  with tf.Graph().as_default():
    placeholders = [tf.placeholder(a.dtype, a.shape) for a in arrays]
    results = function(*placeholders)
    with tf.Session(config=config) as session:
      return session.run(results, dict(zip(placeholders, arrays, strict=True)))


def gradients(frames, weights, biases, gradient, relu=True):
  output = convolution.convolve(frames, weights, biases, relu)
  return tf.gradients(output, [frames, weights, biases], gradient)


def pooled_gradients(frames, weights, biases, gradient):
  output = convolution.convolve_and_pool(frames, weights, biases)
  return tf.gradients(output, [frames, weights, biases], gradient)


# Tiles are 4x4, so that sizes are of all remainders, and all of the network's
# for frames of 72x96 and 84x84. The last one's results are written past the
# caches.
SIZES = [
  *((1, 1, 1), (2, 3, 5), (3, 7, 6), (1, 4, 4), (4, 9, 12), (2, 11, 11)),
  *((3, 18, 24), (2, 21, 21), (2, 36, 48), (40, 36, 48)),
]


@needs_ops
@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize(
  'channels', [(i, o) for i in (16, 32) for o in (16, 32)]
)
@pytest.mark.parametrize('size', SIZES)
def test_convolution_and_its_gradients(size, channels, relu):
  frames, weights, biases, gradient = random_arrays(1, *size, *channels)
  frames[..., 3] = 0  # The ReLU's gradient is zero there, too.

  def build(frames, weights, biases, gradient):
    output = convolution.convolve(frames, weights, biases, relu)
    assert output.op.type == 'Conv3x3'
    assert output.shape == gradient.shape
    inputs = [frames, weights, biases]
    results = tf.gradients(output, inputs, gradient)
    assert [r.shape for r in results] == [i.shape for i in inputs]
    return output, *results

  output, *results = run(build, [frames, weights, biases, gradient])
  assert_close(output, numpy_convolve(frames, weights, biases, relu, None))
  expected = numpy_gradients(frames, weights, relu, gradient)
  for result, right in zip(results, expected, strict=True):
    assert_close(result, right)


POOLED_SIZES = [
  *((1, 1, 1), (2, 3, 5), (3, 7, 6), (1, 4, 13), (9, 18, 24), (2, 11, 11)),
  *((5, 36, 25), (1, 72, 96)),
]


@needs_ops
@pytest.mark.parametrize(
  'channels', [(i, o) for i in (1, 3, 4, 16, 32) for o in (16, 32)]
)
@pytest.mark.parametrize('size', POOLED_SIZES)
def test_pooled_convolution_and_its_gradients(size, channels):
  frames, weights, biases, _ = random_arrays(10, *size, *channels)
  candidates = numpy_windows(
    numpy_convolve(frames, weights, biases, False, None)
  )
  gradient = np.random.default_rng(11).normal(size=candidates.shape[1:])
  gradient = gradient.astype(np.float32)

  def build(frames, weights, biases, gradient):
    output = convolution.convolve_and_pool(frames, weights, biases)
    assert output.op.type == 'Conv3x3Pool'
    assert output.shape == gradient.shape
    inputs = [frames, weights, biases]
    results = tf.gradients(output, inputs, gradient)
    assert [r.shape for r in results] == [i.shape for i in inputs]
    return *output.op.outputs, *results

  arrays = [frames, weights, biases, gradient]
  output, places, *results = run(build, arrays)
  assert_close(output, candidates.max(0))
  # Of nearly equal ones either is right.
  chosen = np.take_along_axis(candidates, places[np.newaxis].astype(int), 0)[0]
  assert_close(output, chosen)
  expected = numpy_gradients(
    *(frames, weights, False),
    numpy_pool_gradient(gradient, places, frames.shape[1:3]),
  )
  for result, right in zip(results, expected, strict=True):
    assert_close(result, right)


@needs_ops
def test_of_equal_pixels_one_has_the_pools_gradient():
  frames = np.zeros((1, 6, 6, 3), np.float32)
  weights, biases = np.ones((3, 3, 3, 16), np.float32), np.ones(16, np.float32)

  def build(frames, weights, biases):
    output = convolution.convolve_and_pool(frames, weights, biases)
    return *output.op.outputs, tf.gradients(output, biases)[0]

  output, places, biases_gradient = run(build, [frames, weights, biases])
  np.testing.assert_array_equal(output, np.ones((1, 3, 3, 16)))
  np.testing.assert_array_equal(places, np.zeros((1, 3, 3, 16)))
  np.testing.assert_array_equal(biases_gradient, [9] * 16)


@needs_ops
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_pool_keeps_what_all_pixels_are(value):
  frames, weights, biases, _ = random_arrays(12, 1, 8, 8, 3, 16)
  biases[5] = value
  output = run(convolution.convolve_and_pool, [frames, weights, biases])
  np.testing.assert_array_equal(output[..., 5], np.full((1, 4, 4), value))
  assert np.isfinite(np.delete(output, 5, axis=-1)).all()


@needs_ops
def test_residual_is_added_and_has_the_outputs_gradient():
  arrays = random_arrays(2, 3, 10, 13, 32, 16)
  gradient = random_arrays(3, 3, 10, 13, 32, 16)[-1]

  def build(frames, weights, biases, residual):
    output = convolution.convolve(frames, weights, biases, True, residual)
    return output, tf.gradients(output, residual, gradient)[0]

  output, residual_gradient = run(build, arrays)
  frames, weights, biases, residual = arrays
  assert_close(output, numpy_convolve(frames, weights, biases, True, residual))
  np.testing.assert_array_equal(residual_gradient, gradient)


@pytest.mark.parametrize('channels', [(3, 16), (16, 8), (64, 64)])
def test_other_channels_are_left_to_tensorflow(channels):
  arrays = random_arrays(4, 2, 6, 7, *channels)

  def build(frames, weights, biases, residual):
    return convolution.convolve(frames, weights, biases, True, residual)

  frames, weights, biases, residual = arrays
  expected = numpy_convolve(frames, weights, biases, True, residual)
  assert_close(run(build, arrays), expected)


@pytest.mark.parametrize('channels', [(2, 16), (3, 8), (64, 64)])
def test_pooling_other_channels_is_left_to_tensorflow(channels):
  frames, weights, biases, _ = random_arrays(4, 2, 6, 7, *channels)
  output = run(convolution.convolve_and_pool, [frames, weights, biases])
  expected = numpy_convolve(frames, weights, biases, False, None)
  assert_close(output, numpy_windows(expected).max(0))


@needs_ops
def test_tensorflow_alone_on_request():
  arrays = random_arrays(13, 2, 8, 9, 16, 16)

  def build(frames, weights, biases, residual):
    results = [
      convolution.convolve(
        *(frames, weights, biases, True, residual), by_tensorflow=True
      ),
      convolution.convolve_and_pool(
        frames, weights, biases, by_tensorflow=True
      ),
    ]
    types = {op.type for op in frames.graph.get_operations()}
    assert not types & {'Conv3x3', 'Conv3x3Pool'}
    return results

  frames, weights, biases, residual = arrays
  output, pooled = run(build, arrays)
  assert_close(output, numpy_convolve(frames, weights, biases, True, residual))
  expected = numpy_convolve(frames, weights, biases, False, None)
  assert_close(pooled, numpy_windows(expected).max(0))


@needs_ops
@pytest.mark.parametrize('function', [gradients, pooled_gradients])
def test_no_frames(function):
  frames, weights, biases, gradient = random_arrays(5, 0, 5, 5, 16, 16)
  if function is pooled_gradients:
    gradient = gradient[:, :3, :3]
  results = run(function, [frames, weights, biases, gradient])
  assert results[0].shape == (0, 5, 5, 16)
  assert not results[1].any()
  assert not results[2].any()


@needs_ops
@pytest.mark.parametrize('function', [gradients, pooled_gradients])
def test_results_do_not_depend_on_threads(function, monkeypatch):
  # Else the process has the threads of its first session.
  monkeypatch.setenv('TF_OVERRIDE_GLOBAL_THREADPOOL', '1')
  frames, weights, biases, gradient = random_arrays(6, 30, 18, 24, 32, 32)
  if function is pooled_gradients:
    gradient = gradient[:, :9, :12]
  arrays = [frames, weights, biases, gradient]
  one, many = (
    run(function, arrays, tf.ConfigProto(intra_op_parallelism_threads=threads))
    for threads in (1, 5)
  )
  for a, b in zip(one, many, strict=True):
    np.testing.assert_array_equal(a, b)


@needs_ops
@pytest.mark.parametrize(
  'function', [convolution.convolve, convolution.convolve_and_pool]
)
def test_a_frame_is_convolved_the_same_whatever_is_beside_it(function):
  frames, weights, biases, _ = random_arrays(7, 7, 9, 12, 16, 32)

  def outputs(frames):
    return run(function, [frames, weights, biases])

  together = outputs(frames)
  for number in range(7):
    alone = outputs(frames[number : number + 1])
    np.testing.assert_array_equal(together[number : number + 1], alone)


@needs_ops
def test_nan_is_not_hidden_by_the_relu():
  frames, weights, biases, _ = random_arrays(8, 1, 8, 8, 16, 16)
  frames[0, 2, 3, 4] = np.nan

  def build(*inputs):
    return convolution.convolve(*inputs, relu=True)

  output = run(build, [frames, weights, biases])
  assert np.isnan(output[0, 1:4, 2:5]).all()


@needs_ops
@pytest.mark.parametrize(
  ('shapes', 'message'),
  [
    (([1, 4, 4, 16], [3, 3, 16, 24], [24]), 'A filter is'),
    (([1, 4, 4, 16], [5, 5, 16, 16], [16]), 'A filter is'),
    (([1, 4, 4, 32], [3, 3, 16, 16], [16]), 'Expected pictures of 16'),
    (([4, 4, 16], [3, 3, 16, 16], [16]), 'Expected pictures of 16'),
    (([1, 4, 4, 16], [3, 3, 16, 16], [32]), 'Expected \\[16\\]'),
    (([1, 4, 4, 16], [3, 3, 16, 16], [16], [1, 4, 5, 16]), 'Expected \\[1,4,4'),
    (
      ([1, 4, 4, 16], [3, 3, 16, 16], [16], *[[1, 4, 4, 16]] * 2),
      'More than one',
    ),
  ],
)
def test_op_refuses_wrong_shapes(shapes, message):
  with tf.Graph().as_default(), tf.Session() as session:
    # So that it is the kernel that refuses them.
    frames, weights, biases, *residual = (
      tf.placeholder_with_default(tf.zeros(shape), None) for shape in shapes
    )
    output = convolution._library().conv3x3(
      frames, weights, biases, residual, relu=True
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
      session.run(output)


@needs_ops
def test_gradient_ops_refuse_wrong_shapes():
  frames, weights, _, gradient = random_arrays(9, 2, 4, 4, 16, 32)
  pooled = gradient[:, :2, :2]
  places = np.zeros(pooled.shape, np.uint8)
  ops = convolution._library()
  with tf.Graph().as_default(), tf.Session() as session:
    for results, message in [
      (
        ops.conv3x3_gradient(gradient[:1], frames, weights, relu=False),
        'Expected \\[2,4,4,32\\]',
      ),
      (
        ops.conv3x3_pool_gradient(gradient, frames, weights, places, 1),
        'Expected \\[2,2,2,32\\]',
      ),
      (
        ops.conv3x3_pool_gradient(pooled, frames, weights, places[:1], 1),
        'Expected \\[2,2,2,32\\]',
      ),
      (
        ops.conv3x3_pool_gradient(pooled, frames, weights, places, 0),
        'have 1 gradients',
      ),
    ]:
      with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        session.run(results)


_PROGRAM = """
import numpy as np
import tensorflow.compat.v1 as tf
import convolution
with tf.Graph().as_default(), tf.Session() as session:
  for _ in range(2):
    output = convolution.convolve(
      tf.ones([1, 3, 3, 16]), tf.ones([3, 3, 16, 16]), tf.ones([16])
    )
  assert output.op.type != 'Conv3x3'
  assert session.run(output)[0, 1, 1, 0] == 9 * 16 + 1
"""


def run_program(folder):
  shutil.copy(convolution.__file__, folder)
  return subprocess.run(
    [sys.executable, '-c', _PROGRAM],
    cwd=folder,
    env={'CUDA_VISIBLE_DEVICES': '', 'TF_CPP_MIN_LOG_LEVEL': '3'},
    capture_output=True,
    text=True,
  )


def test_without_the_library_tensorflow_convolves_after_one_warning(tmp_path):
  result = run_program(tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stderr.count('make ops') == 1


def test_library_that_does_not_fit_is_told(tmp_path):
  (tmp_path / 'convolution_ops.so').write_bytes(b'\x7fELF and no more')
  result = run_program(tmp_path)
  assert result.returncode == 1
  assert 'ImportError' in result.stderr
  assert 'make clean ops' in result.stderr
