# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A trained agent for other programs.

In: a log folder or checkpoint; then an environment's outputs, step by step.
Out: actions. Importing this defines no flags and changes nothing in the
program.
"""

import numbers

import numpy as np
import tensorflow.compat.v1 as tf

import action_sets
import checkpoints
import environments
from agent import Agent, AgentOutput


class Player:
  """A trained agent that plays an environment of yours, step by step.

    with Player('/tmp/agent') as player:
      action, _, _ = player.step(frame, reward, done)

  `action_set` has what its actions mean to the environments of the training, as
  JSON has it in the log folder; `environment_action` looks it up.
  `popart_levels` are the names of the levels that have a baseline of their own.
  """

  def __init__(self, path, seed=None):
    """Loads an agent.

    Args:
      path: log folder of a training, for its last checkpoint; or a checkpoint
        in it, e.g. /tmp/agent/model.ckpt-1000.
      seed: int, of the actions; None lets them differ each time.

    Raises:
      UserError: there is no such checkpoint.
    """
    description, checkpoint = checkpoints.load_description(path)
    self.frame_shape = tuple(description['frame_shape'])
    self.action_set = description['action_set']
    self._action_set = action_sets.from_json(description)
    self.popart_levels = checkpoints.popart_levels(description)
    with tf.Graph().as_default():
      tf.set_random_seed(seed)
      agent = Agent(
        action_sets.num_actions(self._action_set),
        description['torso'],
        core=description['flags']['core'],
        normalize_frames=description['flags']['normalize_frames'],
        popart_levels=self.popart_levels,
      )
      self._build(agent)
      self._session = tf.Session()
      checkpoints.Saver().restore(self._session, checkpoint)
      self._run = self._session.make_callable(
        (self._output, self._next_state), self._inputs
      )
      self._state = self._session.run(agent.initial_state(1))
    self._action = np.zeros(np.shape(agent.num_actions), int).tolist()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Frees the memory of the agent, which can't be used from then on."""
    self._session.close()

  def step(self, frame, reward=0.0, done=False, instruction=''):
    """Chooses an action.

    Args:
      frame: uint8 [height, width, channels] of any size; resized for the agent.
        Without its last dimension, it has one channel.
      reward: float, for the last action.
      done: bool, whether the last action ended an episode, so that this is the
        first frame of another one.
      instruction: string, what the agent is told to do.

    Returns:
      `AgentOutput`: int, which of the actions; float32 [num_actions]; float.
      If an action is made of several: a list of ints, and float32 [num_heads,
      the most actions of a head]. With several `popart_levels`, the baseline is
      float32 [num_levels].

    Raises:
      ValueError: the arguments are not as above.
    """
    frame = self._check_frame(frame)
    reward = _check_reward(reward)
    # Any kind of False and True, but nothing else, and none of many.
    if np.ndim(done) or done not in (0, 1):
      raise ValueError(f'done must be a bool, but it is {done!r}.')
    if not isinstance(instruction, (str, bytes)):
      raise ValueError(
        f'The instruction must be a string, but it is {instruction!r}.'
      )
    output, self._state = self._run(
      [self._action],
      [reward],
      [bool(done)],
      [environments.resize(frame, *self.frame_shape[:2])],
      [instruction],
      *self._state,
    )
    self._action = output.action[0].tolist()
    baseline = output.baseline[0]
    if baseline.size == 1:
      baseline = baseline.item()
    return AgentOutput(self._action, output.policy_logits[0], baseline)

  def environment_action(self, action):
    """Returns what the `step` of the training's environments takes.

    Args:
      action: of an `AgentOutput`.

    Returns:
      An int, an array of ints, or a list or dict of these.
    """
    return action_sets.look_up(self._action_set, action)

  def _check_frame(self, frame):
    """Returns the frame as an array; raises ValueError if it is none."""
    try:
      frame = np.asarray(frame)
    except ValueError:  # Rows of different lengths.
      frame = np.array(None)
    channels = self.frame_shape[2]
    shape = frame.shape if frame.ndim != 2 else (*frame.shape, 1)
    if (
      frame.dtype != np.uint8
      or len(shape) != 3
      or shape[2] != channels
      or 0 in shape
    ):
      raise ValueError(
        f'A frame must be uint8 [height, width, {channels}], one at a time, '
        f'but this is {frame.dtype}{list(frame.shape)}.'
      )
    return frame

  def _build(self, agent):
    state = tf.nest.map_structure(
      lambda t: tf.placeholder(t.dtype, t.shape), agent.initial_state(1)
    )
    action = tf.placeholder(tf.int32, [1, *np.shape(agent.num_actions)])
    reward = tf.placeholder(tf.float32, [1])
    done = tf.placeholder(tf.bool, [1])
    frame = tf.placeholder(tf.uint8, [1, *self.frame_shape])
    instruction = tf.placeholder(tf.string, [1])
    env_output = environments.StepOutput(reward, (), done, (frame, instruction))
    self._output, self._next_state = agent((action, env_output), state)
    self._inputs = [action, reward, done, frame, instruction, *state]


def _check_reward(reward):
  """Returns a reward as float; raises ValueError if it is no finite number."""
  is_number = isinstance(reward, (numbers.Real, np.bool_)) or (
    isinstance(reward, np.ndarray) and reward.shape == ()
  )
  with np.errstate(over='ignore'):
    is_finite = is_number and np.isfinite(np.float32(reward))
  if not is_finite:
    raise ValueError(f'A reward must be a finite number, but it is {reward!r}.')
  return float(reward)
