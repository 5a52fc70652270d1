# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the actor's and the learner's graphs, and of the flags."""

import collections
import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import sonnet as snt
from absl import flags
from absl.testing import flagsaver

import convolution
import environments
import experiment
import popart
import py_process
import unrolls
import vtrace
from actors import create_processes
from agent import Agent, AgentOutput
from experiment import tf
from helpers import FRAME, NUM_ACTIONS, constants, env_outputs, run_graph
from learner import clip_rewards

FLAGS = flags.FLAGS
if not FLAGS.is_parsed():
  FLAGS(['experiment_test'])


def test_keras_is_left_to_those_who_want_it():
  code = (
    'import sys, experiment; assert "keras" not in sys.modules; '
    'import keras, tensorflow as tf; tf.keras.layers.Dense(3)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


# --- The learner ------------------------------------------------------------


def softmax(logits):
  exp = np.exp(logits - logits.max(-1, keepdims=True))
  return exp / exp.sum(-1, keepdims=True)


def numpy_losses(target_logits, baseline, behaviour, env, discounting):
  """Sections 4.1 and 4.2 of the paper, step by step, in float64."""
  target = softmax(target_logits.astype(np.float64))
  num_steps, batch_size = len(target) - 1, target.shape[1]
  mu = softmax(behaviour.policy_logits.astype(np.float64))
  policy_gradient, value, entropy = 0.0, 0.0, 0.0
  for b in range(batch_size):
    vs = [0.0] * num_steps + [baseline[num_steps, b]]
    for t in reversed(range(num_steps)):
      action = behaviour.action[t + 1, b]
      rho = target[t, b, action] / mu[t + 1, b, action]
      gamma = 0.0 if env.done[t + 1, b] else discounting
      reward = np.clip(env.reward[t + 1, b], -1, 1)
      if env.truncated[t + 1, b]:  # No step: its error is 0.
        reward = baseline[t, b]
      delta = min(1, rho) * (
        reward + gamma * baseline[t + 1, b] - baseline[t, b]
      )
      vs[t] = (
        baseline[t, b]
        + delta
        + gamma * min(1, rho) * (vs[t + 1] - baseline[t + 1, b])
      )
      advantage = min(1, rho) * (reward + gamma * vs[t + 1] - baseline[t, b])
      policy_gradient -= np.log(target[t, b, action]) * advantage
    for t in range(num_steps):
      value += 0.5 * (vs[t] - baseline[t, b]) ** 2
      if not env.truncated[t + 1, b]:
        entropy -= (target[t, b] * np.log(target[t, b])).sum()
  return policy_gradient, value, entropy


@pytest.fixture
def learner_batch():
  """Returns the inputs of the learner, [T + 1, B, ...], for T=5 and B=3."""
  random = np.random.default_rng(4)
  shape = (6, 3)
  agent_outputs = AgentOutput(
    action=random.integers(0, NUM_ACTIONS, shape, np.int32),
    policy_logits=random.normal(size=(*shape, NUM_ACTIONS)).astype(np.float32),
    baseline=random.normal(size=shape).astype(np.float32),
  )
  instructions = ('', 'go', 'find the red door')
  return env_outputs(random, shape, instructions), agent_outputs


def of_two_heads(outputs):
  """Returns an `AgentOutput` with heads of 3 and 2 actions, by chance."""
  random = np.random.default_rng(6)
  shape = outputs.action.shape
  logits = random.normal(size=(*shape, 2, 3)).astype(np.float32)
  logits[..., 1, 2] = -1e9
  return outputs._replace(
    action=random.integers(0, [3, 2], (*shape, 2), np.int32),
    policy_logits=logits,
  )


def joint(outputs):
  """Returns the same with one head, of the 6 pairs of actions."""
  logits, action = outputs.policy_logits, outputs.action
  pairs = logits[..., 0, :, np.newaxis] + logits[..., 1, np.newaxis, :2]
  return outputs._replace(
    action=2 * action[..., 0] + action[..., 1],
    policy_logits=pairs.reshape(*action.shape[:-1], 6),
  )


@pytest.mark.parametrize('num_actions', [NUM_ACTIONS, (3, 2)])
@flagsaver.flagsaver(
  batch_size=3,
  unroll_length=5,
  num_action_repeats=4,
  entropy_cost=0.1,
  baseline_cost=0.5,
  discounting=0.9,
  learning_rate=0.25,
  total_environment_frames=240,
  epsilon=0.1,
)
def test_update_equals_the_papers_equations(learner_batch, num_actions):
  env, behaviour = learner_batch
  if num_actions == (3, 2):
    behaviour = of_two_heads(behaviour)
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(num_actions, 'shallow')
    state = agent.initial_state(3)
    target, _ = agent.unroll(
      tf.constant(behaviour.action), constants(env), state
    )
    learner = experiment.build_learner(
      agent, state, constants(env), constants(behaviour)
    )
    bias = next(
      v for v in agent.trainable_variables if v.name == 'agent/baseline/b:0'
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      target = session.run(target)
      before = session.run(bias)
      output = session.run(learner)
      after, step = session.run([bias, tf.train.get_global_step()])

  if num_actions == (3, 2):
    target, behaviour = joint(target), joint(behaviour)
  policy_gradient, value, entropy = numpy_losses(
    target.policy_logits, target.baseline, behaviour, env, 0.9
  )
  np.testing.assert_allclose(
    output.policy_gradient_loss, policy_gradient, rtol=1e-3
  )
  np.testing.assert_allclose(output.baseline_loss, value, rtol=1e-3)
  np.testing.assert_allclose(output.entropy, entropy / 15, rtol=1e-3)
  np.testing.assert_allclose(
    output.total_loss, policy_gradient + 0.5 * value - 0.1 * entropy, rtol=1e-3
  )
  assert output.global_step == step == 60
  # The gradient of the baseline's bias is the sum of its errors; RMSProp's
  # mean square starts at 1.
  vs_errors = np.zeros(1)
  epsilon = 1e-3
  for sign in (1, -1):
    # d/db of 0.25 sum (vs - V - b)^2, with vs held fixed, by differences.
    shifted = value_loss_with_fixed_targets(
      target, behaviour, env, 0.9, sign * epsilon
    )
    vs_errors += sign * 0.5 * shifted / (2 * epsilon)
  gradient = vs_errors[0]
  mean_square = 0.99 + 0.01 * gradient**2
  np.testing.assert_allclose(
    after - before,
    -0.25 * gradient / np.sqrt(mean_square + 0.1),
    rtol=1e-2,
  )


def value_loss_with_fixed_targets(target, behaviour, env, discounting, shift):
  """Returns the baseline loss if all baselines but the targets move."""
  probabilities = softmax(target.policy_logits.astype(np.float64))
  mu = softmax(behaviour.policy_logits.astype(np.float64))
  baseline, total = target.baseline.astype(np.float64), 0.0
  for b in range(3):
    vs = baseline[5, b]
    for t in reversed(range(5)):
      action = behaviour.action[t + 1, b]
      rho = min(1, probabilities[t, b, action] / mu[t + 1, b, action])
      gamma = 0.0 if env.done[t + 1, b] else discounting
      reward = np.clip(env.reward[t + 1, b], -1, 1)
      if env.truncated[t + 1, b]:  # No step: its error is 0.
        reward = baseline[t, b]
      vs = (
        baseline[t, b]
        + rho * (reward + gamma * baseline[t + 1, b] - baseline[t, b])
        + gamma * rho * (vs - baseline[t + 1, b])
      )
      total += 0.5 * (vs - baseline[t, b] - shift) ** 2
  return total


@flagsaver.flagsaver(
  batch_size=3,
  unroll_length=5,
  entropy_cost=0.1,
  learning_rate=0.5,
  # The mean square stays 1, so that a step is a fixed share of the gradient.
  decay=1.0,
  epsilon=0.0,
)
def test_gradients_equal_those_of_a_plain_graph(learner_batch):
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    tf.set_random_seed(1)  # The same weights in each session.
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'deep')
    learner = experiment.build_learner(
      agent, agent.initial_state(3), constants(env), constants(behaviour)
    )
    plain_loss = loss_of_single_steps(agent, env, behaviour)
    variables = agent.trainable_variables
    gradients = [
      tf.convert_to_tensor(g) for g in tf.gradients(plain_loss, variables)
    ]
    initialize = tf.global_variables_initializer()
    config = tf.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    with tf.Session(config=config) as session:
      session.run(initialize)
      expected_loss, expected = session.run([plain_loss, gradients])
    with tf.Session() as session:
      session.run(initialize)
      before = session.run(variables)
      loss = session.run(learner).total_loss
      after = session.run(variables)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-4)
  for old, new, gradient in zip(before, after, expected, strict=True):
    np.testing.assert_allclose(
      (old - new) / 0.5, gradient, rtol=1e-2, atol=1e-4 * np.abs(gradient).max()
    )


