# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the agent's network."""

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import environments
from agent import Agent, _InstructionEncoder
from helpers import NUM_ACTIONS, constants, env_outputs, run_graph


@pytest.mark.parametrize('torso', ['deep', 'shallow'])
def test_unroll_equals_single_steps(torso):
  random = np.random.default_rng(1)
  num_steps, batch_size = 4, 2
  inputs = env_outputs(random, (num_steps, batch_size), ('', 'a b', 'red door'))
  actions = random.integers(0, NUM_ACTIONS, (num_steps, batch_size), np.int32)
  with tf.Graph().as_default():
    agent = Agent(NUM_ACTIONS, torso)
    state = agent.initial_state(batch_size)
    unrolled, last_state = agent.unroll(
      tf.constant(actions), constants(inputs), state
    )
    steps = []
    for t in range(num_steps):
      output, state = agent(
        (
          tf.constant(actions[t]),
          constants(tf.nest.map_structure(lambda x, t=t: x[t], inputs)),
        ),
        state,
      )
      steps.append(output)
    unrolled, last_state, steps, state = run_graph(
      (unrolled, last_state, steps, state)
    )
  assert unrolled.action.shape == (num_steps, batch_size)
  for t, step in enumerate(steps):
    np.testing.assert_allclose(
      unrolled.policy_logits[t], step.policy_logits, atol=1e-5
    )
    np.testing.assert_allclose(unrolled.baseline[t], step.baseline, atol=1e-5)
  np.testing.assert_allclose(last_state.hidden, state.hidden, atol=1e-5)
  np.testing.assert_allclose(last_state.cell, state.cell, atol=1e-5)


def test_state_is_reset_where_an_episode_begins():
  random = np.random.default_rng(2)
  inputs = env_outputs(random, (2,))._replace(done=np.array([True, False]))
  with tf.Graph().as_default():
    agent = Agent(NUM_ACTIONS, 'shallow')
    inputs = (tf.constant([0, 1]), constants(inputs))
    fresh, _ = agent(inputs, agent.initial_state(2))
    ones = tf.nest.map_structure(tf.ones_like, agent.initial_state(2))
    used, _ = agent(inputs, ones)
    fresh, used = run_graph((fresh.baseline, used.baseline))
  np.testing.assert_allclose(fresh[0], used[0], rtol=1e-5)
  assert abs(fresh[1] - used[1]) > 1e-4


def test_words_and_their_order_matter():
  random = np.random.default_rng(3)
  inputs = env_outputs(random, (1,))
  frame, _ = inputs.observation
  texts = np.array(['go left', 'left go', 'go left', ''], object)
  inputs = tf.nest.map_structure(lambda x: np.repeat(x[:1], 4, 0), inputs)
  inputs = inputs._replace(observation=(np.repeat(frame, 4, 0), texts))
  with tf.Graph().as_default():
    agent = Agent(NUM_ACTIONS, 'shallow')
    output, _ = agent(
      (tf.zeros([4], tf.int32), constants(inputs)), agent.initial_state(4)
    )
    values = run_graph(output.baseline)
  np.testing.assert_allclose(values[0], values[2], rtol=1e-5)
  assert len(set(np.round(values, 6))) == 3


def test_instructions_are_read_word_by_word():
  texts = ['', 'go', 'find the red door']
  with tf.Graph().as_default():
    tf.set_random_seed(1)
    encoder = _InstructionEncoder()
    encoded = encoder(tf.constant(texts))
    rows = []
    for text in texts:
      state = encoder._lstm.initial_state(1)
      for word in text.split():
        bucket = tf.strings.to_hash_bucket_fast([word], 1000)
        _, state = encoder._lstm(encoder._embedding(bucket), state)
      rows.append(state.hidden)
    values, expected = run_graph(
      [
        (result, encoder_gradients(encoder, result))
        for result in (encoded, tf.concat(rows, axis=0))
      ]
    )
  tf.nest.map_structure(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b).max()),
    values,
    expected,
  )
  assert all(np.abs(gradient).max() > 0 for gradient in expected[1])


def test_no_instructions_are_zeros():
  with tf.Graph().as_default():
    encoder = _InstructionEncoder()
    encoded = encoder(tf.constant(['', '', '']))
    values, gradients = run_graph(
      (encoded, encoder_gradients(encoder, encoded))
    )
  np.testing.assert_array_equal(values, np.zeros([3, 64]))
  assert not any(gradient.any() for gradient in gradients)


def test_no_instructions_leave_words_to_the_optimizer_as_they_are():
  with tf.Graph().as_default():
    encoder = _InstructionEncoder()
    encoded = encoder(tf.constant(['', '']))
    (gradient,) = tf.gradients(encoded, encoder._embedding.embeddings)
    # RMSProp updates each of them, be its gradient zero.
    assert run_graph(gradient.indices).size <= 1


def encoder_gradients(encoder, result):
  loss = tf.reduce_sum(tf.sin(10 * result))
  return [
    tf.convert_to_tensor(gradient)
    for gradient in tf.gradients(loss, encoder.trainable_variables)
  ]


def test_deep_agent_has_the_papers_size():
  with tf.Graph().as_default():
    agent = Agent(9, 'deep')
    inputs = environments.StepOutput(
      tf.zeros([1]),
      (),
      tf.zeros([1], tf.bool),
      (tf.zeros([1, 72, 96, 3], tf.uint8), tf.constant([''])),
    )
    agent((tf.zeros([1], tf.int32), inputs), agent.initial_state(1))
    sizes = [v.shape.num_elements() for v in agent.trainable_variables]
    kernels = [v for v in agent.trainable_variables if v.shape.rank == 4]
  assert len(kernels) == 15
  assert 1.5e6 < sum(sizes) < 1.7e6
