# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of V-trace against the paper's sums, evaluated in float64."""

import numpy as np
import tensorflow.compat.v1 as tf

import vtrace


def _sum_of_equation_1(
  log_rhos,
  discounts,
  rewards,
  values,
  bootstrap_value,
  clip_rho_threshold=1.0,
  clip_pg_rho_threshold=1.0,
  lambda_=1.0,
):
  """Evaluates equation 1 as it is printed, term by term, in float64."""
  rhos = np.exp(np.asarray(log_rhos, np.float64))
  discounts, rewards, values = (
    np.asarray(x, np.float64) for x in (discounts, rewards, values)
  )
  bootstrap_value = np.asarray(bootstrap_value, np.float64)[np.newaxis]
  no_clip = np.inf
  rho_bar = no_clip if clip_rho_threshold is None else clip_rho_threshold
  pg_bar = no_clip if clip_pg_rho_threshold is None else clip_pg_rho_threshold

  next_values = np.concatenate([values, bootstrap_value])[1:]
  deltas = np.minimum(rho_bar, rhos) * (
    rewards + discounts * next_values - values
  )
  factors = discounts * lambda_ * np.minimum(1.0, rhos)
  vs = np.empty_like(deltas)
  for s in range(len(deltas)):
    # Row t - s is the product of the factors s .. t - 1; an empty one is 1.
    weights = np.cumprod(
      np.concatenate([np.ones_like(factors[:1]), factors[s:-1]]), axis=0
    )
    vs[s] = values[s] + (weights * deltas[s:]).sum(axis=0)
  next_vs = np.concatenate([vs, np.broadcast_to(bootstrap_value, vs[:1].shape)])
  advantages = rewards + discounts * next_vs[1:] - values
  return vtrace.VTraceReturns(vs, np.minimum(pg_bar, rhos) * advantages)


def _trajectories(length, batch_size, trailing=(), max_log_rho=2.0, seed=0):
  """Returns random arguments of `from_importance_weights`."""
  rng = np.random.RandomState(seed)
  shape = (length, batch_size, *trailing)
  discounts = np.where(rng.uniform(size=shape) < 0.1, 0.0, 0.99)
  arrays = {
    'log_rhos': rng.uniform(-max_log_rho, max_log_rho, shape),
    'discounts': discounts,
    'rewards': rng.normal(size=shape),
    'values': rng.normal(size=shape),
    'bootstrap_value': rng.normal(size=shape[1:]),
  }
  return {name: array.astype(np.float32) for name, array in arrays.items()}


def _evaluate(arrays, **kwargs):
  with tf.Graph().as_default(), tf.Session() as session:
    return session.run(vtrace.from_importance_weights(**arrays, **kwargs))


def _evaluate_fed(arrays, shapes, **kwargs):
  """Feeds the arrays to placeholders of the given static shapes."""
  with tf.Graph().as_default(), tf.Session() as session:
    placeholders = {
      name: tf.placeholder(tf.float32, shapes[name]) for name in arrays
    }
    returns = vtrace.from_importance_weights(**placeholders, **kwargs)
    return session.run(
      returns, {placeholders[name]: arrays[name] for name in arrays}
    )


def _softmax_log_probs(logits, actions):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  return np.take_along_axis(log_probs, actions[..., np.newaxis], -1)[..., 0]


