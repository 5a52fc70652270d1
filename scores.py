# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The human-normalised score, in which results on many levels are compared.

In: episode returns of a level and its reference scores. Out: a percentage.
"""

import numpy as np


def human_normalized(returns, human, rand):
  """Computes a level's score in percent: random play is 0, human play 100.

  Source: https://arxiv.org/abs/1802.01561, section 5.3:

    100 * (mean return - random) / (human - random)

  Args:
    returns: sequence of episode returns, at least one.
    human: float, mean return of human play.
    rand: float, mean return of random play.

  Returns:
    float.
  """
  return float(100 * (np.mean(returns) - rand) / (human - rand))
