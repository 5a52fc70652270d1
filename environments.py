# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Environments: plain Python classes, and their face in the graph.

A level name belongs to a family, one class each; `FAMILIES` says which. A
family is constructed in a process of its own (`py_process`) and has

  initial() -> observation         starts the first episode
  step(action) -> Step, or its first three values
  close()

where an observation is `(frame, instruction)`: uint8 [height, width, channels]
and a string. With `done`, `reward` belongs to the episode that ended and the
observation is the first of the next one: environments reset themselves. A test
plays a single episode in each process: after its end nothing happens any more,
and the last observation stays. In the program, without a process, a family
offers class methods:

  describe(level, settings) -> EnvironmentSpec
  create(level, seed, settings, spec) -> PyProcess
  level_arguments(level) -> dict, the constructor's arguments that depend on it
  picture(frame, spec) -> the frame for people, uint8 [height, width, 1 or 3]

and the constant `MEGABYTES`, what a process takes, None if it isn't known.

The libraries of the environments are imported in their processes alone.

Three things may end. `done`: what follows has no value for what came before,
the discount is 0. `game_over`: the accounts of the whole game are complete. A
lost life in Atari is `done`, but the game is not over.

The third is a time limit, which only cuts an episode off: what would follow has
a value, that of the last observation. So a cut takes an entry of its own:

  entry   reward   done   game_over  truncated  observation
  t       r_t      False  False      False      the last of the episode
  t + 1   0        True   True       True       the first of the next one

Entry t + 1 is no step: whatever the action was, the environment was reset. Its
return and number of steps are those of the game, as at any end. All that the
learner has to do is to learn nothing from this entry, and to let the value of
the last observation stand for what would have followed. With `truncated`,
`done` and `reward` of entries 1 ... T, and the learner's own values V of
observations 0 ... T - 1,

  rewards   = where(truncated, V, clip(reward))
  discounts = where(done, 0, discounting)
  entropy   = where(truncated, 0, entropy)

in V-trace and the loss. There the target is V, so that the losses of value and
policy are 0; and the entry before bootstraps from V, off-policy corrections
included. No matter how unrolls are cut: an unroll whose last entry is t
bootstraps from that observation anyway.

