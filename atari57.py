# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The games of Atari-57 and the suite's human-normalised scores.

The reference scores are those that the paper's appendix normalises with
(https://arxiv.org/abs/1802.01561): mean returns of human players and of an
agent that picks actions at random.
"""

import collections

import numpy as np

from scores import human_normalized

# Mean returns (human, random) by game, in the alphabet's order.
_REFERENCE_SCORES = {
  'Alien': (7127.7, 227.8),
  'Amidar': (1719.5, 5.8),
  'Assault': (742, 222.4),
  'Asterix': (8503.3, 210),
  'Asteroids': (47388.7, 719.1),
  'Atlantis': (29028.1, 12850),
  'BankHeist': (753.1, 14.2),
  'BattleZone': (37187.5, 2360),
  'BeamRider': (16926.5, 363.9),
  'Berzerk': (2630.4, 123.7),
  'Bowling': (160.7, 23.1),
  'Boxing': (12.1, 0.1),
  'Breakout': (30.5, 1.7),
  'Centipede': (12017, 2090.9),
  'ChopperCommand': (7387.8, 811),
  'CrazyClimber': (35829.4, 10780.5),
  'Defender': (18688.9, 2874.5),
  'DemonAttack': (1971, 152.1),
  'DoubleDunk': (-16.4, -18.6),
  'Enduro': (860.5, 0),
  'FishingDerby': (-38.7, -91.7),
  'Freeway': (29.6, 0),
  'Frostbite': (4334.7, 65.2),
  'Gopher': (2412.5, 257.6),
  'Gravitar': (3351.4, 173),
  'Hero': (30826.4, 1027),
  'IceHockey': (0.9, -11.2),
  'Jamesbond': (302.8, 29),
  'Kangaroo': (3035, 52),
  'Krull': (2665.5, 1598),
  'KungFuMaster': (22736.3, 258.5),
  'MontezumaRevenge': (4753.3, 0),
  'MsPacman': (6951.6, 307.3),
  'NameThisGame': (8049, 2292.3),
  'Phoenix': (7242.6, 761.4),
  'Pitfall': (6463.7, -229.4),
  'Pong': (14.6, -20.7),
  'PrivateEye': (69571.3, 24.9),
  'Qbert': (13455, 163.9),
  'Riverraid': (17118, 1338.5),
  'RoadRunner': (7845, 11.5),
  'Robotank': (11.9, 2.2),
  'Seaquest': (42054.7, 68.4),
  'Skiing': (-4336.9, -17098.1),
  'Solaris': (12326.7, 1236.3),
  'SpaceInvaders': (1668.7, 148),
  'StarGunner': (10250, 664),
  'Surround': (6.5, -10),
  'Tennis': (-8.3, -23.8),
  'TimePilot': (5229.2, 3568),
  'Tutankham': (167.6, 11.4),
  'UpNDown': (11693.2, 533.4),
  'Venture': (1187.5, 0),
  'VideoPinball': (17667.9, 16256.9),
  'WizardOfWor': (4756.5, 563.5),
  'YarsRevenge': (54576.9, 3092.9),
  'Zaxxon': (9173.3, 32.5),
}

# By level, the name of the game's Gymnasium environment.
HUMAN_SCORES = {
  f'gym:ALE/{game}-v5': human for game, (human, _) in _REFERENCE_SCORES.items()
}
RANDOM_SCORES = {
  f'gym:ALE/{game}-v5': rand for game, (_, rand) in _REFERENCE_SCORES.items()
}

# Train level to test level: all games serve for both.
LEVEL_MAPPING = collections.OrderedDict(
  (level, level) for level in HUMAN_SCORES
)

# In the suite's order.
ALL_LEVELS = list(LEVEL_MAPPING)


def compute_human_normalized_score(level_returns, aggregate=np.median):
  """Computes the suite's score in percent: random play is 0, human play 100.

  Source: https://arxiv.org/abs/1802.01561, section 5.3.2. A game's score is

    100 * (mean return - random) / (human - random)

  Args:
    level_returns: dict from level name to a sequence of episode returns, with
      an entry for each of the 57 levels.
    aggregate: function from the games' scores, a list of floats, to the
      suite's: the paper reports the median, and often the mean.

  Returns:
    float, the score in percent.

  Raises:
    ValueError: if a level is missing, unknown or without returns.
  """
  unknown = [level for level in level_returns if level not in LEVEL_MAPPING]
  if unknown:
    raise ValueError(f'Not levels of Atari-57: {", ".join(unknown)}')
  missing = [
    level for level in ALL_LEVELS if len(level_returns.get(level, ())) == 0
  ]
  if missing:
    raise ValueError(f'Levels without episode returns: {", ".join(missing)}')
  scores = [
    human_normalized(returns, HUMAN_SCORES[level], RANDOM_SCORES[level])
    for level, returns in level_returns.items()
  ]
  return float(aggregate(scores))
