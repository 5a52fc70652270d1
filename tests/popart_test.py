# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of baselines in units of their own for each level."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from absl import flags
from absl.testing import flagsaver

import experiment
import popart
import py_process
from agent import Agent, AgentOutput
from environments import StepOutput
from helpers import ROOT, TESTS, run
from player import Player
from toy_suite import LARGE, SMALL

FLAGS = flags.FLAGS
if not FLAGS.is_parsed():
  FLAGS(['popart_test'])

LEVELS = ['a', 'b', 'c']


class Baseline:
  """Runs a `NormalizedBaseline` of 3 levels on 4 features, T=5 and B=6."""

  def __init__(self):
    tf.set_random_seed(2)
    self._features = np.random.default_rng(1).normal(size=(7, 4))
    baseline = popart.NormalizedBaseline(LEVELS)
    self._values = baseline(tf.constant(self._features, tf.float32))
    self._targets = tf.placeholder(tf.float32, [5, 6])
    self._counts = tf.placeholder(tf.bool, [5, 6])
    self._names = tf.placeholder(tf.string, [6])
    # As by two learners.
    self._update = baseline.update(
      [
        popart.Targets(
          self._targets[:, part], self._counts[:, part], self._names[part]
        )
        for part in (slice(0, 2), slice(2, 6))
      ]
    )
    self._variables = {v.name.split('/')[-1]: v for v in baseline.variables}
    self.session = tf.Session()
    self.session.run(tf.global_variables_initializer())

  def values(self):
    return self.session.run(self._values)

  def variables(self):
    """Returns the values of w, b, mean and variance by name."""
    variables = self.session.run(self._variables)
    return {name.removesuffix(':0'): v for name, v in variables.items()}

  def values_by_hand(self):
    """Returns what `values` should, with float64."""
    v = {name: x.astype(np.float64) for name, x in self.variables().items()}
    deviation = np.clip(np.sqrt(v['variance']), 1e-4, 1e6)
    return (self._features @ v['w'] + v['b']) * deviation + v['mean']

  def update(self, targets, names, counts=True):
    feed_dict = {
      self._targets: targets,
      self._names: names,
      self._counts: np.broadcast_to(counts, (5, 6)),
    }
    self.session.run(self._update, feed_dict)


@pytest.fixture
def large_steps(monkeypatch):
  """Makes the steps of the moments so large that a few of them show."""
  assert popart.NormalizedBaseline._STEP_SIZE == 3e-4  # The paper's.
  monkeypatch.setattr(popart.NormalizedBaseline, '_STEP_SIZE', 0.1)
  return 0.1


@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e4])
def test_values_stay_as_they_are_when_the_moments_move(scale, large_steps):
  random = np.random.default_rng(3)
  with tf.Graph().as_default():
    baseline = Baseline()
    for _ in range(10):
      before, weights = baseline.values(), baseline.variables()['w']
      targets = scale * random.normal(random.normal(), size=(5, 6))
      baseline.update(targets, random.choice(LEVELS, 6))
      # To the precision of float32 for numbers as large as the mean.
      largest = max(1, np.abs(baseline.variables()['mean']).max())
      for expected in (before, baseline.values_by_hand()):
        np.testing.assert_allclose(
          baseline.values(), expected, rtol=3e-6, atol=1e-6 * largest
        )
      assert np.abs(baseline.variables()['w'] / weights - 1).max() > 1e-4


def test_moments_are_those_of_the_paper(large_steps):
  """mu and nu move by a step for each unroll, of the targets that count."""
  random = np.random.default_rng(4)
  mean, second_moment = np.zeros(3), np.ones(3)
  with tf.Graph().as_default():
    baseline = Baseline()
    for _ in range(50):
      targets = random.normal([[3, -20, 0, 3, 1, 5]], 9, (5, 6))
      levels = random.integers(0, 3, 6)
      counts = random.random((5, 6)) < 0.8
      counts[:, 2] = False  # An unroll that doesn't count at all.
      baseline.update(targets, [LEVELS[i] for i in levels], counts)
      for b, i in enumerate(levels):
        if counts[:, b].any():
          counted = targets[counts[:, b], b]
          mean[i] += large_steps * (counted.mean() - mean[i])
          second_moment[i] += large_steps * (
            np.mean(counted**2) - second_moment[i]
          )
    variables = baseline.variables()
  np.testing.assert_allclose(variables['mean'], mean, rtol=1e-4)
  np.testing.assert_allclose(
    variables['variance'], second_moment - mean**2, rtol=1e-4
  )


