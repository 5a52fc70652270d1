# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Action sets: what an agent chooses from, and what that is to an environment.

In: the action of an agent, an index; or several, if the policy has several
heads. Out: what an environment's `step` takes.

An action set is an array [num_actions, ...], whose row i is what action i is to
the environment. Or it is a nest (lists and dicts) of arrays [num_actions], one
for each head of the policy: the environment's action is the same nest of what
was chosen from each. The order of the heads is that of `tree.flatten`.
"""

import math

import numpy as np
import tree

# --- For the agent ----------------------------------------------------------


def num_actions(action_set):
  """Returns the number of actions, int; or a tuple with that of each head."""
  if not _has_heads(action_set):
    return len(action_set)
  return tuple(len(head) for head in tree.flatten(action_set))


def table(action_set):
  """Returns the set as a table in which actions can be looked up.

  Returns:
    Array of the rows of all heads, and the index of the first row of each head,
    int32 [num_heads]; or, without heads, 0. The environment's action is in the
    rows `first + action`.
  """
  if not _has_heads(action_set):
    return np.asarray(action_set), 0
  heads = tree.flatten(action_set)
  sizes = [len(head) for head in heads]
  first = (np.cumsum(sizes) - sizes).astype(np.int32)
  return np.concatenate(heads), first


def _has_heads(action_set):
  return isinstance(action_set, (list, dict))


# --- For people and other programs ------------------------------------------


def look_up(action_set, action):
  """Returns what an environment takes for an action.

  Args:
    action_set: see above.
    action: int; or a sequence of ints, one for each head.

  Returns:
    An int; an array; or a list or dict of these.
  """
  return _to_arrays(_chosen(action_set, action))


def _chosen(action_set, action):
  """As `look_up`, but returns lists instead of arrays."""
  if not _has_heads(action_set):
    return action_set[action].tolist()
  heads = tree.flatten(action_set)
  return tree.unflatten_as(
    action_set,
    [head[i].item() for head, i in zip(heads, action, strict=True)],
  )


def _to_arrays(nest):
  """Returns a nest of ints with arrays for its lists of ints."""
  if isinstance(nest, dict):
    return {key: _to_arrays(value) for key, value in nest.items()}
  if not isinstance(nest, list):
    return nest
  if all(isinstance(value, int) for value in nest):
    return np.array(nest)
  return [_to_arrays(value) for value in nest]


def describe(action_set, action):
  """Returns what an environment takes for an action, as text for people."""
  text = str(_chosen(action_set, action))
  return text.replace("'", '').replace(',', '')


def to_json(action_set):
  """Returns the set for JSON, a dict; `from_json` reads it."""
  return {
    'num_actions': tree.map_structure(len, action_set),
    'action_set': tree.map_structure(np.ndarray.tolist, action_set),
  }


def from_json(values):
  """Returns the action set that is in the dict `values`."""
  return tree.map_structure_up_to(
    values['num_actions'],
    lambda _, head: np.array(head, np.int32),
    values['num_actions'],
    values['action_set'],
  )


# --- Of Gymnasium's spaces --------------------------------------------------


def of_space(space):
  """Returns the action set of a Gymnasium environment.

  Args:
    space: of its actions.

  Raises:
    ValueError: there are other than finitely many actions.
  """
  from gymnasium import spaces

  if isinstance(space, spaces.Tuple) and len(space):
    return [of_space(part) for part in space]
  if isinstance(space, spaces.Dict) and len(space):
    return {str(key): of_space(space[key]) for key in _keys(space)}
  if isinstance(space, spaces.Discrete):
    return _heads(space.n, space.start)
  if isinstance(space, spaces.MultiDiscrete):
    return _heads(space.nvec, space.start)
  if isinstance(space, spaces.MultiBinary):
    return _heads(np.full(space.shape, 2), np.zeros(space.shape, int))
  raise ValueError(
    'its actions must be Discrete, MultiDiscrete or MultiBinary, or a Tuple or '
    f'Dict of these, but there is {" ".join(str(space).split())}'
  )


def to_space(space, values):
  """Returns an action of a Gymnasium environment.

  Args:
    space: of its actions.
    values: int, what was chosen; or int array of that of each head.
  """
  return _pack(space, iter(np.ravel(values)))


def _keys(space):
  # As `tree` sorts those of a dict, in which they are strings.
  return sorted(space, key=str)


def _heads(counts, starts):
  """Returns the nest of heads for arrays of numbers of actions."""
  if np.ndim(counts) == 0:
    return np.arange(starts, starts + counts, dtype=np.int32)
  return [_heads(*pair) for pair in zip(counts, starts, strict=True)]


def _pack(space, values):
  """Returns an action of a space, which takes what it needs from an iterator.

  It has the types that the space has.
  """
  from gymnasium import spaces

  if isinstance(space, spaces.Tuple):
    return tuple(_pack(part, values) for part in space)
  if isinstance(space, spaces.Dict):
    return {key: _pack(space[key], values) for key in _keys(space)}
  count = math.prod(space.shape)
  # A scalar if it has no dimensions.
  return np.fromiter(values, space.dtype, count).reshape(space.shape)[()]