class LogProbsTest(tf.test.TestCase):
  def test_equals_log_softmax_at_the_actions(self):
    rng = np.random.RandomState(1)
    logits = rng.normal(scale=10, size=(6, 3, 5)).astype(np.float32)
    for dtype in (np.int32, np.int64):
      actions = rng.randint(5, size=(6, 3)).astype(dtype)
      with tf.Graph().as_default(), tf.Session() as session:
        log_probs = session.run(
          vtrace.log_probs_from_logits_and_actions(logits, actions)
        )
      self.assertAllClose(
        _softmax_log_probs(logits, actions), log_probs, rtol=1e-5, atol=1e-5
      )

  def test_unknown_shapes(self):
    logits = np.float32([[[0.0, np.log(3.0)], [1.0, 1.0]]])
    with tf.Graph().as_default(), tf.Session() as session:
      logits_in = tf.placeholder(tf.float32)
      actions_in = tf.placeholder(tf.int32)
      log_probs = session.run(
        vtrace.log_probs_from_logits_and_actions(logits_in, actions_in),
        {logits_in: logits, actions_in: [[1, 0]]},
      )
    self.assertAllClose([[np.log(0.75), np.log(0.5)]], log_probs)

  def test_those_of_several_heads_are_summed(self):
    rng = np.random.RandomState(2)
    logits = rng.normal(scale=3, size=(6, 2, 4, 5)).astype(np.float32)
    actions = rng.randint(5, size=(6, 2, 4))
    with tf.Graph().as_default(), tf.Session() as session:
      log_probs = session.run(
        vtrace.log_probs_from_logits_and_actions(logits, actions)
      )
    self.assertAllClose(
      _softmax_log_probs(logits, actions).sum(-1), log_probs, 1e-5, 1e-5
    )

  def test_wrong_rank_is_refused(self):
    with tf.Graph().as_default():
      for shape in ([4, 2], [4, 2, 1, 1]):
        with self.assertRaisesRegex(ValueError, 'actions must have rank 3'):
          vtrace.log_probs_from_logits_and_actions(
            np.zeros([4, 2, 1, 3], np.float32), np.zeros(shape, np.int32)
          )
      with self.assertRaisesRegex(ValueError, 'logits must have rank 3'):
        vtrace.log_probs_from_logits_and_actions(
          np.zeros([4, 2], np.float32), np.zeros([4, 2], np.int32)
        )
      with self.assertRaisesRegex(ValueError, 'actions must have rank 2'):
        vtrace.log_probs_from_logits_and_actions(
          np.zeros([4, 2, 3], np.float32), np.zeros([4], np.int32)
        )


