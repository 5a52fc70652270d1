# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of learner and actor tasks: real processes, killed and cut off."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
from absl import flags
from absl.testing import flagsaver

import cluster
import experiment
import socket_filter
from chief import ActorRegistry
from errors import UserError
from experiment import tf
from helpers import (
  ROOT,
  TESTS,
  TOY,
  Program,
  alive,
  checkpoint_step,
  descendants,
  wait_until,
)
from levels import Game

FLAGS = flags.FLAGS
if not FLAGS.is_parsed():
  FLAGS(['distributed_test'])


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


class Tasks:
  """Tasks of one training; those that still run at the end are killed."""

  def __init__(self, logdir, host='localhost', num_learners=1):
    self.logdir = str(logdir)
    self.addresses = [f'{host}:{free_port()}' for _ in range(num_learners)]
    self._programs = []

  @property
  def address(self):
    return self.addresses[0]

  def __enter__(self):
    return self

  def __exit__(self, error, *_):
    for program in self._programs:
      program.kill()
    if error:
      for program in self._programs:
        print(*program.process.args[2:], program.read_all(), sep='\n')

  def start(self, *flags, **kwargs):
    addresses = ','.join(self.addresses)
    program = Program(
      *(*TOY, f'--learner_addresses={addresses}', *flags), **kwargs
    )
    self._programs.append(program)
    return program

  def learner(self, *flags, task=0, **kwargs):
    return self.start(
      '--job_name=learner',
      f'--task={task}',
      f'--logdir={self.logdir}',
      '--save_checkpoint_secs=1',
      *flags,
      **kwargs,
    )

  def actor(self, task, *flags, **kwargs):
    return self.start('--job_name=actor', f'--task={task}', *flags, **kwargs)

  def wait_for_training(self):
    """Waits until training has gone on."""
    step = checkpoint_step(self.logdir) or 0
    wait_until(lambda: (checkpoint_step(self.logdir) or 0) > step)


def test_steps_refused_by_mistake_are_repeated():
  errors = []

  def run(options, feed_dict, fetches, targets, metadata):
    if errors:
      raise errors.pop()
    return real(options, feed_dict, fetches, targets, metadata)

  def refusal(request):
    # As TensorFlow's, with what was fed.
    return tf.errors.AbortedError(
      None, None, f'{request} request was received twice. ' + '{' * 50_000
    )

  with tf.Graph().as_default(), tf.Session() as session:
    x = tf.placeholder(tf.float32, [])
    real, session._call_tf_sessionrun = session._call_tf_sessionrun, run
    cluster.repeat_refused(session)
    negative = session.make_callable(-tf.constant(2.0))
    errors += 2 * [refusal('The same RunGraph (Worker)')]
    assert session.run(2 * x, {x: 3}) == 6
    errors += 2 * [refusal('The same RunGraph (Worker)')]
    assert negative() == -2
    # Others are not, and are told without what was fed.
    errors += [refusal('The same RunStep (Master)')]
    with pytest.raises(tf.errors.AbortedError, match='received') as caught:
      session.run(2 * x, {x: 3})
    assert len(caught.value.message) < 5000


def test_what_actor_tasks_did_is_told():
  with tf.Graph().as_default():
    tasks = ActorRegistry(mock.Mock(), '', 1, ['/cpu:0'])
  tasks.session = mock.Mock()
  for unrolls in (1000, 1012):
    beat = cluster.Heartbeat(99.0, 1.0, unrolls, 5, 3, 0, 0, 0, 0.0)
    heartbeats = (100.0, [4], [beat], ([4], [b'host:1']))
    tasks.session.run.return_value = heartbeats
    tasks.membership_changes()
  values, lines = tasks.membership()
  # Of unrolls, those for another learner don't count.
  assert values['unrolls_per_actor_mean'] == 12
  assert values['actors_begun'] == 3
  assert lines[1:] == ['actors: 3 of 5 have begun']


