# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Draws learning curves from the metrics of trainings.

  python plot.py <logdir> [<logdir> ...] [--x=hours] [--output=curve.png]

One panel per level, and for suites one per score. A training alone shows each
episode as a dot and the mean of the last 100 as a line. Trainings that differ
in their seed alone are one line, the mean of theirs, in a band from the lowest
to the highest. Tests in the background of a training are diamonds.
"""

import argparse
import collections
import contextlib
import glob
import json
import os
import sys

import matplotlib as mpl

mpl.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

import quiet

_EPISODES = 100
_POINTS = 200  # Of a line that is the mean of others.
_X_LABELS = {'frames': 'environment frames', 'hours': 'hours'}

# Wong's palette tells colours apart for colour-blind people as well, and the
# styles of the lines do in black and white.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STYLES = ('-', '--', '-.', ':')

# The flags in which trainings may differ that are drawn as one.
_UNIMPORTANT_FLAGS = {
  'actor_address',
  'learner_address',
  'seed',
  'logdir',
  'checkpoint',
  'level_cache_dir',
  'max_environment_restarts',
  'mode',
  'save_checkpoint_secs',
  'test_interval_frames',
  'test_num_episodes',
  'video_dir',
}

# A panel: the tag of what is drawn, its title and the label of its y axis, the
# tag of the tests of the same, and whether values are those of single episodes.
Panel = collections.namedtuple('Panel', 'tag title label test_tag is_episodes')


def read_scalars(logdir):
  """Reads the metrics of a training from its event files.

  Args:
    logdir: folder of the training.

  Returns:
    Dict from tag to an array [n, 3] of environment frames, values and hours of
    training, in the order of the frames.
  """
  points, hours = collections.defaultdict(list), 0.0
  # One file for each time that the training went on.
  for path in sorted(glob.glob(os.path.join(logdir, 'events.out.tfevents.*'))):
    begin, start = None, hours
    for event in _read_events(path):
      begin = begin or event.wall_time
      hours = start + (event.wall_time - begin) / 3600
      for value in event.summary.value:
        if value.HasField('simple_value'):
          points[value.tag].append((event.step, value.simple_value, hours))
  return {
    tag: np.array(sorted(values, key=lambda point: point[0]))
    for tag, values in points.items()
  }


def _read_events(path):
  """Yields the events of a file that have metrics."""
  with quiet.start():
    import tensorflow.compat.v1 as tf
  # It advises another reader, which TensorFlow 1 doesn't have.
  tf.logging.set_verbosity(tf.logging.ERROR)
  # The last one may be half written.
  with contextlib.suppress(tf.errors.DataLossError):
    for event in tf.train.summary_iterator(path):
      if event.summary.value:
        yield event


def group(logdirs):
  """Sorts log directories by their settings.

  Args:
    logdirs: list of folders.

  Returns:
    List of lists of those that differ in their seeds alone.
  """
  groups = {}
  for logdir in logdirs:
    try:
      with open(os.path.join(logdir, 'agent.json')) as file:
        values = json.load(file)['flags']
    except FileNotFoundError:
      key = logdir
    else:
      for name in _UNIMPORTANT_FLAGS:
        values.pop(name, None)
      key = json.dumps(values, sort_keys=True)
    groups.setdefault(key, []).append(logdir)
  return list(groups.values())


def running_mean(values, count):
  """Returns the mean of the last `count` values, fewer at the beginning."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  ends = np.arange(1, len(values) + 1)
  begins = np.maximum(0, ends - count)
  return (sums[ends] - sums[begins]) / (ends - begins)


def mean_and_range(curves):
  """Joins curves where all of them have values.

  Args:
    curves: list of (x, y), arrays [n] with x in ascending order.

  Returns:
    Arrays x, mean, lowest and highest, [points].
  """
  begin = max(x[0] for x, _ in curves)
  end = min(x[-1] for x, _ in curves)
  grid = np.linspace(begin, max(begin, end), _POINTS)
  values = np.array([np.interp(grid, x, y) for x, y in curves])
  return grid, values.mean(0), values.min(0), values.max(0)