def test_levels_that_were_not_played_keep_every_bit(large_steps):
  random = np.random.default_rng(5)
  with tf.Graph().as_default():
    baseline = Baseline()
    for _ in range(10):
      baseline.update(random.normal(size=(5, 6)), LEVELS * 2)
      before = baseline.variables()
      baseline.update(random.normal(100, 30, (5, 6)), ['b'] * 5 + ['unknown'])
      after = baseline.variables()
      for name, old in before.items():
        changed = np.any(np.atleast_2d(after[name] != old), axis=0)
        assert list(changed) == [False, True, False], name


def test_deviation_has_limits():
  with tf.Graph().as_default():
    baseline = popart.NormalizedBaseline(LEVELS)
    baseline(tf.zeros([1, 4]))
    deviation = baseline.deviation(['c', 'a', 'b', 'b', 'unknown'])
    variance = next(v for v in baseline.variables if 'variance' in v.name)
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(variance.assign([0, 9, 1e20]))
      values = session.run(deviation)
  np.testing.assert_allclose(values, [1e6, 1e-4, 3, 3, np.nan], rtol=1e-6)


# --- Two levels --------------------------------------------------------------


def bandit(random):
  """Returns a batch of a bandit with 3 arms, [11, 8, ...], and its answers.

  The arm that pays 1 or, in the levels of the second half, 1,000 depends on the
  frame. The actions are those of a random policy.
  """
  shape = 11, 8
  level = np.broadcast_to(np.arange(8) // 4, shape)
  number = random.integers(0, 3, shape)
  frames = np.zeros((*shape, 4, 6, 1), np.uint8)
  frames[:, :, 0, :, 0] = 255 * level[..., None]
  columns = np.arange(6) // 2 == number[..., None]
  frames[:, :, 1:, :, 0] = 255 * columns[:, :, None]
  answers = (number + level) % 3
  actions = random.integers(0, 3, shape).astype(np.int32)
  rewards = np.zeros(shape, np.float32)
  rewards[1:] = (actions[1:] == answers[:-1]) * np.array([1, 1000])[level[1:]]
  nothing = np.zeros(shape, bool)
  env = StepOutput(
    rewards, (), nothing, (frames, np.full(shape, '')), nothing, nothing
  )
  behaviour = AgentOutput(
    actions, np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
  )
  return env, behaviour, answers


@pytest.mark.parametrize('levels', [(), (SMALL, LARGE)])
@flagsaver.flagsaver(
  batch_size=8,
  unroll_length=10,
  reward_clipping='none',
  discounting=0.0,
  learning_rate=0.002,
  learning_rate_schedule='constant',
  epsilon=0.01,
  entropy_cost=0.01,
  max_gradient_norm=40.0,
)
def test_small_rewards_are_learned_beside_large_ones_with_popart_alone(levels):
  random = np.random.default_rng(6)
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    tf.train.get_or_create_global_step()
    agent = Agent(3, 'shallow', core='none', popart_levels=levels)
    env, behaviour, _ = bandit(random)
    inputs = tf.nest.map_structure(
      lambda x: tf.placeholder_with_default(x, x.shape), (env, behaviour)
    )
    names = tf.constant([SMALL] * 4 + [LARGE] * 4)
    learner = experiment.build_learner(agent, (), *inputs, names)
    policy, _ = agent.unroll(inputs[1].action, inputs[0], ())
    values = agent.at_level(policy, names).baseline
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())

      def run(fetches, *batch):
        feed = zip(*map(tf.nest.flatten, (inputs, batch)), strict=True)
        return session.run(fetches, dict(feed))

      for _ in range(250):
        env, behaviour, _ = bandit(random)
        run(learner.global_step, env, behaviour)
      env, behaviour, answers = bandit(random)
      logits, values = run((policy.policy_logits, values), env, behaviour)
  right = np.mean(logits.argmax(-1) == answers, axis=0)
  if levels:
    assert right[:4].mean() > 0.9
    assert right[4:].mean() > 0.9
    assert 0.5 < values[:, :4].mean() < 1.2
    assert 500 < values[:, 4:].mean() < 1200
  else:
    assert right[:4].mean() < 0.8


