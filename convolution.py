# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Convolutions of 3x3 pixels, in about half of the time TensorFlow takes.

The paper's deep network spends nearly all of its time in convolutions of 16 or
32 channels, and TensorFlow's are made for many more. On processors with AVX-512
`convolve` uses operations of our own (`convolution_ops.cc`, built by `make
ops`), everywhere else, as on GPUs, TensorFlow's; results differ in rounding.
They are for graphs, not for eager execution.
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
_PICTURE_CHANNELS = (1, 3, 4)  # Grey, colours, and the last frames of Atari.


@functools.cache
def _library():
  """Loads the operations; None, after one warning, if they aren't built.

  Raises:
    ImportError: they exist, but don't fit this TensorFlow.
  """
  if not os.path.exists(_LIBRARY):
    logging.getLogger(__name__).warning(
      'convolution_ops.so is not built: on a processor with AVX-512, '
      'convolutions take about twice as long. Run "make ops" to build it.'
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


def convolve(
  frames, weights, biases, relu=False, residual=None, by_tensorflow=False
):
  """Convolves frames; their size stays, with zeros around them.

  Args:
    frames: float32 [N, height, width, in].
    weights: float32 [3, 3, in, out].
    biases: float32 [out].
    relu: whether frames go through a ReLU first.
    residual: float32 [N, height, width, out], added at the end; None for none.
    by_tensorflow: whether to use none but TensorFlow's operations.

  Returns:
    float32 [N, height, width, out].
  """
  if not by_tensorflow and _can_convolve(weights, _CHANNELS):
    residuals = [] if residual is None else [residual]
    return _library().conv3x3(frames, weights, biases, residuals, relu=relu)
  if relu:
    frames = tf.nn.relu(frames)
  output = tf.nn.bias_add(tf.nn.conv2d(frames, weights, 1, 'SAME'), biases)
  return output if residual is None else output + residual


def convolve_and_pool(frames, weights, biases, by_tensorflow=False):
  """Convolves frames and takes the maximum around every second pixel.

  Args:
    frames: float32 [N, height, width, in].
    weights: float32 [3, 3, in, out].
    biases: float32 [out].
    by_tensorflow: whether to use none but TensorFlow's operations.

  Returns:
    float32 [N, ceil(height / 2), ceil(width / 2), out], maxima of 3x3 pixels.
  """
  if not by_tensorflow and _can_convolve(
    weights, (*_PICTURE_CHANNELS, *_CHANNELS)
  ):
    return _library().conv3x3_pool(frames, weights, biases).output
  output = convolve(frames, weights, biases, by_tensorflow=True)
  return tf.nn.max_pool2d(output, 3, 2, 'SAME')


def _can_convolve(weights, in_channels):
  """Returns whether our own operations can, given those for the input."""
  *size, weights_in, weights_out = weights.shape.as_list()
  return (
    available()
    and size == [3, 3]
    and weights_in in in_channels
    and weights_out in _CHANNELS
  )


@tf.RegisterGradient('Conv3x3')
def _convolve_gradient(op, gradient):
  frames, weights, _, *residuals = op.inputs
  gradients = _library().conv3x3_gradient(
    gradient, frames, weights, relu=op.get_attr('relu')
  )
  return [
    *(gradients.input_gradient, gradients.filter_gradient),
    *(gradients.bias_gradient, *[gradient for _ in residuals]),
  ]


@tf.RegisterGradient('Conv3x3Pool')
def _convolve_and_pool_gradient(op, gradient, _):
  frames, weights, biases = op.inputs
  of_pictures = weights.shape[2] in _PICTURE_CHANNELS
  gradients = _library().conv3x3_pool_gradient(
    *(gradient, frames, weights, op.outputs[1]),
    num_input_gradients=0 if of_pictures else 1,
  )
  frames_gradient = gradients.input_gradient
  if of_pictures:
    # No training needs it: whoever asks for it gets it from TensorFlow.
    output = convolve_and_pool(frames, weights, biases, by_tensorflow=True)
    frames_gradient = tf.gradients(output, frames, gradient)
  return *frames_gradient, gradients.filter_gradient, gradients.bias_gradient
