# Licensed under the Apache License, Version 2.0; see LICENSE.
"""PopArt: a baseline that is learned in units of its own for each level.

Levels differ in the size of their rewards, and those with large ones would
decide alone what a network for all of them learns. See "Multi-task Deep
Reinforcement Learning with PopArt" (https://arxiv.org/abs/1809.04474).

In: features, and the targets of the values. Out: values in units of the
rewards, and the deviation of each level, by which errors are to be divided.
"""

import collections

import sonnet as snt
import tensorflow.compat.v1 as tf

# What values were learned from: the targets, float32 [T, B]; which of them
# count, bool [T, B]; and the names of the levels, string [B].
Targets = collections.namedtuple('Targets', 'values counts level_name')


class NormalizedBaseline(snt.Module):
  """A linear layer with an output per level, and their running moments.

  The value of a level is deviation * output + mean, with the moments of the
  targets that it had so far. When these move, the layer's weights follow, so
  that the values stay what they are.
  """

  _STEP_SIZE = 3e-4  # Of the moments, for each unroll. The paper's, as is:
  _MIN_DEVIATION, _MAX_DEVIATION = 1e-4, 1e6

  def __init__(self, level_names):
    """Makes the modules.

    Args:
      level_names: list of the names of the levels, in the outputs' order.
    """
    super().__init__('popart')
    self._level_names = list(level_names)
    self._linear = snt.Linear(len(self._level_names), name='normalized')

  @snt.once
  def _make_variables(self):
    shape = [len(self._level_names)]
    self._mean = tf.Variable(tf.zeros(shape), trainable=False, name='mean')
    # Not the paper's second moment: next to a large mean, a small deviation
    # would be lost in float32.
    self._variance = tf.Variable(
      tf.ones(shape), trainable=False, name='variance'
    )

  def __call__(self, features):
    """Maps float32 [N, features] to values in rewards, [N, num_levels]."""
    self._make_variables()
    normalized = self._linear(features)
    return normalized * self._deviation(self._variance) + self._mean

  def select(self, values, level_name):
    """Returns the values of a level.

    Args:
      values: float32 [..., num_levels].
      level_name: string, of a shape that broadcasts to [...].

    Returns:
      float32 [...]; NaN for a level that there is no output for.
    """
    is_level = self._one_hot(level_name)
    return tf.reduce_sum(values * is_level, -1) / tf.reduce_sum(is_level, -1)

  def deviation(self, level_name):
    """Returns the deviation of levels, float32 [B], for their names [B]."""
    return self.select(self._deviation(self._variance), level_name)

  def update(self, parts):
    """Builds the update of the moments, and of the weights with them.

    As in the paper, each unroll moves its level's moments by a step towards
    those of its targets, one unroll after another.

    The optimiser's slots stay as they are. They hold gradients by normalised
    errors, which are of the same size before and after.

    Args:
      parts: list of `Targets`, of a batch.

    Returns:
      An operation, to be run after the optimiser's step.
    """
    targets = tf.concat([part.values for part in parts], 1)
    counts = tf.cast(tf.concat([part.counts for part in parts], 1), tf.float32)
    level_name = tf.concat([part.level_name for part in parts], 0)
    count = tf.reduce_sum(counts, 0)
    mean = tf.math.divide_no_nan(tf.reduce_sum(counts * targets, 0), count)
    variance = tf.math.divide_no_nan(
      tf.reduce_sum(counts * (targets - mean) ** 2, 0), count
    )
    is_level = self._one_hot(level_name)
    is_level *= tf.cast(count > 0, tf.float32)[:, tf.newaxis]
    # After n steps, the share of the old moments is (1 - step size)^n.
    num_later = tf.cumsum(is_level, exclusive=True, reverse=True)
    shares = self._STEP_SIZE * is_level * (1 - self._STEP_SIZE) ** num_later
    old_share = (1 - self._STEP_SIZE) ** tf.reduce_sum(is_level, 0)
    mean, variance = mean[:, tf.newaxis], variance[:, tf.newaxis]
    old_mean = self._mean.read_value()
    old_variance = self._variance.read_value()
    new_mean = old_mean + tf.reduce_sum(shares * (mean - old_mean), 0)
    new_variance = old_share * (
      old_variance + (new_mean - old_mean) ** 2
    ) + tf.reduce_sum(shares * (variance + (mean - new_mean) ** 2), 0)
    new_deviation = self._deviation(new_variance)
    # Is exactly 1 where nothing moved.
    ratio = self._deviation(old_variance) / new_deviation
    weights, biases = self._linear.w.read_value(), self._linear.b.read_value()
    values = (
      (self._mean, new_mean),
      (self._variance, new_variance),
      (self._linear.w, weights * ratio),
      (self._linear.b, biases * ratio + (old_mean - new_mean) / new_deviation),
    )
    # First all are computed, as they depend on the old values.
    with tf.control_dependencies([value for _, value in values]):
      return tf.group(
        *(v.assign(value, read_value=False) for v, value in values)
      )

  def _deviation(self, variance):
    return tf.clip_by_value(
      tf.sqrt(variance), self._MIN_DEVIATION, self._MAX_DEVIATION
    )

  def _one_hot(self, level_name):
    """Returns which level names are, float32 [..., num_levels]."""
    names = tf.convert_to_tensor(level_name)[..., tf.newaxis]
    return tf.cast(tf.equal(names, self._level_names), tf.float32)
