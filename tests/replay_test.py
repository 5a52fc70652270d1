# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the memory of unrolls that are replayed."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import memory
import replay
from errors import UserError

FRAMES = (3, 4, 5, 1)  # Of an unroll.


def unrolls_of(numbers):
  """Returns a batch of unrolls that can be told apart, and their dtypes."""
  frames = [
    np.random.default_rng(n).integers(0, 256, FRAMES, np.uint8) for n in numbers
  ]
  texts = [
    [f'step {t} of the long unroll {n}'.encode() for t in range(3)]
    for n in numbers
  ]
  ends = [[n % 2 == 0, False, True] for n in numbers]
  return (
    np.array(frames),
    np.array(texts, object),
    np.array(ends),
    (),
    np.array(numbers, np.int64),
  )


class Mixer:
  """Runs a `Replay` on batches of unrolls of given numbers."""

  def __init__(self, capacity, num_fresh, num_replayed):
    tf.set_random_seed(1)
    self._inputs = tf.nest.map_structure(
      lambda x: tf.placeholder(
        tf.string if x.dtype == object else x.dtype, x.shape
      ),
      unrolls_of(range(num_fresh)),
    )
    unroll = tf.nest.map_structure(lambda t: t[0], self._inputs)
    self.replay = replay.Replay(capacity, unroll, num_replayed)
    self._outputs = self.replay.mix(self._inputs)
    self._session = tf.Session()
    self._session.run(tf.local_variables_initializer())

  def __call__(self, numbers):
    """Returns the numbers of the unrolls that come out."""
    feed_dict = dict(
      zip(
        tf.nest.flatten(self._inputs),
        tf.nest.flatten(unrolls_of(numbers)),
        strict=True,
      )
    )
    outputs = self._session.run(self._outputs, feed_dict)
    tf.nest.map_structure(
      np.testing.assert_array_equal, outputs, unrolls_of(outputs[-1])
    )
    return list(outputs[-1])


def test_unrolls_come_back_as_they_were_until_they_are_replaced():
  with tf.Graph().as_default():
    mix = Mixer(capacity=5, num_fresh=2, num_replayed=100)
    for begin in range(0, 16, 2):
      numbers = mix([begin, begin + 1])
      assert numbers[:2] == [begin, begin + 1]
      assert set(numbers[2:]) == set(range(max(0, begin - 3), begin + 2))


def test_all_are_drawn_alike():
  with tf.Graph().as_default():
    mix = Mixer(capacity=8, num_fresh=2, num_replayed=1600)
    for begin in range(0, 12, 2):
      numbers = mix([begin, begin + 1])
  counts = np.unique(numbers[2:], return_counts=True)[1]
  assert len(counts) == 8
  # 200 each, with a deviation of 13.
  assert np.all(np.abs(counts - 200) < 70)


def test_batch_larger_than_the_memory_leaves_its_last_unrolls():
  with tf.Graph().as_default():
    mix = Mixer(capacity=2, num_fresh=5, num_replayed=20)
    assert set(mix(range(5))[5:]) == {3, 4}
    assert set(mix(range(5, 10))[5:]) == {8, 9}


def test_memory_is_as_large_as_told_and_not_saved(monkeypatch):
  with tf.Graph().as_default():
    mix = Mixer(capacity=7, num_fresh=2, num_replayed=1)
    # Frames, strings of 24 bytes, bools, a number.
    assert mix.replay.num_bytes == 7 * (60 + 3 * 24 + 3 + 8)
    assert not tf.global_variables()
    monkeypatch.setattr(memory, 'free_bytes', lambda: 1000)
    with pytest.raises(UserError, match=r'7 unrolls take .* are free'):
      Mixer(capacity=7, num_fresh=2, num_replayed=1)
