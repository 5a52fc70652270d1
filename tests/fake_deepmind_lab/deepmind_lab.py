# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A strict stand-in for DeepMind Lab's Python module, for tests only.

It refuses what the real module refuses (design: what was observed there), knows
a handful of levels, and plays a game whose course can be told beforehand:

  - an episode takes `episode_length(level, seed)` frames;
  - a frame's reward is 1 for moving forward, -1 for moving backward, 10 for
    firing, and 100 more in the last frame of the episode;
  - the picture is `frame(level, seed, num_steps, ...)`;
  - language levels load another map after every `RESTART_FRAMES` frames.

Environment variables make it slow, or its episodes long, in what they say:

  FAKE_DMLAB_COMPILE_SECONDS   of a processor, for a map to compile
  FAKE_DMLAB_STEP_SECONDS      of a processor, for a frame
  FAKE_DMLAB_EPISODE_FRAMES    of each episode, instead of `episode_length`
  FAKE_DMLAB_SLEEPS            1: it sleeps for these times instead, as if there
                               were a processor for each
"""

import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
import weakref
import zlib

import numpy as np

# What there is to know about a level.
_INSTRUCTED, _COMPILES, _HELD_OUT, _NEEDS_DATA = 'INSTR', 'map', 'test', 'data'

_DMLAB30 = 'contributed/dmlab30/'
_LEVELS = {
  'seekavoid_arena_01': {_INSTRUCTED},
  'demos/extra_entities': set(),
  _DMLAB30 + 'explore_goal_locations_small': {_INSTRUCTED, _COMPILES},
  _DMLAB30 + 'language_select_located_object': {_INSTRUCTED, _COMPILES},
  _DMLAB30 + 'rooms_collect_good_objects_train': {_INSTRUCTED},
  _DMLAB30 + 'rooms_collect_good_objects_test': {_INSTRUCTED, _HELD_OUT},
  _DMLAB30 + 'rooms_exploit_deferred_effects_train': {_INSTRUCTED},
  _DMLAB30 + 'rooms_exploit_deferred_effects_test': {_INSTRUCTED, _HELD_OUT},
  _DMLAB30 + 'psychlab_continuous_recognition': {_INSTRUCTED, _NEEDS_DATA},
  _DMLAB30 + 'psychlab_arbitrary_visuomotor_mapping': {
    _INSTRUCTED,
    _NEEDS_DATA,
  },
}
_NUMBERS = {'width': '320', 'height': '240', 'fps': '60', 'mixerSeed': '0'}
_TEXTS = {
  'levelDirectory',
  'appendCommand',
  'datasetPath',
  'allowHoldOutLevels',
  'logLevel',
}
_ACTIONS = (
  ('LOOK_LEFT_RIGHT_PIXELS_PER_FRAME', -512, 512),
  ('LOOK_DOWN_UP_PIXELS_PER_FRAME', -512, 512),
  ('STRAFE_LEFT_RIGHT', -1, 1),
  ('MOVE_BACK_FORWARD', -1, 1),
  ('FIRE', 0, 1),
  ('JUMP', 0, 1),
  ('CROUCH', 0, 1),
)

RESTART_FRAMES = 16
NUM_IMAGES = 2400  # Of the data set.

_runfiles_path = os.path.dirname(os.path.abspath(__file__))


def version():
  return 'stand-in'


def runfiles_path():
  return _runfiles_path


def set_runfiles_path(path):
  global _runfiles_path
  if not isinstance(path, str):
    raise TypeError('set_runfiles_path() takes a str')
  _runfiles_path = path


def _variable(name):
  return float(os.environ.get(f'FAKE_DMLAB_{name}', 0))


def _work(seconds):
  """Takes so much time of a processor."""
  if _variable('SLEEPS'):
    time.sleep(seconds)
    return
  end = time.process_time() + seconds
  while time.process_time() < end:
    _hash(end)


def episode_length(level, seed):
  """Returns the number of frames of an episode: 30 to 49."""
  return int(_variable('EPISODE_FRAMES')) or 30 + _hash(level, seed) % 20


def image_of(level, seed):
  """Returns the number of the data set's image that an episode shows."""
  return 1 + _hash(level, seed) % NUM_IMAGES


