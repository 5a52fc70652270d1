# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of a trained agent in another program."""

import os
import re

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import checkpoints
import environments
from agent import Agent
from errors import UserError
from helpers import ROOT, TESTS, save_agent
from player import Player


def save_trained_agent(logdir, num_actions=3, frame_shape=(4, 6, 1)):
  """Saves an agent as a training does; returns the checkpoint."""
  checkpoint = save_agent(logdir, num_actions, frame_shape)
  spec = environments.EnvironmentSpec(np.arange(num_actions), frame_shape)
  checkpoints.save_description(
    str(logdir), spec, 'shallow', {'normalize_frames': True}
  )
  return checkpoint


def test_player_does_what_the_agent_does(tmp_path):
  """Step by step, as the whole sequence that the learner would see."""
  checkpoint = save_trained_agent(tmp_path)
  random = np.random.default_rng(7)
  frames = random.integers(0, 256, (6, 4, 6, 1), np.uint8)
  rewards = random.normal(size=6).astype(np.float32)
  dones = np.array([False, False, False, True, False, False])
  texts = ['', 'go on', 'go on', 'stop', '', '']
  player = Player(str(tmp_path), seed=3)
  assert player.frame_shape == (4, 6, 1)
  outputs = [
    player.step(*step)
    for step in zip(frames, rewards, dones, texts, strict=True)
  ]
  actions = [output.action for output in outputs]
  assert set(actions) <= set(player.action_set) == {0, 1, 2}
  with tf.Graph().as_default():
    tf.train.get_or_create_global_step()
    agent = Agent(3, 'shallow', normalize_frames=True)
    env_outputs = environments.StepOutput(
      tf.constant(rewards[:, None]),
      (),
      tf.constant(dones[:, None]),
      (tf.constant(frames[:, None]), tf.constant(np.array(texts)[:, None])),
    )
    expected, _ = agent.unroll(
      tf.constant([0, *actions[:-1]])[:, None],
      env_outputs,
      agent.initial_state(1),
    )
    with tf.Session() as session:
      tf.train.Saver().restore(session, checkpoint)
      expected = session.run(expected)
  for t, output in enumerate(outputs):
    np.testing.assert_allclose(
      output.policy_logits, expected.policy_logits[t, 0], atol=1e-5
    )
    np.testing.assert_allclose(
      output.baseline, expected.baseline[t, 0], atol=1e-5
    )
  # Larger frames are resized: of whole blocks, to the same.
  large = np.kron(frames[0, ..., 0], np.ones((5, 5), np.uint8))
  resized = Player(checkpoint).step(large, rewards[0], False)
  np.testing.assert_allclose(
    resized.policy_logits, outputs[0].policy_logits, atol=1e-5
  )
  with pytest.raises(ValueError, match=r'uint8 \[height, width, 1\]'):
    player.step(np.zeros((4, 6, 3), np.uint8))
  for path in (str(tmp_path / 'none'), checkpoint + '0', TESTS):
    with pytest.raises(UserError, match='no trained agent'):
      Player(path)


def test_readmes_program_with_a_trained_agent_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # ViZDoom leaves a file where it runs.
  with open(os.path.join(ROOT, 'README.md')) as file:
    (program,) = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
  assert "'/tmp/doom'" in program
  save_trained_agent(tmp_path, 4, (72, 96, 3))
  names = {}
  exec(program.replace('/tmp/doom', str(tmp_path)), names)
  # It played to the end of an episode: 300 tics, 4 to a step, or the monster
  # was shot, at -1 for a tic and -5 for a shot that missed.
  assert names['terminated'] or names['truncated']
  assert -600 <= names['episode_return'] <= 101
