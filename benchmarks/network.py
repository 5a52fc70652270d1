# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many actor tasks does one learner serve?

Measures a training's communication alone. The learner takes batches of unrolls,
drops them and publishes parameters; the actor tasks have no environments.
Unrolls, parameters and messages have the sizes of a real training with the
flags of experiment.py that are given. Run it on an otherwise idle machine:

  python benchmarks/network.py --actors=1,10,50,100 --torso=deep

Actor tasks are threads of a few processes here, with a session and a connection
each: as processes they would need 0.4 GB each. They share the cores with the
learner. So compare the learner's processor time per unroll and its memory, and
not unrolls/s.
"""

import os
import subprocess
import sys
import threading
import time

import numpy as np
from absl import app, flags

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import cluster
import environments
import experiment
import unrolls
from agent import Agent, AgentOutput
from experiment import tf

FLAGS = flags.FLAGS
flags.DEFINE_list('actors', ['1', '10', '50', '100'], 'Numbers of actor tasks.')
flags.DEFINE_integer('seconds', 15, 'Duration of each measurement.')
flags.DEFINE_integer('processes', 4, 'Processes that the actor tasks share.')
flags.DEFINE_integer('clients', 0, 'Internal: be so many actor tasks.')

_NUM_ACTIONS = 9
_REQUIREMENTS = '{}'


def _unroll():
  """Returns the `Unroll` of one real unroll's size, NumPy values."""
  length = FLAGS.unroll_length + 1
  frames = np.random.default_rng(1).integers(
    0, 256, (length, FLAGS.height, FLAGS.width, 3), np.uint8
  )
  float32 = np.float32
  return unrolls.Unroll(
    unrolls.ActorOutput(
      level_name=np.array(b'level', object),
      agent_state=(np.zeros(256, float32), np.zeros(256, float32)),
      env_outputs=environments.StepOutput(
        np.zeros(length, float32),
        environments.StepOutputInfo(
          np.zeros(length, float32), np.zeros(length, np.int32)
        ),
        np.zeros(length, bool),
        (frames, np.full(length, b'', object)),
        np.zeros(length, bool),
        np.zeros(length, bool),
      ),
      agent_outputs=AgentOutput(
        np.zeros(length, np.int32),
        np.zeros((length, _NUM_ACTIONS), float32),
        np.zeros(length, float32),
      ),
    ),
    np.array(0, np.int64),
  )


def _specs(unroll):
  return tf.nest.map_structure(
    lambda x: tf.TensorSpec(
      x.shape, tf.string if x.dtype == object else x.dtype
    ),
    unroll,
  )


def _be_actors():
  """Sends unrolls and fetches parameters until killed."""
  unroll = _unroll()

  def run():
    specs = _specs(unroll)
    client = cluster.LearnerClient(
      FLAGS.learner_address,
      FLAGS.task,
      FLAGS.actor_address,
      specs,
      lambda: unrolls.build_queue(specs),
      _REQUIREMENTS,
      [],
    )
    client.join()
    while True:
      client.send(unroll)
      client.read()

  threads = [threading.Thread(target=run) for _ in range(FLAGS.clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()


class _Learner:
  """A learner that takes batches and publishes, but doesn't learn."""

  def __init__(self):
    unroll = _unroll()
    with tf.Graph().as_default():
      tf.train.get_or_create_global_step()
      agent = Agent(_NUM_ACTIONS, FLAGS.torso)
      output = tf.nest.map_structure(
        lambda x: tf.constant(x[:, np.newaxis]),
        (unroll.actor_output.agent_outputs, unroll.actor_output.env_outputs),
      )
      agent.unroll(output[0].action, output[1], agent.initial_state(1))
      shared = cluster.SharedState(lambda: unrolls.build_queue(_specs(unroll)))
      batch = shared.queue.dequeue_many(FLAGS.batch_size)
      with tf.control_dependencies(tf.nest.flatten(batch)):
        self._update = shared.publish(agent)
      config = experiment._session_config(0)
      self._session = tf.Session(
        cluster.start_server(FLAGS.learner_address, config), config=config
      )
      self._session.run(tf.global_variables_initializer())
      self._session.run([shared.publish(agent), shared.open(_REQUIREMENTS)])
    self.num_parameters = sum(
      v.shape.num_elements() for v in agent.trainable_variables
    )
    self.num_unrolls = 0
    self.unroll_bytes = sum(
      x.nbytes for x in tf.nest.flatten(unroll) if x.dtype != object
    )

  def run(self):
    update = self._session.make_callable(self._update)
    while True:
      update()
      self.num_unrolls += FLAGS.batch_size


def _memory():
  """Returns the resident memory of this process in MB."""
  with open('/proc/self/statm') as statm:
    return int(statm.read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 1e6


def _sent_and_received():
  """Returns the bytes that were received by the loopback device."""
  with open('/proc/net/dev') as file:
    line = next(line for line in file if line.strip().startswith('lo:'))
  return int(line.split(':')[1].split()[0])


def _start_actors(count):
  shares = [count // FLAGS.processes] * FLAGS.processes
  for i in range(count % FLAGS.processes):
    shares[i] += 1
  return [
    subprocess.Popen(
      [sys.executable, *sys.argv, f'--clients={share}'],
      stdout=subprocess.DEVNULL,
    )
    for share in shares
    if share
  ]


def _measure(learner, count):
  before = _memory()
  programs = _start_actors(count)
  try:
    begin = learner.num_unrolls
    while learner.num_unrolls < begin + 4 * count + 2 * FLAGS.batch_size:
      time.sleep(0.1)
    begin, cpu, lo, now = (
      learner.num_unrolls,
      time.process_time(),
      _sent_and_received(),
      time.monotonic(),
    )
    time.sleep(FLAGS.seconds)
    received = learner.num_unrolls - begin
    print(
      f'| {count} | {received / (time.monotonic() - now):.0f} '
      f'| {1000 * (time.process_time() - cpu) / received:.1f} '
      f'| {(_sent_and_received() - lo) / received / 1e6:.2f} '
      f'| {(_memory() - before) / count:.1f} '
      f'| {len(os.listdir("/proc/self/task"))} |',
      flush=True,
    )
  finally:
    for program in programs:
      program.kill()
      program.wait()


def main(_):
  FLAGS.actor_address = 'network'
  if FLAGS.clients:
    _be_actors()
    return
  learner = _Learner()
  threading.Thread(target=learner.run, daemon=True).start()
  print(
    f'An unroll has {learner.unroll_bytes / 1e6:.2f} MB, the parameters '
    f'{4 * learner.num_parameters / 1e6:.2f} MB.\n\n'
    '| actors | unrolls/s | learner ms per unroll | MB moved per unroll '
    '| MB per actor | threads |\n| --- | --- | --- | --- | --- | --- |',
    flush=True,
  )
  for count in FLAGS.actors:
    _measure(learner, int(count))
  os._exit(0)  # The session still waits for unrolls.


if __name__ == '__main__':
  app.run(main)