def loss_of_single_steps(agent, env, behaviour):
  """Section 4.2 of the paper: the agent step by step, all of them alike."""
  outputs, state = [], agent.initial_state(3)
  for t in range(6):
    actions, inputs = constants(
      tf.nest.map_structure(lambda x, t=t: x[t], (behaviour.action, env))
    )
    output, state = agent((actions, inputs), state)
    outputs.append(output)
  logits = tf.stack([o.policy_logits for o in outputs[:-1]])
  baseline = tf.stack([o.baseline for o in outputs[:-1]])
  actions = behaviour.action[1:]
  targets = vtrace.from_logits(
    behaviour.policy_logits[1:],
    logits,
    actions,
    np.where(env.done[1:], 0, FLAGS.discounting).astype(np.float32),
    tf.where(env.truncated[1:], baseline, np.clip(env.reward[1:], -1, 1)),
    baseline,
    outputs[-1].baseline,
  )
  log_policy = tf.math.log_softmax(logits)
  log_probs = tf.reduce_sum(log_policy * tf.one_hot(actions, NUM_ACTIONS), -1)
  is_step = (~env.truncated[1:, :, np.newaxis]).astype(np.float32)
  return (
    -tf.reduce_sum(log_probs * targets.pg_advantages)
    + FLAGS.baseline_cost * tf.reduce_sum((targets.vs - baseline) ** 2) / 2
    + FLAGS.entropy_cost
    * tf.reduce_sum(is_step * tf.exp(log_policy) * log_policy)
  )


