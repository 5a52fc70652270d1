# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the learning curves."""

import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from tensorboard.backend.event_processing import event_accumulator

import plot
from helpers import ROOT, TOY, run


def write(logdir, points, seed=1, flags=(), start=1000.0):
  """Writes metrics [(tag, step, value, seconds)], as a training does."""
  os.makedirs(logdir, exist_ok=True)
  with open(os.path.join(logdir, 'agent.json'), 'w') as file:
    settings = dict(flags)
    others = {'seed': seed, 'logdir': str(logdir)}
    json.dump({'settings': settings, 'flags': settings | others}, file)
  with tf.Graph().as_default():
    writer = tf.summary.FileWriter(str(logdir), filename_suffix=f'.{start}')
    for tag, step, value, seconds in points:
      summary = tf.Summary(
        value=[tf.Summary.Value(tag=tag, simple_value=value)]
      )
      writer.add_event(
        tf.Event(wall_time=start + seconds, step=step, summary=summary)
      )
    writer.close()


def test_metrics_are_read_with_the_hours_of_training(tmp_path):
  write(tmp_path, [('a/episode_return', 10, 1.5, 0), ('loss', 20, 3.0, 7200)])
  # It went on a day later: the pause doesn't count.
  write(tmp_path, [('a/episode_return', 30, 2.5, 3600)], start=90000.0)
  scalars = plot.read_scalars(str(tmp_path))
  frames, values, hours = scalars['a/episode_return'].T
  assert frames.tolist() == [10, 30]
  assert values.tolist() == [1.5, 2.5]
  assert hours == pytest.approx([0, 2])
  assert scalars['loss'].tolist() == [[20, 3, 2]]


def train(logdir, frames):
  """Trains for real, with small frames and short episodes."""
  code, output = run(
    *TOY, f'--logdir={logdir}', f'--total_environment_frames={frames}'
  )
  assert code == 0, output


def test_frames_after_an_older_checkpoint_are_drawn_once(tmp_path):
  tag = 'gym:toy_gym:Grey-v0/episode_return'
  train(tmp_path, 1000)
  before = plot.read_scalars(str(tmp_path))[tag]
  assert before[-1, 0] > 900
  # As if it had been killed before its last checkpoint.
  for path in tmp_path.glob('model.ckpt-1000.*'):
    path.unlink()
  (tmp_path / 'checkpoint').write_text(
    'model_checkpoint_path: "model.ckpt-0"\n'
    'all_model_checkpoint_paths: "model.ckpt-0"\n'
  )
  train(tmp_path, 600)

  frames, values, hours = plot.read_scalars(str(tmp_path))[tag].T
  # Episodes have 10 frames.
  assert 500 < frames[-1] <= 600
  assert len(frames) <= 60
  shown_by_tensorboard = event_accumulator.EventAccumulator(
    str(tmp_path), size_guidance={event_accumulator.SCALARS: 0}
  ).Reload()
  assert list(zip(frames, values, strict=True)) == [
    (event.step, event.value) for event in shown_by_tensorboard.Scalars(tag)
  ]
  # What was lost took its time, too.
  assert hours[0] >= before[-1, 2]


def test_trainings_that_differ_in_their_seed_are_one_group(tmp_path):
  logdirs = [str(tmp_path / name) for name in 'abcde']
  for seed, logdir in enumerate(logdirs):
    flags = {'torso': 'deep' if logdir.endswith('c') else 'shallow'}
    write(logdir, [], seed, flags)
  a, b, c, d, e = logdirs
  # Of other versions.
  os.remove(os.path.join(d, 'agent.json'))
  with open(os.path.join(e, 'agent.json'), 'w') as file:
    json.dump({'flags': {'seed': 4, 'torso': 'shallow'}}, file)
  assert plot.group(logdirs) == [[a, b], [c], [d], [e]]


def test_mean_and_range_over_seeds():
  x = np.arange(0, 101, 10)
  curves = [(x, 1.0 * x), (x + 20, 3.0 * (x + 20)), (x / 2, 0.5 * x)]
  grid, mean, low, high = plot.mean_and_range(curves)
  # From the latest beginning to the earliest end.
  assert (grid[0], grid[-1]) == (20, 50)
  np.testing.assert_allclose(mean, 5 * grid / 3)
  np.testing.assert_allclose(low, grid)
  np.testing.assert_allclose(high, 3 * grid)


