# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The learner's thread, which runs one update after another.

In: the session of a training and the graph of an update. Out: the values of
the updates, to `Metrics`, and what ended them.
"""

import threading

import tensorflow.compat.v1 as tf

from errors import explain

# The errors after which a monitored session makes a new session.
SESSION_LOST = (tf.errors.AbortedError, tf.errors.UnavailableError)


class SessionLost(Exception):
  """The session of a training can't be used any more."""


class LearnerLoop(threading.Thread):
  """Runs updates until the last frame, or until a stop is requested.

  A thread of its own: the main thread must be free to handle signals.
  """

  def __init__(self, session, update, metrics, coord, total_frames):
    super().__init__()
    self._session = session
    self._update = update
    self._metrics = metrics
    self._coord = coord
    self._total_frames = total_frames
    self.num_updates = 0
    self.error = None

  def run(self):
    try:
      # The hooks that save checkpoints need it, and each thread has its own.
      with self._session.graph.as_default():
        while (
          not self._coord.should_stop()
          and self._metrics.global_step < self._total_frames
        ):
          self._metrics.add(self._session.run_step_fn(self._run_update))
          self.num_updates += 1
    except Exception as error:
      # The end of the queue, or of the session, isn't the learner's error.
      if not self._coord.should_stop():
        self.error = error
    finally:
      self._coord.request_stop()

  def _run_update(self, step_context):
    try:
      return step_context.run_with_hooks(self._update)
    except SESSION_LOST as error:
      # The monitored session would go on with a new session, unknown to the
      # threads of this one.
      raise SessionLost(explain(error)) from error
