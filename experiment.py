# Licensed under the Apache License, Version 2.0; see LICENSE.
"""IMPALA: importance weighted actor-learner architectures (arXiv 1802.01561).

Actors play environments with a slightly old policy and send unrolls to a
learner, which corrects for the difference with V-trace:

  environment process --> actor loop --> queue --> staging --> learner
        ^                   |    ^                               |
        +------ action -----+    +---------- parameters ---------+

  python experiment.py --level_name=gym:VizdoomBasic-v1   # Trains.
  python experiment.py --level_name=gym:VizdoomBasic-v1 --mode=test

On many machines, the queue and the parameters are on the learner task, and
actor tasks reach them over the network (see `Board`):

  python experiment.py --job_name=learner --task=0
  python experiment.py --job_name=actor --task=0   # And 1, 2, ...
"""

import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib

import numpy as np
import six
import tqdm
from absl import app, flags, logging

import quiet

with quiet.start():
  import sonnet as snt
  import tensorflow.compat.v1 as tf

  import atari57
  import convolution
  import dmlab30
  import dynamic_batching
  import environments
  import evaluation
  import py_process
  import video
  import vtrace

# Sonnet asks once whether TensorFlow 2 is on, and would take a graph for a no.
# After a first module outside of any graph it builds modules anywhere.
snt.Module()

FLAGS = flags.FLAGS

# What to run, and where.
flags.DEFINE_enum(
  'mode', 'train', ['train', 'test'], 'Train an agent, or play with it.'
)
flags.DEFINE_string(
  'logdir',
  '/tmp/agent',
  'Folder of checkpoints and metrics. Training goes on from the checkpoint in '
  'it.',
)
flags.DEFINE_string(
  'level_name',
  'explore_goal_locations_small',
  'What to play: a level of DeepMind Lab, gym: and the id of a Gymnasium '
  'environment with images and discrete actions, e.g. gym:VizdoomBasic-v1, '
  'gym:ALE/Pong-v5, or a whole suite: dmlab30, atari57.',
)
flags.DEFINE_integer(
  'test_num_episodes', 10, 'Episodes per level in test mode.', lower_bound=1
)
flags.DEFINE_string(
  'checkpoint',
  '',
  'The checkpoint to test, e.g. /tmp/agent/model.ckpt-1000; the last one in '
  '--logdir if this is not given.',
)
flags.DEFINE_integer(
  'task', -1, 'Number of this task; -1 is training on one machine.'
)
flags.DEFINE_enum(
  'job_name', 'learner', ['learner', 'actor'], 'Job of this task.'
)
flags.DEFINE_string(
  'learner_address',
  'localhost:8000',
  'host:port of the learner task. With localhost only this host can reach it; '
  'else it listens on all interfaces, and who reaches it can do anything: only '
  'for networks that you trust.',
)
flags.DEFINE_string(
  'actor_address',
  None,
  'host:port by which the learner calls this actor task in its reports, '
  'localhost:<8001 + task> by default. Actor tasks open no port.',
)
flags.DEFINE_integer(
  'test_interval_frames',
  0,
  'Environment frames between two tests in the background of a training, in a '
  'process of their own; 0 is off.',
  lower_bound=0,
)
flags.DEFINE_string(
  'video_dir',
  '',
  'Folder for a video of the first test episode of each level; none without.',
)

# The size of the training.
flags.DEFINE_integer(
  'total_environment_frames',
  int(1e9),
  'Environment frames to train for, repeated actions included.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'num_actors',
  4,
  'Actors, with an environment process each. On many machines the actor tasks '
  'that the learner expects, for its reports alone; in test mode, how many '
  'episodes are played at once.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'environments_per_actor',
  1,
  'Environments of an actor task, which share its inference.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'batch_size', 2, 'Unrolls per update of the learner.', lower_bound=1
)
flags.DEFINE_integer(
  'unroll_length', 100, 'Agent steps per unroll.', lower_bound=1
)
flags.DEFINE_integer(
  'seed',
  1,
  'Seed of networks, actions and environments.',
  lower_bound=0,
  upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
  'save_checkpoint_secs', 600, 'Seconds between checkpoints.', lower_bound=1
)

# The environments.
flags.DEFINE_integer(
  'num_action_repeats',
  4,
  'Environment frames per agent step: each action is repeated so often.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'height',
  72,
  'Height of the frames in pixels. Atari uses 84 unless this is given.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'width',
  96,
  'Width of the frames in pixels. Atari uses 84 unless this is given.',
  lower_bound=1,
)
flags.DEFINE_string(
  'dataset_path', '', "Folder with the data of DeepMind Lab's psychlab levels."
)
flags.DEFINE_string(
  'level_cache_dir',
  '~/.cache/impala/dmlab_maps',
  "Folder for DeepMind Lab's compiled maps, shared by all its processes.",
)
flags.DEFINE_integer(
  'max_environment_restarts',
  10,
  'How often the environment process of an actor may die and be restarted '
  'before training stops, or that of a level before its test is given up.',
  lower_bound=0,
)

