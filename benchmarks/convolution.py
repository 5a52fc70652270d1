# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What do the deep network's convolutions take, beside TensorFlow's own?

  python -m benchmarks.convolution

A row is one kind of layer for frames of 72x96: its output and, "back", the
gradients of its input, weights and biases, given that of the output. Layers
before a pool include it, the others a ReLU before and a residual after. GFLOP/s
are those of a plain convolution, so that an algorithm with fewer products may
exceed the machine's rate of matrix products. Contenders take turns; times are
medians.
"""

import argparse
import statistics
import time

from benchmarks import common

# Height, width, channels before and after, whether a pool follows, how many.
_LAYERS = [
  (72, 96, 3, 16, True, 1),
  (36, 48, 16, 16, False, 4),
  (36, 48, 16, 32, True, 1),
  (18, 24, 32, 32, False, 4),
  (18, 24, 32, 32, True, 1),
  (9, 12, 32, 32, False, 4),
]
_BATCHES = {'to learn': 160, 'to act': 8}


def _build(batch_size, layer, by_tensorflow):
  """Returns lists of operations: the layer, and it with its gradients."""
  import convolution
  from experiment import tf

  height, width, in_channels, out_channels, pool, _ = layer

  def variable(*shape):
    return tf.Variable(tf.random.normal(shape, seed=1), use_resource=True)

  frames = variable(batch_size, height, width, in_channels)
  weights = variable(3, 3, in_channels, out_channels)
  biases = variable(out_channels)
  inputs = [weights, biases]
  if pool:
    output = convolution.convolve_and_pool(
      frames, weights, biases, by_tensorflow
    )
  else:
    residual = variable(batch_size, height, width, out_channels)
    output = convolution.convolve(
      frames, weights, biases, True, residual, by_tensorflow
    )
  if in_channels >= 16:  # Frames of the environment need no gradient.
    inputs.append(frames)
  gradient = variable(*output.shape)
  gradients = tf.gradients(output, inputs, gradient)
  return [output.op], [output.op, *(gradient.op for gradient in gradients)]


def _times(batch_size, layer, rounds):
  """Returns seconds: TensorFlow forward, both, ours forward, both."""
  from experiment import tf

  with tf.Graph().as_default(), tf.Session() as session:
    forward, both = zip(
      *(_build(batch_size, layer, theirs) for theirs in (True, False)),
      strict=True,
    )
    session.run(tf.global_variables_initializer())
    # Results stay in TensorFlow.
    calls = [
      session.make_callable(fetch)
      for fetch in (forward[0], both[0], forward[1], both[1])
    ]
    seconds = [[] for _ in calls]
    for _ in range(rounds + 2):
      for call, times in zip(calls, seconds, strict=True):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
  return [statistics.median(times[2:]) for times in seconds]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=9, help='turns of each')
  args = parser.parse_args()
  print(f'Matrix products: {common.matrix_rate() / 1e9:.0f} GFLOP/s')
  rows = []
  for name, batch_size in _BATCHES.items():
    sums = [0] * 4
    for layer in _LAYERS:
      height, width, in_channels, out_channels, pool, count = layer
      tf_forward, tf_both, forward, both = _times(
        batch_size, layer, args.rounds
      )
      products = batch_size * height * width * 9 * in_channels * out_channels
      times = (tf_forward, tf_both - tf_forward, forward, both - forward)
      sums = [a + count * b for a, b in zip(sums, times, strict=True)]
      rows.append(
        [
          f'{count} x {height}x{width}, {in_channels} to {out_channels}'
          + pool * ', pool',
          f'{name}, {batch_size}',
          *(f'{1000 * seconds:.2f}' for seconds in times),
          f'{2 * products / forward / 1e9:.0f}',
        ]
      )
    rows.append(
      [
        'all',
        f'{name}, {batch_size}',
        *(f'{1000 * seconds:.1f}' for seconds in sums),
      ]
    )
  common.print_table(
    [
      *('layer', 'frames', 'TensorFlow ms', 'back ms'),
      *('ours ms', 'back ms', 'ours GFLOP/s'),
    ],
    rows,
  )


if __name__ == '__main__':
  main()