def run_learner(learner_batch, precision):
  """Returns the values of a `LearnerOutput`, and the nodes of its graphs."""
  env, behaviour = learner_batch
  with tf.Graph().as_default(), flagsaver.flagsaver(precision=precision):
    tf.set_random_seed(1)
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'deep', precision)
    learner = experiment.build_learner(
      agent, agent.initial_state(3), constants(env), constants(behaviour)
    )
    metadata = tf.RunMetadata()
    with tf.Session(config=experiment._session_config(1)) as session:
      session.run(tf.global_variables_initializer())
      values = session.run(
        learner,
        options=tf.RunOptions(output_partition_graphs=True),
        run_metadata=metadata,
      )
  return values, [n for graph in metadata.partition_graphs for n in graph.node]


def assert_similar_learners(actual, expected):
  for name in ('total_loss', 'entropy', 'gradient_norm'):
    np.testing.assert_allclose(
      getattr(actual, name), getattr(expected, name), rtol=0.05
    )


@pytest.mark.skipif(
  not convolution.has_bfloat16(), reason='needs a processor with bfloat16'
)
@flagsaver.flagsaver(batch_size=3, unroll_length=5)
def test_tensorflows_convolutions_alone_are_bfloat16(
  learner_batch, monkeypatch
):
  expected, nodes = run_learner(learner_batch, 'float32')
  assert not any(node.attr['T'].type == tf.bfloat16 for node in nodes)
  monkeypatch.setattr(convolution, 'available', lambda precision: False)
  actual, nodes = run_learner(learner_batch, 'bfloat16')
  bfloat16_ops = {
    node.op for node in nodes if node.attr['T'].type == tf.bfloat16
  }
  assert any('Conv2D' in op for op in bfloat16_ops)
  # What is between two convolutions follows; nothing else does.
  rest = {op for op in bfloat16_ops if 'Conv2D' not in op}
  assert rest <= {
    *('Relu', 'ReluGrad', 'AddV2', 'AddN', 'Reshape'),
    *('_MklNativeMaxPool', '_MklNativeMaxPoolGrad'),
  }
  assert_similar_learners(actual, expected)


@pytest.mark.skipif(
  not convolution.available('bfloat16'),
  reason='needs `make ops` and AVX-512 for bfloat16',
)
@flagsaver.flagsaver(batch_size=3, unroll_length=5)
def test_own_sections_are_bfloat16(learner_batch):
  expected, _ = run_learner(learner_batch, 'float32')
  actual, nodes = run_learner(learner_batch, 'bfloat16')
  precisions = [
    node.attr['precision'].type for node in nodes if 'TorsoSection' in node.op
  ]
  # Of the unrolls, of the last observation, and the gradients.
  assert precisions == [tf.bfloat16] * 9
  assert not any(node.attr['T'].type == tf.bfloat16 for node in nodes)
  assert_similar_learners(actual, expected)


@flagsaver.flagsaver(precision='bfloat16')
def test_processor_without_bfloat16_takes_float32(monkeypatch, capsys):
  monkeypatch.setattr(convolution, 'has_bfloat16', lambda: False)
  experiment.check_flags()
  assert FLAGS.precision == 'float32'
  assert 'float32 is used' in capsys.readouterr().out