# The agent and its loss.
flags.DEFINE_enum(
  'torso',
  'deep',
  ['deep', 'shallow'],
  "The paper's network of 15 convolutions, or the one of 2.",
)
flags.DEFINE_enum(
  'precision',
  'float32',
  ['float32', 'bfloat16'],
  'Of what convolutions multiply on the CPU, and, where they are not our own '
  'operations for AVX-512, of what is between two of them. Everything else, '
  'parameters, losses and V-trace too, is float32.',
)
flags.DEFINE_float(
  'entropy_cost', 0.00025, 'Weight of the entropy bonus.', lower_bound=0
)
flags.DEFINE_float(
  'baseline_cost', 0.5, 'Weight of the baseline loss.', lower_bound=0
)
flags.DEFINE_float(
  'discounting',
  0.99,
  'Discount factor per agent step.',
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_enum(
  'reward_clipping',
  'abs_one',
  ['abs_one', 'soft_asymmetric'],
  'abs_one clips rewards to [-1, 1]. soft_asymmetric takes 5 tanh(r / 5), '
  "times 0.3 if negative, as DeepMind's release does; the paper's appendix "
  'prints another formula.',
)

# The optimiser.
flags.DEFINE_float(
  'learning_rate',
  0.00048,
  'Learning rate at the start; falls linearly to 0 at the last frame. The loss '
  'is a sum, so it depends on --batch_size and --unroll_length.',
  lower_bound=0,
)
flags.DEFINE_float(
  'decay', 0.99, "RMSProp's decay.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float('momentum', 0.0, "RMSProp's momentum.", lower_bound=0)
flags.DEFINE_float('epsilon', 0.1, "RMSProp's epsilon.", lower_bound=0)
flags.DEFINE_float(
  'max_gradient_norm',
  0.0,
  'Gradients of a larger global norm are scaled down to it; 0 is off.',
  lower_bound=0,
)

# A benchmark of many levels: the module with its levels and reference scores,
# the folder of the levels, and its scores: functions of the returns by level.
Suite = collections.namedtuple('Suite', 'module folder aggregates')

SUITES = {
  'dmlab30': Suite(
    dmlab30,
    'contributed/dmlab30/',
    {
      'no_cap': functools.partial(
        dmlab30.compute_human_normalized_score, per_level_cap=None
      ),
      'cap_100': functools.partial(
        dmlab30.compute_human_normalized_score, per_level_cap=100
      ),
    },
  ),
  'atari57': Suite(
    atari57,
    '',
    {
      'median': atari57.compute_human_normalized_score,
      'mean': functools.partial(
        atari57.compute_human_normalized_score, aggregate=np.mean
      ),
    },
  ),
}

# Atari's and DeepMind Lab's own pace: 60 frames per second, 4 to a step.
_VIDEO_FRAMES_PER_SECOND = 15

# Whose versions decide the course of an episode, where they are installed.
_ENVIRONMENT_PACKAGES = (
  'ale-py',
  'minigrid',
  'opencv-python-headless',
  'vizdoom',
)

# What the agent is made for, beside its checkpoints.
_DESCRIPTION = 'agent.json'

_NOT_FINITE = 'The loss or its gradient is not finite'
_REPORT_SECONDS = 30  # Between two reports of the metrics.
_EPISODES = 100  # Episodes per level in the averages of the reports.

AgentOutput = collections.namedtuple(
  'AgentOutput', 'action policy_logits baseline'
)
# An unroll: `env_outputs` and `agent_outputs` have unroll_length + 1 entries,
# of which the first is the last of the unroll before; `agent_state` is that
# before the first entry.
ActorOutput = collections.namedtuple(
  'ActorOutput', 'level_name agent_state env_outputs agent_outputs'
)


# --- The agent --------------------------------------------------------------


class Agent(snt.Module):
  """The paper's network (section 5.1 and figure 3), deep or shallow.

  Its input is the environment's output and the action that led to it. The core
  is an LSTM; its state is reset where an episode begins.
  """

  def __init__(
    self, num_actions, torso='deep', precision='float32', name='agent'
  ):
    """Makes the modules.

    Args:
      num_actions: int, number of actions to choose from.
      torso: 'deep' or 'shallow'.
      precision: of what convolutions multiply, 'float32' or 'bfloat16'. Those
        of TensorFlow need a session that rewrites them.
      name: name of the module.
    """
    super().__init__(name)
    self.num_actions = num_actions
    self._frame_encoder = {
      'deep': lambda: _DeepEncoder(precision),
      'shallow': _ShallowEncoder,
    }[torso]()
    self._instruction_encoder = _InstructionEncoder()
    # Inputs weigh twice as much as by default: what is seen has to move the
    # gates more than the memory does, or learning stays blind for long.
    self._core = snt.LSTM(
      256, w_i_init=snt.initializers.VarianceScaling(4.0), name='core'
    )
    self._policy = snt.Linear(num_actions, name='policy_logits')
    self._baseline = snt.Linear(1, name='baseline')

  def initial_state(self, batch_size):
    """Returns the LSTM's state [batch_size, ...] before the first step."""
    return self._core.initial_state(batch_size)

  def __call__(self, input_, core_state):
    """Chooses actions for one step.

    Args:
      input_: pair of the last action, int32 [B], and a `StepOutput` of
        [B, ...].
      core_state: state of the LSTM before the step, [B, ...].

    Returns:
      `AgentOutput` of int32 [B], float32 [B, num_actions] and float32 [B], and
      the next state.
    """
    last_action, env_output = input_
    features = self._torso(last_action, env_output)
    core_output, core_state = self._core(
      features, _reset(self._core, core_state, env_output.done)
    )
    return self._head(core_output), core_state

  def unroll(self, actions, env_outputs, core_state):
    """Runs the agent over a sequence.

    Args:
      actions: the actions that led to `env_outputs`, int32 [T, B].
      env_outputs: `StepOutput` of [T, B, ...].
      core_state: state of the LSTM before the first step, [B, ...].

    Returns:
      `AgentOutput` of [T, B, ...], and the last state.
    """
    # Everything but the LSTM sees all steps at once.
    last_action, env_output = tf.nest.map_structure(
      lambda t: snt.merge_leading_dims(t, 2), (actions, env_outputs)
    )
    features = self._torso(last_action, env_output)
    hidden, cell = _unroll_lstm(
      self._core,
      snt.split_leading_dim(features, actions, 2),
      env_outputs.done,
      core_state,
    )
    # The output of an LSTM is the hidden part of its state.
    outputs = self._head(snt.merge_leading_dims(hidden, 2))
    return (
      tf.nest.map_structure(
        lambda t: snt.split_leading_dim(t, actions, 2), outputs
      ),
      snt.LSTMState(hidden[-1], cell[-1]),
    )

  def _torso(self, last_action, env_output):
    """Returns the core's input, float32 [N, features]."""
    frame, instruction = env_output.observation
    return tf.concat(
      [
        self._frame_encoder(frame),
        tf.clip_by_value(env_output.reward, -1, 1)[:, tf.newaxis],
        tf.one_hot(last_action, self.num_actions),
        self._instruction_encoder(instruction),
      ],
      axis=1,
    )

  def _head(self, core_output):
    """Returns the `AgentOutput` for the core's output, [N, features]."""
    policy_logits = self._policy(core_output)
    action = tf.random.categorical(policy_logits, 1, dtype=tf.int32)
    return AgentOutput(
      # Of logits that are not finite it draws an action beyond the last. The
      # learner is the one to report them.
      action=tf.minimum(tf.squeeze(action, 1), self.num_actions - 1),
      policy_logits=policy_logits,
      baseline=tf.squeeze(self._baseline(core_output), 1),
    )


# Keeps the scale of a signal of which a ReLU takes half (arXiv 1502.01852). By
# Sonnet's default the picture gets fainter layer by layer.
_RELU_INIT = snt.initializers.VarianceScaling(2.0)


class _Convolution(snt.Conv2D):
  """The variables of a convolution of 3x3 pixels."""

  def __init__(self, channels):
    super().__init__(channels, 3, name='conv2_d')

  def __call__(self, in_channels):
    """Returns weights [3, 3, in_channels, channels] and biases [channels]."""
    # Sonnet's, which makes the variables.
    self._initialize(tf.TensorSpec([None, None, None, in_channels]))
    return self.w, self.b


class _DeepEncoder(snt.Module):
  """Three sections of a convolution, a pool and two residual blocks."""

  def __init__(self, precision):
    super().__init__('deep')
    self._precision = precision
    self._sections = [
      [_Convolution(channels) for _ in range(5)] for channels in (16, 32, 32)
    ]
    self._linear = snt.Linear(256, w_init=_RELU_INIT)

  def __call__(self, frame):
    """Maps uint8 [N, height, width, channels] to float32 [N, 256]."""
    for layers in self._sections:
      channels = [frame.shape[-1], *[layers[0].output_channels] * 4]
      weights, biases = zip(
        *(layer(n) for layer, n in zip(layers, channels, strict=True)),
        strict=True,
      )
      frame = convolution.section(frame, weights, biases, self._precision)
    return tf.nn.relu(self._linear(snt.flatten(tf.nn.relu(frame))))


class _ShallowEncoder(snt.Module):
  """Two convolutions."""

  def __init__(self):
    super().__init__('shallow')
    self._network = snt.Sequential(
      [
        snt.Conv2D(16, 8, stride=4, w_init=_RELU_INIT),
        tf.nn.relu,
        snt.Conv2D(32, 4, stride=2, w_init=_RELU_INIT),
        tf.nn.relu,
        snt.Flatten(),
        snt.Linear(256, w_init=_RELU_INIT),
        tf.nn.relu,
      ]
    )

  def __call__(self, frame):
    """Maps uint8 [N, height, width, channels] to float32 [N, 256]."""
    return self._network(tf.cast(frame, tf.float32) / 255)


class _InstructionEncoder(snt.Module):
  """An LSTM over the hashed words of the instruction."""

  _NUM_BUCKETS = 1000

  def __init__(self):
    super().__init__('instruction')
    self._embedding = snt.Embed(self._NUM_BUCKETS, 20)
    self._lstm = snt.LSTM(64)

  def __call__(self, instruction):
    """Maps strings [N] to float32 [N, 64], the LSTM's output at the last word.

    That of an empty instruction is zero.
    """
    # Makes the variables, which a branch can't.
    state = self._lstm.initial_state(1)
    self._lstm(tf.zeros([1, self._embedding.embed_dim]), state)
    # Most environments give none: half of the operations of an inference.
    return tf.cond(
      tf.reduce_any(tf.not_equal(instruction, '')),
      lambda: self._encode(instruction),
      lambda: self._encode_none(tf.shape(instruction)[0], state),
    )

  def _encode_none(self, batch_size, state):
    """Returns zeros, float32 [batch_size, 64]."""
    # No row is looked up. Without the embedding in it, this branch's gradient
    # would be zeros for all rows, which RMSProp takes for an update of each.
    nothing = tf.reduce_sum(self._embedding(tf.zeros([0], tf.int64)))
    return tf.zeros([batch_size, *state.hidden.shape[1:]]) + nothing

  def _encode(self, instruction):
    """As `__call__`, word by word."""
    words = tf.strings.split(instruction, result_type='RaggedTensor')
    lengths = tf.cast(words.row_lengths(), tf.int32)
    # Words come last, after padding; the loop needs a step at least.
    padded = tf.reverse_sequence(words.to_tensor(''), lengths, seq_axis=1)
    padded = tf.reverse(
      tf.pad(padded, [[0, 0], [0, 1]], constant_values=''), axis=[1]
    )
    buckets = tf.strings.to_hash_bucket_fast(padded, self._NUM_BUCKETS)
    num_steps = tf.shape(padded)[1]
    hidden, _ = _unroll_lstm(
      self._lstm,
      tf.transpose(self._embedding(buckets), [1, 0, 2]),
      # The first word begins.
      tf.range(num_steps)[:, tf.newaxis] <= num_steps - lengths,
      self._lstm.initial_state(tf.shape(instruction)[0]),
    )
    return tf.where(lengths > 0, hidden[-1], tf.zeros_like(hidden[-1]))


def _reset(lstm, state, done):
  """Returns an LSTM's state [B, ...], a fresh one where `done`, bool [B]."""
  fresh = lstm.initial_state(tf.shape(done)[0])
  return tf.nest.map_structure(
    lambda new, old: tf.where(done, new, old), fresh, state
  )


def _unroll_lstm(lstm, inputs, done, state):
  """Runs an LSTM over a sequence, resetting it where another one begins.

  As step by step, but only what needs the step before is done step by step:
  inputs are multiplied at once, and so are, in the gradient of the recurrent
  weights, hidden states and gates.

  Args:
    lstm: `snt.LSTM`.
    inputs: float32 [T, B, features], T > 0.
    done: bool [T, B], whether a sequence begins.
    state: state before the first step, [B, ...].

  Returns:
    Hidden part and cells of the state after each step, float32 [T, B, units].
  """
  # Its first call makes the variables, which loops can't do.
  lstm(inputs[0], state)
  gates = tf.tensordot(inputs, lstm.input_to_hidden, 1) + lstm.b
  # A loop's state may not know less of its shape than it did before.
  batch_size = state.hidden.shape[0]
  gates.set_shape([None, batch_size, None])
  done.set_shape([None, batch_size])

  @tf.custom_gradient
  def recur(gates, hidden, cell, weights):
    constant_weights = tf.stop_gradient(weights)

    def step(state, inputs):
      gates, done = inputs
      hidden, cell = _reset(lstm, state, done)
      gates += tf.matmul(hidden, constant_weights)
      i, f, g, o = tf.split(gates, 4, axis=1)
      cell = tf.sigmoid(f) * cell + tf.sigmoid(i) * tf.tanh(g)
      return snt.LSTMState(tf.sigmoid(o) * tf.tanh(cell), cell)

    states = tf.scan(step, (gates, done), snt.LSTMState(hidden, cell))

    def gradient(hidden_gradient, cell_gradient):
      gates_gradient, *initial_gradients = tf.gradients(
        [states.hidden, states.cell],
        [gates, hidden, cell],
        [hidden_gradient, cell_gradient],
      )
      before = tf.concat([hidden[tf.newaxis], states.hidden[:-1]], axis=0)
      before = tf.where(
        tf.broadcast_to(done[..., tf.newaxis], tf.shape(before)),
        tf.zeros_like(before),
        before,
      )
      weights_gradient = tf.tensordot(before, gates_gradient, [[0, 1]] * 2)
      return gates_gradient, *initial_gradients, weights_gradient

    return (states.hidden, states.cell), gradient

  return recur(gates, *state, lstm.hidden_to_hidden)


# --- The actor --------------------------------------------------------------

# What an actor takes from one unroll into the next.
ActorState = collections.namedtuple(
  'ActorState', 'agent_state env_state env_output agent_output'
)
# The graph of an actor. A run of `initial_state` starts the environment. A run
# with `state`, placeholders, fed plays one unroll: `output` is what it saw, an
# `ActorOutput` of [T + 1, ...], and `next_state` what to feed next.
Actor = collections.namedtuple(
  'Actor', 'initial_state state output next_state inference_statistics'
)


def build_actor(agent, env, level_name, action_set, noise_seed=None):
  """Builds the loop in which an actor plays one unroll.

  Args:
    agent: `Agent`.
    env: `FlowEnvironment`.
    level_name: string scalar, tensor or not.
    action_set: array [num_actions, ...], what `env.step` takes.
    noise_seed: int32 scalar tensor, from which, with the number of the step in
      its episode, actions are drawn: the same ones in each run, however its
      inference was batched. None draws them from the graph's random numbers.

  Returns:
    `Actor`.
  """
  is_reproducible = noise_seed is not None

  @dynamic_batching.batch_fn
  def infer(last_action, env_output, agent_state):
    requests = (last_action, env_output), agent_state
    return (
      _infer_padded(agent, requests) if is_reproducible else agent(*requests)
    )

  initial_state = _build_initial_state(agent, env)
  state = tf.nest.map_structure(
    lambda t: tf.placeholder(t.dtype, t.shape), initial_state
  )
  actions = tf.constant(action_set)

  def act(state):
    # The agent doesn't see the accounts of the episode.
    env_output = state.env_output._replace(info=(), game_over=(), truncated=())
    agent_output, agent_state = infer(
      *_with_batch((state.agent_output.action, env_output, state.agent_state))
    )
    if is_reproducible:
      seed = [noise_seed, state.env_state.episode_step]
      agent_output = _redraw_action(agent_output, seed)
    return _without_batch((agent_output, agent_state))

  def step(state, _):
    agent_output, agent_state = act(state)
    env_output, env_state = env.step(
      tf.gather(actions, agent_output.action), state.env_state
    )
    return ActorState(agent_state, env_state, env_output, agent_output)

  # Never run: it makes the variables, which a loop can't.
  act(state)
  # One step after another: each depends on the state that the last returned.
  states = tf.scan(
    step, tf.range(FLAGS.unroll_length), state, parallel_iterations=1
  )
  env_outputs, agent_outputs = tf.nest.map_structure(
    lambda first, rest: tf.concat([first[tf.newaxis], rest], axis=0),
    (state.env_output, state.agent_output),
    (states.env_output, states.agent_output),
  )
  return Actor(
    initial_state=initial_state,
    state=state,
    output=ActorOutput(
      tf.convert_to_tensor(level_name),
      state.agent_state,
      env_outputs,
      agent_outputs,
    ),
    next_state=_take(states, -1),
    inference_statistics=infer.statistics(),
  )


def _infer_padded(agent, requests):
  """Runs the agent so that a row's results don't depend on the other rows.

  Products of one row are computed in another way and round differently; from
  two rows on, all batches give the same.
  """
  batch_size = tf.shape(tf.nest.flatten(requests)[0])[0]
  padding = tf.cast(batch_size < 2, tf.int32)
  padded = tf.nest.map_structure(
    lambda t: tf.concat([t, t[:padding]], axis=0), requests
  )
  return tf.nest.map_structure(lambda t: t[:batch_size], agent(*padded))


def _redraw_action(agent_output, seed):
  """Draws the action of an `AgentOutput` of [1, ...] anew, by two seeds."""
  logits = agent_output.policy_logits
  action = tf.random.stateless_categorical(logits, 1, seed, dtype=tf.int32)
  last = logits.shape[1] - 1  # As in the agent.
  return agent_output._replace(action=tf.minimum(tf.squeeze(action, 1), last))


def _build_initial_state(agent, env):
  """Starts the environment; no action led to its first observation."""
  env_output, env_state = env.initial()
  agent_output = AgentOutput(
    action=tf.constant(0),
    policy_logits=tf.zeros([agent.num_actions]),
    baseline=tf.constant(0.0),
  )
  agent_state = _without_batch(agent.initial_state(1))
  return ActorState(agent_state, env_state, env_output, agent_output)


def _with_batch(nest):
  return tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), nest)


def _without_batch(nest):
  return tf.nest.map_structure(lambda t: tf.squeeze(t, 0), nest)


def _take(nest, index):
  """Returns what is at an index or slice of the leading dimension."""
  return tf.nest.map_structure(lambda t: t[index], nest)


# --- The learner ------------------------------------------------------------

# What an update of the learner tells, scalars. `global_step` is the number of
# environment frames after the update; a run of it does the update.
LearnerOutput = collections.namedtuple(
  'LearnerOutput',
  'global_step learning_rate total_loss policy_gradient_loss baseline_loss '
  'entropy gradient_norm',
)


