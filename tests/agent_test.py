# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the agent's network."""

import os

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import convolution
import environments
from agent import Agent, FrameStatistics, _InstructionEncoder
from helpers import NUM_ACTIONS, ROOT, constants, env_outputs, run_graph


@pytest.mark.parametrize(
  ('torso', 'core', 'normalize_frames', 'num_actions'),
  [
    ('deep', 'lstm', False, NUM_ACTIONS),
    ('shallow', 'lstm', True, (2, 3)),
    ('shallow', 'none', False, NUM_ACTIONS),
  ],
)
def test_unroll_equals_single_steps(torso, core, normalize_frames, num_actions):
  random = np.random.default_rng(1)
  num_steps, batch_size = 4, 2
  inputs = env_outputs(random, (num_steps, batch_size), ('', 'a b', 'red door'))
  shape = (num_steps, batch_size, *np.shape(num_actions))
  actions = random.integers(0, num_actions, shape, np.int32)
  with tf.Graph().as_default():
    agent = Agent(
      num_actions, torso, core=core, normalize_frames=normalize_frames
    )
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
  assert unrolled.action.shape == shape
  for t, step in enumerate(steps):
    np.testing.assert_allclose(
      unrolled.policy_logits[t], step.policy_logits, atol=1e-5
    )
    np.testing.assert_allclose(unrolled.baseline[t], step.baseline, atol=1e-5)
  tf.nest.map_structure(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), last_state, state
  )


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


def test_without_a_core_the_frame_alone_is_seen():
  random = np.random.default_rng(2)
  inputs, others = env_outputs(random, (2,), ('go',)), env_outputs(random, (2,))
  outputs = []
  with tf.Graph().as_default():
    agent = Agent(NUM_ACTIONS, 'shallow', core='none')
    assert agent.initial_state(2) == ()
    for actions, env_output in (
      ([0, 1], inputs),
      (
        [2, 0],
        others._replace(observation=(inputs.observation[0], others[3][1])),
      ),
      ([0, 1], others),
    ):
      output, state = agent((tf.constant(actions), constants(env_output)), ())
      assert state == ()
      outputs.append(output.policy_logits)
    same, also, other = run_graph(outputs)
  np.testing.assert_array_equal(same, also)
  assert np.abs(same - other).max() > 1e-4


# --- Several heads ----------------------------------------------------------


def softmax(logits):
  exp = np.exp(logits.astype(np.float64))
  return exp / exp.sum(-1, keepdims=True)


def test_heads_are_parts_of_one_layer():
  sizes = (2, 4, 3)
  inputs = env_outputs(np.random.default_rng(5), (3,))
  actions = [[0, 0, 0], [1, 3, 2], [0, 2, 1]]
  flat = np.arange(27, dtype=np.float32).reshape(3, 9)
  with tf.Graph().as_default():
    agent = Agent(sizes, 'shallow')
    one_hot = agent._one_hot(tf.constant(actions))
    output, _ = agent(
      (tf.constant(actions), constants(inputs)), agent.initial_state(3)
    )
    shapes = {v.name: v.shape.as_list() for v in agent.variables}
    logits = agent._split(tf.constant(flat))
    one_hot, logits, output = run_graph((one_hot, logits, output))
  assert shapes['agent/policy_logits_2_4_3/w:0'] == [256, 9]
  # Features of the frame and the instruction, the last reward and action.
  assert shapes['agent/core/w_i:0'] == [256 + 64 + 1 + 9, 1024]
  np.testing.assert_array_equal(
    one_hot,
    [
      [1, 0, 1, 0, 0, 0, 1, 0, 0],
      [0, 1, 0, 0, 0, 1, 0, 0, 1],
      [1, 0, 0, 0, 1, 0, 0, 1, 0],
    ],
  )
  assert logits.shape == output.policy_logits.shape == (3, 3, 4)
  for head, (begin, end) in enumerate([(0, 2), (2, 6), (6, 9)]):
    size = end - begin
    np.testing.assert_array_equal(logits[:, head, :size], flat[:, begin:end])
    assert not softmax(logits)[:, head, size:].any()


@pytest.mark.parametrize('seeded', [False, True])
def test_heads_draw_independently_by_their_own_policies(seeded):
  random = np.random.default_rng(8)
  count, sizes = 4000, (3, 2, 3)
  logits = random.normal(size=(3, 3)).astype(np.float32)
  logits[2] = logits[0]  # As the same noise would show.
  logits[1, 2] = -1e9
  with tf.Graph().as_default(), tf.Session() as session:
    tf.set_random_seed(1)
    agent = Agent(sizes, 'shallow')
    batch = tf.constant(np.repeat(logits[np.newaxis], count, 0))
    actions = agent.draw(batch, [5, 6] if seeded else None)
    first, second = session.run(actions), session.run(actions)
  assert np.array_equal(first, second) == seeded
  frequencies = np.zeros((3, 2, 3))
  np.add.at(frequencies, tuple(first.T), 1 / count)
  a, b, c = softmax(logits)
  expected = np.einsum('a,b,c->abc', a, b[:2], c)
  # Five standard deviations.
  tolerance = 5 * np.sqrt(expected.max() / count)
  np.testing.assert_allclose(frequencies, expected, atol=tolerance)


def test_heads_with_logits_that_are_not_finite_draw_actions_that_exist():
  with tf.Graph().as_default():
    agent = Agent((2, 4), 'shallow')
    nan = tf.fill([5, 2, 4], np.float32('nan'))
    drawn = run_graph([agent.draw(nan), agent.draw(nan, [1, 2])])
  for actions in drawn:
    assert actions.shape == (5, 2)
    assert (actions < [2, 4]).all()


# --- Normalised frames ------------------------------------------------------


