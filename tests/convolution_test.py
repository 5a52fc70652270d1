# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of convolution.py and its ops against sums written out in NumPy."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import convolution
import native

_PATIENCE = 120  # Seconds after which a program counts as hung.

# What the sections of the deep network are of: before and after their first
# convolution.
CHANNELS = [(1, 16), (3, 16), (4, 16), (16, 16), (16, 32), (32, 32)]

needs_ops = pytest.mark.skipif(
  not convolution.available(), reason='needs `make ops` and AVX-512'
)
needs_bfloat16 = pytest.mark.skipif(
  not convolution.available('bfloat16'),
  reason='needs `make ops` and AVX-512 for bfloat16',
)


def random_arrays(seed, batch_size, height, width, channels, num_blocks=2):
  """Returns frames, and lists of weights and of biases.

  Args:
    channels: of the frames, which are bytes if there are few, and of the rest.
  """
  rng = np.random.default_rng(seed)
  in_channels, out_channels = channels
  size = batch_size, height, width, in_channels
  if in_channels in (16, 32):
    frames = rng.normal(size=size).astype(np.float32)
  else:
    frames = rng.integers(0, 256, size, np.uint8)
  weights = [
    rng.normal(0, (9 * n) ** -0.5, (3, 3, n, out_channels)).astype(np.float32)
    for n in [in_channels] + 2 * num_blocks * [out_channels]
  ]
  biases = [
    rng.normal(0, 0.1, out_channels).astype(np.float32) for _ in weights
  ]
  return frames, weights, biases


def numbers(frames):
  """Returns what frames stand for, in float64."""
  if frames.dtype == np.uint8:
    frames = frames / 255
  return frames.astype(np.float64)


def shifted(frames):
  """Returns 3x3 places and what is there around each pixel."""
  _, height, width, _ = frames.shape
  padded = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))
  for y, x in itertools.product(range(3), repeat=2):
    yield (y, x), padded[:, y : y + height, x : x + width]


def numpy_convolve(frames, weights, biases):
  output = biases.astype(np.float64)
  for place, around in shifted(frames):
    output = output + around @ weights[place]
  return output


def numpy_gradients(frames, weights, gradient):
  """Returns those of frames, weights and biases."""
  weights_gradient = np.empty(weights.shape)
  for place, around in shifted(frames):
    weights_gradient[place] = np.tensordot(around, gradient, [[0, 1, 2]] * 2)
  # A pixel is above and left of those whose upper left neighbour it is.
  frames_gradient = sum(
    around @ weights[2 - y, 2 - x].T for (y, x), around in shifted(gradient)
  )
  return frames_gradient, weights_gradient, gradient.sum((0, 1, 2))


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


def numpy_section(frames, weights, biases):
  """Returns windows of the pool, and all activations."""
  windows = numpy_windows(
    numpy_convolve(numbers(frames), weights[0], biases[0])
  )
  activations = [windows.max(0)]
  for number in range(1, len(weights)):
    activations.append(
      numpy_convolve(
        np.maximum(activations[-1], 0), weights[number], biases[number]
      )
    )
    if number % 2 == 0:
      activations[-1] += activations[-3]
  return windows, activations


def numpy_section_gradients(frames, weights, activations, places, gradient):
  """Returns those of frames, unless they are bytes, weights and biases."""
  gradient = gradient.astype(np.float64)
  weights_gradients, biases_gradients = [], []

  def go_back(number, frames, gradient):
    frames_gradient, *others = numpy_gradients(
      frames, weights[number], gradient
    )
    weights_gradients.insert(0, others[0])
    biases_gradients.insert(0, others[1])
    return frames_gradient

  for number in range(len(weights) - 1, 0, -2):
    hidden, before = activations[number - 1], activations[number - 2]
    of_hidden = go_back(number, np.maximum(hidden, 0), gradient)
    of_before = go_back(
      number - 1, np.maximum(before, 0), of_hidden * (hidden > 0)
    )
    gradient = gradient + of_before * (before > 0)
  gradient = numpy_pool_gradient(gradient, places, frames.shape[1:3])
  of_frames = go_back(0, numbers(frames), gradient)
  return [
    *([of_frames] if frames.dtype == np.float32 else []),
    *weights_gradients,
    *biases_gradients,
  ]