def build_learner(agent, agent_state, env_outputs, agent_outputs):
  """Builds the loss (section 4.2 of the paper) and its update.

  Args:
    agent: `Agent`.
    agent_state: its state before the first entry, [B, ...].
    env_outputs: `StepOutput` of [T + 1, B, ...].
    agent_outputs: `AgentOutput` of [T + 1, B, ...], by the behaviour policy.

  Returns:
    `LearnerOutput`.
  """
  # The last entry serves for its value alone, through which no gradient goes:
  # what runs apart from the others is spared a backward pass.
  inputs = (agent_outputs.action, env_outputs)
  learner_outputs, last_state = agent.unroll(
    *_take(inputs, slice(None, -1)), agent_state
  )
  last_output, _ = agent(_take(inputs, -1), last_state)
  # The agent's output t came before the environment's output t: after this,
  # entry t has an action, its reward, and policy and baseline before both.
  agent_outputs, env_outputs = _take(
    (agent_outputs, env_outputs), slice(1, None)
  )
  # Its many small operations are not for an accelerator.
  with tf.device('/cpu'):
    vtrace_returns = vtrace.from_logits(
      behaviour_policy_logits=agent_outputs.policy_logits,
      target_policy_logits=learner_outputs.policy_logits,
      actions=agent_outputs.action,
      discounts=tf.cast(~env_outputs.done, tf.float32) * FLAGS.discounting,
      # See environments.py: nothing is learned from an entry that only resets.
      rewards=tf.where(
        env_outputs.truncated,
        learner_outputs.baseline,
        _clip_rewards(env_outputs.reward),
      ),
      values=learner_outputs.baseline,
      bootstrap_value=last_output.baseline,
    )

  policy_gradient_loss = -tf.reduce_sum(
    vtrace.log_probs_from_logits_and_actions(
      learner_outputs.policy_logits, agent_outputs.action
    )
    * vtrace_returns.pg_advantages
  )
  baseline_loss = 0.5 * tf.reduce_sum(
    tf.square(vtrace_returns.vs - learner_outputs.baseline)
  )
  entropy = _entropy(learner_outputs.policy_logits)
  entropy = tf.where(env_outputs.truncated, tf.zeros_like(entropy), entropy)
  total_loss = (
    policy_gradient_loss
    + FLAGS.baseline_cost * baseline_loss
    - FLAGS.entropy_cost * tf.reduce_sum(entropy)
  )
  tf.summary.histogram('action', agent_outputs.action)
  return _build_update(
    agent, total_loss, policy_gradient_loss, baseline_loss, entropy
  )


def _clip_rewards(rewards):
  if FLAGS.reward_clipping == 'abs_one':
    return tf.clip_by_value(rewards, -1, 1)
  squeezed = tf.tanh(rewards / 5.0)
  return tf.where(rewards < 0, 0.3 * squeezed, squeezed) * 5.0


def _entropy(policy_logits):
  """Returns the entropy in nats, [T, B], of policies [T, B, num_actions]."""
  log_policy = tf.nn.log_softmax(policy_logits)
  return -tf.reduce_sum(tf.exp(log_policy) * log_policy, axis=-1)


def _build_update(
  agent, total_loss, policy_gradient_loss, baseline_loss, entropy
):
  """Builds the step of RMSProp; `LearnerOutput` has its results."""
  global_step = tf.train.get_or_create_global_step()
  learning_rate = tf.train.polynomial_decay(
    FLAGS.learning_rate, global_step, FLAGS.total_environment_frames, 0
  )
  optimizer = tf.train.RMSPropOptimizer(
    learning_rate, FLAGS.decay, FLAGS.momentum, FLAGS.epsilon
  )
  variables = agent.trainable_variables
  gradients = tf.gradients(total_loss, variables)
  # Checked before anything is changed, so that a loss that is not a number
  # leaves the variables as they were.
  gradient_norm = tf.global_norm(gradients)
  checks = [
    tf.debugging.check_numerics(total_loss, _NOT_FINITE),
    tf.debugging.check_numerics(gradient_norm, _NOT_FINITE),
  ]
  if FLAGS.max_gradient_norm > 0:
    gradients, _ = tf.clip_by_global_norm(
      gradients, FLAGS.max_gradient_norm, use_norm=gradient_norm
    )
  with tf.control_dependencies(checks):
    update = optimizer.apply_gradients(zip(gradients, variables, strict=True))
  with tf.control_dependencies([update]):
    step = global_step.assign_add(_frames_per_update(), read_value=True)
  output = LearnerOutput(
    global_step=step,
    learning_rate=learning_rate,
    total_loss=total_loss,
    policy_gradient_loss=policy_gradient_loss,
    baseline_loss=baseline_loss,
    entropy=tf.reduce_mean(entropy),
    gradient_norm=gradient_norm,
  )
  for name, value in output._asdict().items():
    if name != 'global_step':
      tf.summary.scalar(name, value)
  return output


def _frames_per_update():
  return FLAGS.batch_size * FLAGS.unroll_length * FLAGS.num_action_repeats


# --- The way from actors to learner -----------------------------------------


class NestQueue:
  """A `tf.FIFOQueue` of nests of tensors."""

  def __init__(self, capacity, like, name):
    """Makes a queue for nests with the structure and shapes of `like`.

    Sessions on one server share the queues of the same name.
    """
    flat = tf.nest.flatten(like)
    self._like = like
    self.queue = tf.FIFOQueue(
      capacity,
      [t.dtype for t in flat],
      [t.shape for t in flat],
      shared_name=name,
      name=name,
    )

  def enqueue(self, nest):
    return self.queue.enqueue(tf.nest.flatten(nest))

  def dequeue(self):
    return self._pack(self.queue.dequeue())

  def dequeue_many(self, count):
    return self._pack(self.queue.dequeue_many(count))

  def _pack(self, flat):
    return tf.nest.pack_sequence_as(
      self._like, flat if isinstance(flat, list) else [flat]
    )


# An unroll on its way; `global_step` is the learner's when it was begun.
Unroll = collections.namedtuple('Unroll', 'actor_output global_step')

# What an update did and found: the `LearnerOutput`, level_name [B], done and
# info [T, B], and scalars.
Update = collections.namedtuple(
  'Update',
  'learner level_name game_over info policy_lag queue_size wait_seconds',
)


def build_staging(queue):
  """Assembles the next batch while the learner works on the last one.

  Args:
    queue: `NestQueue` of unrolls.

  Returns:
    A nest of `Unroll`, its outputs time-major: [T + 1, B, ...]; and the seconds
    that the learner waited for it.
  """
  batch = queue.dequeue_many(FLAGS.batch_size)
  actor_output = batch.actor_output
  env_outputs, agent_outputs = tf.nest.map_structure(
    _swap_leading_dims, (actor_output.env_outputs, actor_output.agent_outputs)
  )
  batch = batch._replace(
    actor_output=actor_output._replace(
      env_outputs=env_outputs, agent_outputs=agent_outputs
    )
  )
  staged = NestQueue(1, batch, 'staged_batches')
  tf.train.add_queue_runner(
    tf.train.QueueRunner(staged.queue, [staged.enqueue(batch)])
  )
  begin = tf.timestamp()
  with tf.control_dependencies([begin]):
    batch = staged.dequeue()
  with tf.control_dependencies(tf.nest.flatten(batch)):
    wait_seconds = tf.timestamp() - begin
  return batch, wait_seconds


def _swap_leading_dims(tensor):
  rank = tensor.shape.rank
  return tf.transpose(tensor, [1, 0, *range(2, rank)])


def build_unroll(actor):
  """Returns the `Unroll` that a run of the actor plays."""
  with tf.device('/cpu'):
    # Read before the first step of the unroll, as the state is fed.
    return Unroll(actor.output, tf.train.get_global_step().read_value())


def build_queue(unroll):
  """Returns the `NestQueue` of unrolls like `unroll` to the learner."""
  with tf.device('/cpu'):
    # As small as can be, for a small lag of the policy and diverse batches.
    return NestQueue(1, unroll, 'unrolls')


def build_training(agent, queue):
  """Returns the `Update` that takes a batch of unrolls from a `NestQueue`."""
  with tf.device('/cpu'):
    batch, wait_seconds = build_staging(queue)
  output = batch.actor_output
  learner = build_learner(
    agent, output.agent_state, output.env_outputs, output.agent_outputs
  )
  lag = learner.global_step - _frames_per_update() - batch.global_step
  return Update(
    learner=learner,
    level_name=output.level_name,
    # The first entry was told as the last one of the unroll before.
    game_over=output.env_outputs.game_over[1:],
    info=_take(output.env_outputs.info, slice(1, None)),
    policy_lag=tf.reduce_mean(tf.cast(lag, tf.float32)) / _frames_per_update(),
    queue_size=queue.queue.size(),
    wait_seconds=wait_seconds,
  )


# Totals: restarts of environment processes, and see `BatchingStatistics`.
ActorStatistics = collections.namedtuple(
  'ActorStatistics', 'restarts batches requests wait_seconds'
)


class ActorLoops(tf.train.SessionRunHook):
  """Runs the actors, a thread and an environment process each.

  All threads run the one graph of an actor, and differ in what they feed.
  """

  def __init__(self, actor, index, processes, fetches, take):
    """Prepares the loops; the session's start starts them.

    Args:
      actor: `Actor`.
      index: int placeholder, which actor runs.
      processes: list of `PyProcess`, one per actor.
      fetches: nest of tensors and ops to run with each unroll.
      take: function of the actor's index and the values of `fetches`, called
        after each unroll; says whether the actor goes on.
    """
    self._actor = actor
    self._index = index
    self.processes = processes
    self._fetches = fetches
    self._take = take
    self._restarts = [0] * len(processes)
    self.coord = None
    self.session = None

  @property
  def restarts(self):
    """How many environment processes were restarted."""
    return sum(self._restarts)

  def statistics(self):
    """Returns the `ActorStatistics` since the start."""
    return ActorStatistics(
      self.restarts, *self.session.run(self._actor.inference_statistics)
    )

  def membership(self):
    """As `ActorTasks.membership`; there is nothing to tell."""
    return {}, []

  def changes(self):
    """As `ActorTasks.changes`; there are none."""
    return []

  def close(self, error=None):
    """Ends the environments' processes."""
    del error
    py_process.close_all(self.processes)

  def begin(self):
    py_process.start_all(self.processes)

  def after_create_session(self, session, coord):
    self.session, self.coord = session, coord
    start = _make_start(session, self._actor, self._index)
    unroll = _make_unroll(session, self._actor, self._index, self._fetches)
    for actor in range(len(self.processes)):
      thread = threading.Thread(
        target=self._run, args=(actor, start, unroll), daemon=True
      )
      coord.register_thread(thread)
      thread.start()

  def _run(self, actor, start, unroll):
    with self.coord.stop_on_exception():
      state = None
      while not self.coord.should_stop():
        try:
          state = state or start(actor)
          values, state = unroll(actor, *state)
        except tf.errors.OpError as error:
          if self.coord.should_stop():
            return
          self._recover(actor, error)
          # The episode ended unseen; the next one begins.
          state = None
        else:
          if not self._take(actor, values):
            return

  def _recover(self, actor, error):
    """Restarts the actor's process if it died, else raises the error."""
    process = self.processes[actor]
    exit_code = process.exit_code(timeout=1.0)
    if exit_code is None:
      raise error
    if self._restarts[actor] >= FLAGS.max_environment_restarts:
      raise py_process.ProcessError(
        f'The environment process of actor {actor} died again, with '
        f'{_describe_exit(exit_code)}, after {self._restarts[actor]} restarts '
        '(--max_environment_restarts).'
      )
    self._restarts[actor] += 1
    logging.warning(
      'The environment process of actor %d died with %s: restart %d of at '
      'most %d.',
      actor,
      _describe_exit(exit_code),
      self._restarts[actor],
      FLAGS.max_environment_restarts,
    )
    # Another seed, or it would play the same episodes again.
    process.restart(seed=_environment_seed(actor, self._restarts[actor]))


def _make_start(session, actor, index):
  """Returns a function of an actor's index that starts its environment.

  It returns the flat state to begin with.
  """
  return session.make_callable(tf.nest.flatten(actor.initial_state), [index])


def _make_unroll(session, actor, index, fetches):
  """Returns a function of an actor's index and flat state that plays an unroll.

  It returns the values of `fetches` and the next flat state.
  """
  return session.make_callable(
    [fetches, tf.nest.flatten(actor.next_state)],
    [index, *tf.nest.flatten(actor.state)],
  )


def _describe_exit(exit_code):
  if exit_code >= 0:
    return f'exit code {exit_code}'
  return f'exit code {exit_code} ({signal.Signals(-exit_code).name})'


def _environment_seed(actor, restart=0):
  """Returns a seed, int32, that differs between actors, restarts and runs."""
  number = _first_environment() + actor
  return _seeds(1, FLAGS.seed, number, restart)[0]


def _first_environment():
  """Returns the number, over all tasks, of this task's first environment."""
  return max(FLAGS.task, 0) * FLAGS.environments_per_actor


def _seeds(count, *numbers):
  """Returns a list of seeds, int32, that depend on all `numbers`."""
  sequence = np.random.SeedSequence(numbers)
  return [int(seed >> 1) for seed in sequence.generate_state(count)]


# --- Metrics ----------------------------------------------------------------


