# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of levels and suites: what a program checks before it plays."""

import pytest

import environments
import levels
from errors import UserError


class Family:
  """Of levels whose checks are recorded; that of `broken` fails."""

  def __init__(self):
    self.described = []

  def describe(self, level, settings):
    del settings
    self.described.append(level)
    if level == 'atari57/broken':
      raise ValueError('It is broken.')
    return f'spec of {level}'


@pytest.fixture
def family(monkeypatch):
  family = Family()
  monkeypatch.setattr(environments, 'family_of', lambda level: family)
  return family


def test_task_checks_the_levels_that_it_plays(family):
  """Numbers of environments go round through the suite's levels."""
  names = list(levels.SUITES['atari57'].module.LEVEL_MAPPING)
  settings = environments.EnvironmentSettings(
    84, 84, 4, '', '', is_test=False, full_action_set=True
  )
  game = levels.choose_game('atari57', settings, played=range(56, 59))
  expected = {names[56], names[0], names[1]}
  assert len(family.described) == 3
  assert {level.rpartition('/')[2] for level in family.described} == {
    name.rpartition('/')[2] for name in expected
  }
  assert game.names == names
  family.described.clear()
  levels.choose_game('atari57', settings)
  assert len(family.described) == 57


def test_level_that_can_not_be_played_is_told(family):
  settings = environments.EnvironmentSettings(
    84, 84, 4, '', '', is_test=False, full_action_set=True
  )
  with pytest.raises(UserError, match='It is broken'):
    levels.choose_game('atari57/broken', settings)
