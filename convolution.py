# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Convolutions of 3x3 pixels, in a fraction of the time TensorFlow takes.

The paper's deep network spends nearly all of its time in convolutions of 16 or
32 channels, and TensorFlow's are made for many more. On processors with AVX-512
`convolve` uses operations of our own (`convolution_ops.cc`, built by `make
ops`), everywhere else, as on GPUs, TensorFlow's; results differ in rounding.
"""

import ctypes
import functools
import logging
import os

import tensorflow.compat.v1 as tf

_LIBRARY = os.path.join(
  os.path.dirname(os.path.abspath(__file__)), 'convolution_ops.so'
)
_CHANNELS = (16, 32)


@functools.cache
def _library():
  """Loads the operations; None, after one warning, if they aren't built.

  Raises:
    ImportError: they exist, but don't fit this TensorFlow.
  """
  if not os.path.exists(_LIBRARY):
    logging.getLogger(__name__).warning(
      'convolution_ops.so is not built: convolutions take about twice as long. '
      'Run "make ops" to build it.'
    )
    return None
  try:
    return tf.load_op_library(_LIBRARY)
  except tf.errors.OpError as error:
    raise ImportError(
      f'{_LIBRARY} does not load, most likely because it was built for '
      f'another TensorFlow ({error.message}). Run "make clean ops" to rebuild '
      'it.'
    ) from error


@functools.cache
def available():
  """Returns whether `convolve` has operations of our own here."""
  if tf.config.list_physical_devices('GPU') or _library() is None:
    return False
  supported = ctypes.CDLL(_LIBRARY).ImpalaConvolutionSupported
  supported.restype = ctypes.c_bool
  return supported()


def convolve(frames, weights, biases, relu=False, residual=None):
  """Convolves frames; their size stays, with zeros around them.

  Args:
    frames: float32 [N, height, width, in].
    weights: float32 [3, 3, in, out].
    biases: float32 [out].
    relu: whether frames go through a ReLU first.
    residual: float32 [N, height, width, out], added at the end; None for none.

  Returns:
    float32 [N, height, width, out].
  """
  if not available() or not set(weights.shape.as_list()[2:]) <= set(_CHANNELS):
    return convolve_by_tensorflow(frames, weights, biases, relu, residual)
  residuals = [] if residual is None else [residual]
  return _library().conv3x3(frames, weights, biases, residuals, relu=relu)


def convolve_by_tensorflow(frames, weights, biases, relu=False, residual=None):
  """The same as `convolve` by TensorFlow's own operations."""
  if relu:
    frames = tf.nn.relu(frames)
  output = tf.nn.bias_add(tf.nn.conv2d(frames, weights, 1, 'SAME'), biases)
  return output if residual is None else output + residual


@tf.RegisterGradient('Conv3x3')
def _gradient(op, gradient):
  frames, weights, _, *residuals = op.inputs
  gradients = _library().conv3x3_gradient(
    gradient, frames, weights, relu=op.get_attr('relu')
  )
  return [*gradients, *[gradient for _ in residuals]]