def assert_close(actual, expected, tolerance=2e-4):
  """Their difference is small beside the size of the expected numbers."""
  assert actual.shape == expected.shape
  scale = np.sqrt(np.mean(np.square(expected))) + 1e-6
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_nearly(actual, expected, tolerance):
  """Their mean difference is small beside the size of the expected numbers."""
  assert actual.shape == expected.shape
  error = np.sqrt(np.mean(np.square(actual - expected)))
  assert error < tolerance * np.sqrt(np.mean(np.square(expected)))


def run(function, arrays, config=None):
  """Returns what a function of nests of tensors gives for nests of arrays."""
  with tf.Graph().as_default():
    placeholders = tf.nest.map_structure(
      lambda a: tf.placeholder(a.dtype, a.shape), arrays
    )
    results = function(*placeholders)
    feeds = dict(
      zip(tf.nest.flatten(placeholders), tf.nest.flatten(arrays), strict=True)
    )
    with tf.Session(config=config) as session:
      return session.run(results, feeds)


def own_section(*inputs, **options):
  """Returns all outputs of our own operation."""
  output = convolution.section(*inputs, **options)
  assert output.op.type == 'TorsoSection'
  return output.op.outputs


def section_gradients(frames, weights, biases, gradient, **options):
  """Returns all outputs, and gradients of frames, if any, weights, biases."""
  outputs = own_section(frames, weights, biases, **options)
  inputs = [*weights, *biases]
  if frames.dtype == tf.float32:
    inputs.insert(0, frames)
  assert outputs[-2].shape == gradient.shape
  gradients = tf.gradients(outputs[-2], inputs, gradient)
  assert [g.shape for g in gradients] == [i.shape for i in inputs]
  return outputs, gradients


def gradient_for(seed, frames, weights):
  batch_size, height, width, _ = frames.shape
  size = batch_size, (height + 1) // 2, (width + 1) // 2, weights[0].shape[3]
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


# Tiles are 4x4, so that sizes are of all remainders, before and after the pool.
SIZES = [
  *((1, 1, 1), (2, 3, 5), (3, 7, 6), (1, 4, 13), (4, 9, 12), (2, 11, 11)),
  *((9, 18, 24), (2, 21, 21)),
]


def check_section(size, channels, num_blocks):
  frames, weights, biases = random_arrays(1, *size, channels, num_blocks)
  gradient = gradient_for(2, frames, weights)
  (*activations, places), results = run(
    section_gradients, (frames, weights, biases, gradient)
  )
  windows, expected = numpy_section(frames, weights, biases)
  for activation, right in zip(activations, expected, strict=True):
    assert_close(activation, right)
  # Of nearly equal ones either is right.
  chosen = np.take_along_axis(windows, places[np.newaxis].astype(int), 0)[0]
  assert_close(activations[0], chosen)
  # So is either side of zero for what is nearly zero.
  expected = numpy_section_gradients(
    frames, weights, activations, places, gradient
  )
  for result, right in zip(results, expected, strict=True):
    assert_close(result, right)


