# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Levels and suites: what can be played, and how well people play it.

In: the name of a level or suite and `EnvironmentSettings`. Out: a `Game`,
which says what is played, and the reference scores of levels.
"""

import collections
import concurrent.futures
import functools

import numpy as np

import atari57
import dmlab30
import environments
from errors import UserError

# A benchmark of many levels: the module with its levels and reference scores,
# the folder of the levels, and its scores: functions of the returns by level.
Suite = collections.namedtuple('Suite', 'module folder aggregates')

SUITES = {
  'dmlab30': Suite(
    dmlab30,
    'contributed/dmlab30/',
    {
      'no_cap': functools.partial(
        dmlab30.compute_human_normalized_score, per_level_cap=None
      ),
      'cap_100': functools.partial(
        dmlab30.compute_human_normalized_score, per_level_cap=100
      ),
    },
  ),
  'atari57': Suite(
    atari57,
    '',
    {
      'median': atari57.compute_human_normalized_score,
      'mean': functools.partial(
        atari57.compute_human_normalized_score, aggregate=np.mean
      ),
    },
  ),
}

# What is played: the class of the levels' family, the levels' names for people
# and for the environments, the `EnvironmentSettings`, what `describe` returned
# for them, and a dict from the names of the levels that can't be played to the
# reasons.
Game = collections.namedtuple(
  'Game', 'family names levels settings spec missing'
)


def choose_game(level_name, settings, played=None):
  """Finds and checks what is to be played.

  Args:
    level_name: of a level or a suite.
    settings: `EnvironmentSettings`; in a test, the suite's test levels are
      played.
    played: indices of those levels of a suite that this program plays itself,
      which alone are checked; None for all.

  Returns:
    `Game`. In a test, some of its levels may be missing.

  Raises:
    UserError: it can't be played.
  """
  names, suite = [level_name], SUITES.get(level_name)
  if suite:
    mapping = suite.module.LEVEL_MAPPING
    names = list(mapping.values() if settings.is_test else mapping)
  levels = [_full_name(name) for name in names]
  family = environments.family_of(levels[0])

  def describe(level):
    try:
      return family.describe(level, settings)
    except ValueError as error:
      return UserError(str(error))

  if played is None:
    played = range(len(names))
  checked = {names[i % len(names)]: levels[i % len(names)] for i in played}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    specs = dict(
      zip(checked, pool.map(describe, checked.values()), strict=True)
    )
  missing = {
    name: specs.pop(name)
    for name in checked
    if isinstance(specs[name], UserError)
  }
  # A test plays the other levels, and reports these as missing.
  if missing and not (settings.is_test and specs):
    raise next(iter(missing.values()))
  spec = next(iter(specs.values()))
  return Game(family, names, levels, settings, spec, missing)


def _full_name(name):
  """Returns the name by which an environment knows the level."""
  for suite in SUITES.values():
    mapping = suite.module.LEVEL_MAPPING
    if name in mapping or name in mapping.values():
      return suite.folder + name
  return name


def training_names(names):
  """Returns the names of levels in training; in a test, suites have others."""
  trained = {
    test: train
    for suite in SUITES.values()
    for train, test in suite.module.LEVEL_MAPPING.items()
  }
  return [trained.get(name, name) for name in names]


def reference_scores(names):
  """Returns a dict from levels of suites to their (human, random) returns."""
  references = {}
  for suite in SUITES.values():
    module = suite.module
    for name in names:
      level = module.LEVEL_MAPPING.get(name, name)
      if level in module.HUMAN_SCORES:
        references[name] = (
          module.HUMAN_SCORES[level],
          module.RANDOM_SCORES[level],
        )
  return references


def aggregates(level_name):
  """Returns a dict from the names of a suite's scores to functions.

  Each takes a dict from level to returns. A single level has no such scores.
  """
  suite = SUITES.get(level_name)
  return suite.aggregates if suite else {}
