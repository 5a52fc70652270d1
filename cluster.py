# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training on many machines: what its tasks share, and how they find another.

In: addresses, the graphs of learners and actors. Out: where in the cluster each
variable and operation is, sessions over the tasks, and which tasks take part.

Each task has a server of its own. The session of the chief, learner 0, is over
all learners. The session of an actor task is over all learners and this task,
so that actors may come and go while no other task knows of them:

  actor task --- unrolls --> queue of learner (task % number of learners)
       ^-------- parameters, once per unroll, from all learners
"""

import collections
import contextlib
import json
import random
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
from errors import UserError, explain

HEARTBEAT_SECONDS = 2  # Between two heartbeats of an actor task.
_LOST_SECONDS = 10  # Without any, an actor task counts as lost.
_SILENT_SECONDS = 30  # Without an answer, another learner counts as lost.
_ANSWER_SECONDS = 10  # For the learners to answer a call.
_ROOM_SECONDS = 60  # For a learner to take an unroll: its queue may be full.
_FAREWELL_SECONDS = 5  # For other tasks to notice that training is done.
_SAVING_SECONDS = 25  # For the chief to save, when all learners are moved.
_WAITING_SECONDS = 30  # Between two lines that say that a task waits.

# A heartbeat of an actor task: when it came and when the task was started
# (seconds since 1970, by the chief's and by the task's clock), how many unrolls
# it sent, and the fields of its `ActorStatistics`.
Heartbeat = collections.namedtuple(
  'Heartbeat', ('time', 'started', 'unrolls', *ActorStatistics._fields)
)

# The errors of a session one of whose learners ended, restarts, or can't be
# reached.
LEARNER_GONE = (
  tf.errors.UnavailableError,
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
)


class LearnerLeaves(Exception):
  """Another learner is about to end; until then, it still answers."""


# --- The tasks --------------------------------------------------------------


class Cluster:
  """The tasks of a training, as one of them sees them.

  Attributes:
    learners: list of the learners' addresses, host:port.
    job: 'learner' or 'actor', the job of this task.
    task: int, the number of this task in its job.
    address: host:port by which other tasks call this one. That of an actor task
      is chosen by `start_server` unless it is given.
  """

  def __init__(self, learners, job, task, address=None):
    self.learners = learners
    self.job = job
    self.task = task
    self.address = address
    self._local_target = None
    self._places = {}

  def start_server(self, config):
    """Starts this task's server.

    Args:
      config: `tf.ConfigProto` with the numbers of its threads.

    Raises:
      UserError: another program listens at its address.
    """
    config = _with_shared_state(config)
    self.address = self.address or f'{_own_host(self.learners[0])}:0'
    host, _, _ = self.address.rpartition(':')
    try:
      # Its own name must not be one that a session gives it.
      server = tf.train.Server(
        {'local': [self.address]}, job_name='local', config=config
      )
    except tf.errors.OpError:
      raise UserError(
        f'--{self.job}_address={self.address}: its port can not be listened '
        'on, probably another program does.'
      ) from None
    port = server.target.rpartition(':')[2]
    self.address = f'{host}:{port}'
    self._local_target = server.target
    if self.is_local():
      socket_filter.shut_out_other_hosts(int(port))

  def describe(self):
    """Returns a line on who can reach this task's port."""
    line = f'{self.job.capitalize()} {self.task} listens at {self.address}'
    if self.is_local():
      return f'{line}, for this host alone.'
    return f'{line}, on all interfaces, and asks for no password.'

  def is_local(self):
    """Returns whether this host alone can reach this task."""
    host, _, _ = self.address.rpartition(':')
    return host in ('localhost', '127.0.0.1', '[::1]')

  def place_variables(self, variables):
    """Decides which learner has which variable; they have about equal shares.

    Args:
      variables: list of `tf.Variable`, in any graph.
    """
    loads = [0] * len(self.learners)
    for variable in sorted(variables, key=lambda v: (-_size(v), v.op.name)):
      learner = loads.index(min(loads))
      loads[learner] += _size(variable)
      self._places[variable.op.name] = learner

  def learner_device(self, task=0):
    """Returns the device function of what a learner computes.

    Variables are where `place_variables` has put them, others on this learner.
    """
    return tf.train.replica_device_setter(
      ps_tasks=len(self.learners),
      ps_device='/job:learner',
      worker_device=f'/job:learner/task:{task}',
      ps_strategy=lambda op: self._places.get(op.name, task),
    )

  def actor_device(self):
    """Returns the device of what this actor task computes."""
    return f'/job:actor/task:{self.task}'

  def copy_variable(self, variable):
    """Returns the op that copies a learner's variable to this actor task.

    Args:
      variable: that of this task, in any graph; the learner's has its name.
    """
    with tf.device(
      f'/job:learner/task:{self._places.get(variable.op.name, 0)}'
    ):
      value = tf.raw_ops.ReadVariableOp(
        resource=_handle(variable), dtype=variable.dtype
      )
    with tf.device(self.actor_device()):
      return tf.raw_ops.AssignVariableOp(
        resource=_handle(variable), value=value
      )

  def session(self, config, with_learners=True, as_newcomer=False):
    """Returns what a session of this task needs.

    Args:
      config: `tf.ConfigProto`.
      with_learners: whether the session is over the learners as well, or over
        this task alone.
      as_newcomer: whether an actor task is to have another name than its own. A
        new session ends those of another task that has its name.

    Returns:
      Its target, and its `tf.ConfigProto`.
    """
    # By its local target, TensorFlow calls its own server without the network.
    target = self._local_target
    tasks = collections.defaultdict(dict)
    if with_learners:
      tasks['learner'] = dict(enumerate(self.learners))
      # Others call this task as well, unless it is the only learner.
      if not self.is_local() and (
        self.job == 'actor' or len(self.learners) > 1
      ):
        target = f'grpc://{self.address}'
    # TensorFlow finds this task among them by the target.
    job, task = self.job, self.task
    if as_newcomer and job == 'actor':
      job, task = 'newcomer', random.getrandbits(31)
    tasks[job][task] = target.removeprefix('grpc://')
    config = _with_shared_state(config)
    config.cluster_def.CopyFrom(tf.train.ClusterSpec(tasks).as_cluster_def())
    return target, config

  def is_loss(self, error):
    """Returns whether an error of a session comes of a learner that is gone."""
    return (
      not isinstance(error, tf.errors.OpError)
      or isinstance(error, LEARNER_GONE)
      or self.missing_learner() is not None
    )

  def missing_learner(self):
    """Returns the address of a learner that nobody listens at, None if none."""
    return next((a for a in self.learners if not _listens(a)), None)