class FromImportanceWeightsTest(tf.test.TestCase):
  def assert_returns_close(self, expected, actual, tolerance=1e-5):
    """Compares with errors relative to the largest number in question."""
    for name in expected._fields:
      want, got = getattr(expected, name), getattr(actual, name)
      self.assertAllEqual(np.isfinite(got), np.ones_like(got, bool), name)
      scale = max(1.0, np.abs(want).max())
      self.assertAllClose(want / scale, got / scale, tolerance, tolerance, name)

  def test_one_trajectory_by_hand(self):
    # Ratios 1/2 and 2 (clipped to 1), discount 1/2, V = 0, then 4.
    vs, pg_advantages = _evaluate(
      {
        'log_rhos': np.float32([[np.log(0.5)], [np.log(2.0)]]),
        'discounts': np.float32([[0.5], [0.5]]),
        'rewards': np.float32([[1.0], [2.0]]),
        'values': np.float32([[0.0], [0.0]]),
        'bootstrap_value': np.float32([4.0]),
      }
    )
    # delta = (1/2 * 1, 1 * (2 + 2)); vs_0 = 1/2 + 1/2 * 1/2 * 4.
    self.assertAllClose([[1.5], [4.0]], vs)
    # Advantages: 1/2 * (1 + 1/2 * 4), 1 * (2 + 1/2 * 4).
    self.assertAllClose([[1.5], [4.0]], pg_advantages)

  def test_matches_equation_1_for_every_length(self):
    # Powers of two and their neighbours are where doubling could slip.
    for length in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 20, 31, 100):
      arrays = _trajectories(length, 3, seed=length)
      self.assert_returns_close(_sum_of_equation_1(**arrays), _evaluate(arrays))

  def test_thresholds(self):
    arrays = _trajectories(13, 4)
    for rho_bar, pg_bar in [(0.5, 2.0), (3.7, 2.2), (None, 1.0), (1.0, None)]:
      thresholds = {
        'clip_rho_threshold': rho_bar,
        'clip_pg_rho_threshold': pg_bar,
      }
      self.assert_returns_close(
        _sum_of_equation_1(**arrays, **thresholds),
        _evaluate(arrays, **thresholds),
      )

  def test_lambda_shortens_the_trace(self):
    arrays = _trajectories(7, 3)
    for lambda_ in (0.0, 0.3, 0.9):
      self.assert_returns_close(
        _sum_of_equation_1(**arrays, lambda_=lambda_),
        _evaluate(arrays, lambda_=lambda_),
      )
    # With 0, each target looks a single step ahead.
    next_values = np.concatenate(
      [arrays['values'], arrays['bootstrap_value'][np.newaxis]]
    )[1:]
    rhos = np.minimum(1, np.exp(arrays['log_rhos']))
    self.assertAllClose(
      arrays['values']
      + rhos
      * (
        arrays['rewards'] + arrays['discounts'] * next_values - arrays['values']
      ),
      _evaluate(arrays, lambda_=0.0).vs,
      rtol=1e-5,
      atol=1e-5,
    )

  def test_thousand_steps(self):
    arrays = _trajectories(1000, 2, max_log_rho=0.05)
    arrays['discounts'] = np.full([1000, 2], 0.999, np.float32)
    self.assert_returns_close(_sum_of_equation_1(**arrays), _evaluate(arrays))

  def test_on_policy_targets_are_n_step_returns(self):
    arrays = _trajectories(40, 3)
    arrays['log_rhos'] = np.zeros_like(arrays['log_rhos'])
    returns = np.empty([40, 3])
    following = arrays['bootstrap_value'].astype(np.float64)
    for t in reversed(range(40)):
      following = arrays['rewards'][t] + arrays['discounts'][t] * following
      returns[t] = following

    vs, pg_advantages = _evaluate(arrays)

    self.assertAllClose(returns, vs, 1e-5, 1e-5)
    self.assertAllClose(returns - arrays['values'], pg_advantages, 1e-5, 1e-5)

  def test_later_episode_has_no_influence(self):
    arrays = _trajectories(12, 2)
    arrays['discounts'][:] = 0.9
    arrays['discounts'][5] = 0.0
    changed = {name: array.copy() for name, array in arrays.items()}
    for name in ('log_rhos', 'rewards', 'values'):
      changed[name][6:] += 3.0
    changed['bootstrap_value'] -= 7.0

    before, after = _evaluate(arrays), _evaluate(changed)

    for name in before._fields:
      self.assertAllEqual(getattr(before, name)[:6], getattr(after, name)[:6])
      self.assertNotAllClose(
        getattr(before, name)[6:], getattr(after, name)[6:]
      )

  def test_ratios_up_to_e12(self):
    arrays = _trajectories(100, 4, max_log_rho=12.0)
    self.assertGreater(arrays['log_rhos'].max(), 11.5)
    for threshold in (1.0, 10.0, None):
      thresholds = {
        'clip_rho_threshold': threshold,
        'clip_pg_rho_threshold': threshold,
      }
      expected = _sum_of_equation_1(**arrays, **thresholds)
      actual = _evaluate(arrays, **thresholds)
      self.assert_returns_close(expected, actual)
      # Small results beside huge ones are right too.
      for name in expected._fields:
        want, got = getattr(expected, name), getattr(actual, name)
        self.assertAllClose(want, got, rtol=1e-3, atol=1e-4)

  def test_overflowing_ratios_are_clipped(self):
    arrays = _trajectories(20, 2)
    arrays['log_rhos'][::3] = 1e4
    arrays['log_rhos'][1::3] = -1e4
    # A TD error of exactly zero beside an infinite ratio.
    for name in ('rewards', 'values', 'discounts'):
      arrays[name][9] = 0.0
    capped = dict(arrays, log_rhos=np.minimum(arrays['log_rhos'], 50.0))
    self.assert_returns_close(_sum_of_equation_1(**capped), _evaluate(arrays))

  def test_unclipped_overflow_stays_within_its_episode(self):
    arrays = _trajectories(20, 2)
    arrays['log_rhos'][12] = 1e4
    arrays['discounts'][:] = 0.9
    arrays['discounts'][10] = 0.0
    arrays['rewards'][12] = 1e3
    arrays['rewards'][18] = arrays['values'][18] = 0.0
    arrays['discounts'][18] = 0.0
    arrays['log_rhos'][18] = 1e4
    thresholds = {'clip_rho_threshold': None, 'clip_pg_rho_threshold': None}

    vs, pg_advantages = _evaluate(arrays, **thresholds)

    self.assertAllEqual(vs[11:13], np.full([2, 2], np.inf))
    head = {name: arrays[name][:11] for name in arrays}
    head['bootstrap_value'] = np.zeros([2], np.float32)
    expected = _sum_of_equation_1(**head, **thresholds)
    self.assertAllClose(expected.vs, vs[:11], 1e-5, 1e-5)
    self.assertAllClose(expected.pg_advantages, pg_advantages[:11], 1e-5, 1e-5)
    self.assertAllEqual(vs[18], np.zeros([2]))
    self.assertAllEqual(pg_advantages[18], np.zeros([2]))

  def test_statically_unknown_dimensions(self):
    known = {'log_rhos': [None, 3], 'bootstrap_value': [3]}
    for length in (1, 2, 3, 8, 33):
      arrays = _trajectories(length, 3, seed=length)
      expected = _sum_of_equation_1(**arrays)
      ranks = {name: [None] * array.ndim for name, array in arrays.items()}
      for shapes in (
        ranks,
        dict.fromkeys(arrays),
        {**ranks, **known},
        {**ranks, 'values': [length, None]},
      ):
        self.assert_returns_close(expected, _evaluate_fed(arrays, shapes))

  def test_trailing_dimensions(self):
    arrays = _trajectories(9, 2, trailing=(3, 4))
    expected = _sum_of_equation_1(**arrays)
    unknown = {name: [None] * array.ndim for name, array in arrays.items()}
    self.assert_returns_close(expected, _evaluate(arrays))
    self.assert_returns_close(expected, _evaluate_fed(arrays, unknown))

  def test_one_ratio_for_several_reward_channels(self):
    arrays = _trajectories(9, 2, trailing=(4,))
    for name in ('log_rhos', 'discounts'):
      arrays[name] = arrays[name][..., :1]
    expected = _sum_of_equation_1(**arrays)
    shapes = {
      name: [None] * (array.ndim - 1) + [array.shape[-1]]
      for name, array in arrays.items()
    }
    self.assert_returns_close(expected, _evaluate(arrays))
    self.assert_returns_close(expected, _evaluate_fed(arrays, shapes))

  def test_static_shape_survives(self):
    with tf.Graph().as_default():
      arrays = _trajectories(5, 2)
      returns = vtrace.from_importance_weights(**arrays)
      self.assertEqual([5, 2], returns.vs.shape.as_list())
      self.assertEqual([5, 2], returns.pg_advantages.shape.as_list())
      arrays['values'] = tf.placeholder(tf.float32, [None, 2])
      returns = vtrace.from_importance_weights(**arrays)
      self.assertEqual([5, 2], returns.pg_advantages.shape.as_list())

  def test_inconsistent_ranks_are_refused(self):
    for name, shape, message in [
      ('bootstrap_value', [None], 'bootstrap_value must have rank 2'),
      ('bootstrap_value', [None] * 3, 'bootstrap_value must have rank 2'),
      ('values', [None] * 2, 'values must have rank 3'),
      ('rewards', [None] * 4, 'rewards must have rank 3'),
      ('discounts', [None], 'discounts must have rank 3'),
    ]:
      shapes = dict.fromkeys(
        ('log_rhos', 'discounts', 'rewards', 'values'), [None] * 3
      )
      shapes['bootstrap_value'] = [None] * 2
      shapes[name] = shape
      with tf.Graph().as_default():
        placeholders = {
          key: tf.placeholder(tf.float32, shape)
          for key, shape in shapes.items()
        }
        with self.assertRaisesRegex(ValueError, message):
          vtrace.from_importance_weights(**placeholders)

  def test_rank_is_checked_when_log_rhos_has_none(self):
    with tf.Graph().as_default():
      with self.assertRaisesRegex(ValueError, 'must have rank 1'):
        vtrace.from_importance_weights(
          log_rhos=tf.placeholder(tf.float32),
          discounts=tf.placeholder(tf.float32),
          rewards=tf.zeros([4, 2]),
          values=tf.placeholder(tf.float32),
          bootstrap_value=tf.zeros([4, 2]),
        )

  def test_threshold_that_is_no_scalar_is_refused(self):
    with tf.Graph().as_default():
      for name in ('clip_rho_threshold', 'clip_pg_rho_threshold'):
        with self.assertRaisesRegex(ValueError, f'{name} must have rank 0'):
          vtrace.from_importance_weights(
            **_trajectories(3, 2), **{name: [1.0, 2.0]}
          )

  def test_no_gradient_flows(self):
    for static in (True, False):
      with tf.Graph().as_default():
        arrays = _trajectories(4, 2)
        tensors = {
          name: tf.constant(array)
          if static
          else tf.placeholder(tf.float32, [None] * array.ndim)
          for name, array in arrays.items()
        }
        returns = vtrace.from_importance_weights(**tensors)
        for result in returns:
          gradients = tf.gradients(result, list(tensors.values()))
          self.assertEqual([None] * len(tensors), gradients)


