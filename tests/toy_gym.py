# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Gymnasium environments of a user, for tests: `gym:toy_gym:Grey-v0`.

The first row of each frame tells what happened: the number of steps, the number
of the episode, a random number and the last action. A step's reward is 10 times
its number plus the action.
"""

import contextlib
import fractions
import os
import signal
import time

import gymnasium as gym
import numpy as np
import tree
from gymnasium import spaces

HEIGHT, WIDTH = 4, 6


class Toy(gym.Env):
  """An environment with one of the `LAYOUTS` of observations."""

  def __init__(self, layout, length=10, start=0, truncates=False):
    self.observation_space, self._arrange = LAYOUTS[layout]
    self.action_space = spaces.Discrete(3, start=start)
    self._length = length
    self._truncates = truncates
    self._episode = 0

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self._episode += 1
    self._num_steps = 0
    self._random = self.np_random.integers(256)
    return self._observation(0), {}

  def step(self, action):
    if not self.action_space.contains(action):
      raise ValueError(f'{action!r} is no action.')
    return self._step(action)

  def _step(self, action):
    self._num_steps += 1
    ends = self._num_steps == self._length
    return (
      self._observation(action),
      10 * self._num_steps + action,
      ends and not self._truncates,
      ends and self._truncates,
      {},
    )

  def _observation(self, action):
    frame = np.zeros((HEIGHT, WIDTH), np.uint8)
    episode = self._episode % 256
    frame[0, :4] = self._num_steps, episode, self._random, action % 256
    frame[1:] = np.arange(18).reshape(3, 6) * 10
    return self._arrange(frame)


def _image(*shape, dtype=np.uint8):
  return spaces.Box(0, 255, shape, dtype)


def _coloured(frame):
  return np.stack([frame, frame + 1, frame + 2], -1)


# The space of the observations, and how a grey frame becomes one.
LAYOUTS = {
  # With strides of its own, as views have them.
  'Grey': (
    _image(HEIGHT, WIDTH),
    lambda frame: np.ascontiguousarray(frame[::-1, ::-1].T).T[::-1, ::-1],
  ),
  'Grey3d': (_image(HEIGHT, WIDTH, 1), lambda frame: frame[..., None]),
  'Rgb': (_image(HEIGHT, WIDTH, 3), _coloured),
  'Dict': (
    spaces.Dict(
      codes=_image(HEIGHT, WIDTH, 3),
      rgb=_image(HEIGHT, WIDTH, 3),
      speed=spaces.Box(-1, 1, (2,)),
      task=spaces.Text(30),
    ),
    lambda frame: {
      'codes': np.full((HEIGHT, WIDTH, 3), 7, np.uint8),
      'rgb': _coloured(frame),
      'speed': np.zeros(2, np.float32),
      'task': 'find the exit',
    },
  ),
  # An image under a name that nobody could foresee.
  'Named': (
    spaces.Dict(vector=_image(5), what_i_see=_image(HEIGHT, WIDTH)),
    lambda frame: {'vector': frame[0, :5], 'what_i_see': frame},
  ),
  'Float': (_image(HEIGHT, WIDTH, 3, dtype=np.float32), _coloured),
  'ChannelsFirst': (_image(3, HEIGHT, WIDTH), _coloured),
  'Vector': (_image(5), lambda frame: frame[0, :5]),
  'Text': (spaces.Text(30), lambda frame: 'no image'),
}


class Thirds(gym.Env):
  """Asks ten times in which third of the frame a bright square is."""

  def __init__(self):
    self.observation_space = _image(36, 48, 1)
    self.action_space = spaces.Discrete(3)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self._num_steps = 0
    return self._observation(), {}

  def step(self, action):
    reward = 1.0 if np.array_equal(action, self._answer) else -1.0
    self._num_steps += 1
    return self._observation(), reward, self._num_steps == 10, False, {}

  def _observation(self):
    self._answer = self.np_random.integers(3)
    x = 16 * self._answer + self.np_random.integers(8)
    return self._square(x, self.np_random.integers(28))

  def _square(self, x, y):
    frame = np.zeros((36, 48, 1), np.uint8)
    frame[y : y + 8, x : x + 8] = 255
    return frame


class Sixths(Thirds):
  """Asks in which third and in which half: wrong unless both are right."""

  def __init__(self):
    super().__init__()
    self.action_space = spaces.MultiDiscrete([3, 2])

  def _observation(self):
    self._answer = column, row = self.np_random.integers([3, 2])
    x, y = self.np_random.integers([8, 11])
    return self._square(16 * column + x, 18 * row + y)


# Spaces of actions that are made of several, by name, and their numbers.
COMPOSED = {
  'binary': (spaces.MultiBinary(3), list),
  'grid': (spaces.MultiBinary((2, 2)), np.ravel),
  'one': (spaces.MultiDiscrete([3]), list),
  'discrete': (
    spaces.MultiDiscrete([2, 3], start=[0, -1], dtype='int16'),
    list,
  ),
  'tuple': (
    spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2))),
    lambda action: [action[0], *action[1]],
  ),
  'dict': (
    spaces.Dict(
      turn=spaces.Discrete(3, start=4),
      # As texts, these names would be sorted in another way.
      buttons=spaces.Dict({10: spaces.Discrete(2), 9: spaces.Discrete(4)}),
    ),
    lambda action: [action['buttons'][i] for i in (10, 9)] + [action['turn']],
  ),
  'part': (
    spaces.Dict(jump=spaces.Discrete(2), turn=spaces.Box(-1, 1, (3,))),
    None,
  ),
  'box': (spaces.Box(-1, 1, (3,)), None),
  'nothing': (spaces.Tuple(()), None),
}


class Composed(Toy):
  """A step's reward has the numbers of its action as digits, in a row."""

  def __init__(self, actions):
    super().__init__('Grey')
    self.action_space, self._numbers = COMPOSED[actions]

  def step(self, action):
    tree.map_structure(self._check, action, self.action_space.sample())
    if not self.action_space.contains(action):
      raise ValueError(f'{action!r} is no action.')
    observation, _, *ends = super()._step(0)
    digits = [int(number) for number in self._numbers(action)]
    return observation, np.dot(digits, 10 ** np.arange(len(digits))), *ends

  def _check(self, action, sample):
    if type(action) is not type(sample) or action.dtype != sample.dtype:
      raise ValueError(f'{action!r} has another type than {sample!r}.')