def ipv6_host():
  """Returns this host by IPv6, or, where there is none, by its name."""
  try:
    with socket.socket(socket.AF_INET6) as listener:
      listener.bind(('::1', 0))
  except OSError:
    return 'localhost'
  return '[::1]'


def test_tasks_train_to_the_last_frame_and_end(tmp_path):
  with Tasks(tmp_path, ipv6_host()) as tasks:
    # Actors may come first.
    actors = [tasks.actor(0), tasks.actor(1, '--environments_per_actor=3')]
    impatient = tasks.actor(2)
    for task, actor in enumerate([*actors, impatient]):
      line = actor.wait_for(f'Actor {task} waits for the learner')
      assert tasks.address in line
    impatient.process.send_signal(signal.SIGINT)
    assert impatient.finish() == 0, impatient.output
    assert 'Traceback' not in impatient.output
    learner = tasks.learner('--total_environment_frames=3000')
    below = [pid for a in actors for pid in descendants(a.process.pid)]
    assert learner.finish() == 0, learner.output
    for actor in actors:
      assert actor.finish() == 0, actor.output
      assert 'joined the learner' in actor.output
      assert 'ends: the learner is done' in actor.output
  assert checkpoint_step(tmp_path) == 3000
  wait_until(lambda: not any(map(alive, below)))


def test_tasks_are_killed_stopped_and_come_back(tmp_path):
  with Tasks(tmp_path) as tasks:
    learner = tasks.learner()
    killed, stopped, other = (tasks.actor(task) for task in range(3))
    # It fits the learner neither in this nor in that.
    stranger = tasks.actor(3, '--unroll_length=7', '--torso=deep')
    for _ in range(3):
      learner.wait_for(r'Actor [012] \(localhost:[0-9]+\) joined')
    tasks.wait_for_training()
    assert stranger.finish() == 2
    assert 'The --torso of the learner' in stranger.output
    assert 'is shallow, that of actor 3 is deep' in stranger.output
    assert 'Traceback' not in stranger.output

    # One is killed, one stopped: the other plays on.
    below = descendants(killed.process.pid)
    killed.process.kill()
    stopped.process.send_signal(signal.SIGSTOP)
    for _ in range(2):
      learner.wait_for('Actor [01] .* is lost')
    assert not any(map(alive, below))
    tasks.wait_for_training()

    # They come, or come back.
    late = tasks.actor(0)
    stopped.process.send_signal(signal.SIGCONT)
    for _ in range(2):
      learner.wait_for('Actor [01] .* joined')

    # The learner is killed: the actors join the next, who goes on.
    learner.process.kill()
    step = checkpoint_step(tmp_path)
    learner = tasks.learner()
    for _ in range(3):
      learner.wait_for('Actor [012] .* joined')
    tasks.wait_for_training()
    assert checkpoint_step(tmp_path) > step

    # Signals end an actor alone, and a learner with its actors.
    late.process.send_signal(signal.SIGTERM)
    assert late.finish() == os.EX_TEMPFAIL, late.output
    learner.wait_for('Actor 0 .* left')
    learner.process.send_signal(signal.SIGINT)
    for program in (learner, stopped, other):
      assert program.finish() == 0, program.output
      assert 'Traceback' not in program.output


def test_moved_learner_goes_on_where_it_was(tmp_path):
  """SIGTERM: it saves, exits with a code of its own, and actors wait."""
  with Tasks(tmp_path) as tasks:
    learner, actor = tasks.learner('--save_checkpoint_secs=600'), tasks.actor(0)
    learner.wait_for('Actor 0 .* joined')
    learner.wait_for('of 1,000,000,000 frames')
    learner.process.send_signal(signal.SIGTERM)
    assert learner.finish() == os.EX_TEMPFAIL, learner.output
    assert 'Traceback' not in learner.output
    reached = int(
      re.search(r'Trained for ([0-9,]+)', learner.output)[1].replace(',', '')
    )
    assert checkpoint_step(tmp_path) == reached > 0
    actor.wait_for('Actor 0 waits for the learner')
    learner = tasks.learner(f'--total_environment_frames={reached + 100}')
    assert learner.finish() == 0, learner.output
    assert actor.finish() == 0, actor.output
  assert checkpoint_step(tmp_path) == reached + 100


