# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Training on many machines: its tasks, what they share, how they find another.

In: addresses, the graphs of learners and actors. Out: where in the cluster each
variable and operation is, and sessions over the tasks. What the chief does with
it is in `chief`, what the other tasks do in `learner_client`.

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
import time

import tensorflow.compat.v1 as tf

import private_apis
import socket_filter
from actors import ActorStatistics
from errors import UserError

HEARTBEAT_SECONDS = 2  # Between two heartbeats of an actor task.
LOST_SECONDS = 10  # Without any, an actor task counts as lost.
ANSWER_SECONDS = 10  # For the learners to answer a call.
_WAITING_SECONDS = 30  # Between two lines that say that a task waits.

# A heartbeat of an actor task: when it came and when the task was started
# (seconds since 1970, by the chief's and by the task's clock), how many unrolls
# it sent, how many actors it has and how many of them have begun, and the
# fields of its `ActorStatistics`.
Heartbeat = collections.namedtuple(
  'Heartbeat',
  ('time', 'started', 'unrolls', 'actors', 'begun', *ActorStatistics._fields),
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
    return next((a for a in self.learners if not listens(a)), None)


def listens(address):
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


def attempts(tell):
  """Yields twice a second, and calls `tell` at once and then now and again."""
  next_line = time.monotonic()
  while True:
    yield
    if time.monotonic() >= next_line:
      next_line += _WAITING_SECONDS
      tell()
    time.sleep(0.5)


def within(seconds):
  return tf.RunOptions(timeout_in_ms=1000 * seconds)
