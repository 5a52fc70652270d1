# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a user can choose for DeepMind Lab: actions, settings, data; checked.

In: what the flags say. Out: what DeepMind Lab takes, or a ValueError with a
sentence for the user.
"""

import collections
import json
import os

# What the program's user chose for DeepMind Lab.
DmLabSettings = collections.namedtuple(
  'DmLabSettings',
  [
    'level_cache_bytes',  # Of all compiled maps at most; None for no bound.
    'num_maps',  # Of each level in training; 0 for any number.
    'maps_seed',  # Int: which maps these are.
    'compiles_ahead',  # Whether the next episode's map is, in training.
    'renderer',  # 'software' or 'hardware'.
    'runfiles_path',  # Folder with DeepMind Lab's files, '' for its own.
    'level_settings',  # Further settings of the level, 'key=value,key=value'.
    'action_set',  # 'paper', 'popart', or the path of a JSON file.
  ],
  defaults=[None, 0, 0, False, 'software', '', '', 'paper'],
)

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

# Those of PopArt (arXiv 1809.04474), which also look up and down, and have two
# speeds of looking left and right.
_POPART_ACTION_SET = (
  *DEFAULT_ACTION_SET[:4],
  *((look, 0, 0, 0, 0, 0, 0) for look in (-10, 10, -60, 60)),
  (0, 10, 0, 0, 0, 0, 0),  # Look down.
  (0, -10, 0, 0, 0, 0, 0),  # Look up.
  *((look, 0, 0, 1, 0, 0, 0) for look in (-10, 10, -60, 60)),
  (0, 0, 0, 0, 1, 0, 0),  # Fire.
)
_ACTION_SETS = {'paper': DEFAULT_ACTION_SET, 'popart': _POPART_ACTION_SET}
# The lowest and highest values of the seven dimensions.
_ACTION_LIMITS = (
  (-512, 512),
  (-512, 512),
  (-1, 1),
  (-1, 1),
  (0, 1),
  (0, 1),
  (0, 1),
)

# Settings that flags of their own, or the program itself, decide.
_OWN_SETTINGS = {
  'width': '--width',
  'height': '--height',
  'datasetPath': '--dataset_path',
  'mixerSeed': '--mode',
  'allowHoldOutLevels': '--mode',
}

_LEVELS_WITH_DATA = (
  'psychlab_arbitrary_visuomotor_mapping',
  'psychlab_continuous_recognition',
)
_IMAGES = [f'{number:04d}.png' for number in range(1, 2401)]
# In place of the data's folder: the levels show plain colours.
_NO_DATA = 'dummy'


def check_dataset(level, path):
  """Raises ValueError if a level needs images that are not in a folder.

  The level would abort its process as soon as it shows one that is missing.
  """
  if os.path.basename(level) not in _LEVELS_WITH_DATA or path == _NO_DATA:
    return
  try:
    missing = sorted({*_IMAGES}.difference(os.listdir(path)))
  except OSError:
    problem = 'is not a folder'
  else:
    if not missing:
      return
    problem = (
      f'has not all of its images {_IMAGES[0]} to {_IMAGES[-1]}: '
      f'{len(missing):,} are missing, the first is {missing[0]}'
    )
  raise ValueError(
    f'Level {level!r} needs a data set, but --dataset_path={path!r} {problem}. '
    "Get the data as DeepMind Lab's data/brady_konkle_oliva2008 says and give "
    f'its folder, or --dataset_path={_NO_DATA} for plain colours in its place.'
  )


def dataset(path):
  """Returns DeepMind Lab's setting for the flag's path."""
  return path if path == _NO_DATA else os.path.abspath(path)


def level_settings(text):
  """Returns the dict in a text 'key=value,key=value'; raises ValueError."""
  settings = {}
  for pair in text.split(',') if text else []:
    key, separator, value = (part.strip() for part in pair.partition('='))
    if not (key and separator):
      raise ValueError(
        f'--dmlab_settings={text} must be like key=value,key=value, but '
        f'{pair!r} is not.'
      )
    if key in _OWN_SETTINGS:
      raise ValueError(
        f'--dmlab_settings={text}: {key} is set by {_OWN_SETTINGS[key]}, leave '
        'it out.'
      )
    settings[key] = value
  return settings


def action_set(name):
  """Returns the actions of a name or file, see `DmLabSettings`.

  Raises:
    ValueError: there are none.
  """
  if name in _ACTION_SETS:
    return _ACTION_SETS[name]
  try:
    with open(name, encoding='utf-8') as file:
      actions = json.load(file)
    # The dimensions and limits of each, and no fractions.
    is_fine = len(actions) > 1 and all(
      type(value) is int and low <= value <= high
      for action in actions
      for value, (low, high) in zip(action, _ACTION_LIMITS, strict=True)
    )
  except OSError as error:
    raise ValueError(
      f'--dmlab_action_set={name} is none of {", ".join(_ACTION_SETS)}, and no '
      f'file that can be read ({error.strerror}).'
    ) from None
  except (ValueError, TypeError):
    is_fine = False
  if not is_fine:
    raise ValueError(
      f'--dmlab_action_set={name} must have a list of two or more actions, '
      "each a list of seven whole numbers in DeepMind Lab's limits "
      f'{json.dumps(_ACTION_LIMITS)}.'
    )
  return actions