def test_what_a_moved_learner_has_is_saved(tmp_path):
  """The chief saves while it still can, and goes on from there."""
  with Tasks(tmp_path, num_learners=2) as tasks:
    chief = tasks.learner('--save_checkpoint_secs=600')
    other = tasks.learner(task=1)
    actors = [tasks.actor(task) for task in range(2)]
    chief.wait_for('of 1,000,000,000 frames')
    other.process.send_signal(signal.SIGTERM)
    assert other.finish() == os.EX_TEMPFAIL, other.output
    chief.wait_for('A learner is gone .it is moved.')
    step = checkpoint_step(tmp_path)
    assert step > 0
    other = tasks.learner(task=1)
    for _ in actors:
      chief.wait_for('Actor [01] .* joined')
    # Now both at once, while actors play.
    chief.wait_for('of 1,000,000,000 frames')
    for learner in (other, chief):
      learner.process.send_signal(signal.SIGTERM)
    for learner in (other, chief):
      assert learner.finish() == os.EX_TEMPFAIL, learner.output
      assert 'Traceback' not in learner.output
    for actor in actors:
      actor.process.send_signal(signal.SIGINT)
      assert actor.finish() == 0, actor.output
  assert checkpoint_step(tmp_path) > step


def test_second_task_of_a_number_is_refused(tmp_path):
  with Tasks(tmp_path) as tasks:
    learner, first = tasks.learner(), tasks.actor(4)
    first_address = re.search(
      r'\((.*)\)', learner.wait_for('Actor 4 .* joined')
    )[1]
    second = tasks.actor(4)
    assert second.finish() == 2
    assert re.search(
      f'There is an actor 4 already, at {first_address}: give the one at '
      'localhost:[0-9]+ another --task',
      second.output,
    ), second.output
    assert 'Traceback' not in second.output
    tasks.wait_for_training()
    # One that follows a killed one is none.
    first.process.kill()
    third = tasks.actor(4)
    third.wait_for('Actor 4 joined')
    learner.process.send_signal(signal.SIGINT)
    assert learner.finish() == 0, learner.output
    assert third.finish() == 0, third.output


def test_learners_are_killed_and_come_back(tmp_path):
  """Of two, first the other and then the chief; training goes on by itself."""
  with Tasks(tmp_path, num_learners=2) as tasks:
    chief, other = tasks.learner(), tasks.learner(task=1)
    actors = [tasks.actor(task) for task in range(2)]
    for _ in actors:
      chief.wait_for('Actor [01] .* joined')
    tasks.wait_for_training()
    other.process.kill()
    chief.wait_for('A learner is gone')
    chief.wait_for(f'waits for the learner at {tasks.addresses[1]}')
    other = tasks.learner(task=1)
    tasks.wait_for_training()
    chief.process.kill()
    other.wait_for(f'Learner 1 waits for the learner at {tasks.address}')
    step = checkpoint_step(tmp_path)
    chief = tasks.learner(f'--total_environment_frames={step + 2000}')
    for program in (chief, other, *actors):
      assert program.finish() == 0, program.output
      assert 'Traceback' not in program.output
  assert checkpoint_step(tmp_path) == step + 2000


def test_slow_environment_does_not_stop_its_neighbour(tmp_path):
  slow = tmp_path / 'slow'
  with Tasks(tmp_path / 'log') as tasks:
    tasks.learner('--level_name=gym:toy_gym:Slow-v0')
    tasks.actor(
      0,
      '--level_name=gym:toy_gym:Slow-v0',
      '--environments_per_actor=2',
      env={'SLOW': str(slow)},
    )
    wait_until((tmp_path / 'slow.begun').exists)
    begin = time.monotonic()
    for _ in range(3):
      tasks.wait_for_training()
    # Else it says nothing of what happens while one is slow.
    assert time.monotonic() - begin < 20