TOYS = [
  *('--level_name=toys', '--height=4', '--width=6', '--num_action_repeats=1'),
  *('--torso=shallow', '--core=none', '--unroll_length=10', '--popart'),
]


def moments_of(logdir, frames):
  """Returns mean and variance of both levels in a checkpoint."""
  checkpoint = tf.train.load_checkpoint(f'{logdir}/model.ckpt-{frames}')
  return np.array(
    [
      checkpoint.get_tensor(f'agent/popart/{name}')
      for name in ('mean', 'variance')
    ]
  )


def test_training_and_test_go_on_with_the_moments(tmp_path, capsys):
  logdir = str(tmp_path / 'log')
  # The second training makes a single update, and takes the flag along.
  for frames, flag_values in ((1000, TOYS), (1020, TOYS[:-1])):
    code, output = run(
      *flag_values,
      *(f'--logdir={logdir}', f'--total_environment_frames={frames}'),
      path=f'{ROOT}:{TESTS}',
      script='tests/toy_suite.py',
    )
    assert code == 0, output
  before, after = moments_of(logdir, 1000), moments_of(logdir, 1020)
  # Of some 50 unrolls, with rewards in a third of their steps.
  (small, large), (small_variance, large_variance) = before
  assert 0.001 < small < 1 < large < 1000
  assert 0.9 < small_variance < 2
  assert 1e4 < large_variance < 1e6
  # Perhaps both unrolls of the batch were of the same level.
  assert np.any(after != before)
  np.testing.assert_allclose(after, before, rtol=0.2)
  # One level alone, by the agent of both.
  arguments = ['--mode=test', f'--logdir={logdir}', f'--level_name={LARGE}']
  with flagsaver.flagsaver():
    FLAGS(['experiment.py', *arguments])
    experiment.test()
  assert f'{LARGE}  ' in capsys.readouterr().out
  with Player(logdir) as player:
    assert player.popart_levels == [SMALL, LARGE]
    small, large = player.step(np.zeros((4, 6), np.uint8)).baseline
  # Outputs of a new layer, in units of the deviations.
  deviations = np.sqrt(after[1])
  assert abs(small) < 10 * deviations[0]
  assert 1e-4 * deviations[1] < abs(large) < 10 * deviations[1]


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_actors_see_the_value_of_their_level(mode):
  with flagsaver.flagsaver():
    FLAGS(['experiment.py', f'--mode={mode}', *TOYS])
    game = experiment._choose_game()
    with tf.Graph().as_default():
      tf.train.get_or_create_global_step()
      agent = experiment._new_agent(game)
      processes = experiment._create_processes(game, 2)
      actor, index = experiment._build_actor_for(game, agent, processes)
      mean, variance = (
        next(v for v in agent.variables if f'popart/{name}' in v.name)
        for name in ('mean', 'variance')
      )
      moments = [mean.assign([5, 700]), variance.assign([0, 0])]
      with tf.train.SingularMonitoredSession(
        hooks=[py_process.PyProcessHook()]
      ) as session:
        session.run(moments)
        for i, value in enumerate((5, 700)):
          state = session.run(actor.initial_state, {index: i})
          feed = zip(*map(tf.nest.flatten, (actor.state, state)), strict=True)
          output = session.run(actor.output, {index: i, **dict(feed)})
          assert output.level_name.decode() == (SMALL, LARGE)[i]
          baseline = output.agent_outputs.baseline
          np.testing.assert_allclose(baseline[1:], value, atol=0.01)
