# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the assignment of levels to actors."""

import heapq

import numpy as np
import pytest

from level_assignment import LevelAssignment

_UNROLL = 400  # Frames.


def simulate(speeds, num_actors, balances, seconds, first=0, move_seconds=5):
  """Plays levels of some speeds in a simulated time.

  Args:
    speeds: frames/s of an actor on each level.
    num_actors: int.
    balances: bool.
    seconds: float.
    first: int, number of the first actor.
    move_seconds: float, for an actor to begin on another level.

  Returns:
    Frames by level, float64 [num_levels]; and the number of moves.
  """
  assignment = LevelAssignment(len(speeds), num_actors, first, balances)
  frames = np.zeros(len(speeds))
  num_moves = 0
  played = [0] * num_actors  # Unrolls of the episode: nine in each.
  events = [(0.0, actor) for actor in range(num_actors)]
  while events[0][0] < seconds:
    now, actor = heapq.heappop(events)
    level = assignment.levels()[actor]
    frames[level] += _UNROLL
    played[actor] += 1
    moved = assignment.after_unroll(actor, _UNROLL, played[actor] % 9 == 0)
    now += _UNROLL / speeds[level]
    if moved is not None:
      assert moved == assignment.levels()[actor] != level
      num_moves += 1
      now += move_seconds
    heapq.heappush(events, (now, actor))
  return frames, num_moves


# 30 levels, from 100 to 5,000 frames/s.
_SPEEDS = np.geomspace(100, 5000, 30)


def test_in_turn_levels_keep_their_actors():
  assignment = LevelAssignment(3, 4, 5, balances=False)
  assert assignment.levels() == [2, 0, 1, 2]
  frames, num_moves = simulate(_SPEEDS, 30, False, 200)
  assert num_moves == 0
  np.testing.assert_allclose(frames, _SPEEDS * 200, rtol=0.05)


@pytest.mark.parametrize('num_actors', [1, 8, 30])
def test_balanced_levels_get_the_same_number_of_frames(num_actors):
  seconds = 150_000 / num_actors
  frames, num_moves = simulate(_SPEEDS, num_actors, True, seconds)
  share = frames / frames.mean()
  assert share.min() > 0.9
  assert share.max() < 1.1
  # All actors together play as the harmonic mean of the speeds; moves cost some
  # of it.
  best = num_actors * seconds / np.mean(1 / _SPEEDS)
  assert 0.75 * best < frames.sum() < 1.01 * best
  # Not after each episode, unless it must.
  if num_actors >= 30:
    assert num_moves < 0.6 * frames.sum() / (9 * _UNROLL)


def test_levels_of_equal_speed_hardly_move():
  frames, num_moves = simulate([500.0] * 6, 6, True, 2000)
  assert num_moves <= 6
  np.testing.assert_allclose(frames, frames.mean(), rtol=0.1)


def test_actors_that_leave_at_the_same_time_go_to_different_levels():
  assignment = LevelAssignment(4, 2, 0, balances=True)
  assert assignment.levels() == [0, 1]
  assert assignment.after_unroll(0, 400, False) is None
  assert assignment.after_unroll(1, 400, False) is None
  moved = [assignment.after_unroll(actor, 400, True) for actor in (0, 1)]
  assert moved == [2, 3]
  assert assignment.levels() == moved