class FromLogitsTest(tf.test.TestCase):
  def _arguments(self, length=11, batch_size=3, num_actions=4):
    rng = np.random.RandomState(7)
    arrays = _trajectories(length, batch_size)
    log_rhos = arrays.pop('log_rhos')
    logits_shape = (*log_rhos.shape, num_actions)
    arrays['actions'] = rng.randint(num_actions, size=log_rhos.shape)
    for name in ('behaviour_policy_logits', 'target_policy_logits'):
      arrays[name] = rng.normal(scale=2, size=logits_shape).astype(np.float32)
    return arrays

  def _expected(self, arrays, **thresholds):
    arrays = dict(arrays)
    actions = arrays.pop('actions')
    mu = _softmax_log_probs(arrays.pop('behaviour_policy_logits'), actions)
    pi = _softmax_log_probs(arrays.pop('target_policy_logits'), actions)
    vs, pg_advantages = _sum_of_equation_1(pi - mu, **arrays, **thresholds)
    return vtrace.VTraceFromLogitsReturns(vs, pg_advantages, pi - mu, mu, pi)

  def test_matches_equation_1(self):
    arrays = self._arguments()
    thresholds = {'clip_rho_threshold': 1.5, 'clip_pg_rho_threshold': None}
    with tf.Graph().as_default(), tf.Session() as session:
      actual = session.run(vtrace.from_logits(**arrays, **thresholds))
    expected = self._expected(arrays, **thresholds)
    for name in expected._fields:
      self.assertAllClose(
        getattr(expected, name), getattr(actual, name), 1e-4, 1e-4, name
      )

  def test_several_heads_choose_a_joint_action(self):
    arrays = self._arguments()
    rng = np.random.RandomState(8)
    shape = arrays['actions'].shape
    arrays['actions'] = rng.randint(4, size=(*shape, 2))
    joint = {'actions': arrays['actions'] @ [4, 1]}
    for name in ('behaviour_policy_logits', 'target_policy_logits'):
      logits = arrays[name] = rng.normal(size=(*shape, 2, 4)).astype(np.float32)
      pairs = logits[..., 0, :, np.newaxis] + logits[..., 1, np.newaxis, :]
      joint[name] = pairs.reshape(*shape, 16)
    with tf.Graph().as_default(), tf.Session() as session:
      actual = session.run(vtrace.from_logits(**arrays))
    expected = self._expected({**arrays, **joint})
    for name in expected._fields:
      self.assertAllClose(
        getattr(expected, name), getattr(actual, name), 1e-4, 1e-4, name
      )

  def test_unknown_shapes(self):
    arrays = self._arguments()
    expected = self._expected(arrays)
    for rank_known in (True, False):
      with tf.Graph().as_default(), tf.Session() as session:
        feeds = {
          name: tf.placeholder(
            array.dtype, [None] * array.ndim if rank_known else None
          )
          for name, array in arrays.items()
        }
        actual = session.run(
          vtrace.from_logits(**feeds),
          {feeds[name]: arrays[name] for name in arrays},
        )
      for name in expected._fields:
        self.assertAllClose(
          getattr(expected, name), getattr(actual, name), 1e-4, 1e-4, name
        )

  def test_targets_are_constant_for_gradients(self):
    arrays = self._arguments()
    with tf.Graph().as_default():
      names = ['behaviour_policy_logits', 'target_policy_logits', 'values']
      for name in names:
        arrays[name] = tf.constant(arrays[name])
      returns = vtrace.from_logits(**arrays)
      for result in (returns.vs, returns.pg_advantages):
        self.assertEqual(
          [None] * 3, tf.gradients(result, [arrays[name] for name in names])
        )

  def test_default_name_scopes(self):
    with tf.Graph().as_default():
      returns = vtrace.from_logits(**self._arguments())
      self.assertStartsWith(
        returns.vs.op.name,
        'vtrace_from_logits/vtrace_from_importance_weights/',
      )


if __name__ == '__main__':
  tf.test.main()
