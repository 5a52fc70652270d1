# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The other tasks' connection to the learners: joining, calls, heartbeats.

In: a `cluster.Cluster`, and what a task sends. Out: calls that wait for a
learner that is gone, and are repeated when it is back.
"""

import contextlib
import json
import threading
import time

import six
import tensorflow.compat.v1 as tf

from cluster import (
  ANSWER_SECONDS,
  HEARTBEAT_SECONDS,
  LEARNER_GONE,
  LOST_SECONDS,
  Heartbeat,
  SharedState,
  attempts,
  repeat_refused,
  within,
)
from console import print_line
from errors import UserError, explain

_ROOM_SECONDS = 60  # For a learner to take an unroll: its queue may be full.
# These may come of it as well, or of a fault in this program.
_PERHAPS_GONE = (
  tf.errors.InvalidArgumentError,
  tf.errors.NotFoundError,
  tf.errors.InternalError,
  tf.errors.UnknownError,
)
# How often, with all learners there, a call or an attempt to join may fail so.
_MAX_FAULTS = 3
_MAX_FAULTS_OF_JOINING = 20
_MAX_REFUSALS = 3  # Until a waiting task says why.


class _Calls:
  """What a task runs on the chief, in the current graph."""

  def __init__(self, cluster):
    shared = SharedState(cluster.learner_device())
    self.requirements = shared.read_requirements(cluster.job)
    key = tf.constant(cluster.task, tf.int64)
    self.heartbeat_values = tf.placeholder(
      tf.float64, [len(Heartbeat._fields) - 1]
    )
    self.heartbeat = shared.heartbeat(
      key, self.heartbeat_values, cluster.address
    )
    self.last_heartbeat = shared.last_heartbeat(key)
    self.leave = shared.leave(key)
    self.announce_leaving = shared.announce_leaving()


class LearnerClient:
  """A task's connection to the learners.

  If one of these is gone, all methods wait until it is back, and repeat what
  failed. They may be called by any thread.
  """

  def __init__(self, cluster, requirements, config, received_signals):
    """Builds what it runs, in a graph of its own; `join` has to be called.

    Args:
      cluster: `Cluster`, with a server.
      requirements: string, JSON of what the chief has to agree on.
      config: `tf.ConfigProto` of this task's sessions.
      received_signals: list, see `console.stop_signals`.
    """
    self._cluster = cluster
    self._requirements = json.loads(requirements)
    self._config = _for_transfers(config)
    self._received_signals = received_signals
    # Those of newcomers, and of tasks that take part.
    self._entry_graph, self._graph = tf.Graph(), tf.Graph()
    with self._entry_graph.as_default():
      self._entry = _Calls(cluster)
    with self._graph.as_default():
      self._calls = _Calls(cluster)
    self._lock = threading.Lock()  # Held while joining.
    self._session = None
    self._name = f'{cluster.job.capitalize()} {cluster.task}'
    self.is_done = False
    self._left = False

  def join(self):
    """Connects to the learners, and waits for those that aren't there.

    Returns:
      Whether it is connected. If not, this task is to end.

    Raises:
      UserError: the chief has other settings.
    """
    with self._lock:
      self._connect()
    return not self._stops()

  def watch_end(self):
    """Asks whether training is done."""
    answer = self._run(self._calls.requirements)
    if answer is not None:
      self.is_done |= bool(answer[1])

  def announce_leaving(self):
    """Tells the chief, if it's there, that this learner is about to end."""
    with contextlib.suppress(
      *LEARNER_GONE, *_PERHAPS_GONE, RuntimeError, AttributeError
    ):
      self._session.run(
        self._calls.announce_leaving, options=within(HEARTBEAT_SECONDS)
      )

  def leave(self):
    """Ends the connection."""
    self._left = True
    _close(self._session).join(HEARTBEAT_SECONDS)

  def _stops(self):
    return self.is_done or self._left or bool(self._received_signals)

  def _run(self, fetches, feed_dict=None, needs_room=False):
    """Runs something on the learners; returns None if this task is to end.

    Args:
      fetches: as of `tf.Session.run`.
      feed_dict: the same.
      needs_room: whether it may have to wait for room in a learner's queue.
    """
    options = within(_ROOM_SECONDS if needs_room else ANSWER_SECONDS)
    faults = 0
    while not self._stops():
      session = self._session
      try:
        return session.run(fetches, feed_dict, options=options)
      except tf.errors.DeadlineExceededError:
        # A full queue is none of the faults that heartbeats find.
        if not needs_room:
          self._rejoin(session)
      # A RuntimeError: another thread closed the session.
      except (*LEARNER_GONE, RuntimeError):
        self._rejoin(session)
      except _PERHAPS_GONE:
        faults += 1
        if faults == _MAX_FAULTS:
          raise
        self._rejoin(session)
    return None

  def _rejoin(self, session):
    with self._lock:
      # Otherwise another thread has connected again already.
      if session is self._session:
        _close(session)
        # A learner that fails still answers for a moment.
        time.sleep(0.5)
        self._connect()

  def _connect(self):
    missing = reason = None
    faults = refusals = 0

    def tell():
      line = f'waits for the learner at {missing}.'
      if refusals > _MAX_REFUSALS:
        line = (
          f'can not join, though all learners are there ({explain(reason)}). '
          f'Learners have to reach this task at {self._cluster.address} '
          '(--actor_address).'
        )
      self._print(line)

    for _ in attempts(tell):
      if self._stops():
        return
      # A session would wait, and not say for whom.
      missing = self._cluster.missing_learner()
      if missing is not None:
        continue
      try:
        self._try_connect()
      except tf.errors.FailedPreconditionError:  # The chief begins.
        missing = self._cluster.learners[0]
      except LEARNER_GONE as error:
        missing, reason = self._cluster.learners[0], error
        refusals += 1
      except _PERHAPS_GONE:
        missing = self._cluster.learners[0]
        faults += 1
        if faults == _MAX_FAULTS_OF_JOINING:
          raise
      else:
        if not self.is_done:
          self._print(f'joined the learner at {self._cluster.learners[0]}.')
        return

  def _try_connect(self):
    """Opens a session, if there is a chief that trains."""
    newcomer = self._open(self._entry_graph, as_newcomer=True)
    try:
      requirements, self.is_done = newcomer.run(
        self._entry.requirements, options=within(ANSWER_SECONDS)
      )
      if not self.is_done:
        self._check(json.loads(requirements))
        self._enter(newcomer)
    finally:
      # Python aborts if it ends while a thread closes a session.
      _close(newcomer).join(HEARTBEAT_SECONDS)
    self._session = self._open(self._graph)

  def _open(self, graph, as_newcomer=False):
    """Returns a new session over the learners."""
    target, config = self._cluster.session(
      self._config, as_newcomer=as_newcomer
    )
    session = tf.Session(target, graph, config)
    repeat_refused(session)
    return session

  def _enter(self, session):
    """Raises UserError if this task can't take part; to be overridden."""

  def _print(self, text):
    print_line(f'{self._name} {text}')

  def _check(self, theirs):
    for name, ours in self._requirements.items():
      if theirs.get(name) != ours:
        raise UserError(
          f'The {name} of the learner at {self._cluster.learners[0]} is '
          f'{theirs.get(name)}, that of {self._name.lower()} is {ours}: they '
          'have to be the same.'
        )