What else was considered. A place for a last observation in each entry would
double the frames that are sent and stored, for one in thousands of entries. The
actor could add the value of the last observation to the reward, but that is the
value of an old network, and clipped. The entry of its own costs one agent step
per episode that was cut off, which counts as frames of the training.
"""

import collections
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import warnings

import numpy as np

import action_sets
import dmlab_choices
import gym_kinds
import py_process
from dmlab_choices import DEFAULT_ACTION_SET as DEFAULT_ACTION_SET
from dmlab_choices import DmLabSettings
from dmlab_maps import (
  AheadCompiler,
  Episodes,
  LocalLevelCache,
  episode_seeds,
  map_seeds,
)

# What an environment says of itself in the graph, one entry per agent step or,
# where `truncated`, for a reset after an episode was cut off: see above. Where
# only the agent reads it, the last two may be left out.
StepOutput = collections.namedtuple(
  'StepOutput',
  'reward info done observation game_over truncated',
  defaults=[(), ()],
)
# Return and number of agent steps of the game so far, this step included.
StepOutputInfo = collections.namedtuple(
  'StepOutputInfo', 'episode_return episode_step'
)

# The same as an environment's process tells it.
Step = collections.namedtuple(
  'Step', 'reward done observation game_over truncated'
)

# action_set: see `action_sets`; of several heads, `step` takes an int32 array
# [num_heads].
# frame_shape: (height, width, channels).
# picture_channels: of a frame for people, (first, end).
EnvironmentSpec = collections.namedtuple(
  'EnvironmentSpec',
  'action_set frame_shape picture_channels',
  defaults=[(0, 3)],  # A fourth would be the opacity.
)

# What the program's user chose for all environments.
EnvironmentSettings = collections.namedtuple(
  'EnvironmentSettings',
  [
    'height',  # Of the frame in pixels, None for the family's usual size.
    'width',  # Likewise.
    'num_action_repeats',  # Environment frames per agent step.
    'dataset_path',  # Folder with the data of DeepMind Lab's Psychlab, or ''.
    'level_cache_dir',  # Folder for DeepMind Lab's compiled maps.
    'is_test',  # Whether a single episode is played for evaluation.
    'full_action_set',  # Whether Atari games have all 18 actions.
    'dmlab',  # `DmLabSettings`.
  ],
  defaults=[False, DmLabSettings()],
)


def resize(frame, height, width):
  """Returns a frame, uint8 [h, w] or [h, w, c], as [height, width, c]."""
  import cv2

  if frame.shape[:2] != (height, width):
    shrinks = frame.shape[0] > height
    frame = cv2.resize(
      frame,
      (width, height),
      interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST,
    )
  # OpenCV drops a single channel.
  return frame.reshape(height, width, -1)


_LARGEST = float(np.finfo(np.float32).max)


def _to_reward(reward, level, num_steps):
  """Returns a reward as a float.

  Args:
    reward: what the environment gave: a number of any type.
    level: name of the level.
    num_steps: number of agent steps in the game, this one included.

  Raises:
    ValueError: it is no finite number.
  """
  try:
    value = float(np.asarray(reward).item())
  except (TypeError, ValueError):
    value = float('nan')
  if not -_LARGEST <= value <= _LARGEST:
    told = ' '.join(str(reward).split())  # An array may take many lines.
    raise ValueError(
      f'{level} gave {told} as the reward of step {num_steps} of a game, '
      'but rewards must be finite numbers'
    )
  return value


def _specs(method_name, frame_shape):
  """Returns what a method of a family returns, for its `_tensor_specs`."""
  observation = (
    py_process.ArraySpec(tuple(frame_shape), np.uint8),
    py_process.ArraySpec((), object),
  )
  reward = py_process.ArraySpec((), np.float32)
  done = py_process.ArraySpec((), np.bool_)
  return {
    'initial': observation,
    'step': (reward, done, observation),
    'close': (),
  }[method_name]


# --- DeepMind Lab -----------------------------------------------------------

# Evaluation mixes its own seed into DeepMind Lab's random levels, so that no
# test episode was seen in training.
_TEST_MIXER_SEED = 0x600D5EED

_DMLAB30 = 'contributed/dmlab30/'


class PyProcessDmLab:
  """A level of DeepMind Lab."""

  MEGABYTES = 200

  def __init__(
    self,
    level,
    config,
    num_action_repeats,
    seed,
    runfiles_path=None,
    level_cache=None,
    is_test=False,
    num_maps=0,
    maps_seed=0,
    compiles_ahead=False,
    renderer='software',
  ):
    """Starts DeepMind Lab.

    Args:
      level: name of the level, a path below game_scripts/levels.
      config: dict of DeepMind Lab's settings, among them width and height.
      num_action_repeats: environment frames per agent step.
      seed: int, from which the seeds of the episodes are drawn.
      runfiles_path: folder with DeepMind Lab's files, None for its own.
      level_cache: object with `fetch` and `write`, e.g. `LocalLevelCache`.
      is_test: whether a single episode is played.
      num_maps: of so many seeds those of the episodes are, 0 for any. This and
        `compiles_ahead` need a `LocalLevelCache`.
      maps_seed: int, which seeds these are, together with the level.
      compiles_ahead: whether the next episode's map is compiled by another
        process while an episode is played.
      renderer: 'software' or 'hardware'.
    """
    import deepmind_lab

    if runfiles_path:
      deepmind_lab.set_runfiles_path(runfiles_path)
    self._level = level
    self._num_action_repeats = num_action_repeats
    self._num_steps = 0
    self._is_test = is_test
    self._is_over = False
    config = {key: str(value) for key, value in config.items()}
    options = {
      'config': config,
      'renderer': renderer,
      'temp_folder': tempfile.gettempdir(),
    }
    if level_cache is not None:
      options['level_cache'] = level_cache
    self._has_instruction = True
    try:
      self._env = deepmind_lab.Lab(
        level, ['RGB_INTERLEAVED', 'INSTR'], **options
      )
    except ValueError:  # Some demo levels have no instruction.
      self._has_instruction = False
      self._env = deepmind_lab.Lab(level, ['RGB_INTERLEAVED'], **options)
    self._episodes = Episodes(
      self._env,
      episode_seeds(seed, map_seeds(level, maps_seed, num_maps), is_test),
      level_cache if num_maps or compiles_ahead else None,
      _maps_name(level, config) if num_maps else None,
      AheadCompiler(level, options, runfiles_path) if compiles_ahead else None,
    )

  def initial(self):
    """Starts an episode and returns its first observation."""
    self._episodes.begin()
    self._num_steps = 0
    self._shown = self._observation()
    return self._shown

  def step(self, action):
    """Repeats `action`, an array [7]; returns (reward, done, observation)."""
    if self._is_over:
      return 0.0, False, self._shown
    self._episodes.step()
    reward = self._env.step(
      np.asarray(action, np.intc), num_steps=self._num_action_repeats
    )
    self._num_steps += 1
    reward = _to_reward(reward, self._level, self._num_steps)
    done = not self._env.is_running()
    # There are no observations after the end of an episode.
    if not done:
      self._shown = self._observation()
    elif self._is_test:
      self._is_over = True
    else:
      self.initial()
    return reward, done, self._shown

  def compile_map(self, seed):
    """Puts the maps of an episode into the cache; returns their number."""
    return self._episodes.compile(int(seed))

  def close(self):
    self._episodes.close()
    self._env.close()

  def _observation(self):
    observations = self._env.observations()
    instruction = observations['INSTR'] if self._has_instruction else ''
    return observations['RGB_INTERLEAVED'], instruction

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del kwargs
    if method_name == 'compile_map':
      return py_process.ArraySpec((), np.int32)
    # DeepMind Lab's own size, where none is asked for, is 320x240.
    size = {'height': 240, 'width': 320, **constructor_kwargs['config']}
    frame_shape = (int(size['height']), int(size['width']), 3)
    return _specs(method_name, frame_shape)

  @staticmethod
  def picture(frame, spec):
    """See the module."""
    del spec
    return frame

  @classmethod
  def describe(cls, level, settings):
    """See the module; raises ValueError if the level can't be played."""
    if importlib.util.find_spec('deepmind_lab') is None:
      raise ValueError(
        f'Level {level!r} needs DeepMind Lab, which is not installed: build it '
        'as the Dockerfile shows, or choose a level that runs now, e.g. '
        '--level_name=gym:VizdoomBasic-v1.'
      )
    dmlab_choices.check_dataset(level, settings.dataset_path)
    spec = EnvironmentSpec(
      np.array(dmlab_choices.action_set(settings.dmlab.action_set), np.intc),
      (settings.height or 72, settings.width or 96, 3),
    )
    chosen = settings.dmlab
    if not level.startswith(_DMLAB30) or (
      chosen.level_settings
      or chosen.runfiles_path
      or chosen.renderer != 'software'
    ):
      cls._probe(level, settings, spec)
    return spec

  @classmethod
  def _probe(cls, level, settings, spec):
    """Raises ValueError if DeepMind Lab does not take what the user chose."""
    process = cls.create(level, 0, settings, spec)
    try:
      process.start()
    except py_process.ProcessError as error:
      raise ValueError(
        f'Level {level!r} can not be played: {_reason(error)}.'
      ) from None
    finally:
      process.close()

  @staticmethod
  def level_arguments(level):
    """See the module."""
    return {'level': level}

  @classmethod
  def create(cls, level, seed, settings, spec):
    """See the module."""
    height, width, _ = spec.frame_shape
    config = {
      'logLevel': 'WARN',
      **dmlab_choices.level_settings(settings.dmlab.level_settings),
      'height': height,
      'width': width,
    }
    if settings.dataset_path:
      config['datasetPath'] = dmlab_choices.dataset(settings.dataset_path)
    if settings.is_test:
      config['allowHoldOutLevels'] = 'true'
      config['mixerSeed'] = _TEST_MIXER_SEED
    return py_process.PyProcess(
      cls,
      level,
      config,
      settings.num_action_repeats,
      seed,
      runfiles_path=settings.dmlab.runfiles_path or None,
      renderer=settings.dmlab.renderer,
      level_cache=LocalLevelCache(
        os.path.abspath(settings.level_cache_dir),
        settings.dmlab.level_cache_bytes,
      ),
      is_test=settings.is_test,
      num_maps=0 if settings.is_test else settings.dmlab.num_maps,
      maps_seed=settings.dmlab.maps_seed,
      compiles_ahead=settings.dmlab.compiles_ahead and not settings.is_test,
    )