def test_running_mean():
  np.testing.assert_allclose(
    plot.running_mean(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6]
  )


def test_table_tells_when_a_return_was_reached():
  # 120 episodes of 10 frames and 2 s each; from the 31st on, they return 1.
  number = np.arange(1, 121)
  returns = np.where(number > 30, 1.0, 0.0)
  episodes = np.stack([10.0 * number, returns, number / 1800], 1)
  scalars = {'x/episode_return': episodes, 'loss': episodes}
  rows = [
    [
      cell.strip()
      for cell in plot.table({'run': scalars}, threshold).split('|')
    ]
    for threshold in (0.75, 0.7, 0.95)
  ]
  summary = ['run', 'x', '1200', '4.0', '5', '0.70', '0.90']
  # 75 of the last 100 for the first time after the 105th. The first 100 have
  # 70; the mean of fewer, as of the first 40, is none.
  assert [row[-10:-1] for row in rows] == [
    [*summary, '1050', '3.5'],
    [*summary, '1000', '3.3'],
    [*summary, '-', '-'],
  ]


@pytest.mark.parametrize('utf8', ['0', '1'])
def test_folders_of_all_names_are_drawn(tmp_path, utf8):
  names = [
    'ä[lr=0.001]',
    'a*',
    'b?',
    'c d',
    '_e',
    '$^$',
    '-g',
    b'h\xff',
  ]
  points = [('x/episode_return', step, float(step), step) for step in range(9)]
  for i, name in enumerate(names):
    write(tmp_path / 'new', points, flags={'learning_rate': i})
    os.rename(
      tmp_path / 'new', os.fsencode(tmp_path) + b'/' + os.fsencode(name)
    )
  result = subprocess.run(
    # The first and the last of them as a shell may leave them.
    [
      *(sys.executable, os.path.join(ROOT, 'plot.py'), '--', '~/ä[lr=0.001]'),
      *names[1:],
    ],
    capture_output=True,
    cwd=tmp_path,
    env={
      **os.environ,
      'HOME': str(tmp_path),
      'LC_ALL': 'POSIX',
      'PYTHONIOENCODING': 'ascii',
      'PYTHONUTF8': utf8,
    },
    timeout=120,
    check=False,
  )
  output = tmp_path / names[0] / 'learning_curve.png'
  assert result.stderr.decode() == ''
  shown = str(output).replace('ä', '\\xe4')
  assert result.stdout.decode() == f'Learning curve: {shown}\n'
  assert plt.imread(output)[..., :3].std() > 0.05


def test_picture_of_a_suite(tmp_path):
  """Two seeds, three levels and a score, drawn by the program."""
  logdirs = [str(tmp_path / name) for name in ('one', 'two')]
  for seed, logdir in enumerate(logdirs):
    points = [
      (f'{level}/episode_return', step, float(step + seed), step)
      for step in range(0, 100, 10)
      for level in ('x', 'y', 'gym:ALE/Pong-v5')
    ]
    points.append(('atari57/training_median', 50, 12.0, 50))
    points.append(('test/x/mean_return', 50, 12.0, 50))
    write(logdir, points, seed)
  panels = plot.panels_of([plot.read_scalars(logdir) for logdir in logdirs])
  assert [panel.title for panel in panels] == [
    'atari57, median',
    'Pong-v5',
    'x',
    'y',
  ]
  output = str(tmp_path / 'curve.png')
  result = subprocess.run(
    [
      sys.executable,
      os.path.join(ROOT, 'plot.py'),
      *logdirs,
      '--x=hours',
      f'--output={output}',
      '--threshold=50',
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  # TensorFlow tells nothing.
  assert result.stderr == ''
  first, *table = result.stdout.splitlines()
  assert first == f'Learning curve: {output}'
  assert len(table) == 2 + 2 * 3
  picture = plt.imread(output)
  assert min(picture.shape[:2]) > 300
  assert picture[..., :3].std() > 0.05
  wrong = subprocess.run(
    [sys.executable, os.path.join(ROOT, 'plot.py'), str(tmp_path / 'none')],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert wrong.returncode == 1
  assert wrong.stderr == (
    f'plot.py: {tmp_path / "none"} can not be read (No such file or '
    'directory).\n'
  )
