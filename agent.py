# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The agent: the paper's network, deep or shallow.

In: what an environment shows (a frame, an instruction, the last reward), the
last action, and the state of the LSTM. Out: an `AgentOutput`, which is an
action, the policy's logits and the baseline, and the next state. It knows
neither flags nor training.
"""

import collections

import numpy as np
import sonnet as snt
import tensorflow.compat.v1 as tf

import convolution
import popart
import private_apis
import recurrence

# Sonnet checks once whether TensorFlow 2 is enabled. Inside of a graph, this
# check wrongly says no: so the first module is made here, outside of any.
snt.Module()

AgentOutput = collections.namedtuple(
  'AgentOutput', 'action policy_logits baseline'
)


class Agent(snt.Module):
  """The paper's network (section 5.1 and figure 3), deep or shallow.

  Its input is the environment's output and the action that led to it. The core
  is an LSTM; its state is reset where an episode begins. Without a core, it is
  the feed-forward network of the paper's Atari agents (appendix G), which sees
  the frame alone, and whose state is empty.

  An action is one of `num_actions`. Or it is made of several, each chosen
  independently of the others by a head of the policy. Then actions have a
  dimension more, [..., num_heads], and logits as well, [..., num_heads, the
  most actions of a head]: those that other heads lack have probability 0.
  """

  # Logit of an action that a head lacks: with minus infinity, the entropy would
  # not be finite.
  _LACKING = -1e9

  def __init__(
    self,
    num_actions,
    torso='deep',
    precision='float32',
    core='lstm',
    normalize_frames=False,
    name='agent',
    popart_levels=(),
  ):
    """Makes the modules.

    Args:
      num_actions: int, number of actions to choose from; or a sequence of
        ints, those of several heads.
      torso: 'deep' or 'shallow'.
      precision: of what convolutions multiply, 'float32' or 'bfloat16'. Those
        of TensorFlow need a session that rewrites them.
      core: 'lstm' or 'none'.
      normalize_frames: whether each pixel is shifted and scaled by its mean and
        deviation, see `FrameStatistics`; else frames are divided by 255.
      name: name of the module.
      popart_levels: names of the levels that have a baseline of their own, see
        `popart`. Without, there is one for all.
    """
    super().__init__(name)
    self.num_actions = num_actions
    self._has_heads = np.ndim(num_actions) == 1
    sizes = np.atleast_1d(num_actions)
    self._num_logits = int(sizes.sum())
    # Of the heads among all logits.
    self._offsets = np.cumsum(sizes) - sizes
    self._frame_statistics = FrameStatistics() if normalize_frames else None
    self._frame_encoder = {
      'deep': lambda: _DeepEncoder(precision),
      'shallow': _ShallowEncoder,
    }[torso]()
    self._core = None
    if core == 'lstm':
      self._instruction_encoder = _InstructionEncoder()
      # Twice the usual variance for the weights of the inputs. With the usual
      # one, the gates depend mostly on the memory, and the agent learns to use
      # what it sees only after many frames.
      self._core = snt.LSTM(
        256, w_i_init=snt.initializers.VarianceScaling(4.0), name='core'
      )
    # The names of the variables tell the heads apart, as their shapes can't: a
    # checkpoint fits none but its own agent.
    suffixes = map(str, num_actions) if self._has_heads else []
    self._policy = snt.Linear(
      self._num_logits, name='_'.join(['policy_logits', *suffixes])
    )
    self._popart = None
    if popart_levels:
      self._popart = popart.NormalizedBaseline(popart_levels)
    else:
      self._baseline = snt.Linear(1, name='baseline')

  def initial_state(self, batch_size):
    """Returns the core's state [batch_size, ...] before the first step."""
    return () if self._core is None else self._core.initial_state(batch_size)

  def initial_output(self):
    """Returns the `AgentOutput`, without B, of no step: all zeros."""
    sizes = np.array(self.num_actions)
    return AgentOutput(
      action=tf.zeros(sizes.shape, tf.int32),
      policy_logits=tf.zeros([*sizes.shape, sizes.max()]),
      baseline=tf.constant(0.0),
    )

  def observe(self, env_outputs):
    """Builds the update of the statistics of frames.

    Args:
      env_outputs: list of `StepOutput` of [T, B, ...], equally large parts of a
        batch. What is computed of one part is computed on its device.

    Returns:
      An operation, to be run after the agent has learned from the same frames.
    """
    if self._frame_statistics is None:
      return tf.no_op()
    return self._frame_statistics.update(
      [part.observation[0] for part in env_outputs]
    )

  def at_level(self, agent_output, level_name):
    """Returns an `AgentOutput` with the baseline of a level.

    Args:
      agent_output: `AgentOutput` that the agent returned, of [..., B, ...].
      level_name: string [B] or scalar.

    Returns:
      `AgentOutput` whose baseline is float32 [..., B]. It is NaN for a level
      that is none of the agent's.
    """
    if self._popart is None:
      return agent_output
    baseline = self._popart.select(agent_output.baseline, level_name)
    return agent_output._replace(baseline=baseline)

  def baseline_scale(self, level_name):
    """Returns by what errors of the baseline of levels are to be divided.

    Args:
      level_name: string [B].

    Returns:
      float32 [B], or a scalar for all.
    """
    if self._popart is None:
      return tf.constant(1.0)
    return self._popart.deviation(level_name)

  def rescale_baseline(self, targets):
    """Builds the update of the baselines' scales; no value is changed by it.

    Args:
      targets: list of `popart.Targets`, parts of a batch.

    Returns:
      An operation, to be run after the agent has learned from the same targets.
    """
    if self._popart is None:
      return tf.no_op()
    return self._popart.update(targets)

  def __call__(self, input_, core_state):
    """Chooses actions for one step.

    Args:
      input_: pair of the last action, int32 [B] or [B, num_heads], and a
        `StepOutput` of [B, ...].
      core_state: state of the LSTM before the step, [B, ...].

    Returns:
      `AgentOutput` of the action, as above; logits, float32 [B, num_actions] or
      [B, num_heads, ...]; and the baseline, float32 [B], or with PopArt
      [B, num_levels], see `at_level`. And the next state.
    """
    last_action, env_output = input_
    features = self._torso(last_action, env_output)
    if self._core is None:
      return self._head(features), core_state
    hidden, cell = _unroll_lstm(
      self._core, features, env_output.done, core_state
    )
    # The output of an LSTM is the hidden part of its state.
    return self._head(hidden), snt.LSTMState(hidden, cell)

  def unroll(self, actions, env_outputs, core_state):
    """Runs the agent over a sequence.

    Args:
      actions: the actions that led to `env_outputs`, int32 [T, B] or [T, B,
        num_heads].
      env_outputs: `StepOutput` of [T, B, ...].
      core_state: state of the LSTM before the first step, [B, ...].

    Returns:
      `AgentOutput` of [T, B, ...], and the last state.
    """
    # All but the LSTM computes all steps at once.
    last_action, env_output = tf.nest.map_structure(
      lambda t: snt.merge_leading_dims(t, 2), (actions, env_outputs)
    )
    features = self._torso(last_action, env_output)
    if self._core is not None:
      hidden, cell = _unroll_lstm(
        self._core,
        snt.split_leading_dim(features, actions, 2),
        env_outputs.done,
        core_state,
      )
      features = snt.merge_leading_dims(hidden, 2)
      core_state = snt.LSTMState(hidden[-1], cell[-1])
    outputs = tf.nest.map_structure(
      lambda t: snt.split_leading_dim(t, actions, 2), self._head(features)
    )
    return outputs, core_state

  def _torso(self, last_action, env_output):
    """Returns the core's input, float32 [N, features]."""
    frame, instruction = env_output.observation
    normalization = None
    if self._frame_statistics is not None:
      normalization = self._frame_statistics(frame.shape[1:])
    features = self._frame_encoder(frame, normalization)
    if self._core is None:
      return features
    return tf.concat(
      [
        features,
        tf.clip_by_value(env_output.reward, -1, 1)[:, tf.newaxis],
        self._one_hot(last_action),
        self._instruction_encoder(instruction),
      ],
      axis=1,
    )

  def _one_hot(self, action):
    """Returns float32 [N, number of logits], a one for each head."""
    if not self._has_heads:
      return tf.one_hot(action, self.num_actions)
    indices = action + self._offsets.astype(np.int32)
    return tf.reduce_sum(tf.one_hot(indices, self._num_logits), axis=1)

  def _head(self, core_output):
    """Returns the `AgentOutput` for the core's output, [N, features]."""
    policy_logits = self._split(self._policy(core_output))
    return AgentOutput(
      action=self.draw(policy_logits),
      policy_logits=policy_logits,
      baseline=self._values(core_output),
    )

  def _values(self, core_output):
    if self._popart is not None:
      return self._popart(core_output)
    return tf.squeeze(self._baseline(core_output), 1)

  def _split(self, logits):
    """Returns the policy's logits by head, if there are several."""
    if not self._has_heads:
      return logits
    sizes = np.array(self.num_actions)[:, np.newaxis]
    column = np.arange(sizes.max())
    padded = tf.pad(logits, [[0, 0], [0, 1]], constant_values=self._LACKING)
    indices = self._offsets[:, np.newaxis] + column
    return tf.gather(
      padded, np.where(column < sizes, indices, self._num_logits), axis=1
    )

  def draw(self, policy_logits, seed=None):
    """Draws actions.

    Args:
      policy_logits: as in an `AgentOutput`, of [B, ...].
      seed: int32 [2], decides what is drawn; None draws from the graph's random
        numbers.

    Returns:
      int32 [B] or [B, num_heads].
    """
    rows = tf.reshape(policy_logits, [-1, policy_logits.shape[-1]])
    if seed is None:
      actions = tf.random.categorical(rows, 1, dtype=tf.int32)
    else:
      actions = tf.random.stateless_categorical(rows, 1, seed, dtype=tf.int32)
    actions = tf.reshape(actions, tf.shape(policy_logits)[:-1])
    # If logits are not finite, TensorFlow draws an action beyond the last. The
    # learner reports such logits, an environment could only crash.
    return tf.minimum(actions, np.array(self.num_actions, np.int32) - 1)


