# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Kinds of Gymnasium environments: their names, and how each is made and seen.

What an environment is, its class inside of all wrappers, decides its kind, and
not its name: a class of Atari, ViZDoom or MiniGrid may be registered under any.
Libraries are imported in the environments' processes alone, where all of this
runs but `parse_level`.
"""

import inspect
import json
import os
import re
import sys
import urllib.parse

import numpy as np

# --- The kinds --------------------------------------------------------------


class Kind:
  """How a kind of environments is made, seen and ended; this is any other."""

  SIZE = (72, 96)  # Of frames, where the user chose none: height and width.
  PICTURE_CHANNELS = (0, 3)  # Of frames, for people: the first, the end.
  # Whether there is an observation after the last step of an episode.
  SHOWS_END = True
  # The argument of its own that repeats actions, if it has one.
  REPEATS_ARGUMENT = None

  def __init__(self, num_action_repeats, height, width, full_action_set):
    """Prepares for an environment.

    Args:
      num_action_repeats: environment frames per agent step.
      height: of the frame in pixels, None for the usual one.
      width: likewise.
      full_action_set: whether an Atari game has all 18 actions.
    """
    self.num_action_repeats = num_action_repeats
    self.size = (height or self.SIZE[0], width or self.SIZE[1])
    self.full_action_set = full_action_set

  def arguments(self):
    """Returns what `gymnasium.make` is to be called with, a dict."""
    return {}

  def wrap(self, env):
    """Wraps the environment so that it shows images."""
    return env

  def check(self, arguments):
    """Raises ValueError if the user may not give these arguments, a dict."""
    if self.REPEATS_ARGUMENT in arguments:
      raise ValueError(
        f'its argument {self.REPEATS_ARGUMENT} is set by --num_action_repeats: '
        'leave it out'
      )

  def num_calls(self):
    """Returns how often the wrapped environment steps for an agent's step."""
    return 1 if self.REPEATS_ARGUMENT else self.num_action_repeats

  def begin(self):
    """Is told that a game begins."""

  def is_terminal(self, terminated, truncated, info):
    """Returns whether what follows has no value for what came before.

    Args:
      terminated: bool, as the environment's step told.
      truncated: likewise.
      info: likewise, a dict.
    """
    del truncated, info
    return bool(terminated)


class _Vizdoom(Kind):
  """A scenario of ViZDoom."""

  CLASS = ('vizdoom.gymnasium_wrapper.base_gymnasium_env', 'VizdoomEnv')
  SHOWS_END = False
  REPEATS_ARGUMENT = 'frame_skip'

  def arguments(self):
    # ViZDoom repeats actions itself and draws only the last frame; at a quarter
    # of its usual 320x240 pixels, a step takes 0.7 instead of 1.2 ms.
    arguments = {'frame_skip': self.num_action_repeats}
    if self.size[0] <= 120 and self.size[1] <= 160:
      arguments['screen_resolution'] = 'RES_160X120'
    return arguments

  def wrap(self, env):
    self._game = env.unwrapped.game
    return env

  def check(self, arguments):
    import vizdoom

    super().check(arguments)
    own = inspect.signature(_class_at(self.CLASS)).parameters
    for name, value in arguments.items():
      # The rest are settings of the engine, which only warns of what's wrong.
      is_setting = name not in own and name != 'scenario_config_file'
      if is_setting and not vizdoom.DoomGame().set_config({name: value}):
        raise ValueError(f'ViZDoom has no setting {name}={value}')

  def is_terminal(self, terminated, truncated, info):
    # At its time limit it tells both.
    return bool(terminated) and (not truncated or self._game.is_player_dead())


class _MiniGrid(Kind):
  """A MiniGrid or BabyAI level, seen as the picture of the agent's view."""

  CLASS = ('minigrid.minigrid_env', 'MiniGridEnv')

  def wrap(self, env):
    from gymnasium import spaces
    from minigrid import wrappers

    if _has_wrapper(env, wrappers.FullyObsWrapper):
      draw = wrappers.RGBImgObsWrapper
    else:
      draw = wrappers.RGBImgPartialObsWrapper
    if _has_wrapper(
      env, (wrappers.RGBImgObsWrapper, wrappers.RGBImgPartialObsWrapper)
    ):
      return env
    # Its own observation holds codes of objects, which are not colours.
    if isinstance(env.observation_space, spaces.Dict):
      return draw(env)
    raise ValueError(
      'its observations are no dict with an image, as those of MiniGrid are: '
      'register it without wrappers that change them'
    )


