# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many actor tasks do learners serve, and what do several learners cost?

Measures a training's communication alone. The learners take batches of unrolls
and drop them; as its gradient, each returns the parameters that it has read.
The update is a real one. The actor tasks have no environments: they send
unrolls and read parameters as fast as they can. All has the sizes of a real
training with the flags of experiment.py that are given; the level is one of
benchmarks/common.py. Run it on an otherwise idle machine, for each number of
learners by itself:

  python -m benchmarks.network --batch_size=32
  python -m benchmarks.network --batch_size=32 --num_learners=2

This takes about 3 minutes each, and 4 GB of memory. To see that it works:
--actors=1,4 --seconds=3.

It prints, first, what an update takes without waiting for unrolls: one of
several learners exchanges parameters and gradients, one of a single learner
doesn't.

Then a row for each number of actor tasks; each learner needs one of them. They
are threads of a few processes, with a server, sessions and connections each: as
processes they would need 0.4 GB each. They share the processors with the
learners. So compare the learners' processor time per unroll and their memory,
and not unrolls/s.

Bytes are those of the loopback device, whoever sent them.
"""

import collections
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import types

import numpy as np
from absl import app, flags

import benchmarks.common  # Before TensorFlow, which it makes quiet.
import chief
import cluster
import experiment
import learner_client
from actors import ActorStatistics
from command_line import FLAGS, check_flags, learner_of_flags, own_flags
from experiment import tf
from learner import Tower

flags.DEFINE_list('actors', ['1', '10', '50', '100'], 'Numbers of actor tasks.')
flags.DEFINE_integer('seconds', 15, 'Duration of each measurement.')
flags.DEFINE_integer('processes', 4, 'Processes that the actor tasks share.')
flags.DEFINE_integer('clients', 0, 'Internal: be so many actor tasks.')

_NUM_EXCHANGES = 30
_NO_ACTORS = types.SimpleNamespace(
  processes=(),
  num_begun=lambda: 0,
  statistics=lambda: ActorStatistics(*4 * [0]),
)
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# What the learners' processes have used: seconds, MB, and threads.
Usage = collections.namedtuple('Usage', 'seconds memory threads')


def _game_flags():
  """Returns the flags by which all tasks play the same."""
  return [
    flag.serialize()
    for flag in own_flags()
    if flag.present and flag.name not in ('task', 'job_name', 'num_learners')
  ]


# --- The actor tasks --------------------------------------------------------


def _be_actors():
  """Sends unrolls and reads parameters until killed."""
  game = experiment._choose_game()
  variables, specs = experiment._actor_specs(game)
  rng = np.random.default_rng(1)
  unroll = tf.nest.map_structure(lambda spec: _value(spec, rng), specs)
  variables = [*variables, tf.train.get_global_step(variables[0].graph)]
  requirements = experiment._task_requirements(game)
  config = experiment._session_config(1)

  def run(task):
    tasks = cluster.Cluster(FLAGS.learner_addresses, 'actor', task)
    tasks.place_variables(variables[:-1])
    tasks.start_server(config)
    client = learner_client.ActorClient(
      *(tasks, requirements, config, []),
      lambda device: experiment._build_learner_queue(specs, device),
      variables,
    )
    client.join()
    next_heartbeat = 0.0
    while not client.is_done:
      client.on_unroll(0, unroll)
      if time.monotonic() > next_heartbeat:
        client.send_heartbeat(_NO_ACTORS)
        next_heartbeat = time.monotonic() + cluster.HEARTBEAT_SECONDS

  threads = [
    threading.Thread(target=run, args=(FLAGS.task + i,))
    for i in range(FLAGS.clients)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


def _value(spec, rng):
  """Returns a value of a spec: frames are noise, all else is 0 or empty."""
  if spec.dtype == tf.string:
    return np.full(spec.shape, b'', object)
  if spec.dtype == tf.uint8:
    return rng.integers(0, 256, spec.shape, np.uint8)
  return np.zeros(spec.shape, spec.dtype.as_numpy_dtype)


# --- The learners -----------------------------------------------------------


class _Chief:
  """Learner 0, which takes batches but doesn't learn."""

  def __init__(self, game):
    self._tasks = experiment._cluster()
    variables, specs = experiment._actor_specs(game)
    self._tasks.place_variables(variables)
    self.num_parameters = sum(v.shape.num_elements() for v in variables)
    self.unroll_bytes = sum(
      spec.shape.num_elements() * spec.dtype.size
      for spec in tf.nest.flatten(specs)
      if spec.dtype != tf.string
    )
    self.num_unrolls = 0
    with experiment._new_graph(self._tasks.learner_device()):
      devices = [
        self._tasks.learner_device(k)
        for k in range(len(FLAGS.learner_addresses))
      ]
      queues = [experiment._build_learner_queue(specs, d) for d in devices]
      self._agent = experiment._new_agent(game)
      self._make_variables(specs)
      self._exchange = self._build_update([(d, []) for d in devices])
      batches = []
      for queue, device in zip(queues, devices, strict=True):
        with tf.device(device), tf.device('/cpu:0'):
          batches.append(queue.dequeue_many(FLAGS.batch_size // len(devices)))
      self._update = self._build_update(
        [(d, tf.nest.flatten(b)) for d, b in zip(devices, batches, strict=True)]
      )
      self.registry = chief.ActorRegistry(
        cluster.SharedState(devices[0]),
        experiment._task_requirements(game),
        FLAGS.num_actors,
        devices,
      )
      self._start()

  def _make_variables(self, specs):
    """Calls the agent, which makes its variables; the call is never run."""
    outputs = tf.nest.map_structure(
      lambda spec: tf.zeros([spec.shape[0], 1, *spec.shape[1:]], spec.dtype),
      (
        specs.actor_output.agent_outputs.action,
        specs.actor_output.env_outputs,
      ),
    )
    self._agent.unroll(*outputs, self._agent.initial_state(1))

  def _build_update(self, parts):
    """Returns the op of an update.

    Args:
      parts: list of each learner's device, and the tensors it waits for.
    """
    towers = []
    for device, tensors in parts:
      with tf.device(device), tf.control_dependencies(tensors):
        towers.append(
          Tower(
            *4 * [tf.constant(0.0)],
            gradients=[
              1e-9 * v.read_value() for v in self._agent.trainable_variables
            ],
            env_outputs=None,
            targets=None,
          )
        )
    return learner_of_flags().build_update(self._agent, towers).global_step.op

  def _start(self):
    config = experiment._session_config(1)
    self._tasks.start_server(config)
    chief.wait_for_learners(self._tasks, [])
    target, config = self._tasks.session(config)
    self._session = tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(master=target, config=config),
      hooks=[self.registry],
    )

  def exchange(self):
    """Measures updates without unrolls.

    Returns:
      The median of their seconds, and the bytes moved by one.
    """
    run = self.registry.session.run
    run(self._exchange)  # TensorFlow optimises its graph.
    seconds, moved = [], _moved_bytes()
    for _ in range(_NUM_EXCHANGES):
      begin = time.perf_counter()
      run(self._exchange)
      seconds.append(time.perf_counter() - begin)
    moved = (_moved_bytes() - moved) / _NUM_EXCHANGES
    return statistics.median(seconds), moved

  def run(self):
    """Takes batches until the other learners end."""
    with contextlib.suppress(*cluster.LEARNER_GONE):
      while True:
        self.registry.session.run(self._update)
        self.num_unrolls += FLAGS.batch_size

  def wait_for_update(self):
    unrolls = self.num_unrolls
    while self.num_unrolls == unrolls:
      time.sleep(0.001)


def _usage(pids):
  """Returns the `Usage` of processes together."""
  total = np.zeros(3)
  for pid in pids:
    with open(f'/proc/{pid}/stat') as stat:
      # After the name, which may have spaces.
      fields = stat.read().rpartition(')')[2].split()
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    total += (
      ticks / os.sysconf('SC_CLK_TCK'),
      pages * os.sysconf('SC_PAGE_SIZE') / 1e6,
      int(fields[17]),
    )
  return Usage(*total)


def _moved_bytes():
  """Returns the bytes that were received by the loopback device."""
  with open('/proc/net/dev') as file:
    line = next(line for line in file if line.strip().startswith('lo:'))
  return int(line.split(':')[1].split()[0])


# --- The measurement --------------------------------------------------------


@contextlib.contextmanager
def _programs(commands):
  """Runs programs, given as lists of arguments of Python; yields their pids."""
  programs = [
    subprocess.Popen(
      [sys.executable, *command], cwd=_ROOT, stdout=subprocess.DEVNULL
    )
    for command in commands
  ]
  try:
    yield [program.pid for program in programs]
  finally:
    for program in programs:
      program.kill()
    for program in programs:
      program.wait()


def _measure(chief, learners, count):
  """Returns the row of the table for a number of actor tasks.

  Args:
    chief: `_Chief`, whose `run` is under way.
    learners: list of the pids of all learners.
    count: int, number of actor tasks.
  """
  before = _usage(learners)
  shares = np.array_split(np.arange(count), min(count, FLAGS.processes))
  commands = [
    [
      *('-m', 'benchmarks.network', *_game_flags(), '--job_name=actor'),
      *(f'--task={share[0]}', f'--clients={len(share)}'),
    ]
    for share in shares
  ]
  with _programs(commands):
    connected = 0
    while connected < count:
      time.sleep(1)
      chief.registry.membership_changes()
      connected = chief.registry.membership()[0]['actors_connected']
    time.sleep(FLAGS.seconds / 3)  # They all send by now.
    chief.wait_for_update()
    begin, usage = time.monotonic(), _usage(learners)
    unrolls, moved = chief.num_unrolls, _moved_bytes()
    time.sleep(FLAGS.seconds)
    chief.wait_for_update()  # Unrolls of half a batch would not be counted.
    unrolls = chief.num_unrolls - unrolls
    seconds, after = time.monotonic() - begin, _usage(learners)
    moved = _moved_bytes() - moved
  # The chief forgets them after a while without heartbeats.
  while connected:
    time.sleep(1)
    chief.registry.membership_changes()
    connected = chief.registry.membership()[0]['actors_connected']
  return [
    count,
    f'{unrolls / seconds:.0f}',
    f'{1000 * (after.seconds - usage.seconds) / unrolls:.1f}',
    f'{moved / unrolls / 1e6:.2f}',
    f'{(after.memory - before.memory) / count:.1f}',
    f'{after.threads:.0f}',
  ]


def _choose_flags():
  """Sets the flags that make all tasks those of the benchmark."""
  if not FLAGS['level_name'].present:
    FLAGS['level_name'].parse(benchmarks.common.FRAMES)
    FLAGS['level_name'].present = 1
  if not FLAGS['normalize_frames'].present:  # That isn't communication.
    FLAGS['normalize_frames'].parse(False)
    FLAGS['normalize_frames'].present = 1
  if FLAGS.learner_addresses is None:
    with contextlib.ExitStack() as stack:
      sockets = [
        stack.enter_context(socket.create_server(('localhost', 0)))
        for _ in range(FLAGS.num_learners)
      ]
      FLAGS['learner_addresses'].parse(
        ','.join(f'localhost:{s.getsockname()[1]}' for s in sockets)
      )
    FLAGS['learner_addresses'].present = 1
  if FLAGS.task == -1:
    FLAGS.task = 0
  check_flags()


def main(_):
  tf.logging.set_verbosity(tf.logging.ERROR)
  _choose_flags()
  if FLAGS.clients:
    _be_actors()
    return
  commands = [
    ['experiment.py', *_game_flags(), '--job_name=learner', f'--task={k}']
    for k in range(1, FLAGS.num_learners)
  ]
  with _programs(commands) as pids:
    chief = _Chief(experiment._choose_game())
    seconds, moved = chief.exchange()
    print(
      f'{FLAGS.num_learners} learners. An unroll has '
      f'{chief.unroll_bytes / 1e6:.2f} MB, the parameters '
      f'{4 * chief.num_parameters / 1e6:.2f} MB. An update without unrolls '
      f'takes {1000 * seconds:.1f} ms and moves {moved / 1e6:.2f} MB.\n',
      flush=True,
    )
    threading.Thread(target=chief.run, daemon=True).start()
    headers = (
      'actors',
      'unrolls/s',
      'learners ms per unroll',
      'MB moved per unroll',
      'learners MB per actor',
      'threads',
    )
    rows = [
      _measure(chief, [os.getpid(), *pids], int(count))
      for count in FLAGS.actors
      if int(count) >= FLAGS.num_learners
    ]
    benchmarks.common.print_table(headers, rows)
  os._exit(0)  # The session still waits for unrolls.


if __name__ == '__main__':
  app.run(main)
