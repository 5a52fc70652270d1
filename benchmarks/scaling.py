# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How do speed and memory grow with actors, batch size and unroll length?

Runs short trainings of the deep network in an environment that takes nearly no
time. Run it on an otherwise idle machine:

  python -m benchmarks.scaling --plot=scaling.png
"""

import argparse
import functools
import statistics

import matplotlib.pyplot as plt

from benchmarks import common

_ACTORS = (1, 2, 4, 8, 16, 32, 48)
_BATCH_SIZES = (1, 4, 16)
_UNROLL_LENGTHS = (5, 20, 100)

# What varies, and (actors, batch size, unroll length) for each of its values.
_SWEEPS = {
  'actors': {n: (n, 4, 20) for n in _ACTORS},
  'batch size': {n: (16, n, 20) for n in _BATCH_SIZES},
  'unroll length': {n: (8, 4, n) for n in _UNROLL_LENGTHS},
}


@functools.cache  # Two sweeps share a setting.
def _measure(setting, seconds):
  return common.train(common.flags_of(common.FRAMES, *setting), seconds)


def _plot(path, results):
  figure, axes = plt.subplots(
    2, len(results), figsize=(9, 5), sharey='row', layout='constrained'
  )
  for column, (name, points) in zip(axes.T, results.items(), strict=True):
    rates = [statistics.median(r['rates']) for r in points.values()]
    memory = [r['memory'] for r in points.values()]
    for axis, values in zip(column, (rates, memory), strict=True):
      axis.plot(list(points), values, marker='o')
    column[1].set_xlabel(name)
  for axis in axes[:, 0]:  # All of a row share it.
    axis.set_ylim(bottom=0)
  axes[0, 0].set_ylabel('environment frames/s')
  axes[1, 0].set_ylabel('MB of the main process')
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=int, default=5, help='per training')
  parser.add_argument('--plot', help='path of a picture of the result')
  args = parser.parse_args()
  print(f'Matrix products: {common.matrix_rate() / 1e9:.0f} GFLOP/s\n')
  results = {
    name: {
      value: _measure(setting, args.seconds) for value, setting in sweep.items()
    }
    for name, sweep in _SWEEPS.items()
  }
  common.print_table(
    ['', '', 'frames/s', 'spread', 'first update s', 'memory MB'],
    [
      [
        name,
        value,
        f'{statistics.median(result["rates"]):,.0f}',
        f'{common.spread(result["rates"]):.0%}',
        f'{result["first_update"]:.1f}',
        f'{result["memory"]:.0f}',
      ]
      for name, points in results.items()
      for value, result in points.items()
    ],
  )
  if args.plot:
    _plot(args.plot, results)


if __name__ == '__main__':
  main()