def _listens(address):
  """Returns whether a program listens at host:port."""
  host, _, port = address.rpartition(':')
  try:
    # IPv6 is in brackets.
    place = host.strip('[]'), int(port)
    socket.create_connection(place, timeout=2).close()
  except OSError:
    return False
  return True


def _own_host(learner_address):
  """Returns this host's address, as a learner's host can reach it."""
  host, _, port = learner_address.rpartition(':')
  try:
    family, kind, _, _, place = socket.getaddrinfo(
      host.strip('[]'), port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
      probe.connect(place)  # Sends nothing, but finds the way.
      own = probe.getsockname()[0]
  except OSError:  # The name is not known yet.
    return socket.gethostname()
  if own in ('127.0.0.1', '::1'):
    return 'localhost'
  return f'[{own}]' if ':' in own else own


def _with_shared_state(config):
  """Returns a `ConfigProto` whose sessions on a server share its variables."""
  shared = tf.ConfigProto()
  shared.CopyFrom(config)
  shared.experimental.share_session_state_in_clusterspec_propagation = True
  return shared


def _handle(variable):
  """Returns the handle of a variable's namesake on the current device."""
  return tf.raw_ops.VarHandleOp(
    dtype=variable.dtype, shape=variable.shape, shared_name=variable.op.name
  )


def _size(variable):
  return variable.shape.num_elements() * variable.dtype.size


# --- What they share --------------------------------------------------------


class SharedState:
  """What the chief, learner 0, shares with all tasks, in its memory.

  All tasks build it. As its resources have the same names in all graphs, the
  sessions of all tasks use those of the chief.
  """

  def __init__(self, device):
    """Makes the resources on the chief, whose device this is."""
    self._device = device
    with self._on_chief():
      self._requirements = _shared_variable('requirements', tf.string)
      # For actor tasks, and for the other learners.
      self._done = {
        job: _shared_variable(f'{job}s_done', tf.bool)
        for job in ('actor', 'learner')
      }
      self._leaving = _shared_variable('leaving', tf.bool)
      self._heartbeats = tf.raw_ops.MutableHashTableOfTensorsV2(
        key_dtype=tf.int64,
        value_dtype=tf.float64,
        value_shape=[len(Heartbeat._fields)],
        shared_name='heartbeats',
      )
      self._addresses = tf.raw_ops.MutableHashTableV2(
        key_dtype=tf.int64, value_dtype=tf.string, shared_name='addresses'
      )

  def open(self, requirements):
    """Returns the op after which other tasks may join."""
    with self._on_chief():
      return tf.group(
        self._requirements.assign(requirements, read_value=False),
        self._leaving.assign(False, read_value=False),
        *(done.assign(False, read_value=False) for done in self._done.values()),
      )

  def finish(self, job):
    """Returns the op that tells the other tasks of a job to end."""
    with self._on_chief():
      return self._done[job].assign(True, read_value=False)

  def announce_leaving(self):
    """Returns the op that tells the chief that another learner is moved."""
    with self._on_chief():
      return self._leaving.assign(True, read_value=False)

  def read_leaving(self):
    """Returns whether another learner is moved."""
    with self._on_chief():
      return self._leaving.read_value()

  def read_requirements(self, job):
    """Returns what `open` got, and whether `finish` was run for the job."""
    with self._on_chief():
      return self._requirements.read_value(), self._done[job].read_value()

  def heartbeat(self, task, values, address):
    """Returns the op of a heartbeat, and what `last_heartbeat` was before it.

    Args:
      task: int64, number of the actor task.
      values: float64 [len(Heartbeat._fields) - 1], a `Heartbeat` without its
        time.
      address: string, of the actor task.
    """
    last = self.last_heartbeat(task)
    with self._on_chief(), tf.control_dependencies(last):
      heartbeat = tf.concat([[tf.timestamp()], values], 0)
      # The address is written first: each task with a heartbeat has one.
      named = tf.raw_ops.LookupTableInsertV2(
        table_handle=self._addresses, keys=[task], values=[address]
      )
      with tf.control_dependencies([named]):
        op = tf.raw_ops.LookupTableInsertV2(
          table_handle=self._heartbeats, keys=[task], values=[heartbeat]
        )
    return op, last

  def last_heartbeat(self, task):
    """Returns the time; and the last heartbeat of a task, and its address.

    Args:
      task: int64, number of the actor task.
    """
    with self._on_chief():
      heartbeat = tf.raw_ops.LookupTableFindV2(
        table_handle=self._heartbeats,
        keys=[task],
        default_value=tf.zeros([len(Heartbeat._fields)], tf.float64),
      )
      address = tf.raw_ops.LookupTableFindV2(
        table_handle=self._addresses, keys=[task], default_value=''
      )
      return tf.timestamp(), heartbeat[0], address[0]

  def leave(self, task):
    """Returns the op that removes an actor task."""
    with self._on_chief():
      return tf.raw_ops.LookupTableRemoveV2(
        table_handle=self._heartbeats, keys=[task]
      )

  def heartbeats(self):
    """Returns the time, tasks and their last heartbeats, and all addresses."""
    with self._on_chief():
      tasks, heartbeats = tf.raw_ops.LookupTableExportV2(
        table_handle=self._heartbeats, Tkeys=tf.int64, Tvalues=tf.float64
      )
      with tf.control_dependencies([heartbeats]):
        addresses = tf.raw_ops.LookupTableExportV2(
          table_handle=self._addresses, Tkeys=tf.int64, Tvalues=tf.string
        )
        now = tf.timestamp()
      return now, tasks, heartbeats, tuple(addresses)

  @contextlib.contextmanager
  def _on_chief(self):
    # Names and device must be the same in all tasks, whatever else is in their
    # graphs.
    with tf.device(self._device), tf.device('/cpu:0'):
      with tf.name_scope('shared/'):
        yield


def _shared_variable(name, dtype):
  # In no collection, so that it is neither initialised nor saved with the
  # other variables.
  return tf.Variable(
    tf.zeros([], dtype),
    name=name,
    use_resource=True,
    trainable=False,
    collections=[],
  )


def repeat_refused(session):
  """Makes a session repeat the runs that a server refuses by mistake.

  A server refuses a run if its id is among the last 100,000. TensorFlow draws
  the id in a new thread for each run, from a seed of 32 bits, so about one run
  in 43,000 is refused.

  Messages of errors are cut. They quote what was fed, and TensorFlow's Python
  code takes a time that is quadratic in the length of a message: with an unroll
  in it, it would not end. Some quotes are no text.
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
      except UnicodeDecodeError as error:
        message = error.object[:1000].decode(errors='replace')
        raise tf.errors.UnknownError(None, None, message) from None

  private_apis.wrap_session_run(session, repeat)


def read_tf_config(text):
  """Returns what flags a TF_CONFIG, a JSON string, stands for, as a dict.

  Raises:
    UserError: it is not as it has to be.
  """
  try:
    config = json.loads(text)
    task, cluster = config['task'], config['cluster']
    values = {'job_name': task['type'], 'task': int(task['index'])}
    learners = [str(address) for address in cluster['learner']]
    if len(learners) > 1:
      values['learner_addresses'] = learners
    else:
      values['learner_address'] = learners[0]
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


# --- The chief --------------------------------------------------------------


def wait_for_learners(cluster, received_signals):
  """Waits, in the chief, until all learners are there.

  Returns:
    Whether they are; if not, a signal came.
  """
  for _ in _attempts(
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
  _wait_while(lambda: _listens(cluster.learners[0]), _SAVING_SECONDS)


def _wait_while(condition, seconds):
  """Waits until a condition ends, but no longer than some seconds."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline and condition():
    time.sleep(0.1)


def _attempts(tell):
  """Yields twice a second, and calls `tell` at once and then now and again."""
  next_line = time.monotonic()
  while True:
    yield
    if time.monotonic() >= next_line:
      next_line += _WAITING_SECONDS
      tell()
    time.sleep(0.5)


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
        (self._learner_times, self._leaving), options=_within(_SILENT_SECONDS)
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
      session.run(self._finish['learner'], options=_within(_ANSWER_SECONDS))
    # They ask for it, so this task has to be there.
    _wait_while(
      lambda: any(map(_listens, cluster.learners[1:])), _FAREWELL_SECONDS
    )


def _actor_name(task, addresses):
  return f'Actor {task} ({six.ensure_str(addresses[task])})'


# --- The other tasks --------------------------------------------------------


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


class Heartbeats:
  """The thread that sends an actor task's heartbeats.

  It begins before the environments do, which may take minutes.
  """

  def __init__(self, client, statistics):
    """Takes an `ActorClient`, and a function that returns `ActorStatistics`."""
    self._client = client
    self._statistics = statistics
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
      while self._client.send_heartbeat(self._statistics()):
        time.sleep(HEARTBEAT_SECONDS)
    except Exception as error:
      self._error = error


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
        self._calls.announce_leaving, options=_within(HEARTBEAT_SECONDS)
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
    options = _within(_ROOM_SECONDS if needs_room else _ANSWER_SECONDS)
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

    for _ in _attempts(tell):
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
        self._entry.requirements, options=_within(_ANSWER_SECONDS)
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
    self._last_values = [self._started, 0, *[0] * len(ActorStatistics._fields)]
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

  def send_heartbeat(self, statistics):
    """Tells the chief that this task is alive, and what it did.

    Args:
      statistics: `ActorStatistics`.

    Returns:
      False if this task is to end.

    Raises:
      UserError: there is another task of this number, which was there first.
    """
    self._last_values = [self._started, self._num_unrolls, *statistics]
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
        self._session.run(self._calls.leave, options=_within(HEARTBEAT_SECONDS))
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
        self._entry.last_heartbeat, options=_within(_ANSWER_SECONDS)
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
      options=_within(_ANSWER_SECONDS),
    )

  def _is_of_another(self, now, heartbeat):
    """Returns whether a heartbeat is of a task that lives and came first."""
    heartbeat = Heartbeat(*heartbeat)
    return (
      0 < heartbeat.started < self._started
      and now - heartbeat.time < _LOST_SECONDS
    )

  def _check_alone(self, now, heartbeat, address):
    if self._is_of_another(now, heartbeat):
      self._is_known = False
      raise UserError(
        f'There is an actor {self._cluster.task} already, at '
        f'{six.ensure_str(address)}: give the one at {self._cluster.address} '
        'another --task.'
      )


def _within(seconds):
  return tf.RunOptions(timeout_in_ms=1000 * seconds)


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
  transfers.operation_timeout_in_ms = 1000 * _ANSWER_SECONDS
  # If a learner's host vanishes, the connection to it stays open for minutes.
  # So a new session needs a connection of its own.
  transfers.rpc_options.disable_session_connection_sharing = True
  # There is nothing to optimise.
  transfers.graph_options.rewrite_options.disable_meta_optimizer = True
  return transfers
