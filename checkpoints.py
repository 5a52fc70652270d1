# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints: saving, finding, reading, checking and describing them.

In: a log folder or the path of a checkpoint. Out: what is in it, or one
sentence on why it can't be used. A folder may have any name, and may be copied
and moved: of the paths in TensorFlow's files, only the last part is used.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil

import tensorflow.compat.v1 as tf
from absl import logging

import action_sets
from errors import UserError

# What the agent is made for, beside its checkpoints.
_DESCRIPTION = 'agent.json'
# TensorFlow's file with the paths of the last checkpoints.
_STATE = 'checkpoint'

# What TensorFlow raises where a checkpoint is damaged. An IndexError: a file
# ends too soon.
_READ_ERRORS = (tf.errors.OpError, ValueError, IndexError, OSError)

# What agents were that are older than these flags.
_OLDER_FLAGS = {
  'core': 'lstm',
  'normalize_frames': False,
  'optimizer': 'rmsprop',
  'popart': False,
}

# --- Saving -----------------------------------------------------------------


class Saver(tf.train.Saver):
  """A `tf.train.Saver` for a folder of any name, on a disk that may be full.

  If a checkpoint can't be saved, this is told, nothing of it is left, and the
  older ones are kept. `error` says why, until one is saved.
  """

  def __init__(self, **kwargs):
    """See `tf.train.Saver`."""
    super().__init__(save_relative_paths=True, **kwargs)
    self.error = None
    self._folder = None

  def save(self, sess, save_path, global_step, **kwargs):
    """See `tf.train.Saver`; returns None if it can't be saved."""
    path = f'{save_path}-{global_step}'
    before = self.last_checkpoints
    if before and os.path.basename(before[-1]) == os.path.basename(path):
      # It is there, or was restored: writing it again could only damage it.
      return path
    try:
      super().save(sess, self._plain(save_path), global_step, **kwargs)
    except (tf.errors.OpError, ValueError, OSError) as error:
      self.error = f'{path} can not be saved ({_reason(error)})'
      logging.warning('%s: the older checkpoints are kept.', self.error)
      with contextlib.suppress(OSError):
        _remove(self._plain(path))
      self.recover_last_checkpoints(before)
      return None
    self.error = None
    return path

  def restore(self, sess, save_path):
    """See `tf.train.Saver`."""
    with _plain_path(save_path) as path:
      super().restore(sess, path)

  def recover_last_checkpoints(self, checkpoint_paths):
    """See `tf.train.Saver`."""
    paths = [self._plain(path) for path in checkpoint_paths]
    self.set_last_checkpoints_with_time(
      [
        (path, os.path.getmtime(path + '.index'))
        for path in paths
        if os.path.exists(path + '.index')
      ]
    )

  def _plain(self, path):
    """Returns a plain path as below, of a file in the folder saved to."""
    # Open to the end: TensorFlow remembers the paths, to delete the files.
    if self._folder is None:
      self._folder = _open_folder(path)
    return f'/proc/self/fd/{self._folder}/{os.path.basename(path)}'


@contextlib.contextmanager
def _plain_path(path):
  """Yields a path of a file that has plain characters alone.

  TensorFlow takes the paths of checkpoints for patterns, and would not find
  those in a folder with [, * or ? in its name.
  """
  folder = _open_folder(path)
  try:
    yield f'/proc/self/fd/{folder}/{os.path.basename(path)}'
  finally:
    os.close(folder)


def _open_folder(path):
  """Returns the descriptor of the folder that a file is in."""
  return os.open(os.path.dirname(path) or '.', os.O_RDONLY | os.O_DIRECTORY)


def _remove(checkpoint):
  """Removes what is left of a checkpoint that could not be saved."""
  for path in glob.glob(glob.escape(checkpoint) + '[._]*'):
    if os.path.isdir(path):
      shutil.rmtree(path)
    else:
      os.remove(path)


def _reason(error):
  """Returns the reason in an error about a file, without the file's path."""
  if isinstance(error, OSError):
    return error.strerror
  text = getattr(error, 'message', None) or str(error) or type(error).__name__
  # In the midst of what TensorFlow says of the graph.
  match = re.search(r'^/proc/self/fd/.*; (.+)$', text, re.MULTILINE)
  return match[1] if match else text.splitlines()[0].rstrip('.')


