# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Times V-trace beside the same formulas with the recursion in `tf.scan`.

How much does the learner save by solving the recursion in log2(T) steps? Run
from the repository's root, on an otherwise idle machine:

  python -m benchmarks.vtrace

(As `python benchmarks/vtrace.py`, this file would be imported in place of the
module `vtrace`.)

There are two tables for each shape. "alone" is the time that passes in a
`session.run` that fetches the two results of one V-trace. For small shapes,
most of it is the fixed time of any `session.run`; "nothing" shows that time by
fetching as many numbers without computing them. "in a graph" is a tenth of the
time of a `session.run` that computes ten, each of which takes the targets of
the one before as its values: the time that V-trace adds to the learner's graph.
The contenders take turns in short blocks, so that a disturbance affects all.

Results are fetched on purpose. If they were not, TensorFlow's graph optimiser
would remove most of the computation.
"""

import argparse
import time

import numpy as np
import tensorflow.compat.v1 as tf

import vtrace

_SHAPES = ((20, 8), (100, 32), (1000, 32))  # (T, B)
_CHAIN_LENGTH = 10


def from_importance_weights_with_scan(
  log_rhos, discounts, rewards, values, bootstrap_value
):
  """V-trace with both thresholds 1, going back one time step at a time."""
  clipped_rhos = tf.minimum(1.0, tf.exp(log_rhos))
  following = tf.concat([values[1:], bootstrap_value[tf.newaxis]], axis=0)
  deltas = clipped_rhos * (rewards + discounts * following - values)

  def step(later, now):
    delta, decay = now
    return delta + decay * later

  vs = values + tf.scan(
    step,
    (deltas, discounts * clipped_rhos),
    initializer=tf.zeros_like(bootstrap_value),
    parallel_iterations=1,
    back_prop=False,
    reverse=True,
  )
  following = tf.concat([vs[1:], bootstrap_value[tf.newaxis]], axis=0)
  return vtrace.VTraceReturns(
    vs=tf.stop_gradient(vs),
    pg_advantages=tf.stop_gradient(
      clipped_rhos * (rewards + discounts * following - values)
    ),
  )


def _variables(length, batch_size):
  """Returns inputs as variables: no feeding or constant folding is timed."""
  rng = np.random.RandomState(length)
  shape = (length, batch_size)
  arrays = {
    'log_rhos': rng.normal(scale=0.5, size=shape),
    'discounts': np.where(rng.uniform(size=shape) < 0.02, 0.0, 0.99),
    'rewards': rng.normal(size=shape),
    'values': rng.normal(size=shape),
    'bootstrap_value': rng.normal(size=shape[1:]),
  }
  return {
    name: tf.Variable(array.astype(np.float32), trainable=False)
    for name, array in arrays.items()
  }


def _without_static_shape(variables):
  """Returns the same inputs, their T and B hidden from graph construction."""
  return {
    name: tf.placeholder_with_default(variable, [None] * variable.shape.rank)
    for name, variable in variables.items()
  }


def _time_in_turns(calls, rounds, calls_per_round):
  """Returns a dict from name to the wall times of single calls, in seconds."""
  times = {name: [] for name in calls}
  for round_index in range(rounds + 1):
    for name, call in calls.items():
      for _ in range(calls_per_round):
        start = time.perf_counter()
        call()
        # Round 0 warms up.
        if round_index:
          times[name].append(time.perf_counter() - start)
  return times


def _chain(function, inputs):
  """Returns the result of V-traces in a row, each waiting for the last one."""
  all_pg_advantages = []
  for _ in range(_CHAIN_LENGTH):
    returns = function(**inputs)
    # Other ratios each time. With the same ones, the graph optimiser would
    # compute some operations once for all ten.
    inputs = dict(inputs, values=returns.vs, log_rhos=0.9 * inputs['log_rhos'])
    all_pg_advantages.append(returns.pg_advantages)
  return vtrace.VTraceReturns(returns.vs, tf.add_n(all_pg_advantages))


def _assert_all_equal(session, contenders):
  expected, *others = (session.run(returns) for returns in contenders.values())
  for returns in others:
    for want, got in zip(expected, returns, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def _print_times(title, times, divisor):
  print(f'  {title:24}    median    10-90 percentile   tf.scan / this')
  baseline = np.median(times['tf.scan'])
  for name, seconds in times.items():
    low, median, high = np.percentile(seconds, [10, 50, 90]) / divisor * 1e6
    ratio = baseline / np.median(seconds)
    print(
      f'    {name:22} {median:7.0f} us {low:7.0f} ..{high:6.0f} us'
      f' {ratio:13.1f}'
    )


def _benchmark(length, batch_size, rounds, calls_per_round):
  print(f'T={length}, B={batch_size}')
  with tf.Graph().as_default(), tf.Session() as session:
    inputs = _variables(length, batch_size)
    unknown_inputs = _without_static_shape(inputs)
    contenders = {
      'tf.scan': (from_importance_weights_with_scan, inputs),
      'vtrace.py': (vtrace.from_importance_weights, inputs),
      'vtrace.py, unknown T, B': (
        vtrace.from_importance_weights,
        unknown_inputs,
      ),
    }
    alone = {name: f(**kwargs) for name, (f, kwargs) in contenders.items()}
    chains = {
      name: _chain(*contender) for name, contender in contenders.items()
    }
    nothing = vtrace.VTraceReturns(
      inputs['values'].read_value(), inputs['rewards'].read_value()
    )
    session.run(tf.global_variables_initializer())

    for title, results, divisor in [
      ('alone', alone, 1),
      ('in a graph', chains, _CHAIN_LENGTH),
    ]:
      _assert_all_equal(session, results)
      if divisor == 1:
        results = dict(results, nothing=nothing)
      calls = {name: session.make_callable(x) for name, x in results.items()}
      times = _time_in_turns(calls, rounds, calls_per_round)
      _print_times(title, times, divisor)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=20, help='turns of each.')
  parser.add_argument(
    '--calls_per_round', type=int, default=10, help='calls in one turn.'
  )
  args = parser.parse_args()
  for length, batch_size in _SHAPES:
    _benchmark(length, batch_size, args.rounds, args.calls_per_round)


if __name__ == '__main__':
  main()