def _maps_name(level, config):
  """Returns the name of all but the seed that a level's maps depend on."""
  settings = {
    key: value
    for key, value in config.items()
    if key not in ('datasetPath', 'height', 'logLevel', 'width')
  }
  return json.dumps([level, settings], sort_keys=True)


# --- Gymnasium --------------------------------------------------------------


def _reason(error):
  """Returns why a `ProcessError` came, on one line."""
  failure = py_process.failure(error)
  text = failure.reason.partition(':\n')[2] or failure.reason
  text = re.sub(r'^(Value|Runtime)Error: ', '', ' '.join(text.split()))
  return text.rstrip('.')


class GymEnvironment:
  """A Gymnasium environment with an image to see and finitely many actions.

  Its class decides how it is played, and not its name: see `gym_kinds`.
  """

  MEGABYTES = None  # Each environment has its own.

  # The names under which libraries keep the image in a dict of observations.
  _IMAGE_KEYS = ('screen', 'rgb', 'image', 'pixels', 'frame', 'obs')

  def __init__(
    self,
    level,
    num_action_repeats,
    seed,
    height=None,
    width=None,
    num_channels=None,
    is_test=False,
    full_action_set=False,
    arguments=None,
  ):
    """Makes the environment.

    Args:
      level: its id, as `gymnasium.make` takes it.
      num_action_repeats: environment frames per agent step.
      seed: int, of the environment's random numbers.
      height: of the frame in pixels, None for the kind's usual one.
      width: likewise.
      num_channels: of the frame, as `describe` found; None in its own process.
      is_test: whether a single episode is played, for evaluation.
      full_action_set: whether an Atari game has all 18 actions, and not only
        those that it makes use of.
      arguments: dict of further arguments for `gymnasium.make`, None for none.

    Raises:
      ValueError: arguments, observations or actions are not as needed.
    """
    for module in gym_kinds.modules_of(level):
      importlib.import_module(module)
    # Many processes share the cores: none needs OpenCV's pool of threads.
    sys.modules['cv2'].setNumThreads(1)
    self._name = gym_kinds.name_of(level, arguments)
    self._seed = seed
    self._is_test = is_test
    self._num_steps = 0  # Of the game.
    self._is_cut = False  # Whether the next step resets and does no more.
    self._last = None  # What stays after the end of a test.
    with warnings.catch_warnings():
      if num_channels is not None:  # The process of `describe` showed them.
        warnings.simplefilter('ignore')
      self._kind, self._env = gym_kinds.make(
        level,
        arguments or {},
        lambda cls: cls(num_action_repeats, height, width, full_action_set),
      )
    self._image_key = self._find_image(self._env.observation_space)
    self._action_set = action_sets.of_space(self._env.action_space)

  def initial(self):
    """Starts an episode and returns its first observation."""
    # Gymnasium's convention: seeded once, then each episode differs.
    observation, _ = self._env.reset(seed=self._seed)
    self._seed = None
    self._num_steps = 0
    self._kind.begin()
    self._shown = self._observation(observation)
    return self._shown

  def step(self, action):
    """Repeats an action; returns a `Step` as a plain tuple.

    Args:
      action: int, or an int array [num_heads].
    """
    if self._last is not None:
      return 0.0, False, self._last, False, False
    if self._is_cut:
      self._is_cut = False
      return 0.0, True, self.initial(), True, True
    observation, reward, terminated, truncated, info = self._repeat(action)
    is_over = bool(terminated or truncated)
    if self._is_test:
      shown = self._observation(observation)
      if is_over:
        self._last = shown
      return reward, is_over, shown, is_over, False
    is_terminal = self._kind.is_terminal(terminated, truncated, info)
    if is_over and is_terminal:
      return reward, True, self.initial(), True, False
    self._is_cut = is_over
    if not is_over or self._kind.SHOWS_END:
      self._shown = self._observation(observation)
    return reward, is_terminal, self._shown, False, False

  def close(self):
    self._env.close()

  def properties(self):
    """Returns what is in an `EnvironmentSpec`: JSON and int32 arrays."""
    shape = self._image_space().shape
    num_channels = shape[2] if len(shape) == 3 else 1
    return (
      json.dumps(action_sets.to_json(self._action_set)),
      np.array([*self._kind.size, num_channels], np.int32),
      np.array(self._kind.PICTURE_CHANNELS, np.int32),
    )

  def _repeat(self, action):
    """Returns what the environment's step does, with the sum of rewards."""
    self._num_steps += 1
    action = action_sets.to_space(self._env.action_space, action)
    total_reward = 0.0
    for _ in range(self._kind.num_calls()):
      observation, reward, terminated, truncated, info = self._env.step(action)
      total_reward += _to_reward(reward, self._name, self._num_steps)
      if terminated or truncated:
        break
    return observation, total_reward, terminated, truncated, info

  def _observation(self, observation):
    """Returns the frame and the instruction of an observation."""
    if self._image_key is None:
      frame, texts = observation, []
    else:
      frame = observation[self._image_key]
      texts = [t for t in observation.values() if isinstance(t, str)]
    return resize(np.asarray(frame), *self._kind.size), ' '.join(texts)

  def _image_space(self):
    space = self._env.observation_space
    return space if self._image_key is None else space[self._image_key]

  def _find_image(self, space):
    """Returns the key of the image in a dict of observations, or None."""
    from gymnasium import spaces

    def is_image(space):
      return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and (len(space.shape) == 2 or space.shape[2:] in ((1,), (3,), (4,)))
      )

    if is_image(space):
      return None
    if isinstance(space, spaces.Dict):
      for key in [*self._IMAGE_KEYS, *space]:
        if key in space.spaces and is_image(space[key]):
          return key
    observations = ' '.join(str(space).split())
    raise ValueError(
      'it shows no image, which is a uint8 array [height, width] or [height, '
      f'width, channels], alone or in a dict, but {observations}'
    )

  @staticmethod
  def _modules(constructor_kwargs):
    return gym_kinds.modules_of(constructor_kwargs['level'])

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del kwargs
    if method_name == 'properties':
      text = py_process.ArraySpec((), object)
      return text, *(py_process.ArraySpec((n,), np.int32) for n in (3, 2))
    frame_shape = [
      constructor_kwargs[name] for name in ('height', 'width', 'num_channels')
    ]
    specs = _specs(method_name, frame_shape)
    if method_name != 'step':
      return specs
    flag = py_process.ArraySpec((), np.bool_)
    return Step(*specs, game_over=flag, truncated=flag)

  @staticmethod
  def picture(frame, spec):
    """See the module."""
    return frame[..., slice(*spec.picture_channels)]

  @classmethod
  def describe(cls, level, settings):
    """See the module; raises ValueError if the level can't be played."""
    probe = cls._process(level, 0, settings, settings.height, settings.width)
    try:
      probe.start()
      action_set, *arrays = probe.call('properties')
    except py_process.ProcessError as error:
      raise ValueError(
        f'Level {level!r} can not be played: {_reason(error)}.'
      ) from None
    finally:
      probe.close()
    return EnvironmentSpec(
      action_sets.from_json(json.loads(action_set)),
      *(tuple(map(int, array)) for array in arrays),
    )

  @classmethod
  def create(cls, level, seed, settings, spec):
    """See the module."""
    return cls._process(level, seed, settings, *spec.frame_shape)

  @staticmethod
  def level_arguments(level):
    """See the module."""
    level, arguments = gym_kinds.parse_level(level)
    return {'level': level, 'arguments': arguments}

  @classmethod
  def _process(cls, level, seed, settings, height, width, num_channels=None):
    return py_process.PyProcess(
      cls,
      **cls.level_arguments(level),
      num_action_repeats=settings.num_action_repeats,
      seed=seed,
      height=height,
      width=width,
      num_channels=num_channels,
      is_test=settings.is_test,
      full_action_set=settings.full_action_set,
    )