@pytest.mark.parametrize('by_tensorflow', [False, True])
@pytest.mark.parametrize('in_channels', [1, 3, 4])
@pytest.mark.parametrize('size', [(3, 7, 6), (2, 11, 11), (1, 18, 24)])
def test_bytes_are_normalised_before_they_are_convolved(
  size, in_channels, by_tensorflow
):
  """Some beyond the limit, each number of a picture in its own way."""
  if not by_tensorflow and not convolution.available():
    pytest.skip('needs `make ops` and AVX-512')
  frames, weights, biases = random_arrays(1, *size, (in_channels, 16))
  random = np.random.default_rng(3)
  scale = random.uniform(0.01, 0.1, frames.shape[1:]).astype(np.float32)
  shift = random.uniform(-8, 2, frames.shape[1:]).astype(np.float32)
  gradient = gradient_for(2, frames, weights)

  def build(frames, weights, biases, scale, shift, gradient):
    output = convolution.section(
      frames,
      weights,
      biases,
      normalization=convolution.Normalization(scale, shift, 2.0),
      by_tensorflow=by_tensorflow,
    )
    assert by_tensorflow or output.op.type == 'TorsoSection'
    return output, tf.gradients(output, [*weights, *biases], gradient)

  output, gradients = run(
    build, (frames, weights, biases, scale, shift, gradient)
  )
  normalized = np.clip(frames.astype(np.float64) * scale + shift, -2, 2)
  assert 0.1 < np.mean(np.abs(normalized) == 2) < 0.9
  # TensorFlow computes the rest as it does for float32.
  expected, expected_gradients = run(
    lambda frames, weights, biases, gradient: (
      output := convolution.section(
        frames, weights, biases, by_tensorflow=True
      ),
      tf.gradients(output, [*weights, *biases], gradient),
    ),
    (normalized.astype(np.float32), weights, biases, gradient),
  )
  _, (*_, by_hand) = numpy_section(normalized, weights, biases)
  assert_close(output, by_hand)
  assert_close(expected, by_hand)
  for result, right in zip(gradients, expected_gradients, strict=True):
    assert_close(result, right)


@needs_ops
@pytest.mark.parametrize('channels', CHANNELS)
@pytest.mark.parametrize('size', SIZES)
def test_section_and_its_gradients(size, channels):
  check_section(size, channels, num_blocks=2)


@needs_ops
@pytest.mark.parametrize('num_blocks', [0, 1, 3])
def test_other_numbers_of_blocks(num_blocks):
  check_section((3, 10, 14), (16, 32), num_blocks)


# Results of the larger ones are written past the caches.
@needs_ops
@pytest.mark.parametrize(
  ('size', 'channels'),
  [
    ((1, 72, 96), (3, 16)),
    ((45, 72, 96), (3, 16)),
    ((80, 36, 48), (16, 32)),
    ((5, 84, 84), (4, 16)),
  ],
)
def test_sizes_of_the_network(size, channels):
  check_section(size, channels, num_blocks=2)


def test_zero_is_where_the_relu_has_no_gradient():
  frames, weights, biases = random_arrays(3, 2, 8, 8, (16, 16), num_blocks=1)
  # Nothing goes into the block's last convolution, and exactly zero.
  weights[1][:] = biases[1][:] = 0

  def build(frames, weights, biases):
    output = convolution.section(frames, weights, biases)
    return tf.gradients(output, [*weights, *biases])

  _, first, last, _, of_hidden, _ = run(build, (frames, weights, biases))
  assert not first.any()
  assert not last.any()
  assert not of_hidden.any()


@needs_bfloat16
@pytest.mark.parametrize('channels', [(3, 16), (4, 16), (16, 32), (32, 32)])
@pytest.mark.parametrize('size', [(2, 11, 13), (9, 18, 24), (1, 36, 48)])
def test_bfloat16_is_near(size, channels):
  frames, weights, biases = random_arrays(4, *size, channels)
  gradient = gradient_for(5, frames, weights)

  def build(*inputs):
    return section_gradients(*inputs, precision='bfloat16')

  (*activations, places), results = run(
    build, (frames, weights, biases, gradient)
  )
  _, expected = numpy_section(frames, weights, biases)
  for activation, right in zip(activations, expected, strict=True):
    assert_nearly(activation, right, 0.03)
    with pytest.raises(AssertionError):
      assert_nearly(activation, right, 1e-4)  # That would be float32.
  expected = numpy_section_gradients(
    frames, weights, activations, places, gradient
  )
  for result, right in zip(results, expected, strict=True):
    assert_nearly(result, right, 0.1)


