# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Environments: plain Python classes, and their face in the graph.

A level name belongs to a family, one class each; `FAMILIES` says which. A
family is constructed in a process of its own (`py_process`) and has

  initial() -> observation         starts the first episode
  step(action) -> (reward, done, observation)
  close()

where an observation is `(frame, instruction)`: uint8 [height, width, channels]
and a string. With `done`, `reward` belongs to the episode that ended and the
observation is the first of the next one: environments reset themselves. A test
plays a single episode in each process: after its end nothing happens any more,
and the last observation stays. In the program, without a process, a family
offers two class methods:

  describe(level, settings) -> EnvironmentSpec
  create(level, seed, settings, spec) -> PyProcess
  picture(frame) -> the frame for people, uint8 [height, width, 1 or 3]

Ends by a time limit count as ends of the episode, as in DeepMind's release: the
value after them is taken as 0. To bootstrap there, the learner would need the
last observation of the episode, which `StepOutput` has no place for.

The libraries of the environments are imported in their processes alone.
"""

import collections
import contextlib
import importlib
import importlib.util
import logging
import os
import shutil
import sys
import tempfile
import uuid
import warnings

import numpy as np

import py_process

# What an environment says of itself in the graph, one entry per agent step.
StepOutput = collections.namedtuple(
  'StepOutput', 'reward info done observation'
)
# Return and number of agent steps of the episode so far, this step included.
StepOutputInfo = collections.namedtuple(
  'StepOutputInfo', 'episode_return episode_step'
)

# action_set: array [num_actions, ...] of what `step` takes.
# frame_shape: (height, width, channels).
EnvironmentSpec = collections.namedtuple(
  'EnvironmentSpec', 'action_set frame_shape'
)

# What the program's user chose for all environments.
Settings = collections.namedtuple(
  'Settings',
  [
    'height',  # Of the frame in pixels, None for the family's usual size.
    'width',  # Likewise.
    'num_action_repeats',  # Environment frames per agent step.
    'dataset_path',  # Folder with the data of DeepMind Lab's Psychlab, or ''.
    'level_cache_dir',  # Folder for DeepMind Lab's compiled maps.
    'is_test',  # Whether a single episode is played for evaluation.
    'full_action_set',  # Whether Atari games have all 18 actions.
  ],
  defaults=[False],
)


def _size(settings, height, width):
  """Returns the frame's (height, width): the user's choice or the family's."""
  return (settings.height or height, settings.width or width)


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

# The nine actions of the paper's table D.2, in DeepMind Lab's seven dimensions:
# look left/right, look down/up, strafe, move, fire, jump, crouch.
DEFAULT_ACTION_SET = (
  (0, 0, 0, 1, 0, 0, 0),  # Forward.
  (0, 0, 0, -1, 0, 0, 0),  # Backward.
  (0, 0, -1, 0, 0, 0, 0),  # Strafe left.
  (0, 0, 1, 0, 0, 0, 0),  # Strafe right.
  (-20, 0, 0, 0, 0, 0, 0),  # Look left.
  (20, 0, 0, 0, 0, 0, 0),  # Look right.
  (-20, 0, 0, 1, 0, 0, 0),  # Look left and move forward.
  (20, 0, 0, 1, 0, 0, 0),  # Look right and move forward.
  (0, 0, 0, 0, 1, 0, 0),  # Fire.
)

# Evaluation mixes its own seed into DeepMind Lab's random levels, so that no
# test episode was seen in training.
_TEST_MIXER_SEED = 0x600D5EED

_LEVELS_WITH_DATA = (
  'psychlab_arbitrary_visuomotor_mapping',
  'psychlab_continuous_recognition',
)


class LocalLevelCache:
  """Keeps DeepMind Lab's compiled maps in a folder that processes share.

  Compiling one takes 4-30 s, fetching it half a second.
  """

  def __init__(self, cache_dir):
    self._cache_dir = cache_dir

  def fetch(self, key, pk3_path):
    """Copies the map `key` to the file `pk3_path`; returns whether it could."""
    try:
      shutil.copyfile(os.path.join(self._cache_dir, key), pk3_path)
    except OSError:
      return False
    return True

  def write(self, key, pk3_path):
    """Stores the file `pk3_path` as the map `key`."""
    path = os.path.join(self._cache_dir, key)
    if os.path.exists(path):
      return
    # Another process may read or write the same key: it must see all or nothing
    # of the file, and a full disk must not end the training.
    temporary = f'{path}.{uuid.uuid4().hex}'
    try:
      os.makedirs(self._cache_dir, exist_ok=True)
      shutil.copyfile(pk3_path, temporary)
      os.replace(temporary, path)
    except OSError as error:
      logging.getLogger(__name__).warning('Map not cached: %s', error)
      with contextlib.suppress(OSError):
        os.unlink(temporary)