def prepare(logdir, checkpoint):
  """Has a training go on from a checkpoint in a folder.

  TensorFlow takes the one that its state file names, but this may be damaged,
  or have the paths of a folder that this one is a copy of.

  Args:
    logdir: folder of the training.
    checkpoint: what `latest` returned.
  """
  # Of checkpoints that a killed training was about to save.
  for unfinished in glob.glob(f'{glob.escape(logdir)}/model.ckpt-*_temp'):
    shutil.rmtree(unfinished, ignore_errors=True)
  for unfinished in glob.glob(f'{glob.escape(logdir)}/model.ckpt-*.tempstate*'):
    with contextlib.suppress(OSError):
      os.remove(unfinished)
  path = os.path.join(logdir, _STATE)
  if checkpoint is None:
    with contextlib.suppress(FileNotFoundError):
      os.remove(path)  # It names none.
    return
  name = os.path.basename(checkpoint)
  kept = [
    other
    for other in _named(logdir) or _all(logdir)[::-1]
    if other != name and os.path.exists(os.path.join(logdir, other + '.index'))
  ]
  # With an absolute folder, the names stay as they are.
  state = tf.train.generate_checkpoint_state_proto('/', name, [*kept, name])
  _write(path, str(state))


def _write(path, text):
  """Writes a file at once: after a crash, it has the old or the new content."""
  try:
    with open(path + '.tmp', 'w', encoding='utf-8') as file:
      file.write(text)
    os.replace(path + '.tmp', path)
  except OSError:
    with contextlib.suppress(OSError):
      os.remove(path + '.tmp')
    raise


# --- Finding and reading ----------------------------------------------------


def latest(logdir):
  """Returns the path of the last complete checkpoint in a folder.

  That is the one that TensorFlow's state file names. If it or this file is
  damaged, it is the newest complete one, and this is told.

  Returns:
    None if there are no checkpoints.

  Raises:
    UserError: none of them is complete.
  """
  named, found = _named(logdir), _all(logdir)
  if not named and not found:
    return None
  first = named[-1] if named else None
  reason = None
  for name in dict.fromkeys([*named[-1:], *found]):
    path = os.path.join(logdir, name)
    try:
      _read(path)
    except _READ_ERRORS as error:
      reason = reason or f'{name}: {_describe_damage(path, error)}'
      continue
    if name != first:
      _tell_damage(logdir, first, name)
    return path
  raise UserError(
    f'No checkpoint in {logdir} can be read ({reason}): bring its files back, '
    'or give another --logdir.'
  )


@functools.cache  # Once, however often it is looked for.
def _tell_damage(logdir, first, name):
  logging.warning(
    '%s in %s is damaged or missing: its newest complete checkpoint, %s, '
    'is used.',
    f'The checkpoint {first}' if first else 'The file "checkpoint"',
    logdir,
    name,
  )


def _named(logdir):
  """Returns the names in the state file, the last one last; [] without."""
  try:
    with _plain_path(os.path.join(logdir, _STATE)) as path:
      state = tf.train.get_checkpoint_state(os.path.dirname(path))
  except (OSError, ValueError):  # A ValueError: it is damaged.
    state = None
  if state is None:
    return []
  paths = [*state.all_model_checkpoint_paths, state.model_checkpoint_path]
  # The last one is among them twice.
  return list(dict.fromkeys(map(os.path.basename, paths[::-1])))[::-1]


def _all(logdir):
  """Returns the names of all checkpoints in a folder, the newest first."""
  try:
    files = os.listdir(logdir)
  except OSError:
    return []
  steps = {
    match[1]: int(match[2])
    for match in map(re.compile(r'(model\.ckpt-(\d+))\.index').fullmatch, files)
    if match
  }
  return sorted(steps, key=steps.get, reverse=True)


def find(logdir, checkpoint):
  """Returns the path of the checkpoint to test.

  Args:
    logdir: folder of a training.
    checkpoint: path of a checkpoint, or '' for the last one in the folder.

  Raises:
    UserError: there is none.
  """
  checkpoint = checkpoint or latest(logdir)
  if checkpoint is None:
    raise UserError(
      f'{logdir} holds no checkpoint to test: give the --logdir of a training.'
    )
  if not os.path.exists(checkpoint + '.index'):
    raise UserError(
      f'The checkpoint {checkpoint} does not exist: give its path without an '
      'extension, e.g. --checkpoint=/tmp/agent/model.ckpt-1000.'
    )
  return checkpoint


def read(checkpoint):
  """Returns the shapes of its variables by name, and its environment frames.

  Raises:
    UserError: it can't be read.
  """
  try:
    return _read(checkpoint)
  except _READ_ERRORS as error:
    raise UserError(
      f'The checkpoint {checkpoint} can not be read '
      f'({_describe_damage(checkpoint, error)}): give another --logdir, or '
      'name an older one in its file "checkpoint" or, to test, by --checkpoint.'
    ) from None