class Metrics:
  """Collects what the learner and the actors do, and reports it."""

  def __init__(self, logdir, levels, actors):
    self._writer = tf.summary.FileWriterCache.get(logdir)
    self._levels = levels
    self._actors = actors
    self._lock = threading.Lock()
    self._episodes = {
      level: collections.deque(maxlen=_EPISODES) for level in levels
    }
    # Since the last time that all levels had one, for the suite's score.
    self._returns = collections.defaultdict(list)
    self._last_inference = np.zeros(3)
    self._begin_period()
    self.global_step = None

  def add(self, update):
    """Takes the values of an `Update`."""
    with self._lock:
      self._updates.append(update)
      self.global_step = int(update.learner.global_step)
      # One row per unroll.
      for name, game_over, returns, steps in zip(
        update.level_name,
        update.game_over.T,
        update.info.episode_return.T,
        update.info.episode_step.T,
        strict=True,
      ):
        for i in np.flatnonzero(game_over):
          self._add_episode(six.ensure_str(name), returns[i], steps[i])

  def latest_return(self):
    """Returns the mean return of the last episodes, None before the first."""
    with self._lock:
      returns = [r for episodes in self._episodes.values() for r, _ in episodes]
    return np.mean(returns) if returns else None

  def report(self):
    """Writes the metrics of the period that ends now.

    Returns:
      The same for people, a list of lines.
    """
    restarts, *inference = self._actors.statistics()
    inference = np.array(inference)
    membership, membership_lines = self._actors.membership()
    with self._lock:
      updates, seconds = self._updates, time.monotonic() - self._begin
      self._begin_period()
      played = {
        level: (len(episodes), *np.mean(episodes, axis=0))
        for level, episodes in self._episodes.items()
        if episodes
      }
    batches, requests, waited = inference - self._last_inference
    self._last_inference = inference
    if not updates:
      self._write(membership)
      return ['No update of the learner in this period.', *membership_lines]
    frames = len(updates) * _frames_per_update()
    values = {
      'environment_frames_per_second': frames / seconds,
      'agent_steps_per_second': frames / FLAGS.num_action_repeats / seconds,
      'learner_updates_per_second': len(updates) / seconds,
      'learner_wait_share': sum(u.wait_seconds for u in updates) / seconds,
      'queue_size': np.mean([u.queue_size for u in updates]),
      'policy_lag_updates': np.mean([u.policy_lag for u in updates]),
      'inference_batch_size': requests / max(batches, 1),
      'inference_wait_seconds': waited / max(requests, 1),
      'environment_restarts': restarts,
      **membership,
    }
    for level, (_, mean_return, mean_steps) in played.items():
      values[f'{level}/mean_return'] = mean_return
      values[f'{level}/mean_frames'] = mean_steps * FLAGS.num_action_repeats
    self._write(values)
    return [
      *self._lines(values, played, updates[-1].learner),
      *membership_lines,
    ]

  def _begin_period(self):
    self._begin = time.monotonic()
    self._updates = []

  def _add_episode(self, level, episode_return, steps):
    self._episodes[level].append((episode_return, steps))
    self._returns[level].append(episode_return)
    values = {
      f'{level}/episode_return': episode_return,
      f'{level}/episode_frames': steps * FLAGS.num_action_repeats,
    }
    suite = SUITES.get(FLAGS.level_name)
    if suite and len(self._returns) == len(self._levels):
      for name, aggregate in suite.aggregates.items():
        values[f'{FLAGS.level_name}/training_{name}'] = aggregate(self._returns)
      self._returns.clear()
    self._write(values)

  def add_test(self, path):
    """Writes what a test found.

    Args:
      path: of the JSON file of its `evaluation.Results`.

    Returns:
      The same for people, a line.

    Raises:
      ValueError: the test isn't complete.
    """
    with open(path) as file:
      content = json.load(file)
    for row in content['levels']:
      # Those that ended first are not a sample of all.
      if not row['missing'] and row['episodes'] < content['num_episodes']:
        raise ValueError(f'{path} is not complete.')
    suite = FLAGS.level_name
    scores = {f'{suite}/{name}': s for name, s in content['scores'].items()}
    levels = {
      f'{row["level"]}/{tag}': row[name]
      for row in content['levels']
      for name, tag in (
        ('mean', 'mean_return'),
        ('human_normalized', 'human_normalized'),
      )
      if row[name] is not None
    }
    values = {f'test/{n}': value for n, value in {**scores, **levels}.items()}
    frames = content['settings']['frames']
    self._write(values, frames)
    # A suite has too many levels for a line.
    lines = [f'{n} {value:.2f}' for n, value in (scores or levels).items()]
    return f'test after {frames:,} frames: {", ".join(lines)}'

  def _write(self, values, step=None):
    self._writer.add_summary(
      tf.Summary(
        value=[
          tf.Summary.Value(tag=tag, simple_value=value)
          for tag, value in values.items()
        ]
      ),
      self.global_step if step is None else step,
    )

  def _lines(self, values, played, learner):
    value = values.__getitem__
    lines = [
      f'{level}: return {mean_return:.2f}, '
      f'{value(f"{level}/mean_frames"):.0f} frames (mean of the last {count} '
      'episodes)'
      for level, (count, mean_return, _) in played.items()
    ]
    return [
      *(lines or ['No episode ended yet.']),
      f'actors: {value("environment_frames_per_second"):.0f} environment '
      f'frames/s, {value("agent_steps_per_second"):.0f} agent steps/s, '
      f'inference batch {value("inference_batch_size"):.1f} after '
      f'{1000 * value("inference_wait_seconds"):.1f} ms, '
      f'{value("environment_restarts"):.0f} environment restarts',
      f'learner: {value("learner_updates_per_second"):.2f} updates/s, waits '
      f'for data {value("learner_wait_share"):.0%} of the time, queue '
      f'{value("queue_size"):.1f} of 1 unroll, policy lag '
      f'{value("policy_lag_updates"):.1f} updates',
      f'losses: total {learner.total_loss:.3g}, policy gradient '
      f'{learner.policy_gradient_loss:.3g}, baseline '
      f'{learner.baseline_loss:.3g}, entropy {learner.entropy:.3f}, '
      f'gradient norm {learner.gradient_norm:.3g}, learning rate '
      f'{learner.learning_rate:.3g}',
    ]


class Console:
  """Shows progress: a live line on a terminal, else a line with each report."""

  def __init__(self, frames):
    self._bar = tqdm.tqdm(
      total=FLAGS.total_environment_frames,
      initial=frames,
      unit=' frames',
      unit_scale=True,
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
    )
    self._last = (time.monotonic(), frames)

  def progress(self, frames, latest_return):
    if latest_return is not None:
      self._bar.set_postfix_str(f'return {latest_return:.2f}', refresh=False)
    self._bar.update(frames - self._bar.n)

  def report(self, frames, lines):
    now, total = time.monotonic(), FLAGS.total_environment_frames
    begin, begin_frames = self._last
    self._last = (now, frames)
    rate = (frames - begin_frames) / (now - begin)
    left = tqdm.tqdm.format_interval((total - frames) / rate) if rate else '?'
    self.say(
      f'{frames / total:.1%} of {total:,} frames, {rate:,.0f} frames/s, '
      f'{left} left'
    )
    for line in lines:
      self.say('  ' + line)

  def say(self, line):
    if self._bar.disable:
      print(line, flush=True)
    else:
      self._bar.write(line)

  def close(self):
    self._bar.close()


# --- Training ---------------------------------------------------------------


class UserError(Exception):
  """A mistake of the user, told in one sentence."""


# What is played: the class of the levels' family, the levels' names for people
# and for the environments, what `describe` told of them, and a dict from the
# names of the levels that can't be played to the reasons.
Game = collections.namedtuple(
  'Game', 'family names levels settings spec missing'
)


def _choose_game():
  """Finds out what the flags ask to play; raises UserError if it can't be."""
  is_test = FLAGS.mode == 'test'
  names, suite = [FLAGS.level_name], SUITES.get(FLAGS.level_name)
  if suite:
    mapping = suite.module.LEVEL_MAPPING
    names = list(mapping.values() if is_test else mapping)
  levels = [_full_name(name) for name in names]
  settings = environments.Settings(
    height=FLAGS.height if FLAGS['height'].present else None,
    width=FLAGS.width if FLAGS['width'].present else None,
    num_action_repeats=FLAGS.num_action_repeats,
    dataset_path=FLAGS.dataset_path,
    level_cache_dir=os.path.expanduser(FLAGS.level_cache_dir),
    is_test=is_test,
    # One agent plays all levels.
    full_action_set=suite is not None,
  )
  family = environments.family_of(levels[0])

  def describe(level):
    try:
      return family.describe(level, settings)
    except ValueError as error:
      return UserError(str(error))

  with concurrent.futures.ThreadPoolExecutor() as pool:
    specs = dict(zip(names, pool.map(describe, levels), strict=True))
  missing = {
    name: specs.pop(name)
    for name in names
    if isinstance(specs[name], UserError)
  }
  # A test tells what it can of the other levels.
  if missing and not (is_test and specs):
    raise next(iter(missing.values()))
  spec = next(iter(specs.values()))
  return Game(family, names, levels, settings, spec, missing)


def _full_name(name):
  """Returns what a level's environment calls it."""
  for suite in SUITES.values():
    mapping = suite.module.LEVEL_MAPPING
    if name in mapping or name in mapping.values():
      return suite.folder + name
  return name


def _create_processes(game, count, seed_of):
  """Returns some `PyProcess`, not started; levels are assigned round-robin.

  Args:
    game: `Game`.
    count: int, how many.
    seed_of: function from a process's index to its environment's seed.
  """
  first = _first_environment()
  return [
    game.family.create(
      game.levels[(first + index) % len(game.levels)],
      seed_of(index),
      game.settings,
      game.spec,
    )
    for index in range(count)
  ]


@contextlib.contextmanager
def _new_graph():
  with tf.Graph().as_default():
    # Actor tasks draw actions each in their own way.
    is_actor = FLAGS.mode == 'train' and FLAGS.job_name == 'actor'
    tf.set_random_seed(
      _seeds(1, FLAGS.seed, FLAGS.task)[0] if is_actor else FLAGS.seed
    )
    tf.train.get_or_create_global_step()
    yield


def _build_actor_for(game, agent, processes, noise_seeds=None):
  """Builds the one graph of all actors, and the placeholder of their index.

  Args:
    game: `Game`.
    agent: `Agent`.
    processes: list of `PyProcess`, made by `_create_processes`.
    noise_seeds: for `build_actor`, a list of ints, one for each process.
  """
  index = tf.placeholder(tf.int32, [], 'actor')
  env = environments.FlowEnvironment(py_process.choose(processes, index))
  number = _first_environment() + index
  level_name = tf.constant(game.names)[number % len(game.names)]
  noise_seed = None if noise_seeds is None else tf.constant(noise_seeds)[index]
  actor = build_actor(agent, env, level_name, game.spec.action_set, noise_seed)
  return actor, index


def _new_agent(game):
  return Agent(len(game.spec.action_set), FLAGS.torso, FLAGS.precision)


def _session_config(num_actors):
  config = tf.ConfigProto(allow_soft_placement=True)
  # Two more than cores, as the learner's large operations hold a thread for
  # long: the actors' small ones needn't wait for them. Together with idle
  # threads that don't spin, it brings the deep network a tenth more frames/s.
  config.inter_op_parallelism_threads = (os.cpu_count() or 1) + 2
  config.experimental.disable_thread_spinning = True
  if not py_process.has_library():
    config.inter_op_parallelism_threads += num_actors
  if FLAGS.precision == 'bfloat16':
    rewrites = config.graph_options.rewrite_options
    rewrites.auto_mixed_precision_onednn_bfloat16 = rewrites.ON
    # Else the LSTM's memory, the logits and parts of V-trace follow, for next
    # to no gain: nearly all of the work is in the convolutions.
    os.environ['TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_ALLOWLIST_REMOVE'] = (
      'MatMul'
    )
  return config


def _read_checkpoint(checkpoint):
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


def _check_agent(theirs, place):
  """Raises UserError if the variables' shapes are those of another agent."""
  for variable in tf.global_variables():
    name, ours = variable.op.name, variable.shape.as_list()
    if theirs.get(name) != ours:
      raise UserError(
        f'{place} holds the checkpoint of another agent: its {name} is '
        f'{theirs.get(name, "missing")}, here it is {ours}. Give another '
        '--logdir, or the --level_name, --torso, --height and --width that it '
        'was trained with.'
      )


def _make_folder(flag, path):
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise UserError(
      f'--{flag}={FLAGS[flag].value} can not be written ({error.strerror}): '
      'give a folder that can.'
    ) from None


def _save_description(game):
  """Saves beside the checkpoints what others need to know of the agent."""
  description = {
    'torso': FLAGS.torso,
    'frame_shape': list(game.spec.frame_shape),
    'action_set': np.asarray(game.spec.action_set).tolist(),
    'flags': _flag_values(),
  }
  with open(os.path.join(FLAGS.logdir, _DESCRIPTION), 'w') as file:
    json.dump(description, file, indent=1)


