# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training on many machines: what learner and actor tasks share.

In: unrolls of the actor tasks, parameters of the learner task. Out: each on the
other machine, and which tasks take part. Both sides build `SharedState`;
`start_server` and `ActorRegistry` are the learner task's side, `LearnerClient`
and `ParameterSync` that of an actor task.
"""

import collections
import contextlib
import json
import socket
import threading
import time

import numpy as np
import six
import tensorflow.compat.v1 as tf

import private_apis
import socket_filter
from actors import Actors, ActorStatistics
from console import print_line
from errors import UserError

HEARTBEAT_SECONDS = 2  # Between two heartbeats of an actor task.
_LOST_SECONDS = 10  # Without any, an actor task counts as lost.
_ANSWER_SECONDS = 10  # For the learner to answer a call.
_ROOM_SECONDS = 60  # For the learner to take an unroll: its queue may be full.
_FAREWELL_SECONDS = 5  # For actor tasks to notice that training is done.
_WAITING_SECONDS = 30  # Between two lines that say that a task waits.

# A heartbeat of an actor task: when it came and when the task was started
# (seconds since 1970, by the learner's and by the task's clock), how many
# unrolls it sent, and the fields of its `ActorStatistics`.
Heartbeat = collections.namedtuple(
  'Heartbeat', ('time', 'started', 'unrolls', *ActorStatistics._fields)
)


class SharedState:
  """What the learner task shares with its actor tasks, in its memory.

  Both sides build it. As its resources have the same names on both, a session
  of an actor task on the learner's server uses those of the learner. Actor
  tasks call the learner and are never called, so they need no port.
  """

  def __init__(self, build_queue):
    """Makes the resources; `build_queue` returns the `NestQueue` of unrolls."""
    # Names and device must be the same on both sides, whatever else is in the
    # graph.
    with tf.name_scope('shared/'), tf.device('/cpu:0'):
      self.queue = build_queue()
      # All parameters in one tensor, for a single transfer.
      self._parameters = _shared_variable('parameters', tf.float32, [None])
      self._global_step = _shared_variable('frames', tf.int64, [])
      self._requirements = _shared_variable('requirements', tf.string, [])
      self._done = _shared_variable('done', tf.bool, [])
      self._heartbeats = tf.raw_ops.MutableHashTableOfTensorsV2(
        key_dtype=tf.int64,
        value_dtype=tf.float64,
        value_shape=[len(Heartbeat._fields)],
        shared_name='heartbeats',
      )
      self._addresses = tf.raw_ops.MutableHashTableV2(
        key_dtype=tf.int64, value_dtype=tf.string, shared_name='addresses'
      )

  def publish(self, agent):
    """Returns the op that shows the agent's parameters as they are now."""
    with tf.device('/cpu:0'):
      flat = [tf.reshape(v.read_value(), [-1]) for v in agent.variables]
      step = tf.train.get_global_step().read_value()
      return tf.group(
        self._parameters.assign(tf.concat(flat, 0), read_value=False),
        self._global_step.assign(step, read_value=False),
      )

  def open(self, requirements):
    """Returns the op after which actor tasks may join."""
    return tf.group(
      self._requirements.assign(requirements, read_value=False),
      self._done.assign(False, read_value=False),
    )

  def finish(self):
    """Returns the op that tells actor tasks to end."""
    return self._done.assign(True, read_value=False)

  def read(self):
    """Returns parameters, float32 [N], and the frames they were trained for."""
    return self._parameters.read_value(), self._global_step.read_value()

  def read_requirements(self):
    """Returns what `open` got, and whether `finish` was run."""
    return self._requirements.read_value(), self._done.read_value()

  def heartbeat(self, task, values, address):
    """Returns the op of a heartbeat, and whether `finish` was run.

    Args:
      task: int64, number of the actor task.
      values: float64 [len(Heartbeat._fields) - 1], a `Heartbeat` without its
        time.
      address: string, of the actor task.
    """
    with tf.device('/cpu:0'):
      heartbeat = tf.concat([[tf.timestamp()], values], 0)
      # The address is written first: each task with a heartbeat has one.
      named = tf.raw_ops.LookupTableInsertV2(
        table_handle=self._addresses, keys=[task], values=[address]
      )
      with tf.control_dependencies([named]):
        op = tf.raw_ops.LookupTableInsertV2(
          table_handle=self._heartbeats, keys=[task], values=[heartbeat]
        )
    return op, self._done.read_value()

  def leave(self, task):
    """Returns the op that removes an actor task."""
    return tf.raw_ops.LookupTableRemoveV2(
      table_handle=self._heartbeats, keys=[task]
    )

  def heartbeats(self):
    """Returns the time, tasks and their last heartbeats, and all addresses."""
    tasks, heartbeats = tf.raw_ops.LookupTableExportV2(
      table_handle=self._heartbeats, Tkeys=tf.int64, Tvalues=tf.float64
    )
    with tf.control_dependencies([heartbeats]):
      addresses = tf.raw_ops.LookupTableExportV2(
        table_handle=self._addresses, Tkeys=tf.int64, Tvalues=tf.string
      )
      now = tf.timestamp()
    return now, tasks, heartbeats, tuple(addresses)