class _Atari(Kind):
  """An Atari game with the paper's preprocessing (appendix G, table G.1).

  Frames are the grey maximum of the last two, 84x84, four stacked as channels.
  A game starts with 1-30 no-ops and is cut off after 108,000 frames, half an
  hour. The loss of a life ends the episode, but the game goes on.
  """

  CLASS = ('ale_py', 'AtariEnv')
  SIZE = (84, 84)
  PICTURE_CHANNELS = (3, 4)  # The newest.
  REPEATS_ARGUMENT = 'frameskip'

  def __init__(self, *args, **kwargs):
    import ale_py

    super().__init__(*args, **kwargs)
    # Else each process greets.
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

  def arguments(self):
    return {
      'frameskip': 1,
      'repeat_action_probability': 0.0,
      'full_action_space': self.full_action_set,
      'max_num_frames_per_episode': 108_000,
    }

  def wrap(self, env):
    import gymnasium
    from gymnasium import wrappers

    if _has_wrapper(env, wrappers.AtariPreprocessing):
      raise ValueError(
        'it has AtariPreprocessing around it, as the program puts around all '
        'Atari games: register it without'
      )
    height, width = self.size
    env = wrappers.AtariPreprocessing(
      env, frame_skip=self.num_action_repeats, screen_size=(width, height)
    )
    env = wrappers.FrameStackObservation(env, stack_size=4)
    if self.full_action_set:
      env = self._with_all_actions(env)
    space = gymnasium.spaces.Box(0, 255, (height, width, 4), np.uint8)
    return wrappers.TransformObservation(
      env, lambda frames: np.moveaxis(frames, 0, -1), space
    )

  def begin(self):
    self._lives = 0

  def is_terminal(self, terminated, truncated, info):
    has_lost = info['lives'] < self._lives
    self._lives = info['lives']
    return bool(terminated) or has_lost

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
      env, np.array(table).__getitem__, gymnasium.spaces.Discrete(len(table))
    )


def _class_at(place):
  """Returns the class at (module, name); () if the module isn't loaded."""
  module, name = place
  return getattr(sys.modules.get(module), name, ())


def _kind_of(env_class):
  """Returns the kind of the environments of a class."""
  for kind in (_Atari, _Vizdoom, _MiniGrid):
    # Where the module isn't loaded, there is no subclass of what is in it.
    if issubclass(env_class, _class_at(kind.CLASS)):
      return kind
  return Kind


def _has_wrapper(env, classes):
  """Returns whether a wrapper of some class is around an environment."""
  import gymnasium

  while isinstance(env, gymnasium.Wrapper):
    if isinstance(env, classes):
      return True
    env = env.env
  return False


# --- Their names ------------------------------------------------------------

# The modules that register environments, by the beginnings of their ids. Others
# are named in the level, `module:id`.
_REGISTERING = (
  ('ALE/', 'ale_py'),
  ('Vizdoom', 'vizdoom.gymnasium_wrapper'),
  ('MiniGrid-', 'minigrid'),
  ('BabyAI-', 'minigrid'),
)

# The id under which a scenario file of ViZDoom is registered.
_SCENARIO = 'VizdoomScenario-v0'

# What JSON writes in another way.
_PYTHON_LITERALS = {'True': True, 'False': False, 'None': None}