class ActorClient(LearnerClient, tf.train.SessionRunHook):
  """An actor task's connection: it sends unrolls and reads parameters.

  A hook of the session that plays.
  """

  def __init__(
    self, cluster, requirements, config, signals, build_queue, variables
  ):
    """Builds what it runs.

    Args:
      cluster: `Cluster`, with a server.
      requirements: string, JSON of what the chief has to agree on.
      config: `tf.ConfigProto` of this task's sessions.
      signals: list, see `console.stop_signals`.
      build_queue: function of a device, that of this task's learner, that
        returns its `NestQueue` of unrolls.
      variables: list of the `tf.Variable` of this task to which the learners'
        are copied.
    """
    super().__init__(cluster, requirements, config, signals)
    learner = cluster.task % len(cluster.learners)
    with self._graph.as_default():
      queue = build_queue(cluster.learner_device(learner))
      self._unroll = queue.placeholders()
      self._send = queue.enqueue(self._unroll)
      self._load = [cluster.copy_variable(variable) for variable in variables]
    self._load_lock = threading.Lock()
    self._load_begin = 0.0
    self._started = time.time()
    self._num_unrolls = 0
    self._last_values = [self._started, *[0] * (len(Heartbeat._fields) - 2)]
    self._is_known = False  # By a heartbeat.

  def after_create_session(self, session, coord):
    del session, coord
    self._load_parameters()

  def on_unroll(self, actor, unroll):
    """Sends an unroll, and reads parameters for the next; see `ActorLoops`."""
    del actor
    placeholders = tf.nest.flatten(self._unroll)
    feed_dict = dict(zip(placeholders, tf.nest.flatten(unroll), strict=True))
    if self._run([self._send], feed_dict, needs_room=True) is None:
      return False
    with self._load_lock:
      self._num_unrolls += 1
    return self._load_parameters()

  def send_heartbeat(self, actors):
    """Tells the chief that this task is alive, and what it did.

    Args:
      actors: its `ActorLoops`.

    Returns:
      False if this task is to end.

    Raises:
      UserError: there is another task of this number, which was there first.
    """
    self._last_values = [
      *(self._started, self._num_unrolls),
      *(len(actors.processes), actors.num_begun(), *actors.statistics()),
    ]
    answer = self._run(
      (self._calls.heartbeat, self._calls.requirements),
      {self._calls.heartbeat_values: self._last_values},
    )
    if answer is not None:
      (_, last), (_, is_done) = answer
      self._check_alone(*last)
      self._is_known = True
      self.is_done |= bool(is_done)
    return not self._stops()

  def leave(self):
    """Tells the chief, if it's there, that this task ends."""
    self._left = True
    if self._is_known:
      with contextlib.suppress(*LEARNER_GONE, *_PERHAPS_GONE, RuntimeError):
        self._session.run(self._calls.leave, options=within(HEARTBEAT_SECONDS))
    super().leave()

  def _load_parameters(self):
    """Copies the learners' variables; returns False if this task is to end.

    Those who come while another waits for the same share one copy.
    """
    requested = time.monotonic()
    with self._load_lock:
      if self._load_begin > requested:
        return not self._stops()
      self._load_begin = time.monotonic()
      return self._run(self._load) is not None

  def _enter(self, session):
    """Raises UserError if there is another task of this number."""
    first = None
    # If its last heartbeat is of a task that was killed, none follows.
    end = time.monotonic() + 2 * HEARTBEAT_SECONDS
    while time.monotonic() < end and not self._stops():
      last = session.run(
        self._entry.last_heartbeat, options=within(ANSWER_SECONDS)
      )
      if not self._is_of_another(*last[:2]):
        break
      if first is not None and first[1][0] != last[1][0]:
        self._check_alone(*last)
      first = first or last
      time.sleep(0.5)
    # From now on, this one was there first.
    session.run(
      self._entry.heartbeat,
      {self._entry.heartbeat_values: self._last_values},
      options=within(ANSWER_SECONDS),
    )

  def _is_of_another(self, now, heartbeat):
    """Returns whether a heartbeat is of a task that lives and came first."""
    heartbeat = Heartbeat(*heartbeat)
    return (
      0 < heartbeat.started < self._started
      and now - heartbeat.time < LOST_SECONDS
    )

  def _check_alone(self, now, heartbeat, address):
    if self._is_of_another(now, heartbeat):
      self._is_known = False
      raise UserError(
        f'There is an actor {self._cluster.task} already, at '
        f'{six.ensure_str(address)}: give the one at {self._cluster.address} '
        'another --task.'
      )