# Keeps the scale of the signal, as a ReLU sets half of it to zero (arXiv
# 1502.01852). With Sonnet's default, it shrinks from layer to layer.
_RELU_INIT = snt.initializers.VarianceScaling(2.0)


class FrameStatistics(snt.Module):
  """Mean and deviation of each pixel of the frames that were learned from.

  Frames of most environments look much alike: what matters in them is small,
  next to what never changes. Pixels of mean 0 and deviation 1 make it visible.
  """

  # Neighbours in an unroll differ little, so these many steps lie between two
  # frames that count.
  _STRIDE = 5
  # The last so many of them count, as an agent that learns sees other frames.
  _MAX_COUNT = 100_000
  # Of pixels that (nearly) never change; else noise would become large.
  _MIN_DEVIATION = 5.0
  _LIMIT = 5.0  # Of the results.

  def __init__(self):
    super().__init__('frame_statistics')

  @snt.once
  def _make_variables(self, shape):
    def variable(name, value, shape):
      return tf.Variable(
        tf.fill(shape, value), trainable=False, name=name, dtype=tf.float32
      )

    self._count = variable('count', 0.0, [])
    self._mean = variable('mean', 0.0, shape)
    self._variance = variable('variance', 0.0, shape)
    # What frames are multiplied with, and what is added then: kept as well, to
    # be computed once for each update instead of each step.
    self._scale = variable('scale', 1 / 255, shape)
    self._shift = variable('shift', 0.0, shape)

  def __call__(self, shape):
    """Returns the `convolution.Normalization` of frames of a shape.

    Before the first update, it divides them by 255.
    """
    self._make_variables(shape)
    return convolution.Normalization(self._scale, self._shift, self._LIMIT)

  def update(self, parts):
    """Returns the operation that takes frames into account.

    Args:
      parts: list of frames, uint8 [T, B, ...].

    Source: https://doi.org/10.1007/978-3-642-51461-6_3 (Chan, Golub, LeVeque),
    the mean and variance of two sets together.
    """
    counts, means, variances = zip(*map(self._measure, parts), strict=True)
    new, mean = tf.add_n(counts), tf.add_n(means) / len(parts)
    variance = tf.add_n(
      [v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)]
    ) / len(parts)
    count = tf.minimum(self._count + new, self._MAX_COUNT)
    share = new / count
    difference = mean - self._mean
    mean = self._mean + share * difference
    variance = (1 - share) * (self._variance + share * difference**2) + (
      share * variance
    )
    scale = 1 / tf.maximum(tf.sqrt(variance), self._MIN_DEVIATION)
    values = (
      (self._count, count),
      (self._mean, mean),
      (self._variance, variance),
      (self._scale, scale),
      (self._shift, -mean * scale),
    )
    # First all are computed, as they depend on the old values.
    with tf.control_dependencies([value for _, value in values]):
      return tf.group(
        *(v.assign(value, read_value=False) for v, value in values)
      )

  def _measure(self, frames):
    """Returns number, mean and variance of those frames that count."""
    with tf.colocate_with(frames):
      counted = tf.cast(frames[:: self._STRIDE], tf.float32)
      count = tf.cast(tf.reduce_prod(tf.shape(counted)[:2]), tf.float32)
      return count, *tf.nn.moments(counted, [0, 1])