@needs_bfloat16
@pytest.mark.parametrize('channels', [(3, 16), (16, 16)])
def test_bfloat16_multiplies_what_it_can_hold_exactly(channels):
  frames, weights, biases = random_arrays(6, 2, 8, 12, channels, num_blocks=0)
  # All that is multiplied, transforms included, are integers below 256.
  one = 255 if frames.dtype == np.uint8 else 1
  frames = one * (frames > np.median(frames)).astype(frames.dtype)
  weights[0] = 24**2 * np.sign(weights[0])

  def build(*inputs):
    return own_section(*inputs, precision='bfloat16')[0]

  _, (expected,) = numpy_section(frames, weights, biases)
  assert_close(run(build, (frames, weights, biases)), expected, 1e-5)


@needs_ops
@pytest.mark.parametrize('size', [(5, 18, 24), (80, 36, 48)])
def test_output_alone_is_the_same(size):
  arrays = random_arrays(7, *size, (16, 32))
  everything = run(own_section, arrays)
  output = run(convolution.section, arrays)
  np.testing.assert_array_equal(output, everything[-2])


@needs_ops
def test_of_equal_pixels_one_has_the_pools_gradient():
  frames = np.zeros((1, 6, 6, 3), np.uint8)
  weights = [np.ones((3, 3, 3, 16), np.float32)]
  biases = [np.ones(16, np.float32)]

  def build(frames, weights, biases):
    outputs = own_section(frames, weights, biases)
    return *outputs, tf.gradients(outputs[0], biases)[0]

  output, places, biases_gradient = run(build, (frames, weights, biases))
  np.testing.assert_array_equal(output, np.ones((1, 3, 3, 16)))
  np.testing.assert_array_equal(places, np.zeros((1, 3, 3, 16)))
  np.testing.assert_array_equal(biases_gradient, [9] * 16)


@needs_ops
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_pool_keeps_what_all_pixels_are(value):
  frames, weights, biases = random_arrays(8, 1, 8, 8, (3, 16), num_blocks=0)
  biases[0][5] = value
  output = run(convolution.section, (frames, weights, biases))
  np.testing.assert_array_equal(output[..., 5], np.full((1, 4, 4), value))
  assert np.isfinite(np.delete(output, 5, axis=-1)).all()


@needs_ops
@pytest.mark.parametrize('precision', ['float32', 'bfloat16'])
def test_nan_is_not_hidden_by_the_relu(precision):
  if not convolution.available(precision):
    pytest.skip('needs AVX-512 for bfloat16')
  frames, weights, biases = random_arrays(9, 1, 8, 8, (16, 16), num_blocks=1)
  biases[0][3] = np.nan

  def build(*inputs):
    return convolution.section(*inputs, precision=precision)

  assert np.isnan(run(build, (frames, weights, biases))).all()


@pytest.mark.parametrize(
  'channels', [(3, 8), (2, 16), (3, 32), (16, 8), (32, 16), (64, 64)]
)
def test_other_channels_are_left_to_tensorflow(channels):
  frames, weights, biases = random_arrays(10, 2, 6, 7, channels)
  if channels[0] > 4:
    frames = (frames / 255).astype(np.float32)

  def build(*inputs):
    output = convolution.section(*inputs)
    assert output.op.type != 'TorsoSection'
    return output

  _, expected = numpy_section(frames, weights, biases)
  assert_close(run(build, (frames, weights, biases)), expected[-1])


