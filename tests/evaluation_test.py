# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of an evaluation's statistics and files."""

import csv
import json

import numpy as np
import pytest

import atari57
import dmlab30
import evaluation
import levels


def make(path, levels=('a', 'b'), num_episodes=3, seed=1, **kwargs):
  return evaluation.Results(
    path=str(path / 'results'),
    settings={'seed': seed},
    levels=list(levels),
    num_episodes=num_episodes,
    references=kwargs.get('references', {}),
    aggregates=kwargs.get('aggregates', {}),
    facts={'flags': {'torso': 'deep'}},
  )


def add(results, level, returns):
  for number, value in enumerate(returns):
    results.add(level, evaluation.Episode(number, value, 40))


def test_statistics_of_a_level(tmp_path):
  results = make(tmp_path, num_episodes=4, references={'a': (12.0, 2.0)})
  returns = [1.0, 7.0, 2.0, 20.0]
  add(results, 'a', returns)
  a, b = results.statistics()
  assert a.episodes == 4
  assert a.mean == np.mean(returns) == 7.5
  # sqrt((6.5^2 + .5^2 + 5.5^2 + 12.5^2) / 3) / sqrt(4)
  assert a.standard_error == pytest.approx(np.sqrt(229 / 3) / 2)
  assert (a.median, a.min, a.max) == (4.5, 1, 20)
  assert a.human_normalized == pytest.approx(100 * (7.5 - 2) / 10)
  assert a.missing is None
  assert b == evaluation.LevelStatistics('b', 0, *[None] * 7)


def test_files_hold_everything_and_are_taken_up(tmp_path):
  results = make(tmp_path)
  add(results, 'a', [1.0, 2.5, 3.0])
  results.give_up('b', 'no, "never"')
  results.save()
  content = json.loads((tmp_path / 'results.json').read_text())
  assert content['settings'] == {'seed': 1}
  assert content['flags'] == {'torso': 'deep'}
  assert content['episodes']['a'][1] == {
    'number': 1,
    'episode_return': 2.5,
    'frames': 40,
  }
  assert not content['is_complete']
  with open(tmp_path / 'results.csv') as file:
    a, b = csv.DictReader(file)
  assert (a['level'], a['episodes'], float(a['mean'])) == ('a', '3', 6.5 / 3)
  assert (b['level'], b['mean'], b['missing']) == ('b', '', 'no, "never"')

  again = make(tmp_path)
  assert again.returns() == {'a': [1.0, 2.5, 3.0], 'b': []}
  assert again.has('a', 2)
  assert not again.has('b', 0)
  # What failed may work now.
  assert not again.missing
  add(again, 'b', [5.0] * 3)
  assert again.is_complete()
  # More episodes go on from those; of fewer, only the first count.
  again.save()
  assert not make(tmp_path, num_episodes=4).is_complete()
  assert make(tmp_path, num_episodes=2).returns()['a'] == [1.0, 2.5]


def test_results_of_another_evaluation_are_refused_and_kept(tmp_path):
  results = make(tmp_path)
  add(results, 'a', [1.0])
  results.save()
  before = (tmp_path / 'results.json').read_bytes()
  with pytest.raises(evaluation.OtherEvaluation, match='seed is 1, here it'):
    make(tmp_path, seed=2)
  assert (tmp_path / 'results.json').read_bytes() == before
  (tmp_path / 'results.json').write_text('{')
  with pytest.raises(evaluation.OtherEvaluation, match='can not be read'):
    make(tmp_path)


@pytest.mark.parametrize('name', ['dmlab30', 'atari57'])
def test_scores_of_a_suite_equal_the_formula(tmp_path, name):
  """Level i has episodes that score 10 i - 10 and 10 i + 10 percent."""
  suite = levels.SUITES[name]
  module = {'dmlab30': dmlab30, 'atari57': atari57}[name]
  names = list(module.LEVEL_MAPPING.values())
  references = levels.reference_scores(names)
  results = make(
    tmp_path,
    names,
    num_episodes=2,
    references=references,
    aggregates=suite.aggregates,
  )
  expected = 10.0 * np.arange(len(names))
  for level, percent in zip(names, expected, strict=True):
    human, rand = module.HUMAN_SCORES[level], module.RANDOM_SCORES[level]
    assert not results.scores()  # Not before all is played.
    add(
      results,
      level,
      [rand + (percent + d) / 100 * (human - rand) for d in (-10, 10)],
    )
  np.testing.assert_allclose(
    [row.human_normalized for row in results.statistics()], expected, atol=1e-6
  )
  scores = results.scores()
  if name == 'dmlab30':
    # 0, 10, ... 290 percent.
    assert scores['no_cap'] == pytest.approx(145)
    assert scores['cap_100'] == pytest.approx((550 + 19 * 100) / 30)
  else:
    # 0, 10, ... 560 percent.
    assert scores['median'] == pytest.approx(280)
    assert scores['mean'] == pytest.approx(280)
  table = results.table()
  assert all(level in table for level in names)
  for title, score in scores.items():
    assert f'{title.replace("_", " ")}: {score:.2f} %' in table
