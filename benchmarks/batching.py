# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How long does batching take, beside TensorFlow's own BatchFunction?

Callers run a `while_loop` of requests each, as actors do, each in a
`session.run` of its own. The batched computation is tiny (one value per row),
so that the time of batching is measured. Run it on an otherwise idle machine:

  python -m benchmarks.batching

Rounds alternate between the batchers. A row of the table has medians over the
rounds: the requests per second, and the time that a batcher adds to a request,
compared with as many callers that compute without a batcher.
"""

import argparse
import concurrent.futures
import statistics
import time

import tensorflow.compat.v1 as tf

import dynamic_batching
import experiment

_CALLERS = (1, 8, 48)
_SHAPES = {'small': (tf.float32, [1, 4]), 'frame': (tf.uint8, [1, 72, 96, 3])}


def _compute(x):
  """The computation: reads one value of each row."""
  first = tf.reshape(x, [tf.shape(x)[0], -1])[:, :1]
  return tf.ensure_shape(tf.cast(first, tf.float32), [None, 1])


def _dynamic(x):
  return dynamic_batching.batch_fn_with_options(
    maximum_batch_size=64, timeout_ms=0
  )(_compute)(x)


def _batch_function(x):
  # It would take the static shape of its arguments for that of a batch.
  x = tf.placeholder_with_default(x, [None, *x.shape[1:]])
  return tf.nondifferentiable_batch_function(
    num_batch_threads=1,
    max_batch_size=64,
    batch_timeout_micros=0,
    max_enqueued_batches=64,
  )(_compute)(x)


def _build(batched, dtype, shape, num_requests):
  """Builds a caller: its requests one after the other."""
  x = tf.cast(tf.fill(shape, 3), dtype)

  def request(last):  # Depends on the result of the one before.
    return x + tf.cast(last[0, 0] * 0, dtype)

  return tf.while_loop(
    lambda i, _: i < num_requests,
    lambda i, y: (i + 1, tf.ensure_shape(batched(request(y)), [1, 1])),
    [0, tf.zeros([1, 1])],
  )[1]


class _Setup:
  """A running session of callers with one kind of batching."""

  def __init__(self, batched, dtype, shape, num_callers, num_requests):
    self._num_callers = num_callers
    self._num_requests = num_requests
    with tf.Graph().as_default() as graph:
      # All callers run this same op, so there is one batcher.
      self._caller = _build(batched, dtype, shape, num_requests)
      self._session = tf.Session(
        graph=graph, config=experiment._session_config(0)
      )
      self._coordinator = tf.train.Coordinator()
      if tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS):
        tf.train.start_queue_runners(self._session, self._coordinator)
    self.round()  # Warms up.

  def round(self):
    """Returns the seconds that all callers together take."""
    call = self._session.make_callable(self._caller)
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(self._num_callers) as pool:
      calls = [pool.submit(call) for _ in range(self._num_callers)]
    seconds = time.perf_counter() - start
    for call in calls:
      call.result()
    return seconds

  def close(self):
    self._coordinator.request_stop()
    self._coordinator.join()
    self._session.close()


def _measure(dtype, shape, num_callers, num_requests, num_rounds):
  """Returns the median seconds of a round of each kind of batching."""
  setups = [
    _Setup(batched, dtype, shape, num_callers, num_requests)
    for batched in (_compute, _dynamic, _batch_function)
  ]
  rounds = [[setup.round() for setup in setups] for _ in range(num_rounds)]
  for setup in setups:
    setup.close()
  return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def _row(name, num_callers, num_requests, seconds):
  """Formats a row of the table."""
  unbatched, ours, theirs = seconds
  total = num_callers * num_requests
  added = [(s - unbatched) / num_requests * 1e6 for s in (ours, theirs)]
  return (
    f'{name:6} {num_callers:7} {total / ours:9.0f} {total / theirs:9.0f} '
    f'{theirs / ours:6.2f} {added[0]:9.0f} {added[1]:9.0f} '
    f'{added[0] / added[1]:6.2f}'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--requests', type=int, default=500, help='per caller')
  parser.add_argument('--rounds', type=int, default=9)
  args = parser.parse_args()
  tf.logging.set_verbosity(tf.logging.ERROR)
  experiment.FLAGS(['benchmark'])  # Sessions are those of a training.
  print('              requests per second     added us per request')
  print('input  callers   dynamic  BatchFn.  ratio   dynamic  BatchFn.  ratio')
  for name, (dtype, shape) in _SHAPES.items():
    for num_callers in _CALLERS:
      seconds = _measure(dtype, shape, num_callers, args.requests, args.rounds)
      print(_row(name, num_callers, args.requests, seconds), flush=True)


if __name__ == '__main__':
  main()