def _shared_variable(name, dtype, shape):
  # In no collection, so that it is neither initialised nor saved with the
  # other variables.
  return tf.Variable(
    tf.zeros([n or 0 for n in shape], dtype),
    shape=tf.TensorShape(shape),
    name=name,
    use_resource=True,
    trainable=False,
    collections=[],
  )


def repeat_refused(session):
  """Makes a session repeat the runs that its server refuses by mistake.

  The server refuses a run if its id is among the last 100,000. TensorFlow draws
  the id in a new thread for each run, from a seed of 32 bits, so about one run
  in 43,000 is refused.

  Messages of errors are cut. They quote what was fed, and TensorFlow's Python
  code takes a time that is quadratic in the length of a message: with an unroll
  in it, it would not end.
  """

  def repeat(run, *args):
    while True:
      try:
        return run(*args)
      except tf.errors.OpError as error:
        if 'The same RunGraph (Worker) request' in error.message:
          continue
        message = error.message[:1000]
        raise type(error)(error.node_def, error.op, message) from None

  private_apis.wrap_session_run(session, repeat)


def read_tf_config(text):
  """Returns a dict of job, task and addresses by flag, from a TF_CONFIG.

  Raises:
    UserError: it is not as it has to be.
  """
  try:
    config = json.loads(text)
    task, cluster = config['task'], config['cluster']
    values = {
      'job_name': task['type'],
      'task': int(task['index']),
      'learner_address': cluster['learner'][0],
    }
    # Actors needn't be listed: more may come.
    if task['type'] == 'actor' and values['task'] < len(
      cluster.get('actor', [])
    ):
      values['actor_address'] = cluster['actor'][values['task']]
  except (ValueError, TypeError, LookupError, AttributeError):
    raise UserError(
      'TF_CONFIG is not as in {"cluster": {"learner": ["host:port"], "actor": '
      '["host:port", ...]}, "task": {"type": "actor", "index": 0}}: mend or '
      'unset it.'
    ) from None
  if values['job_name'] not in ('learner', 'actor'):
    raise UserError(
      f'The job in TF_CONFIG is {values["job_name"]}, it must be learner or '
      'actor.'
    )
  return values


# --- The learner task -------------------------------------------------------


def start_server(learner_address, config):
  """Starts the learner's server.

  Args:
    learner_address: host:port; with localhost, other hosts are shut out.
    config: `tf.ConfigProto`.

  Returns:
    The target for the sessions of this program.

  Raises:
    UserError: another program listens there.
  """
  try:
    server = tf.train.Server(
      {'learner': [learner_address]}, job_name='learner', config=config
    )
  except tf.errors.OpError:
    raise UserError(
      f'--learner_address={learner_address}: its port can not be '
      'listened on, probably another program does.'
    ) from None
  host, _, port = learner_address.rpartition(':')
  line = f'Actor tasks can join at {learner_address}.'
  if host in ('localhost', '127.0.0.1', '[::1]'):
    socket_filter.shut_out_other_hosts(int(port))
  else:
    line += ' The port is open on all interfaces, and asks for no password.'
  print_line(line)
  return server.target


