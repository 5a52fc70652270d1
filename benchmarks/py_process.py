# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many calls of environment processes are made per second?

  python -m benchmarks.py_process

Processes answer an int with a frame of 72x96x3 bytes, a reward, a bool and a
short string, called in turn by a `while_loop` per process. Rounds alternate
between three ways to call them:

  op:      the compiled operation.
  Python:  the same messages through `tf.numpy_function`, as where the operation
           isn't built.
  pipe:    pickled messages through a `multiprocessing.Pipe` per process, from
           `tf.numpy_function`: the classic design.

The table has medians over the rounds, the distance of the quartiles in percent
of the median, and the processor time of one call, in the program and in the
process. While other programs run, compare the processor times.
"""

import argparse
import contextlib
import multiprocessing
import statistics
import time
from unittest import mock

import numpy as np
import tensorflow.compat.v1 as tf

import experiment
import py_process

_NUM_PROCESSES = (1, 16, 48)


class Environment:
  """Does nothing, at the sizes of DeepMind Lab."""

  def __init__(self):
    self._frame = np.zeros([72, 96, 3], np.uint8)

  def step(self, action):
    return np.float32(action), False, (self._frame, 'find the red door')

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del method_name, kwargs, constructor_kwargs
    return (
      py_process.ArraySpec((), np.float32),
      py_process.ArraySpec((), np.bool_),
      (
        py_process.ArraySpec((72, 96, 3), np.uint8),
        py_process.ArraySpec((), object),
      ),
    )


class Pipes:
  """The classic design: forked processes that pickle through pipes."""

  def __init__(self, num_processes):
    context = multiprocessing.get_context('fork')
    self._connections = []
    self._processes = []
    for _ in range(num_processes):
      ours, theirs = context.Pipe()
      process = context.Process(target=self._work, args=(theirs,), daemon=True)
      process.start()
      self._connections.append(ours)
      self._processes.append(process)

  def pids(self, num_processes):
    return [process.pid for process in self._processes[:num_processes]]

  def call(self, index, action):
    connection = self._connections[index]
    connection.send(('step', [action]))
    reward, done, (frame, instruction) = connection.recv()
    return reward, done, frame, instruction.encode()

  @staticmethod
  def _work(connection):
    environment = Environment()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
      while True:
        method, arguments = connection.recv()
        connection.send(getattr(environment, method)(*arguments))


class _Setup:
  """A session with a loop of calls for each of some processes."""

  def __init__(self, num_processes, num_calls, pipes=None):
    self._num_calls = num_processes * num_calls
    with tf.Graph().as_default() as graph:
      self._processes = []
      if pipes is None:
        self._processes = [
          py_process.PyProcess(Environment) for _ in range(num_processes)
        ]
        steps = [process.proxy.step for process in self._processes]
      else:
        steps = [
          lambda action, i=i: _pipe_step(pipes, i, action)
          for i in range(num_processes)
        ]
      fetch = tf.group([_loop(step, num_calls) for step in steps])
      config = experiment._session_config(num_processes)
      # Otherwise all sessions share the threads of the first one.
      config.use_per_session_threads = True
      py_process.start_all(self._processes)
      session = tf.Session(graph=graph, config=config)
    self._run = session.make_callable(fetch)
    self._pids = (
      pipes.pids(num_processes)
      if pipes
      else [process.pid for process in self._processes]
    )
    self.round()  # Warms up.

  def round(self):
    """Returns calls/s, and a call's processor us in program and process."""
    start = time.perf_counter(), time.process_time(), self._process_seconds()
    self._run()
    end = time.perf_counter(), time.process_time(), self._process_seconds()
    elapsed, *cpu = (e - s for s, e in zip(start, end, strict=True))
    return self._num_calls / elapsed, *(c / self._num_calls * 1e6 for c in cpu)

  def close(self):
    py_process.close_all(self._processes)

  def _process_seconds(self):
    total = 0
    for pid in self._pids:
      with open(f'/proc/{pid}/schedstat') as file:
        total += int(file.read().split()[0]) / 1e9
    return total


def _pipe_step(pipes, index, action):
  reward, done, frame, instruction = tf.numpy_function(
    lambda action: pipes.call(index, action),
    [action],
    [tf.float32, tf.bool, tf.uint8, tf.string],
  )
  reward = tf.ensure_shape(reward, [])
  return reward, done, (tf.ensure_shape(frame, [72, 96, 3]), instruction)


def _loop(step, num_calls):
  def body(i, action):
    reward, done, (frame, _) = step(action)
    with tf.control_dependencies([done, frame]):
      return i + 1, tf.cast(reward, tf.int32)  # The next call waits for it.

  return tf.while_loop(lambda i, _: i < num_calls, body, [0, 0])[1]


def _in_python():
  """Runs processes, while entered, as without the compiled operation."""
  return mock.patch.object(py_process, '_library', return_value=None)


def _measure(pipes, num_processes, num_calls, num_rounds):
  """Returns the measurements of all rounds for each way."""
  op = _Setup(num_processes, num_calls)
  with _in_python():
    python = _Setup(num_processes, num_calls)
    pipe = _Setup(num_processes, num_calls, pipes)
  setups = [op, python, pipe]
  rounds = [[setup.round() for setup in setups] for _ in range(num_rounds)]
  op.close()
  with _in_python():
    python.close()
  return zip(*rounds, strict=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--calls', type=int, default=6000, help='per round')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  tf.logging.set_verbosity(tf.logging.ERROR)
  experiment.FLAGS(['benchmark'])  # Sessions are those of a training.
  pipes = Pipes(max(_NUM_PROCESSES))  # Forks, so before TensorFlow's threads.
  print('processes  way     calls/s  spread  x pipe  program us  process us')
  for num_processes in _NUM_PROCESSES:
    num_calls = max(200, args.calls // num_processes)
    measured = [
      list(zip(*rounds, strict=True))
      for rounds in _measure(pipes, num_processes, num_calls, args.rounds)
    ]
    pipe_rate = statistics.median(measured[-1][0])
    for way, (rates, *cpu) in zip(
      ('op', 'Python', 'pipe'), measured, strict=True
    ):
      rate = statistics.median(rates)
      low, _, high = statistics.quantiles(rates, n=4)
      program, process = map(statistics.median, cpu)
      print(
        f'{num_processes:9}  {way:6} {rate:8.0f} {(high - low) / rate:6.0%} '
        f'{rate / pipe_rate:7.2f} {program:11.0f} {process:11.0f}',
        flush=True,
      )


if __name__ == '__main__':
  main()