def test_tensorflow_alone_on_request():
  frames, weights, biases = random_arrays(11, 2, 9, 12, (16, 16))
  gradient = gradient_for(12, frames, weights)

  def build(frames, weights, biases, gradient):
    output = convolution.section(frames, weights, biases, by_tensorflow=True)
    types = {op.type for op in frames.graph.get_operations()}
    assert 'TorsoSection' not in types
    return output, tf.gradients(output, [frames, *weights, *biases], gradient)

  output, results = run(build, (frames, weights, biases, gradient))
  windows, activations = numpy_section(frames, weights, biases)
  assert_close(output, activations[-1])
  expected = numpy_section_gradients(
    frames, weights, activations, windows.argmax(0), gradient
  )
  for result, right in zip(results, expected, strict=True):
    assert_close(result, right)


@needs_ops
@pytest.mark.parametrize('channels', [(3, 16), (16, 32)])
def test_no_frames(channels):
  frames, weights, biases = random_arrays(13, 0, 5, 5, channels)
  gradient = gradient_for(14, frames, weights)
  (*activations, _), results = run(
    section_gradients, (frames, weights, biases, gradient)
  )
  assert activations[-1].shape == (0, 3, 3, channels[1])
  assert not any(result.any() for result in results)


@needs_ops
@pytest.mark.parametrize('channels', [(3, 16), (16, 32)])
def test_results_do_not_depend_on_threads(channels, monkeypatch):
  # Else the process has the threads of its first session.
  monkeypatch.setenv('TF_OVERRIDE_GLOBAL_THREADPOOL', '1')
  frames, weights, biases = random_arrays(15, 30, 18, 24, channels)
  gradient = gradient_for(16, frames, weights)
  one, many = (
    run(
      section_gradients,
      (frames, weights, biases, gradient),
      tf.ConfigProto(intra_op_parallelism_threads=threads),
    )
    for threads in (1, 5)
  )
  for a, b in zip(*map(tf.nest.flatten, (one, many)), strict=True):
    np.testing.assert_array_equal(a, b)


@needs_ops
def test_a_frame_gives_the_same_whatever_is_beside_it():
  frames, weights, biases = random_arrays(17, 7, 9, 12, (16, 32))
  together = run(convolution.section, (frames, weights, biases))
  for number in range(7):
    alone = run(
      convolution.section, (frames[number : number + 1], weights, biases)
    )
    np.testing.assert_array_equal(together[number : number + 1], alone)


def op_inputs(**others):
  """Returns correct inputs of the op but for some, by name."""
  shapes = {
    'frames': [2, 4, 4, 16],
    'filters': [[3, 3, 16, 32], *[[3, 3, 32, 32]] * 2],
    'biases': [[32]] * 3,
    'normalization': [],
    **others,
  }
  return [
    # So that it is the kernel that refuses them.
    [tf.placeholder_with_default(tf.zeros(shape), None) for shape in value]
    if name != 'frames'
    else tf.placeholder_with_default(tf.zeros(value), None)
    for name, value in shapes.items()
  ]


