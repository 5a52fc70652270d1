# Licensed under the Apache License, Version 2.0; see LICENSE.
"""V-trace: off-policy corrected value targets and policy gradient advantages.

IMPALA's actors follow a policy that is some updates older than the one the
learner improves. V-trace weights what they saw by truncated importance ratios,
so that the learner can estimate the values of its own policy from it. See
section 4.1 of "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
Actor-Learner Architectures" (https://arxiv.org/abs/1802.01561).

All tensors are time-major, `[T, B, ...]`: T time steps of B trajectories.
"""

import collections

import tensorflow.compat.v1 as tf

VTraceFromLogitsReturns = collections.namedtuple(
  'VTraceFromLogitsReturns',
  'vs pg_advantages log_rhos behaviour_action_log_probs '
  'target_action_log_probs',
)

VTraceReturns = collections.namedtuple('VTraceReturns', 'vs pg_advantages')


def log_probs_from_logits_and_actions(policy_logits, actions):
  """Computes the log-probabilities of the actions that were taken.

  An action may be made of several that are chosen independently of each other,
  by one head of the policy each. The probability of all is the product.

  Args:
    policy_logits: float32 `[T, B, num_actions]`, unnormalised
      log-probabilities of a softmax policy; or, with several heads, `[T, B,
      num_heads, num_actions]`.
    actions: int32 or int64 `[T, B]`, an action index for each time step; or
      `[T, B, num_heads]`.

  Returns:
    float32 `[T, B]`, log pi(a_t | x_t). Differentiable in `policy_logits`.

  Raises:
    ValueError: if an argument has another rank.
  """
  policy_logits = tf.convert_to_tensor(policy_logits, dtype=tf.float32)
  actions = tf.convert_to_tensor(actions)
  has_heads = policy_logits.shape.rank == 4
  _check_rank('policy_logits', policy_logits, 4 if has_heads else 3)
  _check_rank('actions', actions, 3 if has_heads else 2)
  log_probs = -tf.nn.sparse_softmax_cross_entropy_with_logits(
    labels=actions, logits=policy_logits
  )
  return tf.reduce_sum(log_probs, axis=2) if has_heads else log_probs


def from_logits(
  behaviour_policy_logits,
  target_policy_logits,
  actions,
  discounts,
  rewards,
  values,
  bootstrap_value,
  clip_rho_threshold=1.0,
  clip_pg_rho_threshold=1.0,
  name='vtrace_from_logits',
  lambda_=1.0,
):
  """Computes V-trace targets for two softmax policies.

  Computes the importance ratios rho_t = pi(a_t | x_t) / mu(a_t | x_t) from the
  logits of both policies, and from them the results of
  `from_importance_weights`, where the formulas are (section 4.1 of
  https://arxiv.org/abs/1802.01561).

  Args:
    behaviour_policy_logits: float32 `[T, B, num_actions]`, logits of mu, the
      policy that chose the actions. Several heads, here and below, are as in
      `log_probs_from_logits_and_actions`.
    target_policy_logits: float32 `[T, B, num_actions]`, logits of pi, the
      policy to evaluate and improve.
    actions: int32 or int64 `[T, B]`, actions sampled from mu.
    discounts: float32 `[T, B]`, gamma_t; 0 where step t ended an episode.
    rewards: float32 `[T, B]`, r_t, received after action t.
    values: float32 `[T, B]`, V(x_t), estimates of pi's values.
    bootstrap_value: float32 `[B]`, V(x_T), the estimate after the last step.
    clip_rho_threshold: float scalar, the paper's rho-bar. It decides which
      policy's values the targets estimate. None: no clipping.
    clip_pg_rho_threshold: float scalar, clips the ratio in `pg_advantages`.
      None: no clipping.
    name: string, the name scope of the operations.
    lambda_: float, from 0 to 1, the decay of the trace: 1 looks ahead to the
      end of the unroll, 0 a single step.

  Returns:
    A `VTraceFromLogitsReturns`, all fields float32 `[T, B]`:
      vs: the targets v_t to regress V(x_t) to. Constant for gradients.
      pg_advantages: weights of grad log pi(a_t | x_t) in the policy gradient.
        Constant for gradients.
      log_rhos: log of the unclipped importance ratios.
      behaviour_action_log_probs: log mu(a_t | x_t).
      target_action_log_probs: log pi(a_t | x_t).

  Raises:
    ValueError: if ranks contradict each other.
  """
  with tf.name_scope(name):
    behaviour_action_log_probs = log_probs_from_logits_and_actions(
      behaviour_policy_logits, actions
    )
    target_action_log_probs = log_probs_from_logits_and_actions(
      target_policy_logits, actions
    )
    log_rhos = target_action_log_probs - behaviour_action_log_probs
    vtrace_returns = from_importance_weights(
      log_rhos=log_rhos,
      discounts=discounts,
      rewards=rewards,
      values=values,
      bootstrap_value=bootstrap_value,
      clip_rho_threshold=clip_rho_threshold,
      clip_pg_rho_threshold=clip_pg_rho_threshold,
      lambda_=lambda_,
    )
    return VTraceFromLogitsReturns(
      vs=vtrace_returns.vs,
      pg_advantages=vtrace_returns.pg_advantages,
      log_rhos=log_rhos,
      behaviour_action_log_probs=behaviour_action_log_probs,
      target_action_log_probs=target_action_log_probs,
    )


