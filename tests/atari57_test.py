# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the Atari-57 games and of the human-normalised scores."""

import numpy as np
import pytest

import atari57


def _returns(scores):
  return {level: [score] for level, score in scores.items()}


def test_57_games_that_gymnasium_knows():
  gymnasium = pytest.importorskip('gymnasium')
  gymnasium.register_envs(pytest.importorskip('ale_py'))
  assert len(atari57.ALL_LEVELS) == len(set(atari57.ALL_LEVELS)) == 57
  assert sorted(atari57.ALL_LEVELS) == atari57.ALL_LEVELS
  assert dict(atari57.LEVEL_MAPPING) == {n: n for n in atari57.ALL_LEVELS}
  for level in atari57.ALL_LEVELS:
    assert level.removeprefix('gym:') in gymnasium.registry


def test_reference_scores():
  human, rand = atari57.HUMAN_SCORES, atari57.RANDOM_SCORES
  assert list(human) == list(rand) == atari57.ALL_LEVELS
  assert (rand['gym:ALE/Pong-v5'], human['gym:ALE/Pong-v5']) == (-20.7, 14.6)
  assert human['gym:ALE/MontezumaRevenge-v5'] == 4753.3
  assert all(human[level] > rand[level] for level in human)
  # The columns' sums catch a slip of the pen in any of the 114 numbers.
  assert sum(human.values()) == pytest.approx(606494.2)
  assert sum(rand.values()) == pytest.approx(50864.9)


@pytest.mark.parametrize('aggregate', [np.median, np.mean])
def test_random_play_is_0_and_human_play_is_100(aggregate):
  score = atari57.compute_human_normalized_score
  assert score(_returns(atari57.RANDOM_SCORES), aggregate) == pytest.approx(0)
  assert score(_returns(atari57.HUMAN_SCORES), aggregate) == pytest.approx(100)


def test_median_and_mean_of_the_games_scores():
  """29 games like humans, one 10 times as good, the others at random."""
  returns = _returns(atari57.RANDOM_SCORES)
  for level in atari57.ALL_LEVELS[:29]:
    returns[level] = [atari57.HUMAN_SCORES[level]]
  score = atari57.compute_human_normalized_score
  assert score(returns) == pytest.approx(100)  # The 29th of 57.
  # Two episodes of Pong: 100 * ((312.3 + 352.3) / 2 + 20.7) / 35.3 = 1000.
  returns['gym:ALE/Pong-v5'] = [312.3, 352.3]
  assert score(returns, np.mean) == pytest.approx((29 * 100 + 1000) / 57)
  returns[atari57.ALL_LEVELS[0]] = returns[atari57.ALL_LEVELS[1]] = [-1e9]
  assert score(returns) == pytest.approx(0)


@pytest.mark.parametrize('returns', [None, []])
def test_level_without_returns_is_named(returns):
  everything = _returns(atari57.HUMAN_SCORES)
  everything['gym:ALE/Qbert-v5'] = returns
  if returns is None:
    del everything['gym:ALE/Qbert-v5']
  with pytest.raises(ValueError, match='gym:ALE/Qbert-v5'):
    atari57.compute_human_normalized_score(everything)


def test_unknown_level_is_named():
  everything = {**_returns(atari57.HUMAN_SCORES), 'gym:ALE/Tetris-v5': [1]}
  with pytest.raises(ValueError, match='gym:ALE/Tetris-v5'):
    atari57.compute_human_normalized_score(everything)