def parse_level(level):
  """Returns a level's id for `gymnasium.make` and its arguments, a dict.

  Args:
    level: gym:id, gym:module:id or gym:file.cfg, a scenario of ViZDoom; each
      with arguments or not: ?key=value&key=value.

  Raises:
    ValueError: there is no such file, or the arguments can't be read.
  """
  name, _, query = level.removeprefix('gym:').partition('?')
  try:
    pairs = urllib.parse.parse_qsl(
      query, keep_blank_values=True, strict_parsing=bool(query)
    )
  except ValueError:
    raise ValueError(
      f'Level {level!r} can not be played: after the question mark there must '
      'be arguments of its environment as in key=value&key=value.'
    ) from None
  arguments = {key: _parse_value(text) for key, text in pairs}
  if not name.endswith('.cfg'):
    return name, arguments
  # Its process has a working folder of its own.
  path = os.path.abspath(os.path.expanduser(name))
  if not os.path.isfile(path):
    raise ValueError(
      f'Level {level!r} can not be played: there is no file {path}.'
    )
  return _SCENARIO, {'config_file': path, **arguments}


def _parse_value(text):
  """Returns the value that JSON or Python reads in a text, or the text."""
  if text in _PYTHON_LITERALS:
    return _PYTHON_LITERALS[text]
  try:
    return json.loads(text)
  except ValueError:
    return text


def modules_of(level):
  """Returns the modules that register and run an environment, by its id."""
  module, separator, name = level.rpartition(':')
  return [
    'gymnasium',
    'cv2',
    *(
      module for beginning, module in _REGISTERING if name.startswith(beginning)
    ),
    *([module] if separator else []),
  ]


def name_of(level, arguments):
  """Returns the name of a level for people, by its id and its arguments."""
  query = f'?{urllib.parse.urlencode(arguments)}' if arguments else ''
  return f'gym:{level}{query}'


# --- Their making -----------------------------------------------------------


def _class_of(level):
  """Returns an environment's class, None if only its making will tell."""
  import gymnasium
  from gymnasium.envs import registration

  if level == _SCENARIO and level not in gymnasium.registry:
    gymnasium.register(
      level, ':'.join(_Vizdoom.CLASS), kwargs={'max_buttons_pressed': 1}
    )
  spec = gymnasium.registry.get(level.rpartition(':')[2])
  creator = spec and spec.entry_point
  if isinstance(creator, str):
    creator = registration.load_env_creator(creator)
  is_class = isinstance(creator, type)
  # A wrapper makes what it wraps itself.
  is_known = is_class and not issubclass(creator, gymnasium.Wrapper)
  return creator if is_known else None


def make(level, arguments, prepare):
  """Makes an environment as its kind needs it.

  Args:
    level: its id.
    arguments: dict of the user's arguments.
    prepare: function that takes a class of kinds and returns its object.

  Returns:
    The `Kind` and the wrapped environment.

  Raises:
    ValueError: the arguments are not as needed.
  """
  env, env_class = None, _class_of(level)
  if env_class is None:
    env = _make(level, {}, arguments)
    env_class = type(env.unwrapped)
    level = env.unwrapped.spec.id  # With its version.
  kind = prepare(_kind_of(env_class))
  kind.check(arguments)
  own = kind.arguments()
  if env is not None and own:
    env.close()
    env = None
  if env is None:
    env = _make(level, own, arguments)
  return kind, kind.wrap(env)


def _make(level, own, users):
  """Makes an environment.

  Args:
    level: its id.
    own: dict of the arguments that the program sets.
    users: dict of those that the user gives, which come before them.

  Returns:
    The environment.

  Raises:
    ValueError: it has no such argument.
  """
  import gymnasium

  arguments = {'disable_env_checker': True, **own, **users}
  try:
    return gymnasium.make(level, **arguments)
  except TypeError as error:
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None:
      raise
  (name,) = match.groups()
  if name in users:
    raise ValueError(_no_argument(level, name))
  raise ValueError(
    f'what makes it takes no argument {name!r}, which the program sets for '
    'environments of this kind: have it pass all on to gymnasium.make'
  )


def _no_argument(level, name):
  """Returns the sentence that an environment has no argument of a name."""
  known = []
  for base in getattr(_class_of(level), '__mro__', ()):
    if '__init__' not in vars(base):
      continue
    parameters = inspect.signature(base).parameters.values()
    known += [
      parameter.name
      for parameter in parameters
      if parameter.kind
      in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    # Others would go to the class that this one is of.
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
      break
  return f'its environment has no argument {name!r}' + (
    f', but {", ".join(sorted(set(known)))}' if known else ''
  )