class Bandit(gym.Env):
  """Shows one of three numbers; the right answer is the number plus a shift.

  The first row of the frame tells the shift as well.
  """

  def __init__(self, reward, shift):
    self.observation_space = _image(HEIGHT, WIDTH)
    self.action_space = spaces.Discrete(3)
    self._reward = reward
    self._shift = shift

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self._num_steps = 0
    return self._observation(), {}

  def step(self, action):
    is_right = action == (self._number + self._shift) % 3
    self._num_steps += 1
    ends = self._num_steps == 10
    return self._observation(), is_right * self._reward, ends, False, {}

  def _observation(self):
    self._number = self.np_random.integers(3)
    frame = np.zeros((HEIGHT, WIDTH), np.uint8)
    frame[0] = 255 * self._shift
    frame[1:, 2 * self._number : 2 * self._number + 2] = 255
    return frame


for _name in ('Small', 'SmallTest'):
  gym.register(f'{_name}-v0', Bandit, kwargs={'reward': 1, 'shift': 1})
gym.register('Large-v0', Bandit, kwargs={'reward': 1000, 'shift': 0})
gym.register('Thirds-v0', Thirds)
gym.register('Sixths-v0', Sixths)
for _layout in LAYOUTS:
  gym.register(f'{_layout}-v0', Toy, kwargs={'layout': _layout})
gym.register('Start-v0', Toy, kwargs={'layout': 'Grey', 'start': -1})
gym.register('Cut-v0', Toy, kwargs={'layout': 'Grey', 'truncates': True})
# Gymnasium's own limit.
gym.register('Limit-v0', Toy, kwargs={'layout': 'Grey'}, max_episode_steps=5)


class Lengths(gym.Env):
  """Has, by chance, episodes of 1 step or of 60: the latter return 100 more.

  Where frames differ, so do the actions; each adds its number to the return.
  """

  def __init__(self):
    self.observation_space = _image(HEIGHT, WIDTH)
    self.action_space = spaces.Discrete(3)

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.length = self._left = 60 if self.np_random.random() < 0.5 else 1
    return self._observation(), {}

  def step(self, action):
    self._left -= 1
    ends = self._left == 0
    bonus = 100 if ends and self.length == 60 else 0
    return self._observation(), int(action) + bonus, ends, False, {}

  def _observation(self):
    return self.np_random.integers(256, size=(HEIGHT, WIDTH), dtype=np.uint8)


class Slow(Toy):
  """Takes long to begin an episode after its first, in one of two processes."""

  def reset(self, *, seed=None, options=None):
    # Whose process makes the folder is the slow one.
    if self._episode == 0:
      with contextlib.suppress(FileExistsError):
        os.mkdir(os.environ['SLOW'])
        self._is_slow = True
    elif getattr(self, '_is_slow', False):
      os.rename(os.environ['SLOW'], os.environ['SLOW'] + '.begun')
      time.sleep(20)
    return super().reset(seed=seed, options=options)


class Dies(Toy):
  """Kills its process in some of the episodes."""

  def reset(self, *, seed=None, options=None):
    observation = super().reset(seed=seed)
    if self._random % 2:
      os.kill(os.getpid(), signal.SIGKILL)
    return observation


class Ones(Toy):
  """Gives a reward of 1 at each step."""

  def __init__(self, **kwargs):
    super().__init__('Grey', **kwargs)

  def step(self, action):
    observation, _, *rest = super().step(action)
    return observation, 1, *rest


# What the third step of an episode gives, by name.
REWARDS = {
  'nan': np.float64('nan'),
  'inf': float('-inf'),
  'large': 1e39,  # Infinite as a float32.
  'none': None,
  'text': 'much',
  'several': np.ones(2),
  'bool': np.True_,
  'array': np.array([2.5], np.float16),
  'fraction': fractions.Fraction(5, 2),
}


class Rewarding(Toy):
  """Gives one of the `REWARDS` at the third step of its episodes."""

  def __init__(self, reward):
    super().__init__('Grey')
    self._reward = REWARDS[reward]

  def step(self, action):
    observation, reward, *rest = super().step(action)
    return observation, self._reward if self._num_steps == 3 else reward, *rest


class Typed(Toy):
  """Its reward is 1 for actions of its space's dtype."""

  def __init__(self):
    super().__init__('Grey')
    self.action_space = spaces.Discrete(3, dtype=np.int16)

  def step(self, action):
    observation, _, *rest = super().step(action)
    return observation, type(action) is np.int16, *rest


class Secretive(Toy):
  """Can't be made, and says why in two lines."""

  def __init__(self):
    raise RuntimeError('no licence file\n  see http://localhost')


gym.register('Composed-v0', Composed)
gym.register('Ones-v0', Ones)
gym.register('Rewarding-v0', Rewarding)
gym.register('Typed-v0', Typed)
gym.register('Secretive-v0', Secretive)
gym.register('Lengths-v0', Lengths)
gym.register('Slow-v0', Slow, kwargs={'layout': 'Grey'})
gym.register('Dies-v0', Dies, kwargs={'layout': 'Grey'})
