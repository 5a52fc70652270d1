# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Gymnasium environments with odd rewards: `gym:toy_rewards:Huge-v0`."""

import gymnasium as gym

from toy_gym import Toy


class Rewards(Toy):
  """Gives the same reward at each of its ten steps."""

  def __init__(self, reward):
    super().__init__('Grey')
    self._reward = reward

  def step(self, action):
    observation, _, *ends = super().step(action)
    return observation, self._reward, *ends


# A float32, but the sum of ten is none.
gym.register('Huge-v0', Rewards, kwargs={'reward': 1e38})
gym.register('Nan-v0', Rewards, kwargs={'reward': float('nan')})