def panels_of(runs):
  """Returns the `Panel`s for the metrics of some trainings."""
  tags = sorted({tag for scalars in runs for tag in scalars})
  scores, levels = [], []
  for tag in tags:
    name, _, metric = tag.rpartition('/')
    if metric.startswith('training_'):
      score = metric.removeprefix('training_')
      title = f'{name}, {score.replace("_", " ")}'
      label = 'human-normalised score, %'
      scores.append(Panel(tag, title, label, f'test/{name}/{score}', False))
    elif metric == 'episode_return':
      title = name.removeprefix('gym:').removeprefix('ALE/')
      levels.append(
        Panel(tag, title, 'return', f'test/{name}/mean_return', True)
      )
  return scores + levels


def draw(groups, output, x_axis='frames'):
  """Draws a picture of some trainings.

  Args:
    groups: dict from label to a list of what `read_scalars` returned.
    output: path of the PNG file.
    x_axis: 'frames' or 'hours'.
  """
  panels = panels_of([run for runs in groups.values() for run in runs])
  columns = min(len(panels), max(3, int(np.ceil(len(panels) ** 0.5))))
  rows = -(-len(panels) // columns)
  size = (7, 4.5) if len(panels) == 1 else (3.4 * columns, 2.5 * rows + 0.5)
  figure, axes = plt.subplots(
    rows, columns, figsize=size, squeeze=False, layout='constrained'
  )
  for axis, panel in zip(axes.flat, panels, strict=False):
    for i, runs in enumerate(groups.values()):
      colour, style = _COLOURS[i % len(_COLOURS)], _STYLES[i % len(_STYLES)]
      _draw_group(axis, panel, runs, x_axis, colour, style)
    axis.set_title(panel.title, fontsize='medium')
    axis.set_xlabel(_X_LABELS[x_axis])
    axis.set_ylabel(panel.label)
    axis.grid(alpha=0.3)
    if x_axis == 'frames':
      axis.xaxis.set_major_formatter(ticker.EngFormatter())
  for axis in axes.flat[len(panels) :]:
    axis.set_visible(False)
  handles = [
    plt.Line2D(
      [],
      [],
      color=_COLOURS[i % len(_COLOURS)],
      linestyle=_STYLES[i % len(_STYLES)],
      label=label,
    )
    for i, label in enumerate(groups)
  ]
  figure.legend(handles=handles, loc='outside upper center', fontsize='small')
  figure.savefig(output, dpi=150 if len(panels) < 10 else 100)
  plt.close(figure)


def _draw_group(axis, panel, runs, x_axis, colour, style):
  """Draws what trainings of the same settings have for a panel."""
  column = {'frames': 0, 'hours': 2}[x_axis]
  curves = []
  for scalars in runs:
    if panel.tag in scalars:
      points = scalars[panel.tag]
      x, y = points[:, column], points[:, 1]
      if panel.is_episodes and len(runs) == 1:
        axis.plot(x, y, '.', color=colour, alpha=0.15, markersize=3)
      curves.append((x, running_mean(y, _EPISODES) if panel.is_episodes else y))
    tests = scalars.get(panel.test_tag)
    if tests is not None:
      axis.plot(
        tests[:, column], tests[:, 1], 'D', color=colour, mec='k', markersize=5
      )
  if len(curves) == 1:
    axis.plot(*curves[0], color=colour, linestyle=style)
  elif curves:
    x, mean, low, high = mean_and_range(curves)
    axis.plot(x, mean, color=colour, linestyle=style)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _label(logdirs):
  """Returns the name of some trainings in the legend."""
  name, count = os.path.normpath(logdirs[0]), len(logdirs)
  if count == 1:
    return f'{name} (mean of the last {_EPISODES} episodes)'
  return f'{name} and {count - 1} with other seeds (mean and range)'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('logdir', nargs='+', help='folder of a training')
  parser.add_argument(
    '--x', choices=_X_LABELS, default='frames', help='what the x axis shows'
  )
  parser.add_argument(
    '--output',
    help='picture to write; default: learning_curve.png in the first logdir',
  )
  args = parser.parse_args()
  runs = {logdir: read_scalars(logdir) for logdir in args.logdir}
  for logdir, scalars in runs.items():
    if not panels_of([scalars]):
      sys.exit(f'plot.py: no episodes found in {logdir}.')
  groups = {
    _label(logdirs): [runs[logdir] for logdir in logdirs]
    for logdirs in group(args.logdir)
  }
  output = args.output or os.path.join(args.logdir[0], 'learning_curve.png')
  draw(groups, output, args.x)
  print(f'Learning curve: {output}')


if __name__ == '__main__':
  main()
