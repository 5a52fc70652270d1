# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the metrics of a training."""

import json

import pytest
import tensorflow.compat.v1 as tf

import levels
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