class Heartbeats:
  """The thread that sends an actor task's heartbeats.

  It begins before the environments do, which may take minutes.
  """

  def __init__(self, client, actors):
    """Takes an `ActorClient` and `ActorLoops`."""
    self._client = client
    self._actors = actors
    # The main thread must be free to handle signals.
    self._thread = threading.Thread(target=self._send, daemon=True)
    self._error = None

  def start(self):
    self._thread.start()

  def has_ended(self):
    """Returns whether this task is to end: training is done, or an error."""
    return not self._thread.is_alive()

  def raise_error(self):
    if self._error is not None:
      raise self._error

  def _send(self):
    try:
      while self._client.send_heartbeat(self._actors):
        time.sleep(HEARTBEAT_SECONDS)
    except Exception as error:
      self._error = error


def _close(session):
  """Closes a session; returns the thread that does so.

  If the learners are there, this ends the calls under way. If one isn't, the
  thread waits until they have timed out.
  """

  def close():
    with contextlib.suppress(*LEARNER_GONE, *_PERHAPS_GONE):
      if session is not None:  # It never was there.
        session.close()

  thread = threading.Thread(target=close, daemon=True)
  thread.start()
  return thread


def _for_transfers(config):
  """Returns a `tf.ConfigProto` like `config` for transfers alone."""
  transfers = tf.ConfigProto()
  transfers.CopyFrom(config)
  transfers.operation_timeout_in_ms = 1000 * ANSWER_SECONDS
  # If a learner's host vanishes, the connection to it stays open for minutes.
  # So a new session needs a connection of its own.
  transfers.rpc_options.disable_session_connection_sharing = True
  # There is nothing to optimise.
  transfers.graph_options.rewrite_options.disable_meta_optimizer = True
  return transfers