class _Convolution(snt.Conv2D):
  """The variables of a convolution of 3x3 pixels."""

  def __init__(self, channels):
    super().__init__(channels, 3, name='conv2_d')

  def __call__(self, in_channels):
    """Returns weights [3, 3, in_channels, channels] and biases [channels]."""
    private_apis.make_convolution_variables(self, in_channels)
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

  def __call__(self, frame, normalization):
    """Maps uint8 [N, height, width, channels] to float32 [N, 256]."""
    for layers in self._sections:
      channels = [frame.shape[-1], *[layers[0].output_channels] * 4]
      weights, biases = zip(
        *(layer(n) for layer, n in zip(layers, channels, strict=True)),
        strict=True,
      )
      frame = convolution.section(
        frame, weights, biases, self._precision, normalization
      )
      normalization = None  # Is of the frame alone.
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

  def __call__(self, frame, normalization):
    """Maps uint8 [N, height, width, channels] to float32 [N, 256]."""
    return self._network(convolution.normalize(frame, normalization))


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
    # A branch of `tf.cond` can't make them.
    private_apis.make_lstm_variables(self._lstm, self._embedding.embed_dim)
    # Most environments give no instruction, and the encoder is half of the
    # operations of an inference.
    return tf.cond(
      tf.reduce_any(tf.not_equal(instruction, '')),
      lambda: self._encode(instruction),
      lambda: self._encode_none(tf.shape(instruction)[0]),
    )

  def _encode_none(self, batch_size):
    """Returns zeros, float32 [batch_size, 64]."""
    # No row is looked up. Without the embedding in it, this branch's gradient
    # would be zeros for all rows, which RMSProp takes for an update of each.
    nothing = tf.reduce_sum(self._embedding(tf.zeros([0], tf.int64)))
    return self._lstm.initial_state(batch_size).hidden + nothing

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


def _unroll_lstm(lstm, inputs, done, state):
  """Runs an LSTM over a sequence, resetting it where another one begins.

  The results are those of calling the LSTM step by step.

  Args:
    lstm: `snt.LSTM`.
    inputs: float32 [T, B, features], T > 0; or of a single step, [B, features].
    done: bool [T, B] or [B], whether a sequence begins.
    state: state before the first step, [B, ...].

  Returns:
    Hidden part and cells of the state after each step, float32 [T, B, units] or
    [B, units].
  """
  private_apis.make_lstm_variables(lstm, inputs.shape[-1])
  if inputs.shape.rank == 2:  # One operation instead of ten.
    products = tf.matmul(inputs, lstm.input_to_hidden)
  else:
    products = tf.tensordot(inputs, lstm.input_to_hidden, 1)
  return recurrence.lstm(products + lstm.b, done, *state, lstm.hidden_to_hidden)