def train():
  """Trains until the last frame, an error, or a signal.

  With actors on this machine, or as the learner task of many.
  """
  game = _choose_game()
  with _new_graph(), _stop_signals() as stop_signals:
    agent = _new_agent(game)
    prepare = _prepare_alone if FLAGS.task == -1 else _prepare_learner_task
    actors, update, queue = prepare(game, agent)
    checkpoint = tf.train.latest_checkpoint(FLAGS.logdir)
    if checkpoint:
      _check_agent(_read_checkpoint(checkpoint)[0], FLAGS.logdir)
    _make_folder('logdir', FLAGS.logdir)
    _save_description(game)
    metrics = Metrics(FLAGS.logdir, game.names, actors)
    tests = BackgroundTests(metrics)
    close_queue = queue.queue.close(cancel_pending_enqueues=True)
    config = _session_config(FLAGS.num_actors)
    try:
      with tf.train.MonitoredTrainingSession(
        master='' if FLAGS.task == -1 else _start_server(config),
        checkpoint_dir=FLAGS.logdir,
        save_checkpoint_secs=FLAGS.save_checkpoint_secs,
        save_summaries_secs=_REPORT_SECONDS,
        save_summaries_steps=None,
        log_step_count_steps=None,
        save_graph_def=False,
        stop_grace_period_secs=5,
        config=config,
        hooks=[actors, tests] if FLAGS.test_interval_frames else [actors],
      ) as session:
        metrics.global_step = int(
          actors.session.run(tf.train.get_global_step())
        )
        learner = LearnerLoop(session, update, metrics, actors.coord)
        learner.start()
        _watch(actors, metrics, stop_signals, tests)
        actors.coord.request_stop()
        actors.close(learner.error)
        # Wakes whoever waits for the queue; an update under way is finished.
        actors.session.run(close_queue)
        learner.join()
        # An exception inside of the session's context: no checkpoint is saved,
        # those before it are kept.
        if learner.error:
          raise learner.error
    finally:
      tests.close()
      py_process.close_all(actors.processes)


def _prepare_alone(game, agent):
  """Builds a training whose actors run here.

  Returns:
    `ActorLoops`, the `Update`, and the `NestQueue` between both.
  """
  processes = _create_processes(game, FLAGS.num_actors, _environment_seed)
  actor, index = _build_actor_for(game, agent, processes)
  unroll = build_unroll(actor)
  queue = build_queue(unroll)
  loops = ActorLoops(
    actor, index, processes, queue.enqueue(unroll), lambda actor, values: True
  )
  return loops, build_training(agent, queue), queue


class LearnerLoop(threading.Thread):
  """Updates until the last frame, or until somebody stops.

  A thread of its own: the main thread must be free to handle signals.
  """

  def __init__(self, session, update, metrics, coord):
    super().__init__()
    self._session = session
    self._update = update
    self._metrics = metrics
    self._coord = coord
    self.error = None

  def run(self):
    try:
      # The hooks that save checkpoints need it, and each thread has its own.
      with self._session.graph.as_default():
        while (
          not self._coord.should_stop()
          and self._metrics.global_step < FLAGS.total_environment_frames
        ):
          self._metrics.add(self._session.run(self._update))
    except Exception as error:
      # The end of the queue, or of the session, isn't the learner's error.
      if not self._coord.should_stop():
        self.error = error
    finally:
      self._coord.request_stop()


def _watch(actors, metrics, stop_signals, tests):
  """Shows the progress until the training stops, or a signal comes."""
  console = Console(metrics.global_step)
  next_report = time.monotonic() + _REPORT_SECONDS
  # Short waits, since a signal is handled between two of them.
  while not actors.coord.wait_for_stop(timeout=0.5):
    if stop_signals:
      console.say(
        f'{stop_signals[0].name}: saving a checkpoint, then ending. '
        'Once more ends at once.'
      )
      break
    console.progress(metrics.global_step, metrics.latest_return())
    for line in actors.changes():
      console.say(line)
    tests.poll(console)
    if time.monotonic() >= next_report:
      next_report += _REPORT_SECONDS
      console.report(metrics.global_step, metrics.report())
  tests.tell(console)
  console.close()


@contextlib.contextmanager
def _stop_signals():
  """Collects SIGINT and SIGTERM in a list; the second one ends the program."""
  received = []

  def receive(number, _):
    if received:
      # Environment processes notice by themselves.
      os._exit(128 + number)
    received.append(signal.Signals(number))

  numbers = (signal.SIGINT, signal.SIGTERM)
  previous = [signal.signal(number, receive) for number in numbers]
  try:
    yield received
  finally:
    for number, handler in zip(numbers, previous, strict=True):
      signal.signal(number, handler)


# --- Training on many machines ----------------------------------------------

_HEARTBEAT_SECONDS = 2  # Between two signs of life of an actor task.
_LOST_SECONDS = 10  # Without any, an actor task counts as lost.
_ANSWER_SECONDS = 10  # What the learner has to answer ...
_ROOM_SECONDS = 60  # ... and, with its queue full, to take an unroll.
_FAREWELL_SECONDS = 5  # What actor tasks have to see that training is done.
_WAITING_SECONDS = 30  # Between two lines of an actor task that waits.

# A sign of life of an actor task: when it came and when the task was started
# (seconds since 1970, by the learner's and by the task's clock), how many
# unrolls it sent, and the fields of its `ActorStatistics`.
Beat = collections.namedtuple(
  'Beat', ('time', 'started', 'unrolls', *ActorStatistics._fields)
)


class Board:
  """What the learner task shares with its actor tasks, in its memory.

  Both sides build it: its resources have the same names on both, and a session
  of an actor task on the learner's server uses those of the learner. Actor
  tasks only call, they are never called: they need neither port nor address.
  """

  def __init__(self, unroll):
    """Makes the resources; `unroll` is an `Unroll` like those to come."""
    # A name and a device that don't depend on the rest of the graph.
    with tf.name_scope('board/'), tf.device('/cpu:0'):
      self.queue = build_queue(unroll)
      # All of the agent's in one, for one transfer.
      self._parameters = _shared_variable('parameters', tf.float32, [None])
      self._global_step = _shared_variable('frames', tf.int64, [])
      self._settings = _shared_variable('settings', tf.string, [])
      self._done = _shared_variable('done', tf.bool, [])
      self._beats = tf.raw_ops.MutableHashTableOfTensorsV2(
        key_dtype=tf.int64,
        value_dtype=tf.float64,
        value_shape=[len(Beat._fields)],
        shared_name='beats',
      )
      self._addresses = tf.raw_ops.MutableHashTableV2(
        key_dtype=tf.int64, value_dtype=tf.string, shared_name='addresses'
      )

  def publish(self, agent):
    """Returns the op that shows the agent's parameters as they are now."""
    with tf.device('/cpu:0'):
      flat = [
        tf.reshape(v.read_value(), [-1]) for v in agent.trainable_variables
      ]
      step = tf.train.get_global_step().read_value()
      return tf.group(
        self._parameters.assign(tf.concat(flat, 0), read_value=False),
        self._global_step.assign(step, read_value=False),
      )

  def open(self, settings):
    """Returns the op after which actor tasks may come."""
    return tf.group(
      self._settings.assign(settings, read_value=False),
      self._done.assign(False, read_value=False),
    )

  def finish(self):
    """Returns the op that tells actor tasks to end."""
    return self._done.assign(True, read_value=False)

  def read(self):
    """Returns parameters, float32 [N], and the frames they were trained for."""
    return self._parameters.read_value(), self._global_step.read_value()

  def read_settings(self):
    """Returns what `open` got, and whether `finish` was run."""
    return self._settings.read_value(), self._done.read_value()

  def beat(self, task, values, address):
    """Returns the op of a sign of life, and whether `finish` was run.

    Args:
      task: int64, number of the actor task.
      values: float64 [len(Beat._fields) - 1], a `Beat` without its time.
      address: string, of the actor task.
    """
    with tf.device('/cpu:0'):
      beat = tf.concat([[tf.timestamp()], values], 0)
      # First its address: who is known by a beat has one.
      named = tf.raw_ops.LookupTableInsertV2(
        table_handle=self._addresses, keys=[task], values=[address]
      )
      with tf.control_dependencies([named]):
        op = tf.raw_ops.LookupTableInsertV2(
          table_handle=self._beats, keys=[task], values=[beat]
        )
    return op, self._done.read_value()

  def leave(self, task):
    """Returns the op with which an actor task takes its leave."""
    return tf.raw_ops.LookupTableRemoveV2(table_handle=self._beats, keys=[task])

  def beats(self):
    """Returns the time, the tasks and their last beats, and all addresses."""
    tasks, beats = tf.raw_ops.LookupTableExportV2(
      table_handle=self._beats, Tkeys=tf.int64, Tvalues=tf.float64
    )
    with tf.control_dependencies([beats]):
      addresses = tf.raw_ops.LookupTableExportV2(
        table_handle=self._addresses, Tkeys=tf.int64, Tvalues=tf.string
      )
      now = tf.timestamp()
    return now, tasks, beats, tuple(addresses)


def _shared_variable(name, dtype, shape):
  # In no collection: it's neither initialised nor saved with the others.
  return tf.Variable(
    tf.zeros([n or 0 for n in shape], dtype),
    shape=tf.TensorShape(shape),
    name=name,
    use_resource=True,
    trainable=False,
    collections=[],
  )


def _settings(game):
  """Returns what learner and actor tasks must agree on, as JSON."""
  return json.dumps(
    {
      '--level_name': FLAGS.level_name,
      '--torso': FLAGS.torso,
      '--unroll_length': FLAGS.unroll_length,
      '--num_action_repeats': FLAGS.num_action_repeats,
      'frame size (--height, --width)': list(game.spec.frame_shape),
      'number of actions': len(game.spec.action_set),
    }
  )


def _repeat_refused(session):
  """Has a session on the learner's server repeat what that refused by mistake.

  The server takes a step for a repetition if its id is among the last 100,000.
  TensorFlow draws the id in a new thread for each step, from a seed of 32 bits:
  about one step in 43,000 is refused without being run. The error quotes what
  was fed, and Python's part of TensorFlow takes a time that is quadratic in the
  length of a message: that of an unroll it would not finish. So all errors of
  the session are cut off.
  """
  run = session._call_tf_sessionrun

  def repeat(*args):
    while True:
      try:
        return run(*args)
      except tf.errors.OpError as error:
        if 'The same RunGraph (Worker) request' in error.message:
          continue
        message = error.message[:1000]
        raise type(error)(error.node_def, error.op, message) from None

  session._call_tf_sessionrun = repeat


# --- The learner task -------------------------------------------------------


def _prepare_learner_task(game, agent):
  """As `_prepare_alone`, but the actors are tasks of their own."""
  board = Board(_unroll_specs(game))
  update = build_training(agent, board.queue)
  actors = ActorTasks(board, agent, update, _settings(game))
  return actors, update, board.queue


def _unroll_specs(game):
  """Returns the `Unroll` of `tf.TensorSpec` that actor tasks send."""
  with _new_graph():
    agent = _new_agent(game)
    actor, _ = _build_actor_for(
      game, agent, _create_processes(game, 1, _environment_seed)
    )
    return tf.nest.map_structure(
      lambda t: tf.TensorSpec(t.shape, t.dtype), build_unroll(actor)
    )


def _start_server(config):
  """Starts the learner's server; returns how a session reaches it."""
  try:
    server = tf.train.Server(
      {'learner': [FLAGS.learner_address]}, job_name='learner', config=config
    )
  except tf.errors.OpError:
    raise UserError(
      f'--learner_address={FLAGS.learner_address}: its port can not be '
      'listened on, probably another program does.'
    ) from None
  host, _, port = FLAGS.learner_address.rpartition(':')
  line = f'Actor tasks can join at {FLAGS.learner_address}.'
  if host in ('localhost', '127.0.0.1'):
    _shut_out_other_hosts(int(port))
  else:
    line += ' The port is open on all interfaces, and asks for no password.'
  print(line, flush=True)
  return server.target


# A socket filter (bpf(4), kernel's Documentation/networking/filter.txt) that
# lets in what is sent to 127.0.0.0/8 or ::1: rows of operation, jumps if true
# and if false, and operand.
_IP_HEADER = 2**32 - 2**20
_LOAD_BYTE, _LOAD_WORD, _AND, _IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 6
_TO_THIS_HOST = (
  (_LOAD_BYTE, 0, 0, _IP_HEADER),
  (_AND, 0, 0, 0xF0),
  (_IF_EQUAL, 0, 2, 0x40),  # IPv4, else to the sixth row.
  (_LOAD_BYTE, 0, 0, _IP_HEADER + 16),
  (_IF_EQUAL, 8, 9, 127),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 24),
  (_IF_EQUAL, 0, 7, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 28),
  (_IF_EQUAL, 0, 5, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 32),
  (_IF_EQUAL, 0, 3, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 36),
  (_IF_EQUAL, 0, 1, 1),
  (_RETURN, 0, 0, 2**32 - 1),  # All of the packet.
  (_RETURN, 0, 0, 0),  # Nothing of it.
)
_SO_ATTACH_FILTER = 26