# A chief that learns nothing: its parameters are set, first at random and then
# to others, and the policies of what is played are computed again from them.
_CHIEF = """
import sys
import numpy as np
import chief, cluster, experiment, unrolls
from experiment import FLAGS, tf

FLAGS(sys.argv)
experiment.check_flags()
game, tasks = experiment._choose_game(), experiment._cluster()
variables, unroll = experiment._actor_specs(game)
tasks.place_variables(variables)
assert {tasks._places[v.op.name] for v in variables} == {0, 1}
with experiment._new_graph(tasks.learner_device()):
  devices = [tasks.learner_device(k) for k in range(2)]
  queues = [experiment._build_learner_queue(unroll, d) for d in devices]
  agent = experiment._new_agent(game)
  played = queues[1].dequeue()
  outputs = played.actor_output
  inputs = tf.nest.map_structure(
    lambda t: t[:, tf.newaxis],
    (outputs.agent_outputs.action, outputs.env_outputs))
  state = tf.nest.map_structure(lambda t: t[tf.newaxis], outputs.agent_state)
  again, _ = agent.unroll(*inputs, state)
  version = tf.placeholder(tf.int64, [])
  change = [
    tf.train.get_global_step().assign(version),
    *(v.assign(0.1 * tf.random.normal(v.shape))
      for v in agent.trainable_variables)]
  registry = chief.ActorRegistry(
    cluster.SharedState(devices[0]), experiment._task_requirements(game), 1,
    devices)
  config = experiment._session_config(1)
  tasks.start_server(config)
  assert chief.wait_for_learners(tasks, [])
  target, config = tasks.session(config)
  with tf.train.MonitoredSession(
      tf.train.ChiefSessionCreator(master=target, config=config),
      hooks=[registry]):
    session = registry.session
    for number in (0, 7):
      if number:
        session.run(change, {version: number})
      count = 0
      while count < 5:
        new, theirs, ours = session.run(
          [played.global_step, outputs.agent_outputs.policy_logits,
           again.policy_logits])
        if new == number:
          # What they have at the next entry was computed from this one.
          np.testing.assert_allclose(
            ours[:-1, 0], theirs[1:], rtol=1e-3, atol=1e-4)
          count += 1
      assert np.ptp(theirs) > 0
    registry.close()
  registry.end_learners(tasks, target, config)
print('as computed again')
"""


def test_actors_act_with_the_learners_parameters(tmp_path):
  """Those of the version that the unroll names, from both learners."""
  with Tasks(tmp_path, num_learners=2) as tasks:
    other, actor = tasks.learner(task=1), tasks.actor(1)
    chief = subprocess.run(
      [
        *(sys.executable, '-c', _CHIEF, *TOY),
        *('--job_name=learner', '--task=0', f'--logdir={tmp_path}'),
        f'--learner_addresses={",".join(tasks.addresses)}',
      ],
      env={**os.environ, 'PYTHONPATH': f'{ROOT}:{TESTS}'},
      capture_output=True,
      text=True,
      timeout=180,
    )
    assert 'as computed again' in chief.stdout, chief.stderr
    assert actor.finish() == 0, actor.output
    assert other.finish() == 0, other.output


