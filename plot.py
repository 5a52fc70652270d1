# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Draws learning curves from the metrics of trainings.

  python plot.py <logdir> [<logdir> ...] [--x=hours] [--output=curve.png]
  python plot.py <logdir> [<logdir> ...] --threshold=75

One panel per level, and for suites one per score. A training alone shows each
episode as a dot and the mean of the last 100 as a line. Trainings that differ
in their seed alone are one line, the mean of theirs, in a band from the lowest
to the highest. Tests in the background of a training are diamonds. With a
threshold, a table tells when the mean return of 100 episodes reached it.
"""

import argparse
import collections
import contextlib
import json
import os
import sys

import matplotlib as mpl

mpl.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import tabulate
from matplotlib import ticker

import quiet

_EPISODES = 100
_POINTS = 200  # Of a line that is the mean of others.
_X_LABELS = {'frames': 'environment frames', 'hours': 'hours'}

# Wong's palette tells colours apart for colour-blind people as well, and the
# styles of the lines do in black and white.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_STYLES = ('-', '--', '-.', ':')

# A panel: the tag of what is drawn, its title and the label of its y axis, the
# tag of the tests of the same, and whether values are those of single episodes.
Panel = collections.namedtuple('Panel', 'tag title label test_tag is_episodes')


def read_scalars(logdir):
  """Reads the metrics of a training from its event files.

  A training that went on from an older checkpoint repeats some frames. As in
  TensorBoard, what was written of them before is left out.

  Args:
    logdir: folder of the training.

  Returns:
    Dict from tag to an array [n, 3] of environment frames, values and hours of
    training, in the order of the frames. The hours include the time that
    repeated frames took.

  Raises:
    OSError: the folder can't be read.
  """
  points, hours = collections.defaultdict(list), 0.0
  # One file for each time that the training went on.
  for name in sorted(os.listdir(logdir)):
    if not name.startswith('events.out.tfevents.'):
      continue
    begin, start = None, hours
    for event in _read_events(os.path.join(logdir, name)):
      begin = begin or event.wall_time
      hours = start + (event.wall_time - begin) / 3600
      # It comes with the number of frames after the first update.
      if event.session_log.status == event.session_log.START:
        for tag, values in points.items():
          points[tag] = [point for point in values if point[0] < event.step]
      for value in event.summary.value:
        if value.HasField('simple_value'):
          points[value.tag].append((event.step, value.simple_value, hours))
  return {
    tag: np.array(sorted(values, key=lambda point: point[0]))
    for tag, values in points.items()
    if values
  }


def _read_events(path):
  """Yields the events of a file that have metrics or begin a session."""
  with quiet.start():
    import tensorflow.compat.v1 as tf
  # TensorFlow warns that this reader is deprecated; version 1 has no other.
  tf.logging.set_verbosity(tf.logging.ERROR)
  # The last one may be half written. As bytes, a path needs no encoding.
  with contextlib.suppress(tf.errors.DataLossError):
    for event in tf.train.summary_iterator(os.fsencode(path)):
      if event.WhichOneof('what') in ('summary', 'session_log'):
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
        # Without the seed, and without what changes nothing that is learned.
        key = json.dumps(json.load(file)['settings'], sort_keys=True)
    # Of another version, or damaged.
    except (OSError, ValueError, LookupError, TypeError):
      key = logdir
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
  legend = figure.legend(
    handles=handles, loc='outside upper center', fontsize='small'
  )
  for text in legend.get_texts():
    text.set_parse_math(False)
  figure.savefig(output, dpi=150 if len(panels) < 10 else 100)
  plt.close(figure)


def table(runs, threshold):
  """Returns a table of when trainings reached a return.

  Args:
    runs: dict from name to what `read_scalars` returned.
    threshold: float, a mean return of 100 episodes.

  Returns:
    String, with a line for each level of each training. Minutes count from the
    first metrics, which a training writes some seconds after its start.
  """
  rows = []
  for name, scalars in runs.items():
    for panel in panels_of([scalars]):
      if panel.is_episodes:
        episodes = scalars[panel.tag]
        reached = _first_above(episodes, threshold)
        rows.append([name, panel.title, *_summary(episodes), *reached])
  return tabulate.tabulate(
    rows,
    [
      *('training', 'level', 'frames', 'minutes', 'frames/s'),
      *(f'first {_EPISODES}', f'last {_EPISODES}'),
      *(f'frames to {threshold:g}', 'minutes'),
    ],
    'github',
    floatfmt=('', '', '.0f', '.1f', '.0f', '.2f', '.2f', '.0f', '.1f'),
    missingval='-',
  )


def _summary(episodes):
  """Returns frames, minutes, frames/s, first and last mean return."""
  frames, returns, hours = episodes.T
  seconds = 3600 * hours[-1]
  return [
    *(frames[-1], seconds / 60, frames[-1] / seconds),
    *(returns[:_EPISODES].mean(), returns[-_EPISODES:].mean()),
  ]


def _first_above(episodes, threshold):
  """Returns frames and minutes to a mean return; None, None if it wasn't."""
  frames, returns, hours = episodes.T
  is_above = running_mean(returns, _EPISODES) >= threshold
  is_above[: _EPISODES - 1] = False  # Of fewer episodes.
  if not is_above.any():
    return [None, None]
  first = is_above.argmax()
  return [frames[first], 60 * hours[first]]


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
  name, count = _printable(logdirs[0]), len(logdirs)
  if count == 1:
    return f'{name} (mean of the last {_EPISODES} episodes)'
  return f'{name} and {count - 1} with other seeds (mean and range)'


def _printable(path):
  """Returns a path with what is no text in it, as \\xff, written out."""
  return os.fsencode(path).decode(errors='backslashreplace')


def _read_episodes(logdir):
  """Returns `read_scalars` of it; ends the program if that has no episodes."""
  try:
    scalars = read_scalars(logdir)
  except OSError as error:
    sys.exit(f'plot.py: {logdir} can not be read ({error.strerror}).')
  if not panels_of([scalars]):
    sys.exit(f'plot.py: no episodes found in {logdir}.')
  return scalars


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
  parser.add_argument(
    '--threshold',
    type=float,
    help='mean return; prints a table of when trainings reached it',
  )
  args = parser.parse_args()
  # Wherever it is shown, a name is no reason to fail.
  sys.stdout.reconfigure(errors='backslashreplace')
  paths = [os.path.normpath(os.path.expanduser(path)) for path in args.logdir]
  logdirs = list(dict.fromkeys(paths))  # Each once.
  runs = {logdir: _read_episodes(logdir) for logdir in logdirs}
  groups = {
    _label(members): [runs[logdir] for logdir in members]
    for members in group(runs)
  }
  output = os.path.expanduser(
    args.output or os.path.join(logdirs[0], 'learning_curve.png')
  )
  try:
    draw(groups, output, args.x)
  except OSError as error:
    sys.exit(f'plot.py: {output} can not be written ({error.strerror}).')
  print(f'Learning curve: {_printable(output)}')
  if args.threshold is not None:
    names = {_printable(logdir): scalars for logdir, scalars in runs.items()}
    print(table(names, args.threshold))


if __name__ == '__main__':
  main()