# The families by the beginnings of their levels' names; the first match counts.
# How episodes end in each, for `done`, `game_over` and `truncated` of a `Step`:
#
#   what is played   done             game over      cut off by a time limit
#   DeepMind Lab     its end          its end        never: its episodes are
#                                                    ended by time, and show
#                                                    nothing after; the value
#                                                    is 0 as in the release
#   Gymnasium        terminated       terminated or  truncated, unless it is
#                                     truncated      terminated as well
#   Atari            terminated, or   likewise       truncated, after 108,000
#                    a life is lost                  frames by default
#   ViZDoom          terminated       likewise       truncated, unless the
#                                                    player is dead; it shows
#                                                    nothing after, so that the
#                                                    frame before stays
#
# In a test, which plays one whole game and learns nothing, all is `done` where
# the game is over and nowhere else, and nothing is ever `truncated`.
FAMILIES = (
  ('gym:', GymEnvironment),
  ('', PyProcessDmLab),
)


def family_of(level):
  """Returns the class that plays a level."""
  return next(cls for prefix, cls in FAMILIES if level.startswith(prefix))


# --- In the graph -----------------------------------------------------------


class FlowEnvironment:
  """An environment in the graph: keeps its accounts and the order of its calls.

  `initial` and `step` return an output and a state; the next `step` takes the
  state and so happens after the call that returned it.
  """

  def __init__(self, env):
    """Wraps an environment.

    Args:
      env: the proxy of a `PyProcess`, with `initial()` and `step(action)` that
        return tensors, and actually start or step when these are computed.
    """
    self._env = env

  def initial(self):
    """Starts the first episode.

    Returns:
      A `StepOutput` with reward 0 and `done` True, and the state, a
      `StepOutputInfo`: float32 episode return, int32 agent steps, scalars.
    """
    import tensorflow.compat.v1 as tf

    observation = self._env.initial()
    # Made after the observation, so that whoever has the state comes later.
    with tf.control_dependencies(tf.nest.flatten(observation)):
      info = StepOutputInfo(tf.constant(0.0), tf.constant(0))
      state = tf.nest.map_structure(tf.identity, info)
    output = StepOutput(
      reward=tf.constant(0.0),
      info=info,
      done=tf.constant(True),
      observation=observation,
      game_over=tf.constant(False),
      truncated=tf.constant(False),
    )
    return output, state

  def step(self, action, state):
    """Makes one agent step.

    Args:
      action: what the environment's `step` takes.
      state: from the previous `initial` or `step`.

    Returns:
      A `StepOutput`, whose info includes this step, and the next state. With
      `game_over`, the info is that of the whole game and the state is zero.
    """
    import tensorflow.compat.v1 as tf

    with tf.control_dependencies(tf.nest.flatten(state)):
      reward, done, observation, *ends = self._env.step(action)
    # Environments as in DeepMind's release tell of nothing but `done`.
    game_over, truncated = ends or (done, tf.zeros_like(done))
    with tf.control_dependencies(tf.nest.flatten(observation)):
      info = StepOutputInfo(
        state.episode_return + reward,
        state.episode_step + tf.cast(~truncated, tf.int32),
      )
      next_state = tf.nest.map_structure(
        lambda value: tf.where(game_over, tf.zeros_like(value), value), info
      )
    output = StepOutput(reward, info, done, observation, game_over, truncated)
    return output, next_state
