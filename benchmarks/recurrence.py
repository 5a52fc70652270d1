# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How long does the LSTM's recurrence take, beside TensorFlow's operations?

  python -m benchmarks.recurrence

Times are of the processor, of all threads together, and medians. Contenders
take turns. The recurrent weights' gradient is part of "with gradients".
"""

import argparse
import resource
import statistics

import numpy as np

from benchmarks import common

_UNITS = 256
# Steps, rows and how many runs are a turn. No steps: an inference.
_SIZES = [
  *((None, 1, 200), (None, 4, 200), (None, 16, 200)),
  *((20, 8, 20), (100, 32, 3)),
]
_CONTENDERS = {'TensorFlow': True, 'ours': False}


def _build(num_steps, batch_size):
  """Returns two lists of operations per contender: forward; with gradients."""
  import recurrence
  from experiment import tf

  leading = [batch_size] if num_steps is None else [num_steps, batch_size]

  def variable(*shape):
    return tf.Variable(tf.random.normal(shape, seed=1), use_resource=True)

  inputs = [
    variable(*leading, 4 * _UNITS),
    variable(batch_size, _UNITS),
    variable(batch_size, _UNITS),
    variable(_UNITS, 4 * _UNITS),
  ]
  done = tf.constant(np.random.default_rng(1).random(leading) < 0.05)
  calls = []
  for by_tensorflow in _CONTENDERS.values():
    sums, *others = map(tf.identity, inputs)
    states = recurrence.lstm(sums, done, *others, by_tensorflow=by_tensorflow)
    forward = [state.op for state in states]
    gradients = tf.gradients(states, [sums, *others])
    calls += [forward, forward + [gradient.op for gradient in gradients]]
  return calls


def _processor_time():
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def _times(num_steps, batch_size, num_runs, rounds):
  """Returns two times per contender, in ms: forward; with gradients."""
  from experiment import tf

  config = tf.ConfigProto()
  config.experimental.disable_thread_spinning = True  # As in a training.
  with tf.Graph().as_default(), tf.Session(config=config) as session:
    fetches = _build(num_steps, batch_size)
    session.run(tf.global_variables_initializer())
    # Operations, not tensors: results aren't copied to Python.
    calls = [session.make_callable(fetch) for fetch in fetches]
    times = [[] for _ in calls]
    for _ in range(rounds + 1):
      for call, of_call in zip(calls, times, strict=True):
        begin = _processor_time()
        for _ in range(num_runs):
          call()
        of_call.append(1000 * (_processor_time() - begin) / num_runs)
  return [statistics.median(of_call[1:]) for of_call in times]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=9, help='turns of each')
  args = parser.parse_args()
  rows = [
    [
      num_steps or 'inference',
      batch_size,
      *(
        f'{time:.3f}'
        for time in _times(num_steps, batch_size, num_runs, args.rounds)
      ),
    ]
    for num_steps, batch_size, num_runs in _SIZES
  ]
  headers = ['steps', 'rows']
  for name in _CONTENDERS:
    headers += [f'{name} ms', 'with gradients ms']
  common.print_table(headers, rows)


if __name__ == '__main__':
  main()
