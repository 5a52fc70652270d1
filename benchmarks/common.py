# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the benchmarks share: trainings to measure, rates, tables."""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import gymnasium
import numpy as np
import tabulate

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NUM_PARTS = 5

FRAMES = 'gym:benchmarks.common:Frames-v0'


class Frames(gymnasium.Env):
  """Always shows the same picture, of the size of DeepMind Lab's."""

  observation_space = gymnasium.spaces.Box(0, 255, (72, 96, 3), np.uint8)
  action_space = gymnasium.spaces.Discrete(9)

  def __init__(self):
    rng = np.random.default_rng(1)
    self._frame = rng.integers(0, 256, (72, 96, 3), np.uint8)
    self._num_steps = 0

  def reset(self, *, seed=None, options=None):
    return self._frame, {}

  def step(self, action):
    self._num_steps += 1
    return self._frame, 0.0, self._num_steps % 1000 == 0, False, {}


gymnasium.register('Frames-v0', Frames)


def train(flags, seconds):
  """Runs a training of `experiment.py` in a process of its own.

  Args:
    flags: list of its flags.
    seconds: how long to measure, after a warm-up of two updates.

  Returns:
    Dict: `rates`, environment frames/s of parts of the time; `first_update`, in
    seconds from the start; `memory`, peak of the main process in MB; and
    `environment_seconds`, processor time of the environments per frame.
  """
  with tempfile.TemporaryDirectory() as logdir:
    run = subprocess.run(
      [
        *(sys.executable, '-m', 'benchmarks.common'),
        *(str(seconds), str(time.time())),
        *flags,
        f'--logdir={logdir}',
      ],
      cwd=_FOLDER,
      env={**os.environ, 'PYTHONPATH': _FOLDER},
      capture_output=True,
      text=True,
    )
  if run.returncode:
    raise RuntimeError(f'A training failed: {run.stdout}{run.stderr}')
  return json.loads(run.stdout.splitlines()[-1])


def _train(seconds, started, flags):
  """Runs a training and prints what `train` returns."""
  import experiment
  import py_process

  times = []
  add = experiment.Metrics.add

  def add_and_note(self, update):
    add(self, update)
    times.append(time.time())
    if len(times) == 2:  # TensorFlow optimises the graph in the first.
      timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
      timer.daemon = True
      timer.start()

  experiment.Metrics.add = add_and_note
  experiment.FLAGS(['experiment.py', *flags])
  experiment.main(None)
  py_process._close_everything()  # Only children that ended are in rusage.
  frames = experiment.learner_of_flags().frames_per_update
  parts = np.array_split(np.diff(times[1:]), _NUM_PARTS)
  children = resource.getrusage(resource.RUSAGE_CHILDREN)
  print(
    json.dumps(
      {
        'rates': [frames / part.mean() for part in parts if part.size],
        'first_update': times[0] - started,
        'memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        'environment_seconds': (children.ru_utime + children.ru_stime)
        / (frames * len(times)),
      }
    )
  )


def flags_of(level_name, num_actors, batch_size, unroll_length):
  return [
    f'--level_name={level_name}',
    f'--num_actors={num_actors}',
    f'--batch_size={batch_size}',
    f'--unroll_length={unroll_length}',
  ]


def matrix_rate():
  """Returns the FLOP/s of float32 products of matrices of 2048x2048."""
  import tensorflow.compat.v1 as tf

  size = 2048
  with tf.Graph().as_default(), tf.Session() as session:
    a, b = (tf.Variable(tf.random.normal([size, size])) for _ in range(2))
    session.run(tf.global_variables_initializer())
    multiply = session.make_callable(tf.matmul(a, b).op)
    seconds = []
    for _ in range(12):
      begin = time.perf_counter()
      multiply()
      seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / statistics.median(seconds[2:])


def spread(values):
  """Returns the distance of the quartiles divided by the median."""
  if len(values) < 2:
    return float('nan')
  low, median, high = statistics.quantiles(values, n=4)
  return (high - low) / median


def print_table(headers, rows):
  print(tabulate.tabulate(rows, headers, 'github'), flush=True)


if __name__ == '__main__':
  _train(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