class PyProcessDmLab:
  """A level of DeepMind Lab."""

  def __init__(
    self,
    level,
    config,
    num_action_repeats,
    seed,
    runfiles_path=None,
    level_cache=None,
    is_test=False,
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
    """
    import deepmind_lab

    if runfiles_path:
      deepmind_lab.set_runfiles_path(runfiles_path)
    self._num_action_repeats = num_action_repeats
    self._is_test = is_test
    self._is_over = False
    self._random_state = np.random.RandomState(seed)
    options = {
      'config': {key: str(value) for key, value in config.items()},
      'renderer': 'software',
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

  def initial(self):
    """Starts an episode and returns its first observation."""
    # A Python int: DeepMind Lab refuses NumPy's.
    self._env.reset(seed=int(self._random_state.randint(0, 2**31 - 1)))
    self._shown = self._observation()
    return self._shown

  def step(self, action):
    """Repeats `action`, an array [7]; returns (reward, done, observation)."""
    if self._is_over:
      return 0.0, False, self._shown
    reward = self._env.step(
      np.asarray(action, np.intc), num_steps=self._num_action_repeats
    )
    done = not self._env.is_running()
    # There are no observations after the end of an episode.
    if not done:
      self._shown = self._observation()
    elif self._is_test:
      self._is_over = True
    else:
      self.initial()
    return reward, done, self._shown

  def close(self):
    self._env.close()

  def _observation(self):
    observations = self._env.observations()
    instruction = observations['INSTR'] if self._has_instruction else ''
    return observations['RGB_INTERLEAVED'], instruction

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del kwargs
    # DeepMind Lab's own size, where none is asked for, is 320x240.
    size = {'height': 240, 'width': 320, **constructor_kwargs['config']}
    frame_shape = (int(size['height']), int(size['width']), 3)
    return _specs(method_name, frame_shape)

  @staticmethod
  def picture(frame):
    """See the module."""
    return frame

  @staticmethod
  def describe(level, settings):
    """See the module; raises ValueError if the level can't be played."""
    if importlib.util.find_spec('deepmind_lab') is None:
      raise ValueError(
        f'Level {level!r} needs DeepMind Lab, which is not installed: build it '
        'as the Dockerfile shows, or choose a level that runs now, e.g. '
        '--level_name=gym:VizdoomBasic-v1.'
      )
    if os.path.basename(level) in _LEVELS_WITH_DATA and not os.path.isdir(
      settings.dataset_path
    ):
      raise ValueError(
        f'Level {level!r} needs a data set, but --dataset_path='
        f'{settings.dataset_path!r} is not a folder: get the data as DeepMind '
        "Lab's documentation of Psychlab says, and pass its folder."
      )
    return EnvironmentSpec(
      np.array(DEFAULT_ACTION_SET, np.intc), (*_size(settings, 72, 96), 3)
    )

  @classmethod
  def create(cls, level, seed, settings, spec):
    """See the module."""
    height, width, _ = spec.frame_shape
    config = {'height': height, 'width': width, 'logLevel': 'WARN'}
    if settings.dataset_path:
      config['datasetPath'] = os.path.abspath(settings.dataset_path)
    if settings.is_test:
      config['allowHoldOutLevels'] = 'true'
      config['mixerSeed'] = _TEST_MIXER_SEED
    return py_process.PyProcess(
      cls,
      level,
      config,
      settings.num_action_repeats,
      seed,
      level_cache=LocalLevelCache(os.path.abspath(settings.level_cache_dir)),
      is_test=settings.is_test,
    )


# --- Gymnasium --------------------------------------------------------------


class GymEnvironment:
  """A Gymnasium environment with an image to see and discrete actions."""

  # Modules that register and run the environments, beside `module:id` names.
  MODULES = ('gymnasium', 'cv2')
  SIZE = (72, 96)

  # The names under which libraries keep the image in a dict of observations.
  _IMAGE_KEYS = ('screen', 'rgb', 'image', 'pixels', 'frame', 'obs')

  def __init__(
    self,
    level,
    num_action_repeats,
    seed,
    height,
    width,
    num_channels=None,
    is_test=False,
    full_action_set=False,
  ):
    """Makes the environment.

    Args:
      level: its id, as `gymnasium.make` takes it.
      num_action_repeats: environment frames per agent step.
      seed: int, of the environment's random numbers.
      height: of the frame, in pixels.
      width: of the frame, in pixels.
      num_channels: of the frame, as `describe` found; None in its own process.
      is_test: whether a single episode is played, for evaluation.
      full_action_set: whether an Atari game has all 18 actions, and not only
        those that it makes use of.

    Raises:
      ValueError: observations or actions are not as needed.
    """
    for module in self.MODULES:
      importlib.import_module(module)
    # Many processes share the cores: none needs OpenCV's pool of threads.
    sys.modules['cv2'].setNumThreads(1)
    self._num_action_repeats = num_action_repeats
    self._size = (height, width)
    self._is_test = is_test
    self._last = None  # What stays after the end of a test.
    self._full_action_set = full_action_set
    self._seed = seed
    with warnings.catch_warnings():
      if num_channels is not None:  # The process of `describe` showed them.
        warnings.simplefilter('ignore')
      self._env = self._make(level)
    self._image_key = self._find_image(self._env.observation_space)
    self._actions = self._find_actions(self._env.action_space)

  def initial(self):
    """Starts an episode and returns its first observation."""
    # Gymnasium's convention: seeded once, then each episode differs.
    observation, _ = self._env.reset(seed=self._seed)
    self._seed = None
    return self._observation(observation)

  def step(self, action):
    """Repeats `action`, an int; returns (reward, done, observation)."""
    if self._last is not None:
      return 0.0, False, self._last
    total_reward = 0.0
    for _ in range(self._num_action_repeats):
      observation, reward, terminated, truncated, info = self._env.step(
        int(action)
      )
      total_reward += float(reward)
      if terminated or truncated:
        if not self._is_test:
          return total_reward, True, self.initial()
        self._last = self._observation(observation)
        return total_reward, True, self._last
    return total_reward, self._ends(info), self._observation(observation)

  def close(self):
    self._env.close()

  def properties(self):
    """Returns the action set, int32 [num_actions], and the frame's shape."""
    shape = self._image_space().shape
    num_channels = shape[2] if len(shape) == 3 else 1
    return self._actions, np.array([*self._size, num_channels], np.int32)

  def _make(self, level):
    """Makes the environment; may take over the repetition of actions."""
    import gymnasium

    return gymnasium.make(level, disable_env_checker=True)

  def _ends(self, info):
    """Returns whether an episode ends where the environment's does not."""
    del info
    return False

  def _observation(self, observation):
    """Returns the frame and the instruction of an observation."""
    if self._image_key is None:
      frame, texts = observation, []
    else:
      frame = observation[self._image_key]
      texts = [t for t in observation.values() if isinstance(t, str)]
    return resize(np.asarray(frame), *self._size), ' '.join(texts)

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

  def _find_actions(self, space):
    from gymnasium import spaces

    if not isinstance(space, spaces.Discrete):
      raise ValueError(f'its actions must be Discrete, but are {space}')
    return np.arange(space.start, space.start + space.n, dtype=np.int32)

  @classmethod
  def _modules(cls, constructor_kwargs):
    module, separator, _ = constructor_kwargs['level'].partition(':')
    return [*cls.MODULES, *([module] if separator else [])]

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del kwargs
    if method_name == 'properties':
      return (
        py_process.ArraySpec((None,), np.int32),
        py_process.ArraySpec((3,), np.int32),
      )
    frame_shape = [
      constructor_kwargs[name] for name in ('height', 'width', 'num_channels')
    ]
    return _specs(method_name, frame_shape)

  @staticmethod
  def picture(frame):
    """See the module."""
    return frame[..., :3]  # A fourth channel would be the opacity.

  @classmethod
  def describe(cls, level, settings):
    """See the module; raises ValueError if the level can't be played."""
    probe = cls._process(level, 0, settings, num_channels=None)
    try:
      probe.start()
      action_set, frame_shape = probe.call('properties')
    except py_process.ProcessError as error:
      reason = str(error).strip().splitlines()[-1]
      reason = reason.removeprefix('ValueError: ').rstrip('.')
      raise ValueError(
        f'Level {level!r} can not be played: {reason}.'
      ) from None
    finally:
      probe.close()
    return EnvironmentSpec(action_set, tuple(int(n) for n in frame_shape))

  @classmethod
  def create(cls, level, seed, settings, spec):
    """See the module."""
    return cls._process(level, seed, settings, spec.frame_shape[2])

  @classmethod
  def _process(cls, level, seed, settings, num_channels):
    height, width = _size(settings, *cls.SIZE)
    return py_process.PyProcess(
      cls,
      level=level.removeprefix('gym:'),
      num_action_repeats=settings.num_action_repeats,
      seed=seed,
      height=height,
      width=width,
      num_channels=num_channels,
      is_test=settings.is_test,
      full_action_set=settings.full_action_set,
    )


class VizdoomEnvironment(GymEnvironment):
  """A scenario of ViZDoom."""

  MODULES = (*GymEnvironment.MODULES, 'vizdoom.gymnasium_wrapper')

  def _make(self, level):
    import gymnasium

    # ViZDoom repeats actions itself and draws only the last frame; at a quarter
    # of its usual 320x240 pixels, a step takes 0.7 instead of 1.2 ms.
    options = {'frame_skip': self._num_action_repeats}
    self._num_action_repeats = 1
    if self._size[0] <= 120 and self._size[1] <= 160:
      options['screen_resolution'] = 'RES_160X120'
    return gymnasium.make(level, disable_env_checker=True, **options)


class MiniGridEnvironment(GymEnvironment):
  """A MiniGrid or BabyAI level, seen as the picture of the agent's view."""

  MODULES = (*GymEnvironment.MODULES, 'minigrid')

  def _make(self, level):
    import minigrid.wrappers

    # Its own observation holds codes of objects, which are not colours.
    return minigrid.wrappers.RGBImgPartialObsWrapper(super()._make(level))


class AtariEnvironment(GymEnvironment):
  """An Atari game with the paper's preprocessing (appendix G, table G.1).

  Frames are the grey maximum of the last two, 84x84, four stacked as channels.
  A game starts with 1-30 no-ops and ends after 108,000 frames at the latest,
  half an hour. In training the loss of a life ends the episode (the game goes
  on); when tested, the whole game is one.
  """

  MODULES = (*GymEnvironment.MODULES, 'ale_py')
  SIZE = (84, 84)

  def _make(self, level):
    import ale_py
    import gymnasium
    from gymnasium import wrappers

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    self._lives = 0
    num_action_repeats, self._num_action_repeats = self._num_action_repeats, 1
    height, width = self._size
    env = gymnasium.make(
      level,
      frameskip=1,
      repeat_action_probability=0.0,
      full_action_space=self._full_action_set,
      max_num_frames_per_episode=108_000,
      disable_env_checker=True,
    )
    env = wrappers.AtariPreprocessing(
      env, frame_skip=num_action_repeats, screen_size=(width, height)
    )
    env = wrappers.FrameStackObservation(env, stack_size=4)
    if self._full_action_set:
      env = self._with_all_actions(env)
    space = gymnasium.spaces.Box(0, 255, (height, width, 4), np.uint8)
    return wrappers.TransformObservation(
      env, lambda frames: np.moveaxis(frames, 0, -1), space
    )

  def _with_all_actions(self, env):
    """Gives a game the 18 actions of the console.

    One game, Skiing, doesn't have those that fire: there, firing does nothing.
    """
    import ale_py
    import gymnasium
    from gymnasium import wrappers

    legal = env.unwrapped.ale.getLegalActionSet()
    indices = {action.name: i for i, action in enumerate(legal)}
    table = []
    for action in ale_py.Action.__members__:
      without_fire = action.removesuffix('FIRE') or 'NOOP'
      table.append(indices.get(action, indices[without_fire]))
    return wrappers.TransformAction(
      env, table.__getitem__, gymnasium.spaces.Discrete(len(table))
    )

  def initial(self):
    self._lives = 0
    return super().initial()

  @staticmethod
  def picture(frame):
    """See the module."""
    return frame[..., -1:]  # The newest.

  def _ends(self, info):
    lost = info['lives'] < self._lives
    self._lives = info['lives']
    return lost and not self._is_test


# The families by the beginnings of their levels' names; the first match counts.
FAMILIES = (
  ('gym:ALE/', AtariEnvironment),
  ('gym:Vizdoom', VizdoomEnvironment),
  ('gym:MiniGrid-', MiniGridEnvironment),
  ('gym:BabyAI-', MiniGridEnvironment),
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
    return StepOutput(
      tf.constant(0.0), info, tf.constant(True), observation
    ), state

  def step(self, action, state):
    """Makes one agent step.

    Args:
      action: what the environment's `step` takes.
      state: from the previous `initial` or `step`.

    Returns:
      A `StepOutput`, whose info includes this step, and the next state. With
      `done`, the info is that of the ended episode and the state is zero.
    """
    import tensorflow.compat.v1 as tf

    with tf.control_dependencies(tf.nest.flatten(state)):
      reward, done, observation = self._env.step(action)
    with tf.control_dependencies(tf.nest.flatten(observation)):
      info = StepOutputInfo(
        state.episode_return + reward, state.episode_step + 1
      )
      next_state = tf.nest.map_structure(
        lambda value: tf.where(done, tf.zeros_like(value), value), info
      )
    return StepOutput(reward, info, done, observation), next_state