def _shut_out_other_hosts(port):
  """Has the kernel drop what other hosts send to a port of this process.

  TensorFlow listens on all interfaces and offers no choice.
  """
  rows = b''.join(struct.pack('HBBI', *row) for row in _TO_THIS_HOST)
  rows = ctypes.create_string_buffer(rows)
  program = struct.pack('HP', len(_TO_THIS_HOST), ctypes.addressof(rows))
  for fd in map(int, os.listdir('/proc/self/fd')):
    # Some are no sockets, one was that of the list itself.
    with contextlib.suppress(OSError), _socket_of(fd) as listener:
      if (
        listener.family in (socket.AF_INET, socket.AF_INET6)
        and listener.getsockname()[1] == port
      ):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _socket_of(fd):
  """Returns a `socket.socket` of its own for a file descriptor's socket."""
  if not stat.S_ISSOCK(os.fstat(fd).st_mode):
    raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
  return socket.socket(fileno=os.dup(fd))


class ActorTasks(tf.train.SessionRunHook):
  """The actor tasks of a learner task, as it knows them by their beats.

  To `train` and `Metrics` what `ActorLoops` are on one machine.
  """

  processes = ()

  def __init__(self, board, agent, update, settings):
    """Builds what is needed; the session's start opens the board."""
    with tf.control_dependencies([board.publish(agent)]):
      self._open = board.open(settings)
    with tf.control_dependencies([update.learner.global_step]):
      self._publish = board.publish(agent)
    self._finish = board.finish()
    self._read_beats = board.beats()
    self._connected = {}  # The last beats by task.
    self._statistics = {}  # By task and its start.
    self._period_begin = collections.Counter()  # Unrolls by task and its start.
    self._num_joined = self._num_lost = 0
    self.coord = None
    self.session = None

  def after_create_session(self, session, coord):
    _repeat_refused(session)
    self.session, self.coord = session, coord
    session.run(self._open)

  def before_run(self, run_context):
    del run_context
    return tf.train.SessionRunArgs(self._publish)

  def changes(self):
    """Returns lines on who came and went since the last call."""
    now, tasks, values, addresses = self.session.run(self._read_beats)
    names = dict(zip(addresses[0], addresses[1], strict=True))
    beats = {
      task: Beat(*value) for task, value in zip(tasks, values, strict=True)
    }
    connected = {
      task: beat
      for task, beat in beats.items()
      if now - beat.time < _LOST_SECONDS
    }
    lines = []
    for task, beat in connected.items():
      self._statistics[task, beat.started] = beat
      # What it sent to another learner before doesn't count, nor what it sent
      # before its first sign of life.
      self._period_begin.setdefault((task, beat.started), beat.unrolls)
      before = self._connected.get(task)
      if before is None or before.started != beat.started:
        self._num_joined += 1
        lines.append(f'{_actor_name(task, names)} joined.')
    for task in self._connected.keys() - connected.keys():
      if task in beats:
        self._num_lost += 1
        lines.append(
          f'{_actor_name(task, names)} is lost, no sign of life for '
          f'{_LOST_SECONDS} s.'
        )
      else:
        lines.append(f'{_actor_name(task, names)} left.')
    self._connected = connected
    return lines

  def statistics(self):
    """Returns the `ActorStatistics` of all tasks together."""
    beats = self._statistics.values()
    return ActorStatistics(
      *(
        sum(getattr(beat, f) for beat in beats) for f in ActorStatistics._fields
      )
    )

  def membership(self):
    """Returns metrics of the tasks since the last call, and lines on them."""
    total = collections.Counter(
      {key: beat.unrolls for key, beat in self._statistics.items()}
    )
    unrolls = collections.Counter(dict.fromkeys(self._connected, 0))
    for (task, _), count in (total - self._period_begin).items():
      unrolls[task] += count
    self._period_begin = total
    counts = np.array([unrolls[task] for task in self._connected] or [0])
    values = {
      'actors_connected': len(self._connected),
      'actors_joined': self._num_joined,
      'actors_lost': self._num_lost,
      'unrolls_per_actor_minimum': counts.min(),
      'unrolls_per_actor_mean': counts.mean(),
      'unrolls_per_actor_maximum': counts.max(),
    }
    line = (
      f'actor tasks: {len(self._connected)} of {FLAGS.num_actors} connected, '
      f'{self._num_joined} joined and {self._num_lost} lost since the start; '
      f'unrolls of each {counts.min():.0f} to {counts.max():.0f}'
    )
    if self._connected:
      line += f', fewest of actor {min(self._connected, key=unrolls.get)}'
    return values, [line]

  def close(self, error):
    """Tells the tasks to end, unless a restart may mend the error."""
    if error:
      return
    self.session.run(self._finish)
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while time.monotonic() < deadline:
      self.changes()
      if not self._connected:
        break
      time.sleep(0.1)


def _actor_name(task, addresses):
  return f'Actor {task} ({six.ensure_str(addresses[task])})'


# --- An actor task ----------------------------------------------------------


# What befalls a session whose learner ended, restarts, or can't be reached.
_GONE = (
  tf.errors.UnavailableError,
  tf.errors.AbortedError,
  tf.errors.CancelledError,
  tf.errors.DeadlineExceededError,
  tf.errors.FailedPreconditionError,
  tf.errors.NotFoundError,
  tf.errors.InternalError,
  tf.errors.UnknownError,
)


class Learner:
  """The learner task as an actor task sees it: far away, and mortal.

  Its methods wait for a learner that is gone, and repeat there what failed. For
  any thread.
  """

  def __init__(self, unroll, settings, stop_signals):
    """Builds what is run on the learner; `join` has to come first.

    Args:
      unroll: an `Unroll` like those to send.
      settings: string, what the learner has to agree on.
      stop_signals: list, see `_stop_signals`.
    """
    self._settings = json.loads(settings)
    self._stop_signals = stop_signals
    self._lock = threading.Lock()  # Of joining.
    self._session = None
    self._started = time.time()
    self._graph = tf.Graph()
    with self._graph.as_default():
      board = Board(unroll)
      self._unroll = tf.nest.map_structure(
        lambda t: tf.placeholder(t.dtype, t.shape), tf.nest.flatten(unroll)
      )
      self._send = board.queue.enqueue(
        tf.nest.pack_sequence_as(unroll, self._unroll)
      )
      self._read = board.read()
      self._read_settings = board.read_settings()
      self._beat_values = tf.placeholder(tf.float64, [len(Beat._fields) - 1])
      task = tf.constant(FLAGS.task, tf.int64)
      self._beat = board.beat(task, self._beat_values, FLAGS.actor_address)
      self._leave = board.leave(task)
    self.is_done = False
    self._left = False

  def join(self):
    """Waits for the learner.

    Returns:
      Whether it's there; else this task is to end.

    Raises:
      UserError: it has other settings.
    """
    with self._lock:
      self._connect()
    return not self._stops()

  def send(self, unroll):
    """Sends an `Unroll` of values; returns False if this task is to end."""
    feed_dict = dict(zip(self._unroll, tf.nest.flatten(unroll), strict=True))
    return self._run([self._send], feed_dict, _ROOM_SECONDS) is not None

  def read(self):
    """Returns what `Board.read` does; None if this task is to end."""
    return self._run(self._read)

  def beat(self, num_unrolls, statistics):
    """Gives a sign of life."""
    values = [self._started, num_unrolls, *statistics]
    beaten = self._run(self._beat, {self._beat_values: values})
    if beaten is not None and beaten[1]:
      self.is_done = True

  def leave(self):
    """Takes leave of the learner, if it's there, for good."""
    self._left = True
    with contextlib.suppress(*_GONE, RuntimeError):
      self._session.run(self._leave, options=_within(_HEARTBEAT_SECONDS))
    _close(self._session).join(_HEARTBEAT_SECONDS)

  def _stops(self):
    return self.is_done or self._left or bool(self._stop_signals)

  def _run(self, fetches, feed_dict=None, seconds=_ANSWER_SECONDS):
    """Runs something on the learner; returns None if this task is to end."""
    while not self._stops():
      session = self._session
      try:
        return session.run(fetches, feed_dict, options=_within(seconds))
      # A RuntimeError: another thread closed the session.
      except (*_GONE, RuntimeError):
        self._rejoin(session)
    return None

  def _rejoin(self, session):
    with self._lock:
      # Else another thread did it already.
      if session is self._session:
        _close(session)
        # A learner that fails is still there for a moment.
        time.sleep(0.5)
        self._connect()

  def _connect(self):
    next_line = time.monotonic()
    while not self._stops():
      settings = self._try_connect()
      if settings is not None:
        self._check(json.loads(settings))
        if not self.is_done:
          _say(f'joined the learner at {FLAGS.learner_address}.')
        return
      if time.monotonic() >= next_line:
        next_line += _WAITING_SECONDS
        _say(f'waits for the learner at {FLAGS.learner_address}.')
      time.sleep(0.5)

  def _try_connect(self):
    """Returns the settings of the learner, None if there's none."""
    host, _, port = FLAGS.learner_address.rpartition(':')
    try:
      # A session would take all its time to find that nobody listens.
      socket.create_connection((host, int(port)), timeout=2).close()
    except OSError:
      return None
    session = tf.Session(
      f'grpc://{FLAGS.learner_address}', self._graph, _remote_config()
    )
    _repeat_refused(session)
    try:
      settings, self.is_done = session.run(
        self._read_settings, options=_within(_ANSWER_SECONDS)
      )
    except _GONE:
      _close(session)
      return None
    self._session = session
    return settings

  def _check(self, theirs):
    for name, ours in self._settings.items():
      if theirs.get(name) != ours:
        raise UserError(
          f'The {name} of the learner at {FLAGS.learner_address} is '
          f'{theirs.get(name)}, that of actor {FLAGS.task} is {ours}: they '
          'have to be the same.'
        )


def _within(seconds):
  return tf.RunOptions(timeout_in_ms=1000 * seconds)


def _close(session):
  """Closes a session; returns the thread that does so.

  If the learner is there, calls under way end. If not, it takes as long as they
  do.
  """

  def close():
    with contextlib.suppress(*_GONE):
      session.close()

  thread = threading.Thread(target=close, daemon=True)
  thread.start()
  return thread


def _say(line):
  print(f'Actor {FLAGS.task} {line}', flush=True)


def _remote_config():
  config = tf.ConfigProto(operation_timeout_in_ms=1000 * _ANSWER_SECONDS)
  # The connection of a learner that vanished, with its host, stays open for
  # minutes: a new session needs a new one.
  config.rpc_options.disable_session_connection_sharing = True
  # There is nothing to optimise, and each actor task would have it done.
  config.graph_options.rewrite_options.disable_meta_optimizer = True
  return config


class Rounds(tf.train.SessionRunHook):
  """Has the environments of an actor task play in rounds.

  In a round each plays an unroll, all with the same parameters, which are
  fetched from the learner between two rounds.
  """

  def __init__(self, learner, agent, num_environments):
    self._learner = learner
    self._barrier = threading.Barrier(num_environments, self._end_round)
    self._values = (
      tf.placeholder(tf.float32, [None]),
      tf.placeholder(tf.int64, []),
    )
    parameters, step = self._values
    variables = agent.trainable_variables
    parts = tf.split(parameters, [v.shape.num_elements() for v in variables])
    self._load_op = tf.group(
      tf.train.get_global_step().assign(step, read_value=False),
      *(
        variable.assign(tf.reshape(part, variable.shape), read_value=False)
        for variable, part in zip(variables, parts, strict=True)
      ),
    )
    self._load = None
    self.num_unrolls = 0

  def after_create_session(self, session, coord):
    del coord
    self._load = session.make_callable(self._load_op, [*self._values])
    self._fetch()

  def take(self, actor, unroll):
    """Sends an unroll and waits for the end of the round; see `ActorLoops`."""
    del actor
    if not self._learner.send(unroll):
      return False
    try:
      self._barrier.wait()
    except threading.BrokenBarrierError:
      return False
    return True

  def stop(self):
    """Wakes those who wait for the end of the round."""
    self._barrier.abort()

  def _end_round(self):
    self.num_unrolls += self._barrier.parties
    self._fetch()

  def _fetch(self):
    values = self._learner.read()
    if values is not None:
      self._load(*values)