def moments_of(frames, deviation=5.0):
  """Returns frames as they should be normalised by themselves, float64."""
  frames = np.asarray(frames, np.float64)
  return frames.mean(0), np.maximum(frames.std(0), deviation)


def test_frames_are_normalised_by_all_that_was_learned_from():
  random = np.random.default_rng(3)
  batches = random.integers(0, 256, (3, 6, 2, 4, 5, 1), np.uint8)
  batches[..., 0, 0, 0] = 100  # A pixel that never changes.
  batches[..., 1, 1, 0] //= 64  # One that nearly doesn't.
  probe = random.integers(0, 256, (7, 4, 5, 1), np.uint8)
  with tf.Graph().as_default(), tf.Session() as session:
    statistics = FrameStatistics()
    normalized = convolution.normalize(
      tf.constant(probe), statistics(probe.shape[1:])
    )
    frames = tf.placeholder(tf.uint8, batches.shape[1:])
    update = statistics.update([frames])
    session.run(tf.global_variables_initializer())
    np.testing.assert_allclose(session.run(normalized), probe / 255, rtol=1e-6)
    for count in (1, 2, 3):
      session.run(update, {frames: batches[count - 1]})
      # Steps 0 and 5 of each unroll.
      seen = batches[:count, ::5].reshape(-1, 4, 5, 1)
      mean, deviation = moments_of(seen)
      np.testing.assert_allclose(
        session.run(normalized),
        np.clip((probe - mean) / deviation, -5, 5),
        atol=1e-4,
      )


def test_frames_of_long_ago_count_less(monkeypatch):
  """With 8 frames that count, a batch of 4 is half of the statistics."""
  monkeypatch.setattr(FrameStatistics, '_MAX_COUNT', 8)
  values = [10, 250, 30, 90]
  with tf.Graph().as_default(), tf.Session() as session:
    statistics = FrameStatistics()
    statistics([1, 1, 1])
    frames = tf.placeholder(tf.uint8, [1, 4, 1, 1, 1])
    update = statistics.update([frames])
    session.run(tf.global_variables_initializer())
    for value in values:
      session.run(update, {frames: np.full(frames.shape, value, np.uint8)})
    scale, shift = session.run([statistics._scale, statistics._shift])
  weights = np.array([1 / 8, 1 / 8, 1 / 4, 1 / 2])
  mean = np.dot(weights, values)
  deviation = np.sqrt(np.dot(weights, (values - mean) ** 2))
  np.testing.assert_allclose(scale.item(), 1 / deviation, rtol=1e-5)
  np.testing.assert_allclose(shift.item(), -mean / deviation, rtol=1e-5)


def test_optimizer_leaves_the_statistics_alone():
  with tf.Graph().as_default():
    agent = Agent(NUM_ACTIONS, 'shallow', normalize_frames=True)
    inputs = constants(env_outputs(np.random.default_rng(4), (1,)))
    agent((tf.zeros([1], tf.int32), inputs), agent.initial_state(1))
    learned = {v.name for v in agent.trainable_variables}
    others = {v.name for v in agent.variables} - learned
  assert others == {
    f'agent/frame_statistics/{name}:0'
    for name in ('count', 'mean', 'variance', 'scale', 'shift')
  }


# --- Instructions -----------------------------------------------------------


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


# --- The networks of the flagfiles -------------------------------------------

_SECTIONS = (16, 32, 32)


def deep_shapes(height, width, channels):
  """Returns the shapes of the weights of figure 3's deep torso, in order."""
  shapes = []
  for out in _SECTIONS:
    shapes += [(3, 3, channels, out)] + 4 * [(3, 3, out, out)]
    channels = out
    height, width = -(-height // 2), -(-width // 2)
  return [*shapes, (height * width * channels, 256)]


@pytest.mark.parametrize(
  ('name', 'num_actions', 'frame_shape', 'expected', 'num_parameters'),
  [
    # By the paper's figure 3: instructions have 64 features; with the last
    # reward and the last action of 9, the LSTM sees 256 + 1 + 9 + 64.
    (
      'dmlab30',
      9,
      (72, 96, 3),
      [
        *deep_shapes(72, 96, 3),
        *[(1000, 20), (20, 256), (64, 256)],
        *[(330, 1024), (256, 1024), (256, 9), (256, 1)],
      ],
      1_628_010,
    ),
    (
      'atari_expert',
      6,
      (84, 84, 4),
      [*deep_shapes(84, 84, 4), (256, 6), (256, 1)],
      1_091_031,
    ),
    (
      'atari57_multitask',
      18,
      (84, 84, 4),
      [*deep_shapes(84, 84, 4), (256, 18), (256, 1)],
      1_094_115,
    ),
  ],
)
def test_flagfile_has_the_papers_network(
  name, num_actions, frame_shape, expected, num_parameters
):
  with open(os.path.join(ROOT, 'flagfiles', name)) as file:
    values = dict(
      line.removeprefix('--').rstrip('\n').partition('=')[::2]
      for line in file
      if line.startswith('--')
    )
  assert 'nonormalize_frames' in values
  with tf.Graph().as_default():
    agent = Agent(num_actions, values['torso'], core=values['core'])
    inputs = environments.StepOutput(
      tf.zeros([1]),
      (),
      tf.zeros([1], tf.bool),
      (tf.zeros([1, *frame_shape], tf.uint8), tf.constant([''])),
    )
    agent((tf.zeros([1], tf.int32), inputs), agent.initial_state(1))
    shapes = [tuple(v.shape.as_list()) for v in agent.variables]
  weights = [shape for shape in shapes if len(shape) > 1]
  assert sorted(weights) == sorted(expected)
  assert sum(int(np.prod(shape)) for shape in shapes) == num_parameters