def _read(checkpoint):
  """As `read`; raises one of `_READ_ERRORS` if anything of it is damaged."""
  with _plain_path(checkpoint) as path:
    reader = tf.train.load_checkpoint(path)
    shapes = reader.get_variable_to_shape_map()
    # Checksums are compared only when values are read.
    values = {name: reader.get_tensor(name) for name in shapes}
  if 'global_step' not in values:
    raise ValueError('it has no global_step')
  return shapes, int(values['global_step'])


def _describe_damage(checkpoint, error):
  if not os.path.exists(checkpoint + '.index'):
    return 'its file .index is missing'
  return _reason(error)


def check_agent(shapes, place):
  """Raises UserError unless a checkpoint is of the agent in the graph.

  Args:
    shapes: dict of the shapes of the checkpoint's variables by name.
    place: what the user knows it by.
  """
  for variable in tf.global_variables():
    name, ours = variable.op.name, variable.shape.as_list()
    if shapes.get(name) != ours:
      raise UserError(
        f'{place} holds the checkpoint of another agent: its {name} is '
        f'{shapes.get(name, "missing")}, here it is {ours}. Give another '
        '--logdir, or the --level_name, --torso, --core, --normalize_frames, '
        '--popart, --optimizer, --height and --width that it was trained with.'
      )


def fingerprint(checkpoint):
  """Returns a hash of all its variables."""
  # The index holds the checksums of all variables.
  with open(checkpoint + '.index', 'rb') as file:
    return hashlib.sha256(file.read()).hexdigest()


def find_description(checkpoint):
  """Returns the description of a checkpoint's agent, or None without one.

  Args:
    checkpoint: path of a checkpoint, in the log folder of its training or, as
      those of its tests are, in the folder test of that.

  Raises:
    UserError: it can't be read.
  """
  folder = os.path.dirname(os.path.abspath(checkpoint))
  path = os.path.join(folder, _DESCRIPTION)
  if not os.path.exists(path) and os.path.basename(folder) == 'test':
    path = os.path.join(os.path.dirname(folder), _DESCRIPTION)
  try:
    with open(path, encoding='utf-8') as file:
      description = json.load(file)
    description['torso']
    # Of before there could be several heads.
    description.setdefault('num_actions', len(description['action_set']))
    description['frame_shape'][2]
    description['flags'] = {**_OLDER_FLAGS, **description['flags']}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, LookupError, TypeError):
    raise UserError(
      f'{path}, the description of the agent, can not be read: bring it back, '
      'or remove it and give the flags of the training.'
    ) from None
  return description


def save_description(
  logdir, spec, torso, flag_values, settings, level_names=()
):
  """Saves beside the checkpoints what others need to know of the agent.

  Args:
    logdir: folder of the checkpoints.
    spec: `environments.EnvironmentSpec` of what it plays.
    torso: 'deep' or 'shallow'.
    flag_values: dict of the training's flags.
    settings: those of them that change what is learned.
    level_names: of what it plays; PopArt's baselines are in this order.
  """
  description = {
    'torso': torso,
    'frame_shape': list(spec.frame_shape),
    **action_sets.to_json(spec.action_set),
    'level_names': list(level_names),
    'settings': settings,
    'flags': flag_values,
  }
  text = json.dumps(description, indent=1, allow_nan=False)
  _write(os.path.join(logdir, _DESCRIPTION), text)


def popart_levels(description):
  """Returns the names of the levels that have a baseline of their own.

  Args:
    description: see `find_description`.
  """
  flag_values = description['flags']
  return description['level_names'] if flag_values['popart'] else []


def describe_changes(description, settings):
  """Returns a list of lines for people: which settings of a training changed.

  Args:
    description: see `find_description`.
    settings: dict of the training's flags that change what is learned.
  """
  before = description['flags']
  changes = [
    f'--{name} {before[name]} -> {value}'
    for name, value in settings.items()
    if before.get(name, value) != value
  ]
  return [f'Goes on with other settings: {", ".join(changes)}.'] * bool(changes)


def load_description(path):
  """Returns the description of an agent and the path of its checkpoint.

  Args:
    path: log folder of a training, for its last checkpoint; or a checkpoint.

  Raises:
    UserError: there is no agent.
  """
  path = os.path.expanduser(path)
  is_folder = os.path.isdir(path)
  checkpoint = latest(path) if is_folder else path
  if checkpoint is None:
    raise UserError(f'{path} holds no trained agent: it has no checkpoint.')
  try:
    if not is_folder:  # `latest` has read it.
      _read(checkpoint)
  except _READ_ERRORS as error:
    raise UserError(
      f'{path} holds no trained agent: {_describe_damage(checkpoint, error)}.'
    ) from None
  description = find_description(checkpoint)
  if description is None:
    raise UserError(
      f'{path} holds no trained agent: {_DESCRIPTION}, which training writes '
      'beside the checkpoints, is missing.'
    )
  return description, checkpoint