def from_importance_weights(
  log_rhos,
  discounts,
  rewards,
  values,
  bootstrap_value,
  clip_rho_threshold=1.0,
  clip_pg_rho_threshold=1.0,
  name='vtrace_from_importance_weights',
  lambda_=1.0,
):
  """Computes V-trace targets from log importance ratios.

  Equation 1 of https://arxiv.org/abs/1802.01561 (section 4.1), with a discount
  for each step, and lambda as in remark 2:

    v_s = V(x_s) + sum_{t=s}^{T-1} (prod_{i=s}^{t-1} gamma_i c_i) delta_t V
    delta_t V = min(rho-bar, rho_t) (r_t + gamma_t V(x_{t+1}) - V(x_t))
    c_i = lambda min(1, rho_i)

  and the advantages of the policy gradient from the same section:

    min(rho-bar_pg, rho_t) (r_t + gamma_t v_{t+1} - V(x_t)),  v_T = V(x_T)

  The dimensions after B are free. `log_rhos` and `discounts` may have size 1
  where the others have more (say, one ratio for several reward channels).

  Args:
    log_rhos: float32 `[T, B, ...]`, log(pi(a_t | x_t) / mu(a_t | x_t)).
    discounts: float32 `[T, B, ...]`, gamma_t; 0 where step t ended an episode.
    rewards: float32 `[T, B, ...]`, r_t, received after action t.
    values: float32 `[T, B, ...]`, V(x_t), estimates of pi's values.
    bootstrap_value: float32 `[B, ...]`, V(x_T), the estimate after the last
      step.
    clip_rho_threshold: float scalar, the paper's rho-bar. None: no clipping.
    clip_pg_rho_threshold: float scalar, rho-bar_pg. None: no clipping.
    name: string, the name scope of the operations.
    lambda_: float, from 0 to 1, the decay of the trace: 1 looks ahead to the
      end of the unroll, 0 a single step.

  Returns:
    A `VTraceReturns` of float32 `[T, B, ...]`, both constant for gradients:
      vs: the targets v_t to regress V(x_t) to.
      pg_advantages: weights of grad log pi(a_t | x_t) in the policy gradient.

  Raises:
    ValueError: if ranks contradict each other or a threshold isn't a scalar.
  """
  with tf.name_scope(name):
    log_rhos = tf.convert_to_tensor(log_rhos, dtype=tf.float32)
    discounts = tf.convert_to_tensor(discounts, dtype=tf.float32)
    rewards = tf.convert_to_tensor(rewards, dtype=tf.float32)
    values = tf.convert_to_tensor(values, dtype=tf.float32)
    bootstrap_value = tf.convert_to_tensor(bootstrap_value, dtype=tf.float32)
    _check_ranks(log_rhos, discounts, rewards, values, bootstrap_value)

    rhos = tf.exp(log_rhos)
    clipped_rhos = _clip('clip_rho_threshold', rhos, clip_rho_threshold)
    clipped_pg_rhos = _clip(
      'clip_pg_rho_threshold', rhos, clip_pg_rho_threshold
    )
    cs = lambda_ * tf.minimum(1.0, rhos)

    values_t_plus_1 = _shift_left(values, bootstrap_value)
    td_errors = rewards + discounts * values_t_plus_1 - values
    deltas = clipped_rhos * td_errors
    vs_minus_values = _solve_backward_recursion(
      deltas,
      discounts * cs,
      _static_length(log_rhos, discounts, rewards, values),
    )
    vs = values + vs_minus_values

    vs_t_plus_1 = _shift_left(vs, bootstrap_value)
    advantages = rewards + _weigh(discounts, vs_t_plus_1) - values
    pg_advantages = _weigh(clipped_pg_rhos, advantages)

    return VTraceReturns(
      vs=tf.stop_gradient(vs), pg_advantages=tf.stop_gradient(pg_advantages)
    )


