# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Checkpoints: finding, reading, checking and describing them.

In: a log folder or the path of a checkpoint. Out: what is in it, or one
sentence on why it can't be used.
"""

import hashlib
import json
import os

import numpy as np
import tensorflow.compat.v1 as tf

from errors import UserError

# What the agent is made for, beside its checkpoints.
_DESCRIPTION = 'agent.json'


def latest(logdir):
  """Returns the path of the last checkpoint in a folder, None without."""
  return tf.train.latest_checkpoint(logdir)


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
    reader = tf.train.load_checkpoint(checkpoint)
    frames = int(reader.get_tensor('global_step'))
  # An IndexError: a file ends too soon.
  except (tf.errors.OpError, ValueError, IndexError) as error:
    raise UserError(
      f'The checkpoint {checkpoint} can not be read '
      f'({str(error).splitlines()[0].rstrip(".")}): give another --logdir, or '
      'name an older one in its file "checkpoint" or, to test, by --checkpoint.'
    ) from None
  return reader.get_variable_to_shape_map(), frames


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
        '--logdir, or the --level_name, --torso, --height and --width that it '
        'was trained with.'
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
    description['flags'], description['torso'], description['action_set']
    description['frame_shape'][2]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, LookupError, TypeError):
    raise UserError(
      f'{path}, the description of the agent, can not be read: bring it back, '
      'or remove it and give the flags of the training.'
    ) from None
  return description


def save_description(logdir, spec, torso, flag_values):
  """Saves beside the checkpoints what others need to know of the agent.

  Args:
    logdir: folder of the checkpoints.
    spec: `environments.EnvironmentSpec` of what it plays.
    torso: 'deep' or 'shallow'.
    flag_values: dict of the training's flags.
  """
  description = {
    'torso': torso,
    'frame_shape': list(spec.frame_shape),
    'action_set': np.asarray(spec.action_set).tolist(),
    'flags': flag_values,
  }
  with open(os.path.join(logdir, _DESCRIPTION), 'w') as file:
    json.dump(description, file, indent=1)


def load_description(path):
  """Returns the description of an agent and the path of its checkpoint.

  Args:
    path: log folder of a training, for its last checkpoint; or a checkpoint.

  Raises:
    UserError: there is no agent.
  """
  is_folder = os.path.isdir(path)
  folder = path if is_folder else os.path.dirname(path)
  checkpoint = latest(path) if is_folder else path
  try:
    with open(os.path.join(folder, _DESCRIPTION)) as file:
      description = json.load(file)
    tf.train.load_variable(checkpoint or folder, 'global_step')
  except (OSError, ValueError, IndexError, tf.errors.OpError) as error:
    raise UserError(f'{path} holds no trained agent: {error}') from None
  return description, checkpoint