def act():
  """Plays as an actor task until the learner is done, an error, or a signal."""
  game = _choose_game()
  with _new_graph(), _stop_signals() as stop_signals:
    agent = _new_agent(game)
    processes = _create_processes(
      game, FLAGS.environments_per_actor, _environment_seed
    )
    actor, index = _build_actor_for(game, agent, processes)
    unroll = build_unroll(actor)
    learner = Learner(unroll, _settings(game), stop_signals)
    rounds = Rounds(learner, agent, len(processes))
    loops = ActorLoops(actor, index, processes, unroll, rounds.take)
    config = _session_config(len(processes))
    config.device_count['GPU'] = 0  # Accelerators belong to the learner.
    try:
      if learner.join():
        with tf.train.MonitoredSession(
          tf.train.ChiefSessionCreator(config=config),
          hooks=[rounds, loops],
          stop_grace_period_secs=5,
        ):
          _watch_learner(learner, rounds, loops, stop_signals)
          loops.coord.request_stop()
          learner.leave()
          rounds.stop()
          loops.close()
      _say(f'ends: {"the learner is done" if learner.is_done else "stopped"}.')
    finally:
      loops.close()


def _watch_learner(learner, rounds, loops, stop_signals):
  """Waits for the end, while a thread gives signs of life."""

  def beat():
    with loops.coord.stop_on_exception():
      while not loops.coord.wait_for_stop(_HEARTBEAT_SECONDS):
        learner.beat(rounds.num_unrolls, loops.statistics())

  # The main thread must be free to handle signals.
  threading.Thread(target=beat, daemon=True).start()
  while not (stop_signals or learner.is_done):
    if loops.coord.wait_for_stop(timeout=0.5):
      break


# --- Test -------------------------------------------------------------------


def test():
  """Plays --test_num_episodes on each level, and tells how it went.

  Which episodes are played is fixed beforehand, and each has an environment
  process and seeds of its own. So the number of actors, what was played before
  an interruption, and how long episodes take change nothing.

  Exits with code 1 if not all of them could be played.
  """
  checkpoint = _find_checkpoint()
  shapes, frames = _read_checkpoint(checkpoint)
  game = _choose_game()
  with _new_graph(), _stop_signals() as stop_signals:
    agent = _new_agent(game)
    # Round after round through the levels.
    count = FLAGS.test_num_episodes * len(game.names)
    seeds = [_test_seeds(game, index) for index in range(count)]
    processes = _create_processes(game, count, lambda index: seeds[index][0])
    actor, index = _build_actor_for(
      game, agent, processes, [noise_seed for _, noise_seed in seeds]
    )
    _check_agent(shapes, FLAGS.checkpoint or FLAGS.logdir)
    results = _open_results(game, checkpoint, frames)
    if FLAGS.video_dir:
      _make_folder('video_dir', FLAGS.video_dir)
    loops = TestLoops(actor, index, processes, game, results)
    if loops.num_workers:
      with tf.train.MonitoredSession(
        tf.train.ChiefSessionCreator(
          config=_session_config(loops.num_workers),
          checkpoint_filename_with_path=checkpoint,
        ),
        hooks=[loops],
      ):
        try:
          _watch_test(loops, results, stop_signals)
        finally:
          loops.stop()
          results.save()
  results.save()
  print(results.table())
  print(f'Results: {results.path}.json, {results.path}.csv')
  if stop_signals:
    print('Interrupted: the same command plays the missing episodes.')
  if not results.is_complete():
    sys.exit(1)


def _find_checkpoint():
  """Returns the path of the checkpoint to test; raises UserError without."""
  checkpoint = FLAGS.checkpoint or tf.train.latest_checkpoint(FLAGS.logdir)
  if checkpoint is None:
    raise UserError(
      f'{FLAGS.logdir} holds no checkpoint to test: give the --logdir of a '
      'training.'
    )
  if not os.path.exists(checkpoint + '.index'):
    raise UserError(
      f'The checkpoint {checkpoint} does not exist: give its path without an '
      'extension, e.g. --checkpoint=/tmp/agent/model.ckpt-1000.'
    )
  return checkpoint


def _test_seeds(game, index):
  """Returns the seeds of a test episode, of its environment and its actions.

  They are the same whether its level is tested alone or with its suite.
  """
  name = game.names[index % len(game.names)]
  number = index // len(game.names)
  return _seeds(2, FLAGS.seed, zlib.crc32(name.encode()), number)


def _open_results(game, checkpoint, frames):
  """Returns the `evaluation.Results` of what the flags ask for."""
  _make_folder('logdir', os.path.dirname(_results_path(frames)))
  # The index holds the checksums of all variables.
  with open(checkpoint + '.index', 'rb') as file:
    fingerprint = hashlib.sha256(file.read()).hexdigest()
  suite = SUITES.get(FLAGS.level_name)
  try:
    results = evaluation.Results(
      path=_results_path(frames),
      settings={
        'level_name': FLAGS.level_name,
        'checkpoint': os.path.basename(checkpoint),
        'checkpoint_sha256': fingerprint,
        'frames': frames,
        'seed': FLAGS.seed,
        'num_action_repeats': FLAGS.num_action_repeats,
        'frame_shape': list(game.spec.frame_shape),
        'precision': FLAGS.precision,
      },
      levels=game.names,
      num_episodes=FLAGS.test_num_episodes,
      references=_reference_scores(game.names),
      aggregates=suite.aggregates if suite else {},
      facts={'flags': _flag_values(), 'versions': _versions()},
    )
  except evaluation.OtherEvaluation as error:
    raise UserError(str(error)) from None
  for name, reason in game.missing.items():
    results.give_up(name, str(reason))
  return results


def _results_path(frames):
  """Returns the path, without extension, of the results of a checkpoint."""
  name = f'{_file_name(FLAGS.level_name)}-frames{frames}-seed{FLAGS.seed}'
  return os.path.join(FLAGS.logdir, 'test', name)


def _file_name(level):
  return re.sub(r'[^\w.-]+', '_', level)


def _reference_scores(names):
  """Returns a dict from levels of suites to their (human, random) returns."""
  references = {}
  for suite in SUITES.values():
    module = suite.module
    for name in names:
      level = module.LEVEL_MAPPING.get(name, name)
      if level in module.HUMAN_SCORES:
        references[name] = (
          module.HUMAN_SCORES[level],
          module.RANDOM_SCORES[level],
        )
  return references


def _flag_values():
  own = FLAGS.get_flags_for_module(sys.modules[__name__])
  return {flag.name: flag.value for flag in own}


def _versions():
  """Returns the versions of what decides the course of an episode."""
  versions = {'python': platform.python_version()}
  for name in ('tensorflow', 'dm-sonnet', 'gymnasium', *_ENVIRONMENT_PACKAGES):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


# What a test sees of an unroll: outputs of [T + 1, ...] as in `ActorOutput`.
TestUnroll = collections.namedtuple(
  'TestUnroll', 'done info frame action baseline'
)


class TestLoops(tf.train.SessionRunHook):
  """Plays the episodes of a test that the results don't have yet.

  Some threads take them one after another. Each starts the episode's process,
  plays to the end, and closes the process.
  """

  def __init__(self, actor, index, processes, game, results):
    """Prepares the loops; the session's start starts them.

    Args:
      actor: `Actor`.
      index: int placeholder, which process plays.
      processes: list of `PyProcess`, one per episode, round after round through
        the levels.
      game: `Game`.
      results: `evaluation.Results`.
    """
    self._actor = actor
    self._index = index
    self._processes = processes
    self._game = game
    self._names = game.names
    self._results = results
    self._episodes = collections.deque()
    for episode in range(len(processes)):
      name, number = self._identify(episode)
      is_seen = results.has(name, number) and (
        number > 0 or not FLAGS.video_dir or os.path.exists(self._video(name))
      )
      if not is_seen and name not in results.missing:
        self._episodes.append(episode)
    self.num_workers = min(FLAGS.num_actors, len(self._episodes))
    # The running processes, which their thread closes or, to wake it, `stop`.
    self._running = set()
    self._lock = threading.Lock()
    self._threads = []
    self.coord = None

  def after_create_session(self, session, coord):
    self.coord = coord
    env_outputs = self._actor.output.env_outputs
    agent_outputs = self._actor.output.agent_outputs
    self._start = _make_start(session, self._actor, self._index)
    self._unroll = _make_unroll(
      session,
      self._actor,
      self._index,
      TestUnroll(env_outputs.done, env_outputs.info, [], [], []),
    )
    self._unroll_for_video = _make_unroll(
      session,
      self._actor,
      self._index,
      TestUnroll(
        env_outputs.done,
        env_outputs.info,
        env_outputs.observation[0],
        agent_outputs.action,
        agent_outputs.baseline,
      ),
    )
    for _ in range(self.num_workers):
      thread = threading.Thread(target=self._run, daemon=True)
      coord.register_thread(thread)
      self._threads.append(thread)
      thread.start()

  def is_running(self):
    return any(thread.is_alive() for thread in self._threads)

  def stop(self):
    """Ends the episodes under way."""
    self.coord.request_stop()
    while self.is_running():
      with self._lock:
        running = list(self._running)
      py_process.close_all(running)
      time.sleep(0.1)

  def _identify(self, episode):
    """Returns the level's name and the episode's number in it."""
    number, level = divmod(episode, len(self._names))
    return self._names[level], number

  def _run(self):
    with self.coord.stop_on_exception():
      while not self.coord.should_stop():
        try:
          episode = self._episodes.popleft()
        except IndexError:
          return
        self._attempt(episode)

  def _attempt(self, episode):
    """Plays an episode; gives its level up if it fails again and again."""
    name, number = self._identify(episode)
    attempts = 1 + FLAGS.max_environment_restarts
    for attempt in range(1, attempts + 1):
      if name in self._results.missing or self.coord.should_stop():
        return
      try:
        info = self._run_process(episode)
      except (tf.errors.OpError, py_process.ProcessError) as error:
        if self.coord.should_stop():
          return
        reason = self._explain(episode, error)
        logging.warning(
          '%s, episode %d: %s (attempt %d of %d).',
          name,
          number,
          reason,
          attempt,
          attempts,
        )
      else:
        frames = int(info.episode_step) * FLAGS.num_action_repeats
        self._results.add(
          name, evaluation.Episode(number, float(info.episode_return), frames)
        )
        return
    self._results.give_up(name, f'{reason} ({attempts} attempts)')

  def _run_process(self, episode):
    """Plays an episode in a process that is started for it."""
    process = self._processes[episode]
    try:
      process.start()
      with self._lock:
        self._running.add(process)
      return self._play(episode)
    finally:
      with self._lock:
        self._running.discard(process)
      # Which may take a while: others needn't wait for it.
      process.close()

  def _play(self, episode):
    """Returns the `StepOutputInfo` of the episode's end."""
    name, number = self._identify(episode)
    if not FLAGS.video_dir or number > 0:
      return self._play_to_the_end(episode, self._unroll, lambda unroll: None)
    with video.record(self._video(name), _VIDEO_FRAMES_PER_SECOND) as add:
      return self._play_to_the_end(
        episode,
        self._unroll_for_video,
        functools.partial(self._add_to_video, add),
      )

  def _play_to_the_end(self, episode, run, see):
    """Runs unrolls, shows each to `see`, and returns the last info."""
    state = self._start(episode)
    while not self.coord.should_stop():
      unroll, state = run(episode, *state)
      see(unroll)
      end = _end(unroll)
      if end is not None:
        return type(unroll.info)(*(values[end] for values in unroll.info))
    raise tf.errors.CancelledError(None, None, 'The test was stopped.')

  def _add_to_video(self, add, unroll):
    end = _end(unroll)
    # The action that answers a frame comes with the next one.
    for t in range(len(unroll.done) - 1 if end is None else end):
      lines = [
        f'return {unroll.info.episode_return[t]:.2f}',
        f'action {unroll.action[t + 1]}   value {unroll.baseline[t + 1]:.3f}',
      ]
      add(self._game.family.picture(unroll.frame[t], self._game.spec), lines)
    if end is not None:
      # The last frame stays for a second, with what its action brought.
      lines[0] = f'return {unroll.info.episode_return[end]:.2f}, the end'
      for _ in range(_VIDEO_FRAMES_PER_SECOND):
        add(
          self._game.family.picture(unroll.frame[end - 1], self._game.spec),
          lines,
        )

  def _video(self, name):
    """Returns the path of a level's video."""
    settings = os.path.basename(self._results.path).removeprefix(
      _file_name(FLAGS.level_name)
    )
    return os.path.join(FLAGS.video_dir, _file_name(name) + settings + '.mp4')

  def _explain(self, episode, error):
    """Returns why an episode could not be played."""
    if isinstance(error, tf.errors.OpError):
      exit_code = self._processes[episode].exit_code()
      # One that had not died by itself was told to end by `close`.
      if exit_code:
        return f'its process died with {_describe_exit(exit_code)}'
    return _last_line(error)