class Proxy:
  """Passes TCP connections on to a port, and counts what comes back."""

  def __init__(self, port):
    self._port = port
    self._listener = socket.create_server(('localhost', 0))
    self.address = f'localhost:{self._listener.getsockname()[1]}'
    self.bytes_back = 0

  def __enter__(self):
    threading.Thread(target=self._accept, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._listener.shutdown(socket.SHUT_RDWR)
    self._listener.close()

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        near, _ = self._listener.accept()
        threading.Thread(target=self._pass, args=(near,), daemon=True).start()

  def _pass(self, near):
    with near, contextlib.suppress(OSError):
      with socket.create_connection(('localhost', self._port)) as far:
        while True:
          for end in select.select([near, far], [], [])[0]:
            data = end.recv(1 << 20)
            if not data:
              return
            (near if end is far else far).sendall(data)
            self.bytes_back += len(data) if end is far else 0


def test_parameters_are_read_once_per_unroll(tmp_path):
  num_unrolls = 80
  with Tasks(tmp_path) as tasks:
    learner = tasks.learner(f'--total_environment_frames={5 * num_unrolls}')
    with Proxy(int(tasks.address.rpartition(':')[2])) as proxy:
      actor = tasks.actor(0, f'--learner_addresses={proxy.address}')
      assert learner.finish() == 0, learner.output
      assert actor.finish() == 0, actor.output
    checkpoint = tf.train.latest_checkpoint(str(tmp_path))
    size = sum(
      4 * tf.TensorShape(shape).num_elements()
      for name, shape in tf.train.list_variables(checkpoint)
      if name.startswith('agent/') and 'RMSProp' not in name
    )
  fetches = proxy.bytes_back / size
  # One before the first unroll; and those of unrolls that were on their way at
  # the end.
  assert num_unrolls <= fetches < num_unrolls + 8


@pytest.fixture
def hosts():
  """Two network namespaces, joined by a cable: (run, cut, restore)."""
  names = [f'impala{i}-{os.getpid()}' for i in range(2)]
  cable = [f'im{i}-{os.getpid()}' for i in range(2)]

  def ip(command):
    subprocess.run(['ip', *command.split()], check=True, capture_output=True)

  try:
    ip(f'link add {cable[0]} type veth peer name {cable[1]}')
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('Network namespaces need root and iproute2.')
  try:
    for i, (name, end) in enumerate(zip(names, cable, strict=True)):
      ip(f'netns add {name}')
      ip(f'link set {end} netns {name}')
      ip(f'-n {name} address add 10.97.0.{i + 1}/24 dev {end}')
      ip(f'-n {name} link set {end} up')
      ip(f'-n {name} link set lo up')
    yield names, lambda state: ip(f'-n {names[0]} link set {cable[0]} {state}')
  finally:
    for name in names:
      subprocess.run(['ip', 'netns', 'delete', name], capture_output=True)


def test_cable_between_two_hosts_is_cut_and_mended(tmp_path, hosts):
  (here, there), set_cable = hosts
  with Tasks(tmp_path) as tasks:
    tasks.addresses = ['10.97.0.1:8000']
    learner = tasks.learner(prefix=['ip', 'netns', 'exec', here])
    near = tasks.actor(0, prefix=['ip', 'netns', 'exec', here])
    far = tasks.actor(1, prefix=['ip', 'netns', 'exec', there])
    for _ in range(2):
      learner.wait_for('Actor [01] .* joined')
    tasks.wait_for_training()
    set_cable('down')
    learner.wait_for('Actor 1 .* is lost')
    tasks.wait_for_training()
    set_cable('up')
    learner.wait_for('Actor 1 .* joined')
    tasks.wait_for_training()
    learner.process.send_signal(signal.SIGINT)
    for program in (learner, near, far):
      assert program.finish() == 0, program.output
      assert 'Traceback' not in program.output


def test_learner_on_localhost_is_for_this_host_alone():
  with socket.socket(socket.AF_INET6) as listener:
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(('::', 0))
    listener.listen()
    port = listener.getsockname()[1]
    # Connecting sends nothing, but tells the address of this host.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
      try:
        probe.connect(('192.0.2.1', 9))
      except OSError:
        pytest.skip('This host has no address but 127.0.0.1.')
      outside = probe.getsockname()[0]
    socket.create_connection((outside, port)).close()
    socket_filter.shut_out_other_hosts(port)
    socket.create_connection(('127.0.0.1', port)).close()
    with pytest.raises(TimeoutError):
      socket.create_connection((outside, port), timeout=0.5)


# --- Flags, seeds and levels ------------------------------------------------


def check_flags(monkeypatch, config, *arguments):
  """Returns job, task and addresses after `_check_flags`."""
  if config is not None:
    monkeypatch.setenv('TF_CONFIG', json.dumps(config))
  with flagsaver.flagsaver():
    FLAGS.unparse_flags()
    FLAGS(['experiment', *arguments])
    experiment.check_flags()
    return (
      FLAGS.job_name,
      FLAGS.task,
      ','.join(FLAGS.learner_addresses),
      FLAGS.actor_address,
    )


CLUSTER = {'learner': ['a:1'], 'actor': ['b:2', 'c:3']}


@pytest.mark.parametrize(
  ('config', 'arguments', 'expected'),
  [
    (None, '', ('learner', -1, 'localhost:8000', None)),
    (
      None,
      '--job_name=actor --task=2',
      ('actor', 2, 'localhost:8000', None),
    ),
    (('actor', 1), '', ('actor', 1, 'a:1', 'c:3')),
    (('learner', 0), '', ('learner', 0, 'a:1', None)),
    # One that came later than the configuration.
    (('actor', 7), '', ('actor', 7, 'a:1', None)),
    (('actor', 1), '--task=1', ('actor', 1, 'a:1', 'c:3')),
  ],
)
def test_flags_and_tf_config(monkeypatch, config, arguments, expected):
  if config is not None:
    task = dict(zip(('type', 'index'), config, strict=True))
    config = {'cluster': CLUSTER, 'task': task}
  assert check_flags(monkeypatch, config, *arguments.split()) == expected


@pytest.mark.parametrize(
  ('config', 'arguments', 'message'),
  [
    ({'task': {'type': 'actor', 'index': 1}}, '', 'TF_CONFIG is not as in'),
    (['a'], '', 'TF_CONFIG is not as in'),
    (
      {'cluster': CLUSTER, 'task': {'type': 'ps', 'index': 0}},
      '',
      'must be learner or actor',
    ),
    (
      {'cluster': CLUSTER, 'task': {'type': 'actor', 'index': 1}},
      '--task=2',
      '--task is 2, but TF_CONFIG has 1',
    ),
    (
      {'cluster': CLUSTER, 'task': {'type': 'actor', 'index': 1}},
      '--actor_address=d:4',
      '--actor_address is d:4, but TF_CONFIG has c:3',
    ),
  ],
)
def test_tf_config_that_can_not_be_followed(
  monkeypatch, config, arguments, message
):
  with pytest.raises(UserError, match=re.escape(message)):
    check_flags(monkeypatch, config, *arguments.split())


def test_each_actor_task_draws_actions_of_its_own():
  seeds = []
  for job, task in (('learner', -1), ('actor', 0), ('actor', 1)):
    with flagsaver.flagsaver(job_name=job, task=task):
      with experiment._new_graph():
        seeds.append(tf.get_default_graph().seed)
  assert len(set(seeds)) == 3


def test_levels_and_seeds_go_round_over_all_environments():
  """Tasks of 2 environments play what one machine with 6 does."""

  class Family:
    create = staticmethod(lambda level, seed, settings, spec: (level, seed))

  game = Game(Family, None, ['a', 'b', 'c', 'd'], None, None, {})
  seed_of = experiment._environment_seed
  alone = experiment._create_processes(game, 6, seed_of)
  assert [level for level, _ in alone] == ['a', 'b', 'c', 'd', 'a', 'b']
  tasks = []
  for task in range(3):
    with flagsaver.flagsaver(
      job_name='actor', task=task, environments_per_actor=2
    ):
      tasks += experiment._create_processes(game, 2, seed_of)
  assert tasks == alone