def _clip(name, rhos, threshold):
  """Truncates importance ratios from above; they are finite afterwards."""
  if threshold is None:
    # exp overflows beyond e^88, and an infinite ratio times an error of zero
    # would be NaN.
    threshold = rhos.dtype.max
  threshold = tf.convert_to_tensor(threshold, dtype=tf.float32)
  _check_rank(name, threshold, 0)
  return tf.minimum(threshold, rhos)


def _weigh(weights, x):
  """Multiplies so that a weight of zero gives zero, even if x overflowed.

  Without clipping, a huge ratio may make a target infinite. The discount of
  zero at the end of an episode keeps it out of that episode's targets.
  """
  return tf.math.multiply_no_nan(x, weights)


def _shift_left(x, last):
  """Returns x_{t+1} for every t, where x_T is `last`."""
  return tf.concat([x, last[tf.newaxis]], axis=0)[1:]


def _solve_backward_recursion(deltas, decays, length):
  """Solves y_s = deltas_s + decays_s * y_{s+1} with y_T = 0.

  Going back step by step would take T small operations in a row. Instead, a
  round doubles the number k of terms: before it, y_s is the sum of the k terms
  from s on, and decays_s the product of the k factors from s on. The round

    y_s      <- y_s + decays_s * y_{s+k}
    decays_s <- decays_s * decays_{s+k}

  makes it 2k. ceil(log2(T)) rounds are enough, each over all of T at once. This
  is a Hillis-Steele scan. It has no division, so decays of zero are exact.

  Args:
    deltas: float32 `[T, B, ...]`.
    decays: float32 `[T, B, ...]`, broadcastable to `deltas`.
    length: int, T, or None where only the run will tell.

  Returns:
    float32 `[T, B, ...]`, y.
  """

  def double(k, ys, decays):
    # The last k elements of ys are complete, so decays has only the T - k
    # elements before them, and T - 2k after this round.
    n = (tf.shape(ys)[0] if length is None else length) - k
    m = tf.maximum(n - k, 0) if length is None else max(n - k, 0)
    ys = tf.concat([ys[:n] + _weigh(decays, ys[k:]), ys[n:]], axis=0)
    return 2 * k, ys, decays[:m] * decays[k:]

  loop_vars = (1, deltas, decays[:-1])
  if length is None:
    return tf.while_loop(
      lambda k, ys, _: k < tf.shape(ys)[0],
      double,
      loop_vars,
      shape_invariants=(
        tf.TensorShape([]),
        _any_length(deltas.shape),
        _any_length(decays.shape),
      ),
    )[1]
  while loop_vars[0] < length:
    loop_vars = double(*loop_vars)
  return loop_vars[1]


def _any_length(shape):
  """Returns the shape with its first dimension unknown."""
  if shape.rank is None:
    return shape
  return tf.TensorShape([None]).concatenate(shape[1:])


def _static_length(*tensors):
  """Returns T if the static shape of one of the tensors has it, else None."""
  for tensor in tensors:
    if tensor.shape.rank and tensor.shape.as_list()[0] is not None:
      return tensor.shape.as_list()[0]
  return None


def _check_ranks(log_rhos, discounts, rewards, values, bootstrap_value):
  """Raises ValueError unless the ranks, as far as known, fit together."""
  time_major = {
    'log_rhos': log_rhos,
    'discounts': discounts,
    'rewards': rewards,
    'values': values,
  }
  ranks = [
    x.shape.rank for x in time_major.values() if x.shape.rank is not None
  ]
  if not ranks:
    return
  for name, tensor in time_major.items():
    _check_rank(name, tensor, ranks[0])
  _check_rank('bootstrap_value', bootstrap_value, ranks[0] - 1)


def _check_rank(name, tensor, rank):
  """Raises ValueError if the tensor is known to have another rank."""
  if tensor.shape.rank not in (None, rank):
    raise ValueError(f'{name} must have rank {rank}, its shape: {tensor.shape}')
