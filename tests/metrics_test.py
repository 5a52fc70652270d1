# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the metrics of a training."""

import collections
import json
import re
import types

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import levels
from actors import ActorStatistics
from environments import StepOutputInfo
from learner import LearnerOutput, Update
from metrics import Metrics


@pytest.mark.parametrize('suite', ['dmlab30', 'atari57'])
def test_scores_of_a_suite_in_training(suite, monkeypatch, tmp_path):
  """The score is written whenever all levels were played."""
  module = levels.SUITES[suite].module
  names = list(module.LEVEL_MAPPING)
  written = []
  with tf.Graph().as_default():
    metrics = Metrics(str(tmp_path), suite, names, None, 1, 1)
    monkeypatch.setattr(metrics, '_write', written.append)
    for human in (True, False):
      for level in names:
        test_level = module.LEVEL_MAPPING[level]
        scores = module.HUMAN_SCORES if human else module.RANDOM_SCORES
        metrics._add_episode(level, scores[test_level], 10)
      expected = 100 if human else 0
      for name in levels.SUITES[suite].aggregates:
        tag = f'{suite}/training_{name}'
        assert written[-1][tag] == pytest.approx(expected)
  assert sum(f'{suite}/training_{name}' in values for values in written) == 2


def test_results_of_some_episodes_are_not_logged(tmp_path):
  row = {
    'level': 'a',
    'episodes': 1,
    'mean': 2.0,
    'human_normalized': None,
    'missing': '',
  }
  path = tmp_path / 'test.json'
  with tf.Graph().as_default():
    metrics = Metrics(str(tmp_path), 'a', ['a'], None, 1, 1)
  for num_episodes in (1, 2):
    path.write_text(
      json.dumps(
        {
          'settings': {'frames': 10},
          'num_episodes': num_episodes,
          'scores': {},
          'levels': [row],
        }
      )
    )
    if num_episodes == 1:
      assert 'a/mean_return 2.00' in metrics.add_test(path)
    else:
      with pytest.raises(ValueError, match='not complete'):
        metrics.add_test(path)


def test_report_is_of_its_period(tmp_path):
  """Two updates of 40 frames each, with an episode each."""
  statistics = iter(
    [
      ActorStatistics(1, 10, 30, 0.6),
      ActorStatistics(1, 30, 110, 1.0),
    ]
  )
  actors = types.SimpleNamespace(
    statistics=lambda: next(statistics),
    membership=lambda: ({'actors_connected': 2}, ['two actors']),
  )
  with tf.Graph().as_default():
    metrics = Metrics(str(tmp_path), 'a', ['a'], actors, 40, 4)
  metrics.global_step = 0
  for step, episode_return in ((40, 1.0), (80, 4.0)):
    metrics.add(update(step, episode_return))
  assert metrics.latest_return() == 2.5
  lines = metrics.report()
  assert lines[0] == ('a: return 2.50, 20 frames (mean of the last 2 episodes)')
  assert lines[-1] == 'two actors'
  # Nothing happens in the second period.
  assert metrics.report()[0].startswith('No update of the learner')
  tf.summary.FileWriterCache.get(str(tmp_path)).flush()
  values = read_events(tmp_path)
  assert values['a/episode_return'] == [(40, 1.0), (80, 4.0)]
  assert values['a/episode_frames'] == [(40, 20.0), (80, 20.0)]
  assert values['a/mean_return'] == [(80, 2.5)]
  assert values['queue_size'] == [(80, 0.5)]
  assert values['policy_lag_updates'] == [(80, 3.0)]
  assert values['inference_batch_size'] == [(80, 3.0)]
  assert values['inference_wait_seconds'] == [(80, pytest.approx(0.02))]
  assert values['environment_restarts'] == [(80, 1.0)]
  assert values['actors_connected'] == [(80, 2.0), (80, 2.0)]
  rate = values['environment_frames_per_second'][0][1]
  assert rate == pytest.approx(
    4 * values['agent_steps_per_second'][0][1], rel=1e-5
  )
  assert rate == pytest.approx(
    40 * values['learner_updates_per_second'][0][1], rel=1e-5
  )


def test_frames_of_each_level_are_counted(tmp_path):
  actors = types.SimpleNamespace(
    statistics=lambda: ActorStatistics(0, 1, 1, 0.0),
    membership=lambda: ({}, []),
  )
  with tf.Graph().as_default():
    metrics = Metrics(str(tmp_path), 'two', ['a', 'b', 'c'], actors, 80, 4)
  metrics.global_step = 0
  for step, names in ((80, [b'a', b'a']), (160, [b'a', b'b'])):
    batch = update(step, 1.0)
    metrics.add(
      batch._replace(
        level_name=names,
        game_over=np.zeros((10, 2), bool),
        info=StepOutputInfo(*np.zeros((2, 10, 2))),
      )
    )
  assert metrics.report()[-1] == (
    'levels: frames of each 0.0% to 75.0% of all; fewest c, most a'
  )
  tf.summary.FileWriterCache.get(str(tmp_path)).flush()
  values = read_events(tmp_path)
  for name, frames in (('a', 120.0), ('b', 40.0), ('c', 0.0)):
    assert values[f'{name}/environment_frames'] == [(160, frames)]


def test_report_tells_how_long_each_of_several_learners_waits(tmp_path):
  actors = types.SimpleNamespace(
    statistics=lambda: ActorStatistics(0, 1, 1, 0.0),
    membership=lambda: ({}, []),
  )
  with tf.Graph().as_default():
    metrics = Metrics(str(tmp_path), 'a', ['a'], actors, 40, 4)
  metrics._begin -= 10
  for step in (40, 80):
    metrics.add(
      update(step, 1.0)._replace(
        queue_size=np.array([1, 0]), wait_seconds=np.array([1.0, 4.0])
      )
    )
  (line,) = [line for line in metrics.report() if 'learners wait' in line]
  assert re.search('0: (19|20)%, 1: (79|80)% of the time', line), line
  tf.summary.FileWriterCache.get(str(tmp_path)).flush()
  values = read_events(tmp_path)
  assert values['learner_0/queue_size'] == [(80, 1.0)]
  assert values['learner_1/wait_share'] == [(80, pytest.approx(0.8, rel=0.05))]


def update(step, episode_return):
  """Returns an `Update` of one unroll of 10 steps with an episode of 5."""
  game_over = np.zeros((10, 1), bool)
  game_over[6] = True
  learner = LearnerOutput(step, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5)
  return Update(
    learner=learner,
    level_name=[b'a'],
    game_over=game_over,
    info=StepOutputInfo(np.full((10, 1), episode_return), np.full((10, 1), 5)),
    policy_lag=2.0 if step == 40 else 4.0,
    queue_size=np.array([0 if step == 40 else 1]),
    wait_seconds=np.array([0.1]),
  )


def read_events(folder):
  """Returns a dict from tags to lists of (step, value) of the event files."""
  values = collections.defaultdict(list)
  for path in sorted(folder.glob('events.*')):
    for event in tf.train.summary_iterator(str(path)):
      for value in event.summary.value:
        values[value.tag].append((event.step, value.simple_value))
  return values
