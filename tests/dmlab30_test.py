# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the DMLab-30 levels and of the human-normalised score."""

import pytest

import dmlab30

_HELD_OUT = {
  'rooms_collect_good_objects_train': 'rooms_collect_good_objects_test',
  'rooms_exploit_deferred_effects_train': 'rooms_exploit_deferred_effects_test',
}


def _returns(scores):
  """Returns one episode per train level, with the scores of the test levels."""
  return {
    train: [scores[test]] for train, test in dmlab30.LEVEL_MAPPING.items()
  }


def test_thirty_levels_in_the_order_of_the_suite():
  assert len(dmlab30.ALL_LEVELS) == len(set(dmlab30.ALL_LEVELS)) == 30
  assert list(dmlab30.LEVEL_MAPPING) == dmlab30.ALL_LEVELS
  # The suite goes by families; these are their sizes.
  families = [level.split('_')[0] for level in dmlab30.ALL_LEVELS]
  assert families == (
    ['rooms'] * 5
    + ['language'] * 4
    + ['lasertag'] * 4
    + ['natlab'] * 3
    + ['skymaze'] * 2
    + ['psychlab'] * 4
    + ['explore'] * 8
  )
  assert dmlab30.ALL_LEVELS[0] == 'rooms_collect_good_objects_train'
  assert dmlab30.ALL_LEVELS[16] == 'skymaze_irreversible_path_hard'
  assert dmlab30.ALL_LEVELS[26] == 'explore_goal_locations_small'
  assert dmlab30.ALL_LEVELS[-1] == 'explore_object_rewards_many'


def test_only_two_levels_are_tested_on_another_one():
  differing = {
    train: test
    for train, test in dmlab30.LEVEL_MAPPING.items()
    if train != test
  }
  assert differing == _HELD_OUT


def test_reference_scores_go_by_test_level():
  test_levels = list(dmlab30.LEVEL_MAPPING.values())
  assert list(dmlab30.HUMAN_SCORES) == test_levels
  assert list(dmlab30.RANDOM_SCORES) == test_levels
  assert dmlab30.HUMAN_SCORES['rooms_collect_good_objects_test'] == 10
  assert dmlab30.RANDOM_SCORES['rooms_collect_good_objects_test'] == 0.073
  assert dmlab30.HUMAN_SCORES['explore_goal_locations_small'] == 267.5
  assert dmlab30.RANDOM_SCORES['explore_goal_locations_small'] == 7.66
  assert dmlab30.RANDOM_SCORES['language_execute_random_task'] == -5.913
  # The columns' sums catch a slip of the pen in any of the 60 numbers.
  assert sum(dmlab30.HUMAN_SCORES.values()) == pytest.approx(3110.15)
  assert sum(dmlab30.RANDOM_SCORES.values()) == pytest.approx(72.617)


@pytest.mark.parametrize('cap', [None, 100])
def test_random_play_is_0_and_human_play_is_100(cap):
  score = dmlab30.compute_human_normalized_score
  assert score(_returns(dmlab30.RANDOM_SCORES), cap) == pytest.approx(0)
  assert score(_returns(dmlab30.HUMAN_SCORES), cap) == pytest.approx(100)


def test_mean_over_episodes_then_over_levels():
  returns = _returns(dmlab30.RANDOM_SCORES)
  # (20, 53, 62.15) has mean 45.05, so 100 * (45.05 - .1) / 99.9 = 44.995.
  returns['skymaze_irreversible_path_hard'] = [20.0, 53.0, 62.15]
  # 100 * (2 - 14.4) / 85.6 = -14.486: worse than random counts as it is.
  returns['skymaze_irreversible_path_varied'] = [2.0]

  score = dmlab30.compute_human_normalized_score(returns, None)

  assert score == pytest.approx((44.994995 - 14.485981) / 30, abs=1e-6)


def test_cap_holds_for_each_level_by_itself():
  returns = _returns(dmlab30.RANDOM_SCORES)
  # 100 * (19.927 - .073) / 9.927 = 200.
  returns['rooms_collect_good_objects_train'] = [19.927]
  # 100 * (50.05 - .1) / 99.9 = 50.
  returns['skymaze_irreversible_path_hard'] = [50.05]

  score = dmlab30.compute_human_normalized_score

  assert score(returns, None) == pytest.approx(250 / 30)
  assert score(returns, 150) == pytest.approx(200 / 30)
  assert score(returns, 100) == pytest.approx(150 / 30)
  assert score(returns, 0) == pytest.approx(0)


def test_test_levels_are_accepted_too():
  by_test_level = {
    level: [score + 1] for level, score in dmlab30.RANDOM_SCORES.items()
  }
  by_train_level = {
    train: by_test_level[test] for train, test in dmlab30.LEVEL_MAPPING.items()
  }
  score = dmlab30.compute_human_normalized_score
  assert score(by_test_level, None) == score(by_train_level, None) > 0


def test_order_of_the_entries_does_not_matter():
  returns = _returns(dmlab30.HUMAN_SCORES)
  returns['rooms_watermaze'] = [0.0]
  backwards = dict(reversed(returns.items()))
  score = dmlab30.compute_human_normalized_score
  assert score(backwards, 100) == pytest.approx(score(returns, 100))


@pytest.mark.parametrize('level', ['rooms_watermaze', *_HELD_OUT])
def test_missing_level_is_named(level):
  returns = _returns(dmlab30.HUMAN_SCORES)
  del returns[level]
  with pytest.raises(ValueError, match=level):
    dmlab30.compute_human_normalized_score(returns, 100)


def test_unknown_level_is_named():
  returns = _returns(dmlab30.HUMAN_SCORES)
  returns['seekavoid_arena_01'] = [1.0]
  with pytest.raises(ValueError, match='seekavoid_arena_01'):
    dmlab30.compute_human_normalized_score(returns, 100)


def test_level_without_returns_is_named():
  returns = _returns(dmlab30.HUMAN_SCORES)
  returns['psychlab_visual_search'] = []
  with pytest.raises(ValueError, match='psychlab_visual_search'):
    dmlab30.compute_human_normalized_score(returns, 100)


@pytest.mark.parametrize(('train', 'test'), _HELD_OUT.items())
def test_train_and_test_level_together_are_refused(train, test):
  returns = _returns(dmlab30.HUMAN_SCORES)
  returns[test] = returns[train]
  with pytest.raises(ValueError, match=test):
    dmlab30.compute_human_normalized_score(returns, 100)
