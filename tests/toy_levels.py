# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Levels that a user makes of MiniGrid, Atari and ViZDoom, for tests.

None has a name from which one could tell what it is.
"""

import gymnasium as gym
from gymnasium import wrappers
from minigrid import minigrid_env
from minigrid import wrappers as minigrid_wrappers
from minigrid.core import grid, mission, world_object


class Corridor(minigrid_env.MiniGridEnv):
  """A plain level: walk to the goal at the other end."""

  def __init__(self, length=6, **kwargs):
    super().__init__(
      mission_space=mission.MissionSpace(lambda: 'walk to the end'),
      width=length,
      height=3,
      max_steps=5,
      **kwargs,
    )

  def _gen_grid(self, width, height):
    self.grid = grid.Grid(width, height)
    self.grid.wall_rect(0, 0, width, height)
    self.put_obj(world_object.Goal(), width - 2, 1)
    self.agent_pos, self.agent_dir = (1, 1), 0
    self.mission = 'walk to the end'


def _make_pong(**kwargs):
  """Doubles the rewards; has what makes it take any argument."""
  import ale_py

  gym.register_envs(ale_py)
  env = gym.make('ALE/Pong-v5', **kwargs)
  return wrappers.TransformReward(env, lambda reward: 2 * reward)


def _make_rigid_pong():
  return _make_pong()


def _make_preprocessed_pong(**kwargs):
  return wrappers.AtariPreprocessing(_make_pong(**kwargs), frame_skip=1)


def _make_doom(**kwargs):
  import vizdoom.gymnasium_wrapper  # noqa: F401 (registers)

  return gym.make('VizdoomBasic-v1', **kwargs)


class Whole(gym.Wrapper):
  """A class that makes what it wraps, and shows the codes of all of it."""

  def __init__(self, **kwargs):
    super().__init__(minigrid_wrappers.FullyObsWrapper(Corridor(**kwargs)))


def _make_drawn(**kwargs):
  return minigrid_wrappers.RGBImgObsWrapper(Corridor(**kwargs), tile_size=5)


def _make_codes(**kwargs):
  return minigrid_wrappers.ImgObsWrapper(Corridor(**kwargs))


gym.register('MyLevel-v0', Corridor)
gym.register('MyWhole-v0', Whole)
gym.register('MyDrawn-v0', _make_drawn)
gym.register('MyCodes-v0', _make_codes)
gym.register('MyPong-v0', _make_pong)
gym.register('MyRigidPong-v0', _make_rigid_pong)
gym.register('MyPreprocessedPong-v0', _make_preprocessed_pong)
gym.register('MyDoom-v0', _make_doom)
