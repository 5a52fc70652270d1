# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The learner's graph: V-trace, losses, and the update.

In: batches of unrolls, `LearnerSettings`. Out: an `Update`, by one learner or
by several synchronous ones.
"""

import collections
import time

import tensorflow.compat.v1 as tf

import popart
import private_apis
import vtrace
from replay import Replay
from unrolls import build_staging

NOT_FINITE = 'The loss or its gradient is not finite'

# What the update depends on: the values of the flags of these names.
LearnerSettings = collections.namedtuple(
  'LearnerSettings',
  (
    'baseline_cost',
    'batch_size',
    'clip_pg_rho_threshold',
    'clip_rho_threshold',
    'decay',
    'discounting',
    'entropy_cost',
    'epsilon',
    'learning_rate',
    'learning_rate_schedule',
    'max_gradient_norm',
    'momentum',
    'num_action_repeats',
    'optimizer',
    'replay_proportion',
    'replay_size',
    'reward_clipping',
    'total_environment_frames',
    'unroll_length',
    'vtrace_lambda',
  ),
)

# The results of an update of the learner, scalars. `global_step` is the number
# of environment frames after the update; a run of it does the update.
LearnerOutput = collections.namedtuple(
  'LearnerOutput',
  'global_step learning_rate total_loss policy_gradient_loss baseline_loss '
  'entropy gradient_norm',
)

# What a learner computes of its batch: losses, float32 scalars; the gradients
# of `total_loss`, one per trainable variable; of the fresh unrolls the
# `StepOutput` of [T, B, ...]; and the `popart.Targets` of the baseline.
Tower = collections.namedtuple(
  'Tower',
  'total_loss policy_gradient_loss baseline_loss entropy gradients env_outputs '
  'targets',
)

# The results of an update: the `LearnerOutput`; of its fresh unrolls level_name
# [B], game_over and info [T, B]; the scalar policy_lag; and of each of N
# learners, [N], how many unrolls its queue has and the seconds it waited for
# its batch.
Update = collections.namedtuple(
  'Update',
  'learner level_name game_over info policy_lag queue_size wait_seconds',
)


class Learner:
  """Builds what a learner computes."""

  def __init__(self, settings):
    """Takes `LearnerSettings`."""
    self._settings = settings
    # Of the unrolls of a batch.
    self.num_replayed = round(settings.replay_proportion * settings.batch_size)
    self.num_fresh = settings.batch_size - self.num_replayed
    self.frames_per_update = (
      self.num_fresh * settings.unroll_length * settings.num_action_repeats
    )

  def build(
    self, agent, agent_state, env_outputs, agent_outputs, level_name=''
  ):
    """Builds the loss of a batch and its update.

    Args:
      agent: `Agent`.
      agent_state: its state before the first entry, [B, ...].
      env_outputs: `StepOutput` of [T + 1, B, ...].
      agent_outputs: `AgentOutput` of [T + 1, B, ...], by the behaviour policy.
      level_name: string [B], needed with PopArt.

    Returns:
      `LearnerOutput`.
    """
    return self.build_update(
      agent,
      [
        self.build_tower(
          *(agent, agent_state, env_outputs, agent_outputs, level_name),
          fresh=slice(None),
        )
      ],
    )

  def build_tower(
    self, agent, agent_state, env_outputs, agent_outputs, level_name, fresh
  ):
    """Builds the loss (section 4.2 of the paper) of a batch and its gradients.

    Args: see `build`, and
      fresh: slice of the unrolls that are not replayed.

    Returns:
      `Tower`.
    """
    # Of the last entry only its value is used, without a gradient. It is
    # computed apart from the others, as it then needs no backward pass.
    inputs = (agent_outputs.action, env_outputs)
    learner_outputs, last_state = agent.unroll(
      *_index(inputs, slice(None, -1)), agent_state
    )
    last_output, _ = agent(_index(inputs, -1), last_state)
    learner_outputs, last_output = (
      agent.at_level(output, level_name)
      for output in (learner_outputs, last_output)
    )
    # The agent's output t came before the environment's output t: after this,
    # entry t has an action, its reward, and policy and baseline before both.
    agent_outputs, env_outputs = _index(
      (agent_outputs, env_outputs), slice(1, None)
    )
    vtrace_returns = self._build_vtrace(
      learner_outputs, agent_outputs, env_outputs, last_output.baseline
    )
    # With PopArt, no level counts for more because its rewards are larger.
    scale = agent.baseline_scale(level_name)
    policy_gradient_loss = -tf.reduce_sum(
      vtrace.log_probs_from_logits_and_actions(
        learner_outputs.policy_logits, agent_outputs.action
      )
      * (vtrace_returns.pg_advantages / scale)
    )
    baseline_loss = 0.5 * tf.reduce_sum(
      tf.square((vtrace_returns.vs - learner_outputs.baseline) / scale)
    )
    entropy = _entropy(learner_outputs.policy_logits)
    entropy = tf.where(env_outputs.truncated, tf.zeros_like(entropy), entropy)
    total_loss = (
      policy_gradient_loss
      + self._settings.baseline_cost * baseline_loss
      - self._settings.entropy_cost * tf.reduce_sum(entropy)
    )
    _summarize_actions(agent_outputs.action)
    return Tower(
      total_loss=total_loss,
      policy_gradient_loss=policy_gradient_loss,
      baseline_loss=baseline_loss,
      entropy=tf.reduce_mean(entropy),
      gradients=tf.gradients(total_loss, agent.trainable_variables),
      env_outputs=_index(env_outputs, (slice(None), fresh)),
      targets=popart.Targets(
        vtrace_returns.vs, ~env_outputs.truncated, level_name
      ),
    )

  def build_update(self, agent, towers):
    """Builds the one update of all learners, by the sum of their gradients.

    The loss is a sum over the batch. So an update of learners with a part each
    is that of one learner with all of it.

    Args:
      agent: `Agent`.
      towers: list of `Tower` of equally large parts of a batch.

    Returns:
      `LearnerOutput`.
    """
    total_loss = tf.add_n([tower.total_loss for tower in towers])
    learning_rate, optimizer = self._build_optimizer()
    variables = agent.trainable_variables
    gradients = [
      _add_gradients(variable, parts)
      for variable, *parts in zip(
        variables, *(tower.gradients for tower in towers), strict=True
      )
    ]
    # Checked before the update, so that a loss that is not finite leaves the
    # variables as they were.
    gradient_norm = tf.global_norm(gradients)
    checks = [
      tf.debugging.check_numerics(total_loss, NOT_FINITE),
      tf.debugging.check_numerics(gradient_norm, NOT_FINITE),
    ]
    if self._settings.max_gradient_norm > 0:
      gradients, _ = tf.clip_by_global_norm(
        gradients, self._settings.max_gradient_norm, use_norm=gradient_norm
      )
    with tf.control_dependencies(checks):
      update = optimizer.apply_gradients(zip(gradients, variables, strict=True))
    with tf.control_dependencies([update]):
      statistics = [
        agent.observe([tower.env_outputs for tower in towers]),
        agent.rescale_baseline([tower.targets for tower in towers]),
      ]
    with tf.control_dependencies(statistics):
      global_step = tf.train.get_or_create_global_step().assign_add(
        self.frames_per_update, read_value=True
      )
    output = LearnerOutput(
      global_step=global_step,
      learning_rate=learning_rate,
      total_loss=total_loss,
      policy_gradient_loss=tf.add_n([t.policy_gradient_loss for t in towers]),
      baseline_loss=tf.add_n([t.baseline_loss for t in towers]),
      entropy=tf.add_n([t.entropy for t in towers]) / len(towers),
      gradient_norm=gradient_norm,
    )
    for name, value in output._asdict().items():
      if name != 'global_step':
        tf.summary.scalar(name, value)
    return output

  def _build_vtrace(
    self, learner_outputs, agent_outputs, env_outputs, bootstrap_value
  ):
    """Returns the `VTraceFromLogitsReturns` of [T, B]; see `build`."""
    # Many small operations: an accelerator would only be slower.
    with tf.device('/cpu'):
      return vtrace.from_logits(
        behaviour_policy_logits=agent_outputs.policy_logits,
        target_policy_logits=learner_outputs.policy_logits,
        actions=agent_outputs.action,
        discounts=tf.cast(~env_outputs.done, tf.float32)
        * self._settings.discounting,
        # Nothing is learned from an entry that only resets, see `environments`.
        rewards=tf.where(
          env_outputs.truncated,
          learner_outputs.baseline,
          clip_rewards(env_outputs.reward, self._settings.reward_clipping),
        ),
        values=learner_outputs.baseline,
        bootstrap_value=bootstrap_value,
        clip_rho_threshold=self._settings.clip_rho_threshold or None,
        clip_pg_rho_threshold=self._settings.clip_pg_rho_threshold or None,
        lambda_=self._settings.vtrace_lambda,
      )

  def _build_optimizer(self):
    """Returns the learning rate and the optimiser."""
    settings = self._settings
    learning_rate = tf.constant(settings.learning_rate)
    if settings.learning_rate_schedule == 'linear':
      learning_rate = tf.train.polynomial_decay(
        settings.learning_rate,
        tf.train.get_or_create_global_step(),
        settings.total_environment_frames,
        0,
      )
    if settings.optimizer == 'adam':
      return learning_rate, tf.train.AdamOptimizer(
        learning_rate, epsilon=settings.epsilon
      )
    return learning_rate, tf.train.RMSPropOptimizer(
      learning_rate, settings.decay, settings.momentum, settings.epsilon
    )

  def build_training(self, agent, queues, devices=(None,)):
    """Builds an update by learners that take unrolls from queues.

    Args:
      agent: `Agent`.
      queues: list of the learners' `NestQueue`s.
      devices: list of the learners' devices.

    Returns:
      `Update`, and the op that ends the learners' waits for unrolls.

    Raises:
      UserError: the memory can't hold --replay_size.
    """
    fresh = slice(self.num_fresh // len(queues))
    towers, batches, wait_seconds, end_waits = [], [], [], []
    # Of a chief that was killed, there may be others in the learners' tasks.
    unique = time.time_ns()
    for k, (queue, device) in enumerate(zip(queues, devices, strict=True)):
      with tf.device(device):
        with tf.device('/cpu:0'):
          batch, seconds, end = build_staging(
            *(queue, fresh.stop),
            name=f'staged_batches_{k}_{unique}',
            replay=self._build_replay(queue.like, len(queues)),
          )
        output = batch.actor_output
        with private_apis.read_once():
          towers.append(
            self.build_tower(
              agent,
              output.agent_state,
              output.env_outputs,
              output.agent_outputs,
              output.level_name,
              fresh,
            )
          )
      batches.append(batch)
      wait_seconds.append(seconds)
      end_waits.append(end)
    learner = self.build_update(agent, towers)
    # The first entry was counted as the last one of the unroll before.
    env_outputs = _index(
      [b.actor_output.env_outputs for b in batches], (slice(1, None), fresh)
    )
    begun = tf.concat([batch.global_step[fresh] for batch in batches], 0)
    lag = learner.global_step - self.frames_per_update - begun
    update = Update(
      learner=learner,
      level_name=tf.concat(
        [b.actor_output.level_name[fresh] for b in batches], 0
      ),
      game_over=tf.concat([output.game_over for output in env_outputs], 1),
      info=tf.nest.map_structure(
        lambda *parts: tf.concat(parts, 1),
        *(output.info for output in env_outputs),
      ),
      policy_lag=tf.reduce_mean(tf.cast(lag, tf.float32))
      / self.frames_per_update,
      queue_size=tf.stack([queue.queue.size() for queue in queues]),
      wait_seconds=tf.stack(wait_seconds),
    )
    return update, tf.group(end_waits)

  def _build_replay(self, unroll, num_learners):
    """Returns the `Replay` of one of the learners, or None without."""
    if not self.num_replayed:
      return None
    return Replay(
      self._settings.replay_size // num_learners,
      unroll,
      self.num_replayed // num_learners,
    )


def _add_gradients(variable, parts):
  """Returns the sum of gradients of a variable, on the variable's device."""
  if len(parts) == 1:
    return parts[0]
  with tf.colocate_with(variable.handle):
    if isinstance(parts[0], tf.IndexedSlices):
      values, indices = zip(
        *((g.values, g.indices) for g in parts), strict=True
      )
      return tf.IndexedSlices(
        tf.concat(values, 0), tf.concat(indices, 0), parts[0].dense_shape
      )
    return tf.add_n(parts)


def clip_rewards(rewards, how):
  """Returns rewards as --reward_clipping, `how`, wants them."""
  if how == 'none':
    return rewards
  if how == 'abs_one':
    return tf.clip_by_value(rewards, -1, 1)
  squeezed = tf.tanh(rewards / 5.0)
  return tf.where(rewards < 0, 0.3 * squeezed, squeezed) * 5.0


def _entropy(policy_logits):
  """Returns the entropy in nats, [T, B], of policies as of the `Agent`."""
  log_policy = tf.nn.log_softmax(policy_logits)
  terms = tf.exp(log_policy) * log_policy
  # Those of independent heads add up.
  return -tf.reduce_sum(terms, axis=list(range(2, terms.shape.rank)))


def _summarize_actions(actions):
  """Writes histograms of actions, [T, B]; or of each head, [T, B, heads]."""
  if actions.shape.rank == 2:
    tf.summary.histogram('action', actions)
    return
  for head, chosen in enumerate(tf.unstack(actions, axis=2)):
    tf.summary.histogram(f'action/{head}', chosen)


def _index(nest, index):
  """Returns what is at an index or slice of the leading dimension."""
  return tf.nest.map_structure(lambda t: t[index], nest)
