# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The levels of DMLab-30 and the suite's human-normalised score.

The reference scores are those of IMPALA's appendix
(https://arxiv.org/abs/1802.01561): mean returns of human players and of an
agent that picks actions at random.
"""

import collections

import numpy as np

from scores import human_normalized

# Mean returns (human, random) by test level, in the suite's order.
_REFERENCE_SCORES = {
  'rooms_collect_good_objects_test': (10, 0.073),
  'rooms_exploit_deferred_effects_test': (85.65, 8.501),
  'rooms_select_nonmatching_object': (65.9, 0.312),
  'rooms_watermaze': (54, 4.065),
  'rooms_keys_doors_puzzle': (53.8, 4.135),
  'language_select_described_object': (389.5, -0.07),
  'language_select_located_object': (280.7, 1.929),
  'language_execute_random_task': (254.05, -5.913),
  'language_answer_quantitative_question': (184.5, -0.33),
  'lasertag_one_opponent_small': (12.65, -0.224),
  'lasertag_three_opponents_small': (18.55, -0.214),
  'lasertag_one_opponent_large': (18.6, -0.083),
  'lasertag_three_opponents_large': (31.5, -0.102),
  'natlab_fixed_large_map': (36.9, 2.173),
  'natlab_varying_map_regrowth': (24.45, 2.989),
  'natlab_varying_map_randomized': (42.35, 7.346),
  'skymaze_irreversible_path_hard': (100, 0.1),
  'skymaze_irreversible_path_varied': (100, 14.4),
  'psychlab_arbitrary_visuomotor_mapping': (58.75, 0.163),
  'psychlab_continuous_recognition': (58.3, 0.224),
  'psychlab_sequential_comparison': (39.5, 0.129),
  'psychlab_visual_search': (78.5, 0.085),
  'explore_object_locations_small': (74.45, 3.575),
  'explore_object_locations_large': (65.65, 4.673),
  'explore_obstructed_goals_small': (206, 6.76),
  'explore_obstructed_goals_large': (119.5, 2.61),
  'explore_goal_locations_small': (267.5, 7.66),
  'explore_goal_locations_large': (194.5, 3.14),
  'explore_object_rewards_few': (77.7, 2.073),
  'explore_object_rewards_many': (106.7, 2.438),
}

# Two levels hold objects out for testing; the others serve for both.
_TRAIN_LEVELS = {
  'rooms_collect_good_objects_test': 'rooms_collect_good_objects_train',
  'rooms_exploit_deferred_effects_test': 'rooms_exploit_deferred_effects_train',
}

# Train level to test level.
LEVEL_MAPPING = collections.OrderedDict(
  (_TRAIN_LEVELS.get(test_level, test_level), test_level)
  for test_level in _REFERENCE_SCORES
)

# Train levels in the suite's order.
ALL_LEVELS = list(LEVEL_MAPPING)

# By test level.
HUMAN_SCORES = {level: human for level, (human, _) in _REFERENCE_SCORES.items()}
RANDOM_SCORES = {level: rand for level, (_, rand) in _REFERENCE_SCORES.items()}


def compute_human_normalized_score(level_returns, per_level_cap):
  """Computes the suite's score in percent: random play is 0, human play 100.

  Source: https://arxiv.org/abs/1802.01561, section 5.3. A level's score is

    100 * (mean return - random) / (human - random)

  at most `per_level_cap`; the suite's score is the mean over its 30 levels.

  Args:
    level_returns: dict from level name to a sequence of episode returns, with
      an entry for each of the 30 levels. A level goes by its train or by its
      test name.
    per_level_cap: float, upper bound of a level's score in percent (the paper
      reports 100), or None for no bound.

  Returns:
    float, the score in percent.

  Raises:
    ValueError: if a level is missing, unknown, given under both names or
      without returns.
  """
  test_level_returns = {}
  for level, returns in level_returns.items():
    test_level = LEVEL_MAPPING.get(level, level)
    if test_level not in HUMAN_SCORES:
      raise ValueError(f'Not a level of DMLab-30: {level!r}')
    if test_level in test_level_returns:
      raise ValueError(f'Both the train and the test level given: {level!r}')
    if len(returns) == 0:
      raise ValueError(f'No episode returns for level {level!r}')
    test_level_returns[test_level] = returns

  missing = [
    train_level
    for train_level, test_level in LEVEL_MAPPING.items()
    if test_level not in test_level_returns
  ]
  if missing:
    raise ValueError(f'Levels without an entry: {", ".join(missing)}')

  scores = []
  for level, returns in test_level_returns.items():
    score = human_normalized(returns, HUMAN_SCORES[level], RANDOM_SCORES[level])
    scores.append(score if per_level_cap is None else min(score, per_level_cap))
  return float(np.mean(scores))
