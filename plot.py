# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Draws learning curves from the metrics of trainings.

  python plot.py <logdir> [<logdir> ...] [--output=curve.png]

One panel per level, one colour per log directory: each episode's return as a
dot and the mean of the last 100 as a line, over environment frames.
"""

import argparse
import collections
import glob
import os
import sys

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import matplotlib as mpl

mpl.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

_EPISODES = 100
_TAG = '/episode_return'


def read_episodes(logdir):
  """Reads the episodes of a training from its event files.

  Args:
    logdir: folder of the training.

  Returns:
    Dict from level name to an array [episodes, 2] of environment frames and
    return, in the order of the frames.
  """
  import tensorflow.compat.v1 as tf

  # It advises another reader, which TensorFlow 1 doesn't have.
  tf.logging.set_verbosity(tf.logging.ERROR)
  levels = collections.defaultdict(list)
  for path in sorted(glob.glob(os.path.join(logdir, 'events.out.tfevents.*'))):
    for event in tf.train.summary_iterator(path):
      for value in event.summary.value:
        if value.tag.endswith(_TAG):
          level = value.tag.removesuffix(_TAG)
          levels[level].append((event.step, value.simple_value))
  return {
    level: np.array(sorted(points, key=lambda point: point[0]))
    for level, points in levels.items()
  }


def running_mean(values, count):
  """Returns the mean of the last `count` values, fewer at the beginning."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  ends = np.arange(1, len(values) + 1)
  begins = np.maximum(0, ends - count)
  return (sums[ends] - sums[begins]) / (ends - begins)


def draw(runs, output):
  """Draws a picture of some trainings.

  Args:
    runs: dict from the name of a training to what `read_episodes` returned.
    output: path of the PNG file.
  """
  levels = sorted({level for episodes in runs.values() for level in episodes})
  columns = min(len(levels), 5)
  rows = -(-len(levels) // columns)
  size = (6, 4) if len(levels) == 1 else (3.2 * columns, 2.6 * rows)
  figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
  # Wong's palette tells colours apart for colour-blind people as well.
  colours = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
  for axis, level in zip(axes.flat, levels, strict=False):
    for i, (name, episodes) in enumerate(runs.items()):
      if level in episodes:
        frames, returns = episodes[level].T
        colour = colours[i % len(colours)]
        axis.plot(frames, returns, '.', color=colour, alpha=0.15, markersize=3)
        axis.plot(
          frames, running_mean(returns, _EPISODES), color=colour, label=name
        )
    axis.set_title(level)
    axis.set_xlabel('environment frames')
    axis.set_ylabel('episode return')
    axis.grid(alpha=0.3)
  for axis in axes.flat[len(levels) :]:
    axis.set_visible(False)
  axes.flat[0].legend(
    title=f'mean of the last {_EPISODES} episodes', loc='upper left', fontsize=8
  )
  figure.tight_layout()
  figure.savefig(output, dpi=150)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('logdir', nargs='+', help='folder of a training')
  parser.add_argument(
    '--output',
    help='picture to write; default: learning_curve.png in the first logdir',
  )
  args = parser.parse_args()
  runs = {
    os.path.basename(os.path.normpath(logdir)): read_episodes(logdir)
    for logdir in args.logdir
  }
  if not any(runs.values()):
    sys.exit(f'plot.py: no episodes found in {", ".join(args.logdir)}.')
  output = args.output or os.path.join(args.logdir[0], 'learning_curve.png')
  draw(runs, output)
  print(f'Learning curve: {output}')


if __name__ == '__main__':
  main()
