# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Replay: unrolls that are learned from more than once.

V-trace corrects for the older policy that played them; see section 5.2.2 of the
paper (https://arxiv.org/abs/1802.01561).

In: batches of unrolls, fresh from the actors. Out: the same, with unrolls of
before. They are in the learner's memory alone, and in no checkpoint.
"""

import tensorflow.compat.v1 as tf

import memory
from console import print_line
from errors import UserError

_STRING_BYTES = 24  # Of TensorFlow, with up to 22 characters in it.


class Replay:
  """The last unrolls, in a ring of memory that is taken at the start."""

  def __init__(self, capacity, unroll, num_replayed):
    """Makes the variables, and tells how much memory they take.

    Args:
      capacity: int, how many unrolls are kept.
      unroll: nest of tensors or specs like those of the unrolls.
      num_replayed: int, how many are drawn for each batch.

    Raises:
      UserError: the memory can't hold so many.
    """
    self.num_bytes = capacity * sum(map(_num_bytes, tf.nest.flatten(unroll)))
    gigabytes, free = self.num_bytes / 1e9, memory.free_bytes()
    if free is not None and self.num_bytes > free:
      raise UserError(
        f'--replay_size: {capacity:,} unrolls take {gigabytes:.3g} GB, but '
        f'{free / 1e9:.3g} GB of memory are free: give a smaller one.'
      )
    print_line(
      f'Replay: {num_replayed} of each batch of unrolls are drawn from the '
      f'last {capacity:,}, which take {gigabytes:.3g} GB of memory.'
    )
    self._capacity = capacity
    self._num_replayed = num_replayed
    with tf.name_scope('replay/'):
      self._num_added = _variable([], tf.int64)
      self._rows = tf.nest.map_structure(
        lambda t: _variable([capacity, *t.shape], t.dtype), unroll
      )

  def mix(self, fresh):
    """Stores unrolls in place of the oldest, and adds some of all to them.

    Args:
      fresh: nest of [N, ...].

    Returns:
      Nest of [N + num_replayed, ...]: the fresh ones come first.
    """
    with tf.control_dependencies([self._add(fresh)]):
      replayed = self._sample()
    return tf.nest.map_structure(
      lambda *parts: tf.concat(parts, 0), fresh, replayed
    )

  def _add(self, fresh):
    """Returns the operation that stores a nest of [N, ...]."""
    # Of more than there is room for, the last.
    fresh = [t[-self._capacity :] for t in tf.nest.flatten(fresh)]
    num_added = self._num_added.read_value()
    end = num_added + tf.shape(fresh[0], out_type=tf.int64)[0]
    indices = tf.range(num_added, end) % self._capacity
    # Rows are written where they are: an assignment of all would copy them.
    writes = [
      tf.raw_ops.ResourceScatterUpdate(
        resource=rows.handle, indices=indices, updates=t
      )
      for rows, t in zip(tf.nest.flatten(self._rows), fresh, strict=True)
    ]
    with tf.control_dependencies(writes):
      return self._num_added.assign(end, read_value=False)

  def _sample(self):
    """Returns a nest of [num_replayed, ...], each one drawn from all."""
    num_stored = tf.minimum(self._num_added.read_value(), self._capacity)
    indices = tf.random.uniform(
      [self._num_replayed], maxval=num_stored, dtype=tf.int64
    )
    return tf.nest.map_structure(
      lambda rows: tf.gather(rows, indices), self._rows
    )


def _variable(shape, dtype):
  return tf.Variable(
    # Takes the memory at once. Of `tf.zeros`, TensorFlow would keep another.
    tf.raw_ops.Empty(shape=shape, dtype=dtype, init=True),
    trainable=False,
    use_resource=True,
    # Initialised by the session, and not saved.
    collections=[tf.GraphKeys.LOCAL_VARIABLES],
  )


def _num_bytes(tensor):
  size = _STRING_BYTES if tensor.dtype == tf.string else tensor.dtype.size
  return size * tensor.shape.num_elements()
