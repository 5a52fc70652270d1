# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The chief, learner 0, of a training on many machines: who takes part.

In: heartbeats of the actor tasks, answers of the other learners. Out: which of
them are there, in metrics and in lines for people; and their end.
"""

import collections
import contextlib
import time

import numpy as np
import six
import tensorflow.compat.v1 as tf

from actors import Actors, ActorStatistics, describe_begun
from cluster import (
  ANSWER_SECONDS,
  LEARNER_GONE,
  LOST_SECONDS,
  Heartbeat,
  LearnerLeaves,
  attempts,
  listens,
  repeat_refused,
  within,
)
from console import print_line

_SILENT_SECONDS = 30  # Without an answer, another learner counts as lost.
_FAREWELL_SECONDS = 5  # For other tasks to notice that training is done.
_SAVING_SECONDS = 25  # For the chief to save, when all learners are moved.


def wait_for_learners(cluster, received_signals):
  """Waits, in the chief, until all learners are there.

  Returns:
    Whether they are; if not, a signal came.
  """
  for _ in attempts(
    lambda: print_line(
      f'Learner 0 waits for the learner at {cluster.missing_learner()}.'
    )
  ):
    if received_signals:
      return False
    if cluster.missing_learner() is None:
      return True


def wait_for_chief_to_end(cluster):
  """Waits in another learner, which is moved, for the chief to be moved too.

  Cluster managers often move all tasks at once, and a checkpoint has variables
  of all learners. If the chief isn't moved, this ends after a while.
  """
  _wait_while(lambda: listens(cluster.learners[0]), _SAVING_SECONDS)


def _wait_while(condition, seconds):
  """Waits until a condition ends, but no longer than some seconds."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and condition():
    time.sleep(0.1)


class ActorRegistry(Actors):
  """The actor tasks of a training, known by their heartbeats to the chief."""

  def __init__(self, shared, requirements, num_expected, learner_devices):
    """Builds the operations. Tasks may join once the session has started.

    Args:
      shared: `SharedState`.
      requirements: string, see `SharedState.open`.
      num_expected: int, how many tasks are expected, for the reports.
      learner_devices: list of the devices of all learners.
    """
    self._num_expected = num_expected
    self._open = shared.open(requirements)
    self._finish = {job: shared.finish(job) for job in ('actor', 'learner')}
    self._graph = tf.get_default_graph()
    self._read_heartbeats = shared.heartbeats()
    self._leaving = shared.read_leaving()
    # Other learners have no heartbeats: they are asked for their time.
    self._learner_times = []
    for device in learner_devices[1:]:
      with tf.device(device), tf.device('/cpu:0'):
        self._learner_times.append(tf.timestamp())
    self._connected = {}  # The last heartbeats by task.
    self._statistics = {}  # By task and the time of its start.
    self._period_begin = collections.Counter()  # Unrolls by task and its start.
    self._num_joined = self._num_lost = 0

  def after_create_session(self, session, coord):
    repeat_refused(session)
    self.session, self.coord = session, coord
    session.run(self._open)

  def membership_changes(self):
    """See `Actors`.

    Raises:
      LearnerLeaves: another learner is about to end.
      One of LEARNER_GONE: it has ended.
    """
    if self._learner_times:
      _, is_leaving = self.session.run(
        (self._learner_times, self._leaving), options=within(_SILENT_SECONDS)
      )
      if is_leaving:
        raise LearnerLeaves('it is moved')
    return self._membership_changes()

  def _membership_changes(self):
    now, tasks, values, addresses = self.session.run(self._read_heartbeats)
    names = dict(zip(addresses[0], addresses[1], strict=True))
    heartbeats = {
      task: Heartbeat(*value) for task, value in zip(tasks, values, strict=True)
    }
    connected = {
      task: heartbeat
      for task, heartbeat in heartbeats.items()
      if now - heartbeat.time < LOST_SECONDS
    }
    lines = []
    for task, heartbeat in connected.items():
      self._statistics[task, heartbeat.started] = heartbeat
      # Unrolls that were sent to another learner, or before the first
      # heartbeat, don't count.
      self._period_begin.setdefault(
        (task, heartbeat.started), heartbeat.unrolls
      )
      before = self._connected.get(task)
      if before is None or before.started != heartbeat.started:
        self._num_joined += 1
        lines.append(f'{_actor_name(task, names)} joined.')
    for task in self._connected.keys() - connected.keys():
      if task in heartbeats:
        self._num_lost += 1
        lines.append(
          f'{_actor_name(task, names)} is lost, no heartbeat for '
          f'{LOST_SECONDS} s.'
        )
      else:
        lines.append(f'{_actor_name(task, names)} left.')
    self._connected = connected
    return lines

  def statistics(self):
    heartbeats = self._statistics.values()
    return ActorStatistics(
      *(
        sum(getattr(heartbeat, f) for heartbeat in heartbeats)
        for f in ActorStatistics._fields
      )
    )

  def membership(self):
    total = collections.Counter(
      {key: heartbeat.unrolls for key, heartbeat in self._statistics.items()}
    )
    unrolls = collections.Counter(dict.fromkeys(self._connected, 0))
    for (task, _), count in (total - self._period_begin).items():
      unrolls[task] += count
    self._period_begin = total
    counts = np.array([unrolls[task] for task in self._connected] or [0])
    connected = self._connected.values()
    begun, lines = describe_begun(
      int(sum(heartbeat.begun for heartbeat in connected)),
      int(sum(heartbeat.actors for heartbeat in connected)),
    )
    values = {
      **begun,
      'actors_connected': len(self._connected),
      'actors_joined': self._num_joined,
      'actors_lost': self._num_lost,
      'unrolls_per_actor_minimum': counts.min(),
      'unrolls_per_actor_mean': counts.mean(),
      'unrolls_per_actor_maximum': counts.max(),
    }
    line = (
      f'actor tasks: {len(self._connected)} of {self._num_expected} connected, '
      f'{self._num_joined} joined and {self._num_lost} lost since the start; '
      f'unrolls of each {counts.min():.0f} to {counts.max():.0f}'
    )
    if self._connected:
      line += f', fewest of actor {min(self._connected, key=unrolls.get)}'
    return values, [line, *lines]

  def close(self, goes_on=False):
    if goes_on:  # The tasks wait for the next chief.
      return
    self.session.run(self._finish['actor'])

    def are_connected():
      self._membership_changes()
      return bool(self._connected)

    _wait_while(are_connected, _FAREWELL_SECONDS)

  def end_learners(self, cluster, target, config):
    """Ends the other learners, once the training's session is closed.

    Args:
      cluster: `Cluster` of the chief.
      target: of the training's session.
      config: its `tf.ConfigProto`.
    """
    if cluster.missing_learner() is not None:
      return  # A session over all would wait for it.
    with (
      contextlib.suppress(*LEARNER_GONE),
      tf.Session(target, self._graph, config) as session,
    ):
      session.run(self._finish['learner'], options=within(ANSWER_SECONDS))
    # They ask for it, so this task has to be there.
    _wait_while(
      lambda: any(map(listens, cluster.learners[1:])), _FAREWELL_SECONDS
    )


def _actor_name(task, addresses):
  return f'Actor {task} ({six.ensure_str(addresses[task])})'