@flagsaver.flagsaver(
  batch_size=3,
  unroll_length=5,
  optimizer='adam',
  learning_rate=0.125,
  learning_rate_schedule='constant',
  total_environment_frames=120,
  epsilon=1e-8,
)
def test_adams_first_step_is_the_learning_rate(learner_batch):
  """Corrected for its start, Adam's first step is g / |g|."""
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    learner = experiment.build_learner(
      agent, agent.initial_state(3), constants(env), constants(behaviour)
    )
    bias = next(
      v for v in agent.trainable_variables if v.name == 'agent/baseline/b:0'
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      before = session.run(bias)
      rates = [session.run(learner).learning_rate]
      after = session.run(bias)
      rates.append(session.run(learner).learning_rate)
  np.testing.assert_allclose(np.abs(after - before), 0.125, rtol=1e-3)
  # With the other schedule, the second update is beyond the last frame.
  assert rates == [0.125, 0.125]


@flagsaver.flagsaver(
  batch_size=3, unroll_length=5, clip_rho_threshold=0.5, vtrace_lambda=0.5
)
def test_vtraces_flags_reach_the_loss(learner_batch):
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    state = agent.initial_state(3)
    inputs = constants(env)
    target, _ = agent.unroll(tf.constant(behaviour.action), inputs, state)
    learner = experiment.build_learner(
      agent, state, inputs, constants(behaviour)
    )
    # Both run before the update changes the agent.
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      target = session.run(target)
      loss = session.run(learner).baseline_loss
  returns = vtrace_by_hand(target, behaviour, env, rho_bar=0.5, lambda_=0.5)
  expected = 0.5 * np.sum((returns - target.baseline[:-1]) ** 2)
  np.testing.assert_allclose(loss, expected, rtol=1e-3)


def vtrace_by_hand(target, behaviour, env, rho_bar, lambda_):
  """Returns the targets of equation 1, backwards, with float64."""
  pi = softmax(target.policy_logits.astype(np.float64))
  mu = softmax(behaviour.policy_logits.astype(np.float64))
  values = target.baseline.astype(np.float64)
  vs = values.copy()
  for t in reversed(range(len(vs) - 1)):
    index = np.arange(vs.shape[1]), behaviour.action[t + 1]
    rho = pi[t][index] / mu[t + 1][index]
    gamma = np.where(env.done[t + 1], 0, FLAGS.discounting)
    reward = np.where(
      env.truncated[t + 1], values[t], np.clip(env.reward[t + 1], -1, 1)
    )
    vs[t] += np.minimum(rho_bar, rho) * (
      reward + gamma * values[t + 1] - values[t]
    ) + gamma * lambda_ * np.minimum(1, rho) * (vs[t + 1] - values[t + 1])
  return vs[:-1]


@flagsaver.flagsaver(batch_size=3, unroll_length=5, entropy_cost=0.1)
def test_nothing_is_learned_from_a_reset_after_a_time_limit(learner_batch):
  """Losses are those of two unrolls, the first ending before the reset."""
  env, behaviour = learner_batch
  env.done[:] = env.truncated[:] = False
  env.reward[3] = 0
  env.done[3] = env.truncated[3] = env.game_over[3] = True
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    state = agent.initial_state(3)
    target, _ = agent.unroll(
      tf.constant(behaviour.action), constants(env), state
    )
    learner = experiment.build_learner(
      agent, state, constants(env), constants(behaviour)
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      target = session.run(target)
      output = session.run(learner)
  expected = np.zeros(3)
  for part in (slice(0, 3), slice(3, 6)):
    logits, baseline, *inputs = tf.nest.map_structure(
      lambda x, part=part: x[part],
      (target.policy_logits, target.baseline, behaviour, env),
    )
    expected += numpy_losses(logits, baseline, *inputs, FLAGS.discounting)
  losses = output.policy_gradient_loss, output.baseline_loss
  np.testing.assert_allclose(losses, expected[:2], rtol=1e-3)
  np.testing.assert_allclose(output.entropy, expected[2] / 15, rtol=1e-3)


@flagsaver.flagsaver(batch_size=3, unroll_length=5)
def test_learner_updates_the_statistics_of_frames(learner_batch):
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow', normalize_frames=True)
    learner = experiment.build_learner(
      agent, agent.initial_state(3), constants(env), constants(behaviour)
    )
    mean = next(v for v in agent.variables if 'statistics/mean' in v.name)
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(learner)
      mean = session.run(mean)
  # The first entry was learned from in the unroll before.
  expected = env.observation[0][1::5].mean((0, 1))
  np.testing.assert_allclose(mean, expected, rtol=1e-5)


@flagsaver.flagsaver(
  batch_size=3,
  unroll_length=5,
  reward_clipping='none',
  discounting=0.9,
  baseline_cost=0.5,
  entropy_cost=0.1,
)
def test_popart_divides_losses_by_the_deviations_of_their_levels(
  learner_batch, monkeypatch
):
  env, behaviour = learner_batch
  env = env._replace(reward=env.reward / 10)  # None is clipped by hand.
  means, variances = np.array([0.3, -2]), np.array([4, 25])
  # So large that the moments move to where the targets are.
  monkeypatch.setattr(popart.NormalizedBaseline, '_STEP_SIZE', 0.5)
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow', popart_levels=['a', 'b'])
    state = agent.initial_state(3)
    names = tf.constant(['a', 'b', 'a'])
    target, _ = agent.unroll(
      tf.constant(behaviour.action), constants(env), state
    )
    target = agent.at_level(target, names)
    learner = experiment.build_learner(
      agent, state, constants(env), constants(behaviour), names
    )
    moments = [
      next(v for v in agent.variables if f'popart/{name}' in v.name)
      for name in ('mean', 'variance')
    ]
    begin = [moments[0].assign(means), moments[1].assign(variances)]
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(begin)
      target = session.run(target)
      output = session.run(learner)
      mean, variance = session.run(moments)
  expected = np.zeros(3)
  second_moments = variances + means**2
  vs = vtrace_by_hand(target, behaviour, env, rho_bar=1, lambda_=1)
  for b, level in enumerate([0, 1, 0]):
    losses = numpy_losses(
      *tf.nest.map_structure(
        lambda x, b=b: x[:, b : b + 1],
        (target.policy_logits, target.baseline, behaviour, env),
      ),
      0.9,
    )
    deviation = np.sqrt(variances[level])
    expected += losses / np.array([deviation, deviation**2, 1])
    counted = vs[~env.truncated[1:, b], b]
    means[level] += 0.5 * (counted.mean() - means[level])
    second_moments[level] += 0.5 * (np.mean(counted**2) - second_moments[level])
  np.testing.assert_allclose(
    [output.policy_gradient_loss, output.baseline_loss],
    expected[:2],
    rtol=1e-3,
  )
  np.testing.assert_allclose(
    output.total_loss, expected @ [1, 0.5, -0.1], rtol=1e-3
  )
  np.testing.assert_allclose(mean, means, rtol=1e-3)
  np.testing.assert_allclose(variance, second_moments - means**2, rtol=1e-3)


@flagsaver.flagsaver(
  batch_size=8,
  unroll_length=5,
  learning_rate=0.002,
  learning_rate_schedule='constant',
  epsilon=0.01,
  discounting=0.0,
  entropy_cost=0.001,
)
def test_deep_network_learns_to_see():
  """Which half of the frame is bright says which of two actions is rewarded.

  With the convolutions that a training would take, forward and backward.
  """
  random = np.random.default_rng(5)
  shape = (6, 8)
  bright = random.integers(0, 2, shape)
  env = env_outputs(random, shape)
  frames = np.full((*shape, *FRAME), 60, np.uint8)
  for index in np.ndindex(*shape):
    half = slice(0, 8) if bright[index] == 0 else slice(8, 16)
    frames[(*index, slice(None), half)] = 200
  actions = random.integers(0, 2, shape).astype(np.int32)
  # Entry t has the action that answered frame t - 1.
  rewards = np.zeros(shape, np.float32)
  rewards[1:] = actions[1:] == bright[:-1]
  env = env._replace(
    reward=rewards,
    done=np.zeros(shape, bool),
    truncated=np.zeros(shape, bool),
    observation=(frames, env.observation[1]),
  )
  behaviour = AgentOutput(
    actions, np.zeros((*shape, 2), np.float32), np.zeros(shape, np.float32)
  )
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    tf.train.get_or_create_global_step()
    agent = Agent(2, 'deep')
    inputs = constants(env._replace(reward=np.zeros(shape, np.float32)))
    state = agent.initial_state(8)
    # What the agent sees must not give the answer away.
    blind = tf.zeros(shape, tf.int32)
    learner = experiment.build_learner(
      agent, state, constants(env), constants(behaviour)
    )
    policy, _ = agent.unroll(blind, inputs, state)
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      for _ in range(60):
        session.run(learner.global_step)
      logits = session.run(policy).policy_logits
  chosen = logits.argmax(-1)
  assert np.mean(chosen[:-1] == bright[:-1]) > 0.95


# --- The way from actors to learner ------------------------------------------


def unroll_of(value, global_step):
  """Returns an `Unroll` of 5 steps with a value in its frames."""
  random = np.random.default_rng(value)
  env = env_outputs(random, (6,))
  env.observation[0][:] = value + np.arange(6)[:, None, None, None]
  outputs = AgentOutput(
    np.arange(6, dtype=np.int32) % NUM_ACTIONS,
    np.zeros((6, NUM_ACTIONS), np.float32),
    np.zeros(6, np.float32),
  )
  zeros = np.zeros(256, np.float32)
  return unrolls.Unroll(
    unrolls.ActorOutput(
      np.array(f'level {value}', object),
      snt.LSTMState(zeros, zeros),
      env,
      outputs,
    ),
    np.int64(global_step),
  )


@contextlib.contextmanager
def training_session(queues, config=None):
  """Yields a session whose queue runners take unrolls from queues."""
  with tf.Session(config=config) as session:
    session.run(
      [tf.global_variables_initializer(), tf.local_variables_initializer()]
    )
    coord = tf.train.Coordinator()
    threads = tf.train.start_queue_runners(session, coord)
    yield session
    coord.request_stop()
    for queue in queues:
      session.run(queue.queue.close(cancel_pending_enqueues=True))
    coord.join(threads, stop_grace_period_secs=10)


@flagsaver.flagsaver(
  batch_size=2, unroll_length=5, num_action_repeats=1, torso='shallow'
)
def test_batches_are_time_major_and_their_policy_lag_is_known():
  """Of the learner's frames, 30, the unrolls were begun at 10 and at 30."""
  pair = [unroll_of(100, 10), unroll_of(200, 30)]
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    tensors = [constants(unroll) for unroll in pair]
    queue = unrolls.build_queue(tensors[0])
    enqueue = [queue.enqueue(tensor) for tensor in tensors]
    (batch, _, _), (update, _) = (
      unrolls.build_staging(queue, 2, 'staged'),
      experiment.learner_of_flags().build_training(agent, [queue]),
    )
    with training_session([queue]) as session:
      session.run(tf.train.get_global_step().assign(30))

      def fill():
        for op in enqueue:
          session.run(op)

      # Both stagings have a batch of their own.
      for _ in range(2):
        fill()
      staged = session.run(batch).actor_output
      fill()
      result = session.run(update)
  frames = staged.env_outputs.observation[0]
  assert frames.shape == (6, 2, *FRAME)
  values = {100: 0, 200: 1}
  first = {int(frames[0, b, 0, 0, 0]): b for b in range(2)}
  assert first.keys() == values.keys()
  for value, b in first.items():
    np.testing.assert_array_equal(frames[:, b, 0, 0, 0], value + np.arange(6))
    assert staged.level_name[b].decode() == f'level {value}'
  assert result.policy_lag == 1.0
  assert result.learner.global_step == 40
  assert result.info.episode_return.shape == (5, 2)


@flagsaver.flagsaver(
  batch_size=5,
  replay_proportion=0.6,
  replay_size=4,
  unroll_length=5,
  num_action_repeats=1,
)
def test_replayed_unrolls_are_learned_from_but_not_counted(capsys):
  values = (10, 40), (70, 100), (130, 160)
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow', normalize_frames=True)
    tf.set_random_seed(1)
    # Each was begun at the frames that the learner has when it takes it.
    tensors = [
      constants(unroll_of(value, 10 * update))
      for update, pair in enumerate(values)
      for value in pair
    ]
    queue = unrolls.build_queue(tensors[0])
    enqueue = [queue.enqueue(tensor) for tensor in tensors]
    update, _ = experiment.learner_of_flags().build_training(agent, [queue])
    mean = next(v for v in agent.variables if 'statistics/mean' in v.name)
    with training_session([queue]) as session:
      results = []
      for pair in range(3):
        for op in enqueue[2 * pair : 2 * pair + 2]:
          session.run(op)
        results.append(session.run(update))
      mean = session.run(mean)
  assert 'Replay: 3 of each batch of unrolls' in capsys.readouterr().out
  for number, result in enumerate(results):
    assert [name.decode() for name in result.level_name] == [
      f'level {value}' for value in values[number]
    ]
    assert result.game_over.shape == result.info.episode_step.shape == (5, 2)
    assert result.learner.global_step == 10 * (number + 1)
    assert result.policy_lag == 0
  # In the statistics is step 1 of each unroll alone, which is one brighter.
  np.testing.assert_allclose(mean, np.mean(values) + 1, rtol=1e-5)


def train_with(num_learners):
  """Returns the variables after 3 updates by learners, on a CPU each.

  The unrolls are the same, and so is the order in which they come.
  """
  pairs = [(unroll_of(40 * i, 0), unroll_of(40 * i + 20, 0)) for i in range(3)]
  with tf.Graph().as_default():
    tf.set_random_seed(3)
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow', normalize_frames=True)
    devices = [f'/cpu:{k}' for k in range(num_learners)]
    queues = []
    for k, device in enumerate(devices):
      with tf.device(device):
        queues.append(unrolls.NestQueue(6, constants(pairs[0][0]), f'q{k}'))
    enqueue = [
      queues[i % num_learners].enqueue(constants(unroll))
      for pair in pairs
      for i, unroll in enumerate(pair)
    ]
    update, end_waits = experiment.learner_of_flags().build_training(
      agent, queues, devices
    )
    config = tf.ConfigProto(device_count={'CPU': 2}, allow_soft_placement=True)
    with training_session(queues, config) as session:
      for op in enqueue:
        session.run(op)
      results = [session.run(update) for _ in range(3)]
      values = session.run({v.name: v for v in tf.global_variables()})
      session.run(end_waits)
  return values, results


@flagsaver.flagsaver(
  batch_size=2,
  unroll_length=5,
  num_action_repeats=1,
  learning_rate=0.01,
  max_gradient_norm=1.0,
)
def test_two_learners_make_the_update_of_one():
  """With RMSProp's slots, statistics of frames and global step."""
  (one, (first, *_)), (two, (other, *_)) = train_with(1), train_with(2)
  assert one.keys() == two.keys()
  assert any('RMSProp' in name for name in one)
  assert one['global_step:0'] == two['global_step:0'] == 30
  for name, value in one.items():
    np.testing.assert_allclose(
      two[name], value, rtol=2e-3, atol=1e-5, err_msg=name
    )
  np.testing.assert_allclose(
    other.learner.total_loss, first.learner.total_loss, rtol=1e-5
  )
  assert list(other.level_name) == list(first.level_name)
  assert other.queue_size.shape == other.wait_seconds.shape == (2,)


@flagsaver.flagsaver(batch_size=2, unroll_length=5)
def test_each_learner_reads_each_variable_once():
  """Each read of another learner's variable is a transfer by the network."""
  with tf.Graph().as_default() as graph:
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow', normalize_frames=True)
    queues = [
      unrolls.NestQueue(1, constants(unroll_of(0, 0)), f'q{k}') for k in (0, 1)
    ]
    update, _ = experiment.learner_of_flags().build_training(
      agent, queues, ['/cpu:0', '/cpu:1']
    )
    needed = tf.graph_util.extract_sub_graph(
      graph.as_graph_def(), [update.learner.global_step.op.name]
    )
  reads = collections.Counter(
    node.input[0] for node in needed.node if node.op == 'ReadVariableOp'
  )
  # Of the embedding, rows are looked up.
  names = {v.op.name for v in agent.trainable_variables}
  names = {name for name in names if 'embed' not in name}
  assert len(names) > 10
  assert {reads[name] for name in names} == {2}


@flagsaver.flagsaver(batch_size=1, unroll_length=5)
def test_batch_of_one_unroll(learner_batch):
  env, behaviour = tf.nest.map_structure(lambda x: x[:, :1], learner_batch)
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    # As from a queue: their shapes are known, their values are not.
    inputs = tf.nest.map_structure(
      lambda x: tf.placeholder_with_default(x, x.shape), (env, behaviour)
    )
    learner = experiment.build_learner(agent, agent.initial_state(1), *inputs)
    assert np.isfinite(run_graph(learner).total_loss)


@flagsaver.flagsaver(batch_size=3, unroll_length=5, max_gradient_norm=0.5)
def test_gradient_norm_is_clipped_but_reported_whole(learner_batch):
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    learner = experiment.build_learner(
      agent, agent.initial_state(3), constants(env), constants(behaviour)
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      before = session.run(agent.trainable_variables)
      norm = session.run(learner).gradient_norm
      after = session.run(agent.trainable_variables)
  assert norm > 0.5
  # RMSProp's first step is the gradient times rate / sqrt(0.99 + ... + 0.1).
  step = np.sqrt(
    sum(np.sum((a - b) ** 2) for a, b in zip(before, after, strict=True))
  )
  np.testing.assert_allclose(
    step, 0.5 * FLAGS.learning_rate / np.sqrt(1.09), rtol=0.02
  )


@flagsaver.flagsaver(batch_size=3, unroll_length=5)
def test_loss_that_is_not_finite_changes_nothing(learner_batch):
  env, behaviour = learner_batch
  with tf.Graph().as_default():
    step = tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    bad = behaviour.policy_logits.copy()
    bad[2, 1, 0] = np.nan
    learner = experiment.build_learner(
      agent,
      agent.initial_state(3),
      constants(env),
      constants(behaviour._replace(policy_logits=bad)),
    )
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      variables = tf.global_variables()
      before = session.run(variables)
      with pytest.raises(tf.errors.InvalidArgumentError, match='not finite'):
        session.run(learner)
      after = session.run(variables)
      assert session.run(step) == 0
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
  ('clipping', 'expected'),
  [
    ('none', [-10, -0.5, 0, 0.5, 10]),
    ('abs_one', [-1, -0.5, 0, 0.5, 1]),
    (
      'soft_asymmetric',
      [
        -1.4460414,
        -0.1495020,
        0,
        0.4983400,
        4.8201379,
      ],
    ),
  ],
)
def test_reward_clipping(clipping, expected):
  with flagsaver.flagsaver(reward_clipping=clipping), tf.Graph().as_default():
    rewards = tf.constant([-10.0, -0.5, 0.0, 0.5, 10.0])
    clipped = run_graph(clip_rewards(rewards, FLAGS.reward_clipping))
  np.testing.assert_allclose(clipped, expected, rtol=1e-5)


# --- The actor --------------------------------------------------------------


class Counter:
  """Shows how often it was stepped; episodes take 3 steps."""

  def __init__(self, offset):
    self._count = offset

  def initial(self):
    return self._observation()

  def step(self, action):
    self._count += 1
    return float(action), self._count % 3 == 0, self._observation()

  def _observation(self):
    return np.full(FRAME, self._count, np.uint8), str(self._count)

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    spec = py_process.ArraySpec
    observation = (spec(FRAME, np.uint8), spec((), object))
    if method_name == 'initial':
      return observation
    return (spec((), np.float32), spec((), np.bool_), observation)


@flagsaver.flagsaver(unroll_length=4)
def test_unrolls_of_one_graph_join_for_each_actor():
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    processes = [py_process.PyProcess(Counter, offset) for offset in (0, 100)]
    index = tf.placeholder(tf.int32, [])
    env = environments.FlowEnvironment(py_process.choose(processes, index))
    actor = experiment.build_actor(
      agent, env, tf.constant(['a', 'b'])[index], np.array([10, 20, 30])
    )
    with tf.train.SingularMonitoredSession(
      hooks=[py_process.PyProcessHook()]
    ) as session:
      states = [
        session.run(actor.initial_state, {index: actor_index})
        for actor_index in (0, 1)
      ]
      outputs = [[], []]
      for _ in range(3):
        for i in (1, 0):
          feed = dict(
            zip(
              tf.nest.flatten(actor.state),
              tf.nest.flatten(states[i]),
              strict=True,
            )
          )
          output, states[i] = session.run(
            (actor.output, actor.next_state), {index: i, **feed}
          )
          outputs[i].append(output)

  for i, offset in enumerate((0, 100)):
    for n, output in enumerate(outputs[i]):
      assert output.level_name == [b'a', b'b'][i]
      counts = offset + 4 * n + np.arange(5)
      frame, instruction = output.env_outputs.observation
      np.testing.assert_array_equal(frame[:, 0, 0, 0], counts % 256)
      assert [int(text) for text in instruction] == list(counts)
      begins = counts % 3 == 0
      begins[0] |= n == 0  # The first episode of all.
      np.testing.assert_array_equal(output.env_outputs.done, begins)
      # The reward is the environment's action, which the agent chose.
      rewards = 10 * (output.agent_outputs.action + 1)
      np.testing.assert_array_equal(output.env_outputs.reward[1:], rewards[1:])
    for before, after in zip(outputs[i][:-1], outputs[i][1:], strict=True):
      for old, new in zip(
        tf.nest.flatten((before.env_outputs, before.agent_outputs)),
        tf.nest.flatten((after.env_outputs, after.agent_outputs)),
        strict=True,
      ):
        np.testing.assert_array_equal(old[-1], new[0])
    np.testing.assert_array_equal(outputs[i][0].agent_state.hidden, 0)


@flagsaver.flagsaver(unroll_length=4)
def test_learner_recomputes_what_the_actor_did():
  """On-policy, the learner's unroll gives the actor's logits and baselines."""
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(NUM_ACTIONS, 'shallow')
    process = py_process.PyProcess(Counter, 5)
    actor = experiment.build_actor(
      agent,
      environments.FlowEnvironment(process.proxy),
      'level',
      np.array([10, 20, 30]),
    )
    batch = tf.nest.map_structure(
      lambda t: tf.expand_dims(t, 1),
      (actor.output.env_outputs, actor.output.agent_outputs),
    )
    state = tf.nest.map_structure(
      lambda t: tf.expand_dims(t, 0), actor.output.agent_state
    )
    learner, _ = agent.unroll(batch[1].action, batch[0], state)
    with tf.train.SingularMonitoredSession(
      hooks=[py_process.PyProcessHook()]
    ) as session:
      values = session.run(actor.initial_state)
      for _ in range(2):  # In the second one, the state isn't the initial one.
        feed = dict(
          zip(
            tf.nest.flatten(actor.state), tf.nest.flatten(values), strict=True
          )
        )
        behaviour, target, values = session.run(
          (actor.output.agent_outputs, learner, actor.next_state), feed
        )
        np.testing.assert_allclose(
          target.policy_logits[:-1, 0], behaviour.policy_logits[1:], atol=1e-5
        )
        np.testing.assert_allclose(
          target.baseline[:-1, 0], behaviour.baseline[1:], atol=1e-5
        )


# --- Seeds and levels -------------------------------------------------------


def test_environment_seeds_differ_between_actors_restarts_and_runs():
  seeds = set()
  for seed in (1, 2):
    with flagsaver.flagsaver(seed=seed):
      seeds |= {
        experiment._environment_seed(actor, restart)
        for actor in range(50)
        for restart in range(3)
      }
  assert len(seeds) == 2 * 50 * 3
  assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_suite_is_played_by_all_levels_in_order(mode, monkeypatch):
  monkeypatch.setattr(
    environments.PyProcessDmLab,
    'describe',
    lambda level, settings: environments.EnvironmentSpec([], (72, 96, 3)),
  )
  with flagsaver.flagsaver(level_name='dmlab30', mode=mode):
    game = experiment._choose_game()
  assert len(game.names) == 30
  assert game.names[0] == f'rooms_collect_good_objects_{mode}'
  assert game.levels == [f'contributed/dmlab30/{name}' for name in game.names]
  assert game.settings.is_test == (mode == 'test')


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_atari_suite_is_57_games_with_all_actions(mode, monkeypatch):
  asked = []

  def describe(cls, level, settings):
    asked.append((level, settings))
    return environments.EnvironmentSpec([], (84, 84, 4))

  monkeypatch.setattr(
    environments.GymEnvironment, 'describe', classmethod(describe)
  )
  with flagsaver.flagsaver(level_name='atari57', mode=mode):
    game = experiment._choose_game()
  assert len(game.names) == 57
  assert game.names == game.levels
  assert {level for level, _ in asked} == set(game.levels)
  assert all(settings.full_action_set for _, settings in asked)
  processes = [
    process._arguments.arguments['level']
    for process in create_processes(game, 58, lambda index: index)
  ]
  assert processes[:2] == ['ALE/Alien-v5', 'ALE/Amidar-v5']
  assert processes[57] == 'ALE/Alien-v5'
  # A game alone has the actions that it makes use of.
  with flagsaver.flagsaver(level_name='gym:ALE/Pong-v5', mode=mode):
    experiment._choose_game()
  assert not asked[-1][1].full_action_set


# --- Flagfiles --------------------------------------------------------------

_FLAGFILES = os.path.join(os.path.dirname(experiment.__file__), 'flagfiles')
_PAPER = {'discounting': 0.99, 'baseline_cost': 0.5, 'num_action_repeats': 4}
_PAPER_DMLAB = {**_PAPER, 'batch_size': 32, 'unroll_length': 100}
_PAPER_ATARI = {
  **_PAPER,
  'batch_size': 32,
  'unroll_length': 20,
  'entropy_cost': 0.01,
  'learning_rate': 0.0006,
  'epsilon': 0.01,
  'max_gradient_norm': 40,
  'reward_clipping': 'abs_one',
  'test_num_episodes': 200,
  'height': 84,
  'width': 84,
}


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    (
      'dmlab_single_level',
      {**_PAPER_DMLAB, 'level_name': 'explore_goal_locations_small'},
    ),
    (
      'dmlab30',
      {
        **_PAPER_DMLAB,
        'level_name': 'dmlab30',
        'reward_clipping': 'soft_asymmetric',
        'total_environment_frames': 10**10,
      },
    ),
    (
      'atari_expert',
      {**_PAPER_ATARI, 'total_environment_frames': 200 * 10**6},
    ),
    (
      'atari57_multitask',
      {
        **_PAPER_ATARI,
        'level_name': 'atari57',
        'total_environment_frames': 57 * 200 * 10**6,
      },
    ),
    ('quick_start', {'level_name': 'gym:VizdoomBasic-v1'}),
    ('minigrid', {'level_name': 'gym:MiniGrid-DoorKey-5x5-v0'}),
    ('atari_two_cores', {'level_name': 'gym:ALE/Pong-v5'}),
  ],
)
def test_flagfile_has_the_papers_settings(name, expected):
  with flagsaver.flagsaver():
    FLAGS(['experiment.py', f'--flagfile={os.path.join(_FLAGFILES, name)}'])
    values = {flag: FLAGS[flag].value for flag in expected}
    assert values == expected
    # What comes later on the command line counts.
    path = os.path.join(_FLAGFILES, name)
    FLAGS(['experiment.py', f'--flagfile={path}', '--batch_size=7'])
    assert FLAGS.batch_size == 7


def test_every_flagfile_is_tested():
  assert set(os.listdir(_FLAGFILES)) == {
    'atari57_multitask',
    'atari_expert',
    'atari_two_cores',
    'dmlab30',
    'dmlab_single_level',
    'minigrid',
    'quick_start',
  }
