# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Actors: their threads, their environment processes, restarts and seeds.

In: the graph of an actor and what is played. Out: unrolls, by running the graph
in a thread for each actor, and statistics. Training uses the interface
`Actors`. On one machine `ActorLoops` has it, on many `chief.ActorRegistry`.
"""

import collections
import functools
import threading

import numpy as np
import tensorflow.compat.v1 as tf
from absl import logging

import py_process
from errors import describe_exit

# Totals: restarts of environment processes, and the fields of
# `dynamic_batching.BatchingStatistics`.
ActorStatistics = collections.namedtuple(
  'ActorStatistics', 'restarts batches requests wait_seconds'
)


class Actors(tf.train.SessionRunHook):
  """The actors of a training, on this machine or on others.

  A hook of the training's session. Once there is a session, it has these
  attributes:

    session: the `tf.Session`, without hooks.
    coord: its `tf.train.Coordinator`.
    processes: sequence of the `PyProcess` of this program.
  """

  session = None
  coord = None
  processes = ()

  def statistics(self):
    """Returns the `ActorStatistics` since the start, of all actors together."""
    raise NotImplementedError

  def membership(self):
    """Returns metrics, a dict, and lines on which actors take part."""
    return {}, []

  def membership_changes(self):
    """Returns lines on which actors joined and left since the last call."""
    return []

  def close(self, goes_on=False):
    """Ends the actors, unless the training goes on in another process."""
    raise NotImplementedError


class ActorLoops(Actors):
  """Runs the actors, a thread and an environment process each.

  All threads run the one graph of an actor, and differ in what they feed.
  """

  def __init__(
    self,
    actor,
    index,
    processes,
    game,
    assignment,
    fetches,
    on_unroll,
    max_restarts,
    seed_of,
    unroll_length,
  ):
    """Prepares the loops; the session's start starts them.

    Args:
      actor: `ActorGraph`.
      index: int placeholder, which actor runs.
      processes: list of `PyProcess`, one per actor.
      game: `levels.Game`.
      assignment: `LevelAssignment` of the actors.
      fetches: nest of tensors and ops to run with each unroll.
      on_unroll: function of the actor's index and the values of `fetches`,
        called after each unroll; says whether the actor goes on.
      max_restarts: int, how often the process of an actor may be restarted,
        after it died, raised, or took too long.
      seed_of: function of an actor's index and the number of starts of its
        process before, that returns the seed of its environment.
      unroll_length: int, agent steps of an unroll.
    """
    self._actor = actor
    self._index = index
    self.processes = processes
    self._game = game
    self._assignment = assignment
    self._fetches = fetches
    self._on_unroll = on_unroll
    self._max_restarts = max_restarts
    self._seed_of = seed_of
    self._unroll_length = unroll_length
    self._restarts = [0] * len(processes)
    self._moves = [0] * len(processes)
    self._begun = set()  # Whose first episode has begun.

  def statistics(self):
    if self.session is None:  # An actor task tells them from its start.
      return ActorStatistics(0, 0, 0, 0.0)
    return ActorStatistics(
      sum(self._restarts), *self.session.run(self._actor.inference_statistics)
    )

  def num_begun(self):
    """Returns how many actors have begun their first episode."""
    return len(self._begun)

  def membership(self):
    return describe_begun(self.num_begun(), len(self.processes))

  def close(self, goes_on=False):
    del goes_on  # The processes end in any case.
    py_process.close_all(self.processes)

  def begin(self):
    try:
      py_process.start_all(self.processes)
    except py_process.ProcessError as error:
      failure = py_process.failure(error)
      if failure is None or error.process is None:
        raise
      # What fails at its first start is no accident: no restart would help.
      actor = self.processes.index(error.process)
      raise py_process.ProcessError(
        self._describe(actor, failure, None)
      ) from None

  def after_create_session(self, session, coord):
    self.session, self.coord = session, coord
    start = make_start(session, self._actor, self._index)
    unroll = make_unroll(session, self._actor, self._index, self._fetches)
    start_threads(
      coord,
      [
        functools.partial(self._run, actor, start, unroll)
        for actor in range(len(self.processes))
      ],
    )

  def _run(self, actor, start, unroll):
    state = None
    while not self.coord.should_stop():
      try:
        state = state or start(actor)
        self._begun.add(actor)
        values, state = unroll(actor, *state)
      except tf.errors.OpError as error:
        if self.coord.should_stop():
          return
        self._recover(actor, error, state)
        # The rest of the episode is lost; the next one begins.
        state = None
      else:
        if not self._on_unroll(actor, values):
          return
        state = self._move(actor, state)

  def _move(self, actor, state):
    """Starts another level if it is the actor's turn.

    Args:
      actor: int.
      state: of the actor, flat.

    Returns:
      The state with which it goes on, None to begin an episode.
    """
    env_state = tf.nest.pack_sequence_as(self._actor.state, state).env_state
    level = self._assignment.after_unroll(
      actor,
      self._unroll_length * self._game.settings.num_action_repeats,
      # Its steps are those since the last end.
      has_ended=env_state.episode_step < self._unroll_length,
    )
    if level is None:
      return state
    self._moves[actor] += 1
    arguments = self._game.family.level_arguments(self._game.levels[level])
    try:
      self.processes[actor].restart(seed=self._seed(actor), **arguments)
    except py_process.ProcessError as error:
      if not self.coord.should_stop():
        self._recover(actor, error, None)
    return None

  def _seed(self, actor):
    """Returns the seed of the actor's process: each start has its own."""
    return self._seed_of(actor, self._restarts[actor] + self._moves[actor])

  def _recover(self, actor, error, state):
    """Restarts the actor's process if it failed, else raises the error."""
    process = self.processes[actor]
    while True:
      failure = py_process.failure(error)
      if failure is None:
        raise error
      summary = self._describe(actor, failure, state)
      if self._restarts[actor] >= self._max_restarts:
        raise py_process.ProcessError(
          f'{summary} It was restarted {self._restarts[actor]} times before '
          '(--max_environment_restarts).'
        )
      self._restarts[actor] += 1
      logging.warning(
        '%s Restart %d of at most %d.',
        summary,
        self._restarts[actor],
        self._max_restarts,
      )
      try:
        # With the old seed, it would play the same episodes again.
        process.restart(seed=self._seed(actor))
        return
      except py_process.ProcessError as another:
        if self.coord.should_stop():
          return
        error, state = another, None

  def _describe(self, actor, failure, state):
    """Returns a sentence on a failed environment; logs its traceback."""
    if failure.traceback:
      logging.error('%s', failure.traceback)
    reason = failure.reason
    if reason == 'died':
      exit_code = self.processes[actor].exit_code(timeout=1.0)
      reason = f'died with {describe_exit(exit_code)}'
    where = 'at its start'
    if state is not None:
      env_state = tf.nest.pack_sequence_as(self._actor.state, state).env_state
      where = f'in the unroll from step {env_state.episode_step} of a game on'
    name = self._game.names[self._assignment.levels()[actor]]
    return (
      f'The environment process of actor {actor} ({name}, seed '
      f'{self._seed(actor)}), {where}, {reason}.'
    )


