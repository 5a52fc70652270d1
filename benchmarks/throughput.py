# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How many environment frames per second does a whole training learn from?

Runs real trainings of the deep network, one after the other, in an environment
that takes nearly no time and in real ones. Run it on an otherwise idle machine:

  python -m benchmarks.throughput --plot=throughput.png

The bound is the rate of a machine that computes only the network's products: in
each agent step one forward pass to act, and a forward and a backward pass
(which counts as two) to learn. It is computed from the rate of large float32
matrix products, which is measured before and after each training. The share of
the bound is known as model FLOP utilisation. "without them" is the rate if the
environments took no processor time.

Rates are medians over parts of the measured time; "spread" is the distance of
the quartiles in percent of the median.
"""

import argparse
import os
import statistics

import matplotlib.pyplot as plt

from benchmarks import common

# Level, actors, batch size, unroll length, other flags.
_SETTINGS = {
  'frames': (common.FRAMES, 8, 8, 20),
  'frames, bfloat16': (common.FRAMES, 8, 8, 20, '--precision=bfloat16'),
  'frames, 32 actors': (common.FRAMES, 32, 32, 100),
  'ViZDoom': ('gym:VizdoomBasic-v1', 8, 8, 20),
  'Pong': ('gym:ALE/Pong-v5', 8, 8, 20, '--height=84', '--width=84'),
}
_NUM_ACTION_REPEATS = 4
_SHAPES = {'Pong': (84, 84, 4, 6), 'ViZDoom': (72, 96, 3, 4)}


def _products(frames, weights):
  """Returns the products of a layer: one per weight and place of its output."""
  places = frames.shape[:-1].num_elements() or 0
  return places * weights.shape.num_elements()


def step_flops(height, width, channels, num_actions):
  """Returns the FLOPs of an agent step: to act, and three times to learn."""
  import tensorflow.compat.v1 as tf

  import environments
  from agent import Agent

  with tf.Graph().as_default() as graph:
    agent = Agent(num_actions)
    env_output = environments.StepOutput(
      tf.zeros([1]),
      (),
      tf.zeros([1], tf.bool),
      (tf.zeros([1, height, width, channels], tf.uint8), tf.fill([1], '')),
    )
    agent((tf.zeros([1], tf.int32), env_output), agent.initial_state(1))
    # Products of the instruction's encoder have an unknown number of rows and
    # count as 0: these environments give no instruction.
    products = 0
    for op in graph.get_operations():
      if op.type in ('Conv2D', 'MatMul'):
        products += _products(op.outputs[0], op.inputs[1])
      elif op.type == 'TorsoSection':
        frames, *others = op.inputs
        weights = others[: len(others) // 2]
        products += _products(frames, weights[0])
        for output, weight in zip(op.outputs[1:], weights[1:], strict=False):
          products += _products(output, weight)
  return 4 * 2 * products


def _plot(path, rates, bound):
  figure, axes = plt.subplots(figsize=(7, 3), layout='constrained')
  bars = axes.barh(list(rates), list(rates.values()))
  axes.bar_label(bars, fmt='{:,.0f}', padding=3)
  axes.axvline(bound, color='black', linestyle='--')
  axes.text(bound, -0.9, 'float32 bound', ha='center')
  axes.set_xlim(right=1.25 * max(bound, *rates.values()))
  axes.invert_yaxis()
  axes.set_xlabel('environment frames/s')
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=int, default=15, help='per training')
  parser.add_argument(
    '--only', nargs='+', choices=_SETTINGS, default=list(_SETTINGS)
  )
  parser.add_argument('--plot', help='path of a picture of the result')
  args = parser.parse_args()
  rows, rates = [], {}
  # Measured before and after each training, as it changes on shared machines.
  matrix_rates = [common.matrix_rate()]
  for name in args.only:
    level, num_actors, batch_size, unroll_length, *flags = _SETTINGS[name]
    flags += common.flags_of(level, num_actors, batch_size, unroll_length)
    result = common.train(flags, args.seconds)
    matrix_rates.append(common.matrix_rate())
    matrix_rate = statistics.mean(matrix_rates[-2:])
    rates[name] = statistics.median(result['rates'])
    flops = step_flops(*_SHAPES.get(name, (72, 96, 3, 9)))
    bound = matrix_rate / flops * _NUM_ACTION_REPEATS
    busy = result['environment_seconds'] / os.cpu_count()
    rows.append(
      [
        name,
        f'{num_actors}, {batch_size}, {unroll_length}',
        f'{rates[name]:,.0f}',
        f'{common.spread(result["rates"]):.0%}',
        f'{matrix_rate / 1e9:.0f}',
        f'{bound:,.0f}',
        f'{rates[name] / bound:.0%}',
        f'{1e6 * result["environment_seconds"]:.0f}',
        f'{1 / (1 / rates[name] - busy):,.0f}',
        f'{result["first_update"]:.1f}',
        f'{result["memory"]:.0f}',
      ]
    )
  common.print_table(
    [
      *('environment', 'actors, batch, unroll', 'frames/s', 'spread'),
      *(
        'GFLOP/s',
        'bound',
        'of the bound',
        'environments us/frame',
        'without them',
      ),
      *('first update s', 'memory MB'),
    ],
    rows,
  )
  if args.plot:
    _plot(args.plot, rates, bound)


if __name__ == '__main__':
  main()
