# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Sections of the paper's deep torso, in a fraction of TensorFlow's time.

The deep network spends nearly all of its time in convolutions of 16 or 32
channels, and TensorFlow's are made for many more. On processors with AVX-512 a
`section` is one operation of our own (`convolution_ops.cc`, built by `make
ops`), everywhere else, as on GPUs, one of TensorFlow's; results differ in
rounding. It is for graphs, not for eager execution.
"""

import ctypes
import functools
import re

import tensorflow.compat.v1 as tf

import native

# Before and after the first convolution of the network's sections. Pictures are
# grey, in colours, or the last four of Atari.
_CHANNELS = {
  tf.uint8: {(1, 16), (3, 16), (4, 16)},
  tf.float32: {(16, 16), (16, 32), (32, 32)},
}


def _library():
  """Returns the `native.Library` of the operations; None if it isn't built.

  Raises:
    ImportError: it is there, but doesn't load.
  """
  return native.load_library(
    'convolution_ops',
    'on a processor with AVX-512, convolutions take about twice as long',
  )


@functools.cache
def available(precision='float32'):
  """Returns whether `section` is of our own operations here.

  Args:
    precision: 'float32' or 'bfloat16'.
  """
  if tf.config.list_physical_devices('GPU') or _library() is None:
    return False
  supported = _library().function(
    'ImpalaConvolutionSupported', ctypes.c_bool, ctypes.c_bool
  )
  return supported(precision == 'bfloat16')


@functools.cache
def has_bfloat16():
  """Returns whether the processor has instructions for bfloat16 (x86 alone)."""
  if _library() is not None:
    return _library().function('ImpalaHasBfloat16', ctypes.c_bool)()
  try:
    with open('/proc/cpuinfo') as file:
      return re.search(r'\bavx512_bf16\b', file.read()) is not None
  except OSError:  # Another system than Linux.
    return False


def kernels(precision='float32'):
  """Returns what convolves in sections of the network, in words for a user.

  Args:
    precision: 'float32' or 'bfloat16'.
  """
  if not available(precision):
    return "TensorFlow's convolutions"
  bfloat16 = ' BF16' if precision == 'bfloat16' else ''
  return f'AVX-512{bfloat16} convolutions'


def section(frames, weights, biases, precision='float32', by_tensorflow=False):
  """Convolves frames, pools, and adds residual blocks (the paper's figure 3).

  Convolutions are of 3x3 pixels; with zeros around frames, their size stays.
  The pool takes the maximum around every second pixel. A block is a ReLU, a
  convolution, a ReLU and another one, added to what it is given.

  Args:
    frames: float32 [N, height, width, in], or uint8, which count as 255ths.
    weights: list of float32 [3, 3, in, out] and, for each block, two of
      [3, 3, out, out].
    biases: list of as many float32 [out].
    precision: 'bfloat16' to round what our own operations multiply to it, but
      not for the gradients of weights of less than 16 channels. TensorFlow's
      operations do so if the session rewrites them.
    by_tensorflow: whether to use none but TensorFlow's operations.

  Returns:
    float32 [N, ceil(height / 2), ceil(width / 2), out].
  """
  if by_tensorflow or not _is_supported(frames, weights, precision):
    return _section_by_tensorflow(frames, weights, biases)
  outputs = _library().ops.torso_section(
    frames, weights, biases, precision=tf.as_dtype(precision)
  )
  return outputs.activations[-1]


def _is_supported(frames, weights, precision):
  """Returns whether our own operations can use them here."""
  first, *others = (weight.shape.as_list() for weight in weights)
  *size, in_channels, out_channels = first
  return (
    available(precision)
    and size == [3, 3]
    and (in_channels, out_channels) in _CHANNELS[frames.dtype]
    and all(other == [*size, out_channels, out_channels] for other in others)
  )


def _section_by_tensorflow(frames, weights, biases):
  if frames.dtype == tf.uint8:
    frames = tf.cast(frames, tf.float32) / 255
  first, *others = (
    functools.partial(_convolve, weights=weight, biases=bias)
    for weight, bias in zip(weights, biases, strict=True)
  )
  output = tf.nn.max_pool2d(first(frames), 3, 2, 'SAME')
  for convolve, convolve_again in zip(others[::2], others[1::2], strict=True):
    hidden = convolve(tf.nn.relu(output))
    output += convolve_again(tf.nn.relu(hidden))
  return output


def _convolve(frames, weights, biases):
  return tf.nn.bias_add(tf.nn.conv2d(frames, weights, 1, 'SAME'), biases)


@tf.RegisterGradient('TorsoSection')
def _section_gradient(op, *gradients):
  count = op.get_attr('num_convolutions')
  frames, weights = op.inputs[0], op.inputs[1 : 1 + count]
  *activations, places = op.outputs
  gradient = gradients[count - 1]  # The others are only for what follows here.
  results = _library().ops.torso_section_gradient(
    *(gradient, frames, weights, activations, places),
    num_frames_gradients=1 if frames.dtype == tf.float32 else 0,
    precision=op.get_attr('precision'),
  )
  return (
    *(results.frames_gradient or [None]),
    *results.filter_gradients,
    *results.bias_gradients,
  )