class ActorRegistry(Actors):
  """The actor tasks of a learner task, known by their heartbeats."""

  def __init__(self, shared, agent, global_step, requirements, num_expected):
    """Builds the operations. Tasks may join once the session has started.

    Args:
      shared: `SharedState`.
      agent: `Agent`, whose parameters are published.
      global_step: the tensor whose computation is an update.
      requirements: string, see `SharedState.open`.
      num_expected: int, how many tasks are expected, for the reports.
    """
    self._num_expected = num_expected
    with tf.control_dependencies([shared.publish(agent)]):
      self._open = shared.open(requirements)
    with tf.control_dependencies([global_step]):
      self._publish = shared.publish(agent)
    self._finish = shared.finish()
    self._read_heartbeats = shared.heartbeats()
    self._connected = {}  # The last heartbeats by task.
    self._statistics = {}  # By task and the time of its start.
    self._period_begin = collections.Counter()  # Unrolls by task and its start.
    self._num_joined = self._num_lost = 0

  def after_create_session(self, session, coord):
    repeat_refused(session)
    self.session, self.coord = session, coord
    session.run(self._open)

  def before_run(self, run_context):
    del run_context
    return tf.train.SessionRunArgs(self._publish)

  def membership_changes(self):
    now, tasks, values, addresses = self.session.run(self._read_heartbeats)
    names = dict(zip(addresses[0], addresses[1], strict=True))
    heartbeats = {
      task: Heartbeat(*value) for task, value in zip(tasks, values, strict=True)
    }
    connected = {
      task: heartbeat
      for task, heartbeat in heartbeats.items()
      if now - heartbeat.time < _LOST_SECONDS
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
          f'{_LOST_SECONDS} s.'
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
    values = {
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
    return values, [line]

  def close(self, error=None):
    # After an error the learner may be restarted, so its tasks go on waiting.
    if error:
      return
    self.session.run(self._finish)
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while time.monotonic() < deadline:
      self.membership_changes()
      if not self._connected:
        break
      time.sleep(0.1)


def _actor_name(task, addresses):
  return f'Actor {task} ({six.ensure_str(addresses[task])})'


# --- An actor task ----------------------------------------------------------


# The errors of a session whose learner ended, restarts, or can't be reached.
_LEARNER_GONE = (
  tf.errors.UnavailableError,
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
  tf.errors.NotFoundError,
  tf.errors.InternalError,
  tf.errors.UnknownError,
)


class LearnerClient:
  """An actor task's connection to the learner task.

  If the learner is gone, all methods wait until it is back, and repeat what
  failed. They may be called by any thread.
  """

  def __init__(
    self,
    learner_address,
    task,
    actor_address,
    unroll,
    build_queue,
    requirements,
    received_signals,
  ):
    """Builds what is run on the learner; `join` has to be called before.

    Args:
      learner_address: host:port of the learner.
      task: int, number of this actor task.
      actor_address: what the learner calls it in its reports.
      unroll: an `Unroll` like those to send.
      build_queue: function that returns the `NestQueue` of unrolls.
      requirements: string, JSON of what the learner has to agree on.
      received_signals: list, see `console.stop_signals`.
    """
    self._learner_address = learner_address
    self._task = task
    self._requirements = json.loads(requirements)
    self._received_signals = received_signals
    self._lock = threading.Lock()  # Held while joining.
    self._session = None
    self._started = time.time()
    self._graph = tf.Graph()
    with self._graph.as_default():
      shared = SharedState(build_queue)
      self._unroll = tf.nest.map_structure(
        lambda t: tf.placeholder(t.dtype, t.shape), tf.nest.flatten(unroll)
      )
      self._send = shared.queue.enqueue(
        tf.nest.pack_sequence_as(unroll, self._unroll)
      )
      self._read = shared.read()
      self._read_requirements = shared.read_requirements()
      self._heartbeat_values = tf.placeholder(
        tf.float64, [len(Heartbeat._fields) - 1]
      )
      key = tf.constant(task, tf.int64)
      self._heartbeat = shared.heartbeat(
        key, self._heartbeat_values, actor_address
      )
      self._leave = shared.leave(key)
    self.is_done = False
    self._left = False

  def join(self):
    """Connects to the learner, and waits for it if it isn't there.

    Returns:
      Whether it is connected. If not, this task is to end.

    Raises:
      UserError: the learner has other settings.
    """
    with self._lock:
      self._connect()
    return not self._stops()

  def send(self, unroll):
    """Sends an `Unroll` of values; returns False if this task is to end."""
    feed_dict = dict(zip(self._unroll, tf.nest.flatten(unroll), strict=True))
    return self._run([self._send], feed_dict, _ROOM_SECONDS) is not None

  def read(self):
    """Returns what `SharedState.read` does; None if this task is to end."""
    return self._run(self._read)

  def send_heartbeat(self, num_unrolls, statistics):
    """Tells the learner that this task is alive, and what it did."""
    values = [self._started, num_unrolls, *statistics]
    answer = self._run(self._heartbeat, {self._heartbeat_values: values})
    if answer is not None and answer[1]:
      self.is_done = True

  def leave(self):
    """Tells the learner, if it's there, that this task ends."""
    self._left = True
    with contextlib.suppress(*_LEARNER_GONE, RuntimeError):
      self._session.run(self._leave, options=_within(HEARTBEAT_SECONDS))
    _close(self._session).join(HEARTBEAT_SECONDS)

  def _stops(self):
    return self.is_done or self._left or bool(self._received_signals)

  def _run(self, fetches, feed_dict=None, seconds=_ANSWER_SECONDS):
    """Runs something on the learner; returns None if this task is to end."""
    while not self._stops():
      session = self._session
      try:
        return session.run(fetches, feed_dict, options=_within(seconds))
      # A RuntimeError: another thread closed the session.
      except (*_LEARNER_GONE, RuntimeError):
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
    next_line = time.monotonic()
    while not self._stops():
      requirements = self._try_connect()
      if requirements is not None:
        self._check(json.loads(requirements))
        if not self.is_done:
          self._print(f'joined the learner at {self._learner_address}.')
        return
      if time.monotonic() >= next_line:
        next_line += _WAITING_SECONDS
        self._print(f'waits for the learner at {self._learner_address}.')
      time.sleep(0.5)

  def _try_connect(self):
    """Returns the requirements of the learner, None if there's none."""
    host, _, port = self._learner_address.rpartition(':')
    try:
      # A session would take all its time to find that nobody listens.
      address = host.strip('[]'), int(port)  # IPv6 is in brackets.
      socket.create_connection(address, timeout=2).close()
    except OSError:
      return None
    session = tf.Session(
      f'grpc://{self._learner_address}', self._graph, _client_config()
    )
    repeat_refused(session)
    try:
      requirements, self.is_done = session.run(
        self._read_requirements, options=_within(_ANSWER_SECONDS)
      )
    except _LEARNER_GONE:
      _close(session)
      return None
    self._session = session
    return requirements

  def _print(self, text):
    print_line(f'Actor {self._task} {text}')

  def _check(self, theirs):
    for name, ours in self._requirements.items():
      if theirs.get(name) != ours:
        raise UserError(
          f'The {name} of the learner at {self._learner_address} is '
          f'{theirs.get(name)}, that of actor {self._task} is {ours}: they '
          'have to be the same.'
        )


def _within(seconds):
  return tf.RunOptions(timeout_in_ms=1000 * seconds)


def _close(session):
  """Closes a session; returns the thread that does so.

  If the learner is there, this ends the calls under way. If it isn't, the
  thread waits until they have timed out.
  """

  def close():
    with contextlib.suppress(*_LEARNER_GONE):
      session.close()

  thread = threading.Thread(target=close, daemon=True)
  thread.start()
  return thread


def _client_config():
  config = tf.ConfigProto(operation_timeout_in_ms=1000 * _ANSWER_SECONDS)
  # If the learner's host vanishes, the connection to it stays open for minutes.
  # So a new session needs a connection of its own.
  config.rpc_options.disable_session_connection_sharing = True
  # The graph has nothing to optimise, but the learner would try for each task.
  config.graph_options.rewrite_options.disable_meta_optimizer = True
  return config


class ParameterSync(tf.train.SessionRunHook):
  """Makes the environments of an actor task play in rounds.

  In a round, each environment plays an unroll, all with the same parameters.
  Between two rounds, the next parameters are fetched from the learner.
  """

  def __init__(self, client, agent, num_environments):
    self._client = client
    self._barrier = threading.Barrier(num_environments, self._end_round)
    self._values = (
      tf.placeholder(tf.float32, [None]),
      tf.placeholder(tf.int64, []),
    )
    parameters, step = self._values
    variables = agent.variables
    parts = tf.split(parameters, [v.shape.num_elements() for v in variables])
    self._load_op = tf.group(
      tf.train.get_global_step().assign(step, read_value=False),
      *(
        variable.assign(tf.reshape(part, variable.shape), read_value=False)
        for variable, part in zip(variables, parts, strict=True)
      ),
    )
    self._load = None
    self.num_unrolls = 0

  def after_create_session(self, session, coord):
    del coord
    self._load = session.make_callable(self._load_op, [*self._values])
    self._fetch()

  def on_unroll(self, actor, unroll):
    """Sends an unroll and waits for the end of the round; see `ActorLoops`."""
    del actor
    if not self._client.send(unroll):
      return False
    try:
      self._barrier.wait()
    except threading.BrokenBarrierError:
      return False
    return True

  def stop(self):
    """Ends the environments' wait for the end of the round."""
    self._barrier.abort()

  def _end_round(self):
    self.num_unrolls += self._barrier.parties
    self._fetch()

  def _fetch(self):
    values = self._client.read()
    if values is not None:
      self._load(*values)