@needs_ops
@pytest.mark.parametrize(
  ('scales', 'message'),
  [
    ([[4, 4, 3]], 'a scale and a shift'),
    ([[4, 4, 3], [4, 4, 1]], r'Expected \[4,4,3\]'),
  ],
)
def test_op_refuses_wrong_scales(scales, message):
  with tf.Graph().as_default(), tf.Session() as session:
    outputs = convolution._library().ops.torso_section(
      tf.zeros([2, 4, 4, 3], tf.uint8),
      [tf.zeros([3, 3, 3, 16])],
      [tf.zeros([16])],
      [tf.zeros(scale) for scale in scales],
      precision=tf.float32,
      limit=5.0,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
      session.run(outputs.activations[-1])


@needs_ops
@pytest.mark.parametrize(
  ('shapes', 'message'),
  [
    ({'filters': [[3, 3, 16, 24]] * 3}, 'A filter is'),
    ({'filters': [[3, 3, 32, 16]] * 3}, 'A filter is'),
    ({'filters': [[5, 5, 16, 32], *[[3, 3, 32, 32]] * 2]}, 'A filter is'),
    (
      {'filters': [[3, 3, 16, 32], [3, 3, 16, 32], [3, 3, 32, 32]]},
      r'Expected \[3,3,32,32\]',
    ),
    (
      {
        'filters': [[3, 3, 16, 32], *[[3, 3, 32, 32]] * 3],
        'biases': [[32]] * 4,
      },
      'they are pairs; not 4',
    ),
    ({'biases': [[32], [16], [32]]}, r'Expected \[32\]'),
    ({'frames': [2, 4, 4, 32]}, 'Expected frames of 16'),
    ({'frames': [4, 4, 16]}, 'Expected frames of 16'),
    ({'normalization': [[4, 4, 16]] * 2}, 'Bytes are normalized'),
    (
      {
        'frames': [2, 4, 4, 3],
        'filters': [[3, 3, 3, 16], *[[3, 3, 16, 16]] * 2],
        'biases': [[16]] * 3,
      },
      'of 3 channels as uint8, not .* as float',
    ),
  ],
)
def test_op_refuses_wrong_shapes(shapes, message):
  with tf.Graph().as_default(), tf.Session() as session:
    outputs = convolution._library().ops.torso_section(
      *op_inputs(**shapes), precision=tf.float32, limit=0.0
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
      session.run(outputs.activations[-1])


@needs_ops
@pytest.mark.parametrize(
  ('others', 'message'),
  [
    ({'gradient': [2, 4, 4, 32]}, r'Expected \[2,2,2,32\]'),
    ({'places': [1, 2, 2, 32]}, r'Expected \[2,2,2,32\]'),
    (
      {'activations': [[2, 2, 2, 32], [2, 2, 2, 16], [2, 2, 2, 32]]},
      r'Expected \[2,2,2,32\]',
    ),
    ({'num_frames_gradients': 0}, 'have 1 gradients'),
  ],
)
def test_gradient_op_refuses_wrong_shapes(others, message):
  right = [2, 2, 2, 32]
  shapes = {
    'gradient': right,
    'activations': [right] * 3,
    'places': right,
    'num_frames_gradients': 1,
    **others,
  }
  with tf.Graph().as_default(), tf.Session() as session:
    frames, filters, *_ = op_inputs()
    results = convolution._library().ops.torso_section_gradient(
      tf.zeros(shapes['gradient']),
      frames,
      filters,
      [tf.zeros(shape) for shape in shapes['activations']],
      tf.zeros(shapes['places'], tf.uint8),
      [],
      limit=0.0,
      num_frames_gradients=shapes['num_frames_gradients'],
      precision=tf.float32,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
      session.run(results)


def test_the_kernels_that_are_told_are_those_used():
  own = {
    'float32': 'AVX-512 convolutions',
    'bfloat16': 'AVX-512 BF16 convolutions',
  }
  for precision, words in own.items():
    with tf.Graph().as_default():
      output = convolution.section(
        tf.ones([1, 4, 4, 16]),
        [tf.ones([3, 3, 16, 16])],
        [tf.ones([16])],
        precision,
      )
      is_own = output.op.type == 'TorsoSection'
    assert convolution.kernels(precision) == (
      words if is_own else "TensorFlow's convolutions"
    )


def processor_flags():
  """Returns what Linux says of the processor."""
  for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
    if line.startswith('flags'):
      return line.split()
  return []


def test_bfloat16_is_what_linux_says_of_the_processor():
  assert convolution.has_bfloat16() == ('avx512_bf16' in processor_flags())


# The output of its large frame is of 16 MB, what it computes with of 64, and of
# 44 for the gradient. All that is given is there before memory is limited.
_LARGE = """
import resource
import tensorflow.compat.v1 as tf
import convolution

ops = convolution._library().ops

def build(size):
  # Returns variables, and operations for the output and for gradients.
  frames = tf.Variable(tf.zeros([1, size, size, 3], tf.uint8))
  output = tf.Variable(tf.zeros([1, size // 2, size // 2, 16]))
  places = tf.Variable(tf.zeros([1, size // 2, size // 2, 16], tf.uint8))
  weights = [tf.ones([3, 3, 3, 16])]
  gradient = ops.torso_section_gradient(
    output, frames, weights, [output], places, [], num_frames_gradients=0,
    precision=tf.float32, limit=0.0,
  )
  results = [
    convolution.section(frames, weights, [tf.zeros([16])]).op,
    gradient.filter_gradients[0].op,
  ]
  return [frames, output, places], results

def limit_memory(megabytes):
  with open('/proc/self/statm') as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
  resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), -1))

tf.enable_resource_variables()
with tf.Graph().as_default(), tf.Session() as session:
  small_variables, small = build(8)
  variables, large = build(1024)
  session.run([v.initializer for v in small_variables + variables])
  session.run(small)  # Makes threads, and all else that is made once.
  for operation in large:
    limit_memory(30)
    try:
      session.run(operation)
    except tf.errors.ResourceExhaustedError as error:
      print(operation.type, error.message.replace('\\n', ' '))
  limit_memory(1000)
  session.run(large)
  print('works')
"""


@needs_ops
def test_too_little_memory_fails_the_operation_alone():
  result = subprocess.run(
    [sys.executable, '-c', _LARGE],
    cwd=native.FOLDER,
    env={
      **os.environ,
      'CUDA_VISIBLE_DEVICES': '',
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'MALLOC_ARENA_MAX': '1',  # More of them need address space.
      'MALLOC_MMAP_THRESHOLD_': '1000000',  # Larger memory is given back.
    },
    capture_output=True,
    text=True,
    timeout=_PATIENCE,
  )
  assert result.returncode == 0, result.stderr
  output, gradient, works = result.stdout.splitlines()
  assert output.startswith('TorsoSection ')
  assert gradient.startswith('TorsoSectionGradient ')
  for message in (output, gradient):
    assert 'No memory is left for a convolution.' in message
  assert works == 'works'


_PROGRAM = """
import numpy as np
import tensorflow.compat.v1 as tf
import convolution
with tf.Graph().as_default(), tf.Session() as session:
  for _ in range(2):
    output = convolution.section(
      tf.ones([1, 3, 3, 16]), [tf.ones([3, 3, 16, 16])], [tf.ones([16])]
    )
  assert output.op.type != 'TorsoSection'
  assert session.run(output)[0, 0, 0, 0] == 9 * 16 + 1
for precision in ('float32', 'bfloat16'):
  print(convolution.kernels(precision))
print(convolution.has_bfloat16())
"""


def run_program(folder):
  for module in (native, convolution):
    shutil.copy(module.__file__, folder)
  return subprocess.run(
    [sys.executable, '-c', _PROGRAM],
    cwd=folder,
    env={'CUDA_VISIBLE_DEVICES': '', 'TF_CPP_MIN_LOG_LEVEL': '3'},
    capture_output=True,
    text=True,
    timeout=_PATIENCE,
  )


def test_without_the_library_tensorflow_convolves_after_one_warning(tmp_path):
  result = run_program(tmp_path)
  assert result.returncode == 0, result.stderr
  assert result.stderr.count('make ops') == 1
  has_bfloat16 = 'avx512_bf16' in processor_flags()
  assert result.stdout == (
    2 * "TensorFlow's convolutions\n" + f'{has_bfloat16}\n'
  )


def test_library_that_does_not_fit_is_told(tmp_path):
  (tmp_path / 'convolution_ops.so').write_bytes(b'\x7fELF and no more')
  result = run_program(tmp_path)
  assert result.returncode == 1
  assert 'ImportError' in result.stderr
  assert 'make clean ops' in result.stderr
