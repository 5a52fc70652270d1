# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Unrolls, and their way from actors to the learner.

In: what an actor plays in a run of its graph. Out: batches of it for the
learner, [T + 1, B, ...], of which one is always ready.
"""

import collections

import tensorflow.compat.v1 as tf

# An unroll: `env_outputs` and `agent_outputs` have unroll_length + 1 entries,
# of which the first is the last of the unroll before; `agent_state` is that
# before the first entry.
ActorOutput = collections.namedtuple(
  'ActorOutput', 'level_name agent_state env_outputs agent_outputs'
)

# An unroll on its way to the learner; `global_step` is the learner's when the
# unroll was begun.
Unroll = collections.namedtuple('Unroll', 'actor_output global_step')


class NestQueue:
  """A `tf.FIFOQueue` of nests of tensors."""

  def __init__(self, capacity, like, name):
    """Makes a queue for nests with the structure and shapes of `like`.

    Sessions on one server share the queues of the same name.
    """
    flat = tf.nest.flatten(like)
    self.like = like
    self.queue = tf.FIFOQueue(
      capacity,
      [t.dtype for t in flat],
      [t.shape for t in flat],
      shared_name=name,
      name=name,
    )

  def placeholders(self):
    """Returns a nest to feed and enqueue."""
    return tf.nest.map_structure(
      lambda t: tf.placeholder(t.dtype, t.shape), self.like
    )

  def enqueue(self, nest):
    return self.queue.enqueue(tf.nest.flatten(nest))

  def dequeue(self):
    return self._pack(self.queue.dequeue())

  def dequeue_many(self, count):
    return self._pack(self.queue.dequeue_many(count))

  def _pack(self, flat):
    return tf.nest.pack_sequence_as(
      self.like, flat if isinstance(flat, list) else [flat]
    )


def build_unroll(actor):
  """Returns the `Unroll` that a run of the actor plays."""
  with tf.device('/cpu'):
    # Read before the first step of the unroll, as the state is fed.
    return Unroll(actor.output, tf.train.get_global_step().read_value())


def build_queue(unroll):
  """Returns the `NestQueue` of unrolls like `unroll` to the learner."""
  with tf.device('/cpu'):
    # The smallest capacity, for a small policy lag and diverse batches.
    return NestQueue(1, unroll, 'unrolls')


def build_staging(queue, num_fresh, name, replay=None):
  """Assembles the next batch while the learner works on the last one.

  Args:
    queue: `NestQueue` of unrolls.
    num_fresh: int, unrolls of a batch that are taken from the queue.
    name: of the queue of batches.
    replay: `replay.Replay` that adds others to them, or None.

  Returns:
    A nest of `Unroll`, its outputs time-major: [T + 1, B, ...], the fresh ones
    first; the seconds that the learner waited for it; and the op that ends such
    a wait.
  """
  batch = queue.dequeue_many(num_fresh)
  if replay:
    batch = replay.mix(batch)
  actor_output = batch.actor_output
  env_outputs, agent_outputs = tf.nest.map_structure(
    _swap_leading_dims, (actor_output.env_outputs, actor_output.agent_outputs)
  )
  batch = batch._replace(
    actor_output=actor_output._replace(
      env_outputs=env_outputs, agent_outputs=agent_outputs
    )
  )
  staged = NestQueue(1, batch, name)
  tf.train.add_queue_runner(
    tf.train.QueueRunner(
      staged.queue,
      [staged.enqueue(batch)],
      # At the session's end, it may wait for unrolls.
      queue_closed_exception_types=(
        tf.errors.OutOfRangeError,
        tf.errors.CancelledError,
      ),
    )
  )
  begin = tf.timestamp()
  with tf.control_dependencies([begin]):
    batch = staged.dequeue()
  with tf.control_dependencies(tf.nest.flatten(batch)):
    wait_seconds = tf.timestamp() - begin
  return batch, wait_seconds, staged.queue.close(cancel_pending_enqueues=True)


def _swap_leading_dims(tensor):
  rank = tensor.shape.rank
  return tf.transpose(tensor, [1, 0, *range(2, rank)])
