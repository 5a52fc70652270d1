# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How long do the deep network's sections take, beside TensorFlow's?

  python -m benchmarks.convolution

A row of the table is a section of the network for frames of 72x96: a
convolution, a pool and two residual blocks. It has the time for the output and,
"back", for the gradients of input, weights and biases, given the output's.
Contenders take turns; times are medians.
"""

import argparse
import statistics
import time

from benchmarks import common

# Height, width, channels before and after.
_SECTIONS = [(72, 96, 3, 16), (36, 48, 16, 32), (18, 24, 32, 32)]
_BATCHES = {'to learn': 160, 'to act': 8}
_CONTENDERS = {
  'TensorFlow': {'by_tensorflow': True},
  'float32': {},
  'bfloat16': {'precision': 'bfloat16'},
}


def _build(batch_size, section):
  """Returns two lists of operations per contender: forward; with gradients."""
  import convolution
  from experiment import tf

  height, width, in_channels, out_channels = section

  def variable(*shape):
    return tf.Variable(tf.random.normal(shape, seed=1), use_resource=True)

  weights = [
    variable(3, 3, channels, out_channels)
    for channels in (in_channels, *[out_channels] * 4)
  ]
  biases = [variable(out_channels) for _ in weights]
  inputs = [*weights, *biases]
  if in_channels < 16:  # Frames of the environment need no gradient.
    frames = tf.Variable(
      tf.fill(
        [batch_size, height, width, in_channels], tf.constant(9, tf.uint8)
      ),
      use_resource=True,
    )
  else:
    frames = variable(batch_size, height, width, in_channels)
    inputs.append(frames)
  calls = []
  for options in _CONTENDERS.values():
    output = convolution.section(
      tf.identity(frames), weights, biases, **options
    )
    gradients = tf.gradients(output, inputs, tf.ones_like(output))
    calls += [
      [output.op],
      [output.op, *(gradient.op for gradient in gradients)],
    ]
  return calls


def _times(batch_size, section, rounds):
  """Returns two times per contender, in seconds: forward; back."""
  from experiment import tf

  with tf.Graph().as_default(), tf.Session() as session:
    fetches = _build(batch_size, section)
    session.run(tf.global_variables_initializer())
    # Operations, not tensors: results aren't copied to Python.
    calls = [session.make_callable(fetch) for fetch in fetches]
    seconds = [[] for _ in calls]
    for _ in range(rounds + 2):
      for call, times in zip(calls, seconds, strict=True):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
  medians = [statistics.median(times[2:]) for times in seconds]
  return [
    time - before
    for forward, both in zip(medians[::2], medians[1::2], strict=True)
    for time, before in ((forward, 0), (both, forward))
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=9, help='turns of each')
  args = parser.parse_args()
  print(f'Matrix products: {common.matrix_rate() / 1e9:.0f} GFLOP/s')
  rows = []
  for name, batch_size in _BATCHES.items():
    sums = [0] * 2 * len(_CONTENDERS)
    for section in _SECTIONS:
      height, width, in_channels, out_channels = section
      times = _times(batch_size, section, args.rounds)
      sums = [a + b for a, b in zip(sums, times, strict=True)]
      rows.append(
        [
          f'{height}x{width}, {in_channels} to {out_channels}',
          f'{name}, {batch_size}',
          *(f'{1000 * seconds:.2f}' for seconds in times),
        ]
      )
    rows.append(
      [
        'all',
        f'{name}, {batch_size}',
        *(f'{1000 * seconds:.1f}' for seconds in sums),
      ]
    )
  headers = ['section', 'frames']
  for name in _CONTENDERS:
    headers += [f'{name} ms', 'back ms']
  common.print_table(headers, rows)


if __name__ == '__main__':
  main()