def describe_begun(num_begun, num_actors):
  """Returns what `Actors.membership` does on actors that have begun."""
  lines = []
  if num_begun < num_actors:
    lines.append(f'actors: {num_begun} of {num_actors} have begun')
  return {'actors_begun': num_begun}, lines


def start_threads(coord, functions):
  """Runs functions in a thread each; an exception in one stops them all.

  Args:
    coord: `tf.train.Coordinator`, which raises the exception when it is joined.
    functions: list of functions without arguments.

  Returns:
    List of the threads.
  """

  def run(function):
    with coord.stop_on_exception():
      function()

  threads = [
    threading.Thread(target=run, args=(function,), daemon=True)
    for function in functions
  ]
  for thread in threads:
    coord.register_thread(thread)
    thread.start()
  return threads


def make_start(session, actor, index):
  """Returns a function of an actor's index that starts its environment.

  That function returns the first state, flat.
  """
  return session.make_callable(tf.nest.flatten(actor.initial_state), [index])


def make_unroll(session, actor, index, fetches):
  """Returns a function of an actor's index and flat state that plays an unroll.

  That function returns the values of `fetches` and the next state, flat.
  """
  return session.make_callable(
    [fetches, tf.nest.flatten(actor.next_state)],
    [index, *tf.nest.flatten(actor.state)],
  )


def create_processes(game, count, seed_of, first=0):
  """Returns `PyProcess`es, not started. Levels are assigned in turn.

  Args:
    game: `Game`.
    count: int, number of processes.
    seed_of: function from a process's index to its environment's seed.
    first: int, number of the first environment among those of all tasks.
  """
  return [
    game.family.create(
      game.levels[(first + index) % len(game.levels)],
      seed_of(index),
      game.settings,
      game.spec,
    )
    for index in range(count)
  ]


def draw_seeds(count, *numbers):
  """Returns a list of seeds, int32, that depend on all `numbers`."""
  sequence = np.random.SeedSequence(numbers)
  return [int(seed >> 1) for seed in sequence.generate_state(count)]
