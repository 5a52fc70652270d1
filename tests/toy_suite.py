# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The program with a suite of two toys more, for tests: --level_name=toys."""

import types

from absl import app

import experiment
import levels

SMALL, LARGE = 'gym:toy_gym:Small-v0', 'gym:toy_gym:Large-v0'

levels.SUITES['toys'] = levels.Suite(
  types.SimpleNamespace(
    LEVEL_MAPPING={SMALL: 'gym:toy_gym:SmallTest-v0', LARGE: LARGE},
    HUMAN_SCORES={},
    RANDOM_SCORES={},
  ),
  '',
  {},
)

if __name__ == '__main__':
  app.run(experiment.main, flags_parser=experiment._parse_flags)