def _end(unroll):
  """Returns the index at which a `TestUnroll` ends its episode, or None."""
  # The first entry was seen as the last of the unroll before.
  ends = np.flatnonzero(unroll.done[1:])
  return 1 + ends[0] if ends.size else None


def _last_line(error):
  """Returns what an error says, without the way to it."""
  text = error.message if isinstance(error, tf.errors.OpError) else str(error)
  lines = [line for line in text.splitlines() if re.match(r'\w', line)]
  return lines[-1].rstrip('.') if lines else type(error).__name__


def _watch_test(loops, results, stop_signals):
  """Shows the progress until all episodes are played, or a signal comes."""
  total = FLAGS.test_num_episodes * len(results.returns())
  played = results.num_played()
  next_report = time.monotonic() + _REPORT_SECONDS
  with tqdm.tqdm(
    total=total,
    initial=played,
    unit=' episodes',
    dynamic_ncols=True,
    disable=not sys.stderr.isatty(),
  ) as bar:
    while loops.is_running() and not stop_signals:
      loops.coord.wait_for_stop(timeout=0.5)
      played = results.num_played()
      bar.update(played - bar.n)
      results.save()
      if bar.disable and time.monotonic() >= next_report:
        next_report += _REPORT_SECONDS
        print(f'{played} of {total} episodes', flush=True)


# --- Test in the background of a training -----------------------------------

# Ends with the process whose id is its first argument, and becomes another
# program.
_CHILD = (
  'import os, sys, py_process; py_process.die_with(int(sys.argv[1])); '
  'os.execv(sys.executable, [sys.executable, *sys.argv[2:]])'
)


class BackgroundTests(tf.train.SessionRunHook):
  """Tests checkpoints in another process while the training goes on.

  The learner's thread saves a checkpoint; `poll`, of the main thread, has it
  tested. One at a time: while a test is under way, none is begun.
  """

  def __init__(self, metrics):
    self._metrics = metrics
    self._folder = os.path.join(FLAGS.logdir, 'test')
    self._log = os.path.join(self._folder, 'background.log')
    self._next_frames = None
    self._checkpoint = None  # The one to test, or in test.
    self._process = None

  def begin(self):
    # Its own: the training's may delete a checkpoint before it's read.
    self._saver = tf.train.Saver(max_to_keep=1)

  def after_create_session(self, session, coord):
    self._schedule(session.run(tf.train.get_global_step()))

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(tf.train.get_global_step())

  def after_run(self, run_context, run_values):
    if run_values.results < self._next_frames or self._checkpoint:
      return
    session = run_context.session
    frames = session.run(tf.train.get_global_step())
    self._schedule(frames)
    os.makedirs(self._folder, exist_ok=True)
    self._checkpoint = self._saver.save(
      session,
      os.path.join(self._folder, 'model.ckpt'),
      frames,
      write_meta_graph=False,
    )

  def poll(self, console):
    """Tells of a test that ended, and starts the next one."""
    self.tell(console)
    if self._checkpoint and self._process is None:
      self._start()

  def tell(self, console):
    """Logs the results of a test if it has ended."""
    if self._process is None or self._process.poll() is None:
      return
    try:
      # With 1, some levels are missing. Anything else: no test, and a file may
      # be there from before.
      if self._process.returncode not in (0, 1):
        raise ValueError('The test ended early.')
      frames = int(self._checkpoint.rpartition('-')[2])
      line = self._metrics.add_test(_results_path(frames) + '.json')
    except (OSError, ValueError):
      line = f'The test of {self._checkpoint} failed, see {self._log}.'
    console.say(line)
    # In this order: without a checkpoint, the learner's thread saves another.
    self._process = None
    self._checkpoint = None

  def close(self):
    """Ends a test under way."""
    if self._process is not None:
      self._process.terminate()
      try:
        self._process.wait(timeout=10)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()

  def _schedule(self, frames):
    interval = FLAGS.test_interval_frames
    self._next_frames = (frames // interval + 1) * interval

  def _start(self):
    own = FLAGS.get_flags_for_module(sys.modules[__name__])
    arguments = [
      flag.serialize()
      for flag in own
      if flag.present and flag.name not in ('job_name', 'task')
    ]
    with open(self._log, 'a') as log:
      self._process = subprocess.Popen(
        [
          sys.executable,
          '-c',
          _CHILD,
          str(os.getpid()),
          os.path.abspath(__file__),
          *arguments,
          '--mode=test',
          f'--checkpoint={self._checkpoint}',
          # On many machines --num_actors is no number of this one's.
          f'--num_actors={min(FLAGS.num_actors, os.cpu_count() or 1)}',
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # A Ctrl-C is for the training.
        env={
          **os.environ,
          'PYTHONPATH': os.pathsep.join(sys.path),
          'CUDA_VISIBLE_DEVICES': '-1',  # The training has taken it all.
        },
      )


# --- A trained agent for other programs -------------------------------------


class Player:
  """A trained agent that plays an environment of yours, step by step.

    player = experiment.Player('/tmp/agent')
    action, _, _ = player.step(frame, reward, done)

  `action_set` has what its actions mean to the environments of the training.
  """

  def __init__(self, path, seed=None):
    """Loads an agent.

    Args:
      path: log directory of a training, for its last checkpoint; or a
        checkpoint in it, e.g. /tmp/agent/model.ckpt-1000.
      seed: int, of the actions; None lets them differ each time.

    Raises:
      UserError: there is no such checkpoint.
    """
    is_folder = os.path.isdir(path)
    folder = path if is_folder else os.path.dirname(path)
    checkpoint = tf.train.latest_checkpoint(path) if is_folder else path
    try:
      with open(os.path.join(folder, _DESCRIPTION)) as file:
        description = json.load(file)
      tf.train.load_variable(checkpoint or folder, 'global_step')
    except (OSError, ValueError, IndexError, tf.errors.OpError) as error:
      raise UserError(f'{path} holds no trained agent: {error}') from None
    self.frame_shape = tuple(description['frame_shape'])
    self.action_set = description['action_set']
    with tf.Graph().as_default():
      tf.set_random_seed(seed)
      agent = Agent(len(self.action_set), description['torso'])
      self._build(agent)
      self._session = tf.Session()
      tf.train.Saver().restore(self._session, checkpoint)
      self._run = self._session.make_callable(
        (self._output, self._next_state), self._inputs
      )
      self._state = self._session.run(agent.initial_state(1))
    self._action = 0

  def step(self, frame, reward=0.0, done=False, instruction=''):
    """Chooses an action.

    Args:
      frame: uint8 [height, width, channels] of any size; resized for the agent.
      reward: float, for the last action.
      done: bool, whether the last action ended an episode, so that this is the
        first frame of another one.
      instruction: string, what the agent is told to do.

    Returns:
      `AgentOutput`: int, which of the actions; float32 [num_actions]; float.

    Raises:
      ValueError: the frame has another number of channels than the agent's.
    """
    height, width, channels = self.frame_shape
    frame = environments.resize(np.asarray(frame), height, width)
    if frame.shape[2] != channels:
      raise ValueError(
        f'Frames must have {channels} channels, but this one has '
        f'{frame.shape[2]}.'
      )
    output, self._state = self._run(
      [self._action], [reward], [done], [frame], [instruction], *self._state
    )
    self._action = int(output.action[0])
    return AgentOutput(
      self._action, output.policy_logits[0], float(output.baseline[0])
    )

  def _build(self, agent):
    state = tf.nest.map_structure(
      lambda t: tf.placeholder(t.dtype, t.shape), agent.initial_state(1)
    )
    action = tf.placeholder(tf.int32, [1])
    reward = tf.placeholder(tf.float32, [1])
    done = tf.placeholder(tf.bool, [1])
    frame = tf.placeholder(tf.uint8, [1, *self.frame_shape])
    instruction = tf.placeholder(tf.string, [1])
    env_output = environments.StepOutput(reward, (), done, (frame, instruction))
    self._output, self._next_state = agent((action, env_output), state)
    self._inputs = [action, reward, done, frame, instruction, *state]


# --- Main -------------------------------------------------------------------


def _has_bfloat16():
  """Returns whether the processor has instructions for it (Linux, x86)."""
  try:
    with open('/proc/cpuinfo') as file:
      return re.search(r'\b(avx512_bf16|amx_bf16)\b', file.read()) is not None
  except OSError:
    return False


def _check_flags():
  """Completes the flags; raises UserError if they make no sense together."""
  if FLAGS.precision == 'bfloat16' and not _has_bfloat16():
    FLAGS.precision = 'float32'
    print(
      'This processor has no instructions for bfloat16: float32 is used.',
      flush=True,
    )
  if FLAGS.checkpoint and FLAGS.mode != 'test':
    raise UserError(
      '--checkpoint is for --mode=test: training goes on from the last '
      'checkpoint in --logdir.'
    )
  if FLAGS.mode == 'test':
    if FLAGS.task != -1:
      raise UserError('--task is for training: a test runs on one machine.')
    return
  if 'TF_CONFIG' in os.environ:
    _take_tf_config(os.environ['TF_CONFIG'])
  if FLAGS.task == -1 and (
    FLAGS['job_name'].present or FLAGS.job_name == 'actor'
  ):
    raise UserError(
      f'--job_name={FLAGS.job_name} needs a --task: 0 for the learner; 0, 1, 2 '
      '... for the actors. To train on this machine alone, leave both out.'
    )
  if FLAGS.task < -1 or (FLAGS.task > 0 and FLAGS.job_name == 'learner'):
    raise UserError(
      f'--job_name={FLAGS.job_name} has no --task={FLAGS.task}: the learner is '
      'task 0, the actors are tasks 0, 1, 2 ...'
    )
  if FLAGS.actor_address is None:
    FLAGS.actor_address = f'localhost:{8001 + FLAGS.task}'
  for name in ('learner_address', 'actor_address'):
    address = FLAGS[name].value
    match = re.fullmatch(r'[^\s\[\]]+:([0-9]{1,5})', str(address))
    if not match or int(match[1]) > 65535:
      raise UserError(f'--{name}={address} is no host:port.')


def _take_tf_config(text):
  """Sets job, task and addresses as TF_CONFIG, a JSON string, has them."""
  try:
    config = json.loads(text)
    task, cluster = config['task'], config['cluster']
    values = {
      'job_name': task['type'],
      'task': int(task['index']),
      'learner_address': cluster['learner'][0],
    }
    # Actors needn't be listed: more may come.
    if task['type'] == 'actor' and values['task'] < len(
      cluster.get('actor', [])
    ):
      values['actor_address'] = cluster['actor'][values['task']]
  except (ValueError, TypeError, LookupError, AttributeError):
    raise UserError(
      'TF_CONFIG is not as in {"cluster": {"learner": ["host:port"], "actor": '
      '["host:port", ...]}, "task": {"type": "actor", "index": 0}}: mend or '
      'unset it.'
    ) from None
  if values['job_name'] not in ('learner', 'actor'):
    raise UserError(
      f'The job in TF_CONFIG is {values["job_name"]}, it must be learner or '
      'actor.'
    )
  for name, value in values.items():
    flag = FLAGS[name]
    if flag.present and flag.value != value:
      raise UserError(
        f'--{name} is {flag.value}, but TF_CONFIG has {value}: leave one of '
        'them out.'
      )
    flag.value = value


# malloc.h
_M_ARENA_MAX = -8


def _limit_arenas():
  """Has threads share what others freed.

  By default glibc keeps it apart for up to 8 arenas per processor: 70 MB more
  with 48 actors, while 2 per processor are as fast.
  """
  if 'MALLOC_ARENA_MAX' not in os.environ:
    with contextlib.suppress(AttributeError):  # Another library of C.
      ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2 * (os.cpu_count() or 1))


def main(_):
  _limit_arenas()
  tf.logging.set_verbosity(
    tf.logging.INFO if FLAGS.verbosity > 0 else tf.logging.ERROR
  )
  try:
    _check_flags()
    run = act if FLAGS.job_name == 'actor' else train
    {'train': run, 'test': test}[FLAGS.mode]()
  except KeyboardInterrupt:  # Before anything was started.
    sys.exit(128 + signal.SIGINT)
  except UserError as error:
    _exit(error, 2)
  except py_process.ProcessError as error:
    _exit(error, 1)
  except tf.errors.InvalidArgumentError as error:
    if _NOT_FINITE not in str(error):
      raise
    _exit(
      f'{_NOT_FINITE}: training stops, the last checkpoint in {FLAGS.logdir} '
      'is kept. A lower --learning_rate or a --max_gradient_norm may help.',
      1,
    )


def _exit(error, code):
  print(f'experiment.py: {error}', file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _exit(error, 2)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