def frame(level, seed, num_steps, height, width, mixer_seed=0):
  """Returns the picture after so many frames, uint8 [height, width, 3]."""
  generator = np.random.RandomState(_hash(level, seed, num_steps, mixer_seed))
  return generator.randint(0, 256, (height, width, 3)).astype(np.uint8)


def instruction(level, seed):
  """Returns what an episode asks for: only language levels say something."""
  if '/language_' not in level:
    return ''
  return 'fetch the ' + ('red', 'green', 'blue')[seed % 3] + ' ball'


def map_of(level, seed, mixer_seed=0, part=0):
  """Returns the compiled map of an episode, or of a part of it, as bytes."""
  return f'map of {level} {seed} {mixer_seed} {part} '.encode() * 1000


def _hash(*parts):
  return zlib.crc32(repr(parts).encode())


def _require(is_fine, error, message):
  if not is_fine:
    raise error(message)


class Lab:
  """One environment."""

  # Like the real one, it takes no attributes beside its own.
  __slots__ = (
    '__weakref__',
    '_config',
    '_generator',
    '_is_closed',
    '_level',
    '_level_cache',
    '_num_steps',
    '_observations',
    '_remove_folder',
    '_seed',
    '_temp_folder',
  )

  def __init__(
    self,
    level,
    observations,
    config={},  # noqa: B006 - never changed, and the real signature.
    renderer='software',
    level_cache=None,
    temp_folder=None,
  ):
    _require(isinstance(level, str), TypeError, 'level must be a str')
    _require(
      isinstance(observations, list), TypeError, 'observations must be a list'
    )
    _require(isinstance(config, dict), TypeError, 'config must be a dict')
    for key, value in config.items():
      _require(
        isinstance(key, str) and isinstance(value, str),
        TypeError,
        'config must be a dict of str to str',
      )
    _require(
      renderer in ('software', 'hardware'),
      RuntimeError,
      f'Invalid renderer: {renderer}',
    )
    for key, value in config.items():
      _require(
        key in _TEXTS or (key in _NUMBERS and value.isdigit()),
        RuntimeError,
        f'Invalid setting: {key} = {value}',
      )
    _require(
      level in _LEVELS,
      RuntimeError,
      f'Failed to init environment - "Level not found: {level}"',
    )
    _require(
      _HELD_OUT not in _LEVELS[level]
      or config.get('allowHoldOutLevels') == 'true',
      RuntimeError,
      'Failed to init environment - "Hold-out levels are not allowed."',
    )
    names = {'RGB_INTERLEAVED', 'RGB'} | ({'INSTR'} & _LEVELS[level])
    for name in observations:
      _require(name in names, ValueError, f'Unknown observation {name!r}.')
    self._level = level
    self._observations = tuple(observations)
    self._config = {**_NUMBERS, **config}
    self._level_cache = level_cache
    self._temp_folder = tempfile.mkdtemp(
      prefix='dmlab_temp_folder_', dir=temp_folder
    )
    # As the real one: only a killed process leaves it behind.
    self._remove_folder = weakref.finalize(
      self, shutil.rmtree, self._temp_folder, ignore_errors=True
    )
    self._generator = random.Random(0)
    self._is_closed = False
    self._seed = self._num_steps = None

  def reset(self, episode=-1, seed=None):
    self._require_open()
    _require(isinstance(episode, int), ValueError, 'episode must be an int')
    if seed is None:
      seed = self._generator.randrange(2**31)
    _require(isinstance(seed, int), ValueError, 'seed must be an int')
    traits = _LEVELS[self._level]
    if _NEEDS_DATA in traits:
      self._load_image(seed)
    if _COMPILES in traits:
      self._load_map(seed)
    self._seed, self._num_steps = seed, 0
    return True

  def step(self, action, num_steps=1):
    _require(isinstance(action, np.ndarray), TypeError, 'action: no ndarray')
    _require(
      action.dtype == np.intc and action.shape == (len(_ACTIONS),),
      ValueError,
      'action must have dtype np.intc and shape (7,)',
    )
    _require(isinstance(num_steps, int), TypeError, 'num_steps must be an int')
    self._require_running()
    reward = 0.0
    _work(num_steps * _variable('STEP_SECONDS'))
    for _ in range(num_steps):
      self._num_steps += 1
      if '/language_' in self._level and self._num_steps % RESTART_FRAMES == 0:
        self._load_map(self._seed, self._num_steps // RESTART_FRAMES)
      reward += float(action[3]) + 10.0 * float(action[4])
      if not self.is_running():
        return reward + 100.0
    return reward

  def is_running(self):
    self._require_open()
    return self._seed is not None and self._num_steps < episode_length(
      self._level, self._seed
    )

  def observations(self):
    self._require_running()
    picture = frame(
      self._level,
      self._seed,
      self._num_steps,
      int(self._config['height']),
      int(self._config['width']),
      int(self._config['mixerSeed']),
    )
    everything = {
      'RGB_INTERLEAVED': picture,
      'RGB': np.ascontiguousarray(np.moveaxis(picture, -1, 0)),
      'INSTR': instruction(self._level, self._seed),
    }
    return {name: everything[name] for name in self._observations}

  def events(self):
    self._require_open()
    return []

  def num_steps(self):
    self._require_open()
    return self._num_steps or 0

  def fps(self):
    return int(self._config['fps'])

  def observation_spec(self):
    size = int(self._config['height']), int(self._config['width'])
    return [
      {'name': 'RGB_INTERLEAVED', 'shape': (*size, 3), 'dtype': np.uint8},
      {'name': 'RGB', 'shape': (3, *size), 'dtype': np.uint8},
    ] + [
      {'name': name, 'shape': (), 'dtype': str}
      for name in sorted({'INSTR'} & _LEVELS[self._level])
    ]

  def action_spec(self):
    return [
      {'name': name, 'min': low, 'max': high} for name, low, high in _ACTIONS
    ]

  def close(self):
    self._is_closed = True
    self._remove_folder()

  def _load_image(self, seed):
    folder = self._config.get('datasetPath', '')
    _require(
      folder,
      RuntimeError,
      'Failed to start environment - assertion failed: no data set',
    )
    if folder == 'dummy':  # Plain colours.
      return
    path = os.path.join(folder, f'{image_of(self._level, seed):04d}.png')
    if not os.path.isfile(path):
      print(f'[image.load] - "{path}" could not be read', file=sys.stderr)
      os.abort()

  def _load_map(self, seed, part=0):
    """Gets a map from the cache, or compiles and stores it."""
    mixer_seed = int(self._config['mixerSeed'])
    compiled = map_of(self._level, seed, mixer_seed, part)
    key = hashlib.md5(compiled).hexdigest()
    path = os.path.join(self._temp_folder, 'map.pk3')
    cache = self._level_cache
    if cache is None or not cache.fetch(key, path):
      _work(_variable('COMPILE_SECONDS'))
      with open(path, 'wb') as file:
        file.write(compiled)
      if cache is not None:
        cache.write(key, path)
    with open(path, 'rb') as file:
      _require(file.read() == compiled, RuntimeError, f'Broken map: {path}')

  def _require_open(self):
    _require(not self._is_closed, RuntimeError, 'The environment is closed.')

  def _require_running(self):
    self._require_open()
    _require(self.is_running(), RuntimeError, 'No episode is under way.')
