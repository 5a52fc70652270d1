# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of a trained agent in another program."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import action_sets
import checkpoints
import environments
import toy_gym
from agent import Agent
from errors import UserError
from helpers import ROOT, TESTS, save_agent
from player import Player


def save_trained_agent(
  logdir,
  num_actions=3,
  frame_shape=(4, 6, 1),
  action_set=None,
  popart_levels=(),
):
  """Saves an agent as a training does; returns the checkpoint."""
  checkpoint = save_agent(
    logdir, num_actions, frame_shape, popart_levels=popart_levels
  )
  if action_set is None:
    action_set = np.arange(num_actions)
  spec = environments.EnvironmentSpec(action_set, frame_shape)
  checkpoints.save_description(
    str(logdir),
    spec,
    'shallow',
    {'normalize_frames': True, 'popart': bool(popart_levels)},
    {},
    popart_levels,
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


@pytest.mark.parametrize('name', ['binary', 'grid', 'one', 'tuple'])
def test_player_chooses_what_its_environment_takes(tmp_path, name):
  space, numbers = toy_gym.COMPOSED[name]
  action_set = action_sets.of_space(space)
  counts = action_sets.num_actions(action_set)
  save_trained_agent(tmp_path, counts, action_set=action_set)
  seen = set()
  with Player(str(tmp_path), seed=3) as player:
    for _ in range(20):
      output = player.step(np.zeros((4, 6, 1), np.uint8))
      assert output.policy_logits.shape == (len(counts), max(counts))
      taken = player.environment_action(output.action)
      assert space.contains(taken), taken
      seen.add(tuple(numbers(taken)))
    assert player.action_set == action_sets.to_json(action_set)['action_set']
  # Each of the numbers changes.
  assert all(len(set(column)) > 1 for column in zip(*seen, strict=True))


def test_agent_of_before_there_were_heads_plays(tmp_path):
  save_trained_agent(tmp_path)
  path = tmp_path / 'agent.json'
  description = json.loads(path.read_text())
  assert description.pop('num_actions') == 3
  path.write_text(json.dumps(description))
  with Player(str(tmp_path)) as player:
    action = player.step(np.zeros((4, 6, 1), np.uint8)).action
    assert player.environment_action(action) == player.action_set[action]


@pytest.mark.parametrize('levels', [['one'], ['one', 'two']])
def test_player_has_a_value_for_each_level_of_popart(levels, tmp_path):
  checkpoint = save_trained_agent(tmp_path, popart_levels=levels)
  weights = tf.train.load_variable(checkpoint, 'agent/popart/normalized/w')
  assert weights.shape == (256, len(levels))
  with Player(str(tmp_path)) as player:
    assert player.popart_levels == levels
    baseline = player.step(np.zeros((4, 6), np.uint8)).baseline
  if len(levels) == 1:
    assert isinstance(baseline, float)
  else:
    assert baseline.shape == (2,)
    assert baseline[0] != baseline[1]


# A program of somebody else's, with flags of its own. It says what differs
# before and after it loads an agent and plays.
_ABSL_PROGRAM = """
import os, sys
from absl import app, flags

def state():
  fds = {fd: os.readlink(f'/proc/self/fd/{fd}') for fd in ('0', '1', '2')}
  return dict(os.environ), fds, sorted(flags.FLAGS)

import tensorflow  # Which sets and defines some of its own.
before = state()
from player import Player
assert state() == before, 'the import'
flags.DEFINE_integer('seed', 5, 'Of this program.')
flags.DEFINE_string('mode', 'fast', 'Also of this program.')

def main(argv):
  before = state()
  import numpy as np
  with Player(flags.FLAGS.logdir, seed=flags.FLAGS.seed) as player:
    output = player.step(np.zeros((4, 6, 1), np.uint8))
  assert state() == before, 'the agent'
  import keras
  keras.layers.Dense(3)(np.zeros((1, 2), np.float32))
  import tensorflow as tf
  tf.keras.layers.Dense(3)(np.zeros((1, 2), np.float32))
  print(flags.FLAGS.seed, flags.FLAGS.mode, output.action in (0, 1, 2))

flags.DEFINE_string('logdir', '', 'Of the agent.')
app.run(main)
"""


def test_program_with_flags_of_its_own_plays(tmp_path):
  save_trained_agent(tmp_path)
  result = subprocess.run(
    [sys.executable, '-c', _ABSL_PROGRAM, '--seed=7', f'--logdir={tmp_path}'],
    # What our modules set when these tests imported them would hide that they
    # set it.
    env={'PATH': os.environ['PATH'], 'PYTHONPATH': ROOT},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert (result.returncode, result.stdout) == (0, '7 fast True\n'), result


def test_agent_in_a_folder_that_can_not_be_written(tmp_path):
  save_trained_agent(tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  prefix = []
  if os.getuid() == 0:  # Who can write everywhere, unless this is taken away.
    prefix = ['setpriv', '--bounding-set=-dac_override']
    if not shutil.which('setpriv'):
      pytest.skip('Root can write everywhere.')
  program = (
    'import sys\n'
    'import numpy as np\n'
    'from player import Player\n'
    'try:\n'
    '  open(sys.argv[1] + "/file", "w")\n'
    'except PermissionError:\n'
    '  frame = np.zeros((4, 6, 1), np.uint8)\n'
    '  print(Player(sys.argv[1]).step(frame).action in (0, 1, 2))\n'
  )
  tmp_path.chmod(0o555)
  try:
    result = subprocess.run(
      [*prefix, sys.executable, '-c', program, str(tmp_path)],
      env={**os.environ, 'PYTHONPATH': ROOT},
      capture_output=True,
      text=True,
      timeout=120,
    )
  finally:
    tmp_path.chmod(0o755)
  assert (result.returncode, result.stdout) == (0, 'True\n'), result
  assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_player_can_be_closed(tmp_path):
  save_trained_agent(tmp_path)
  frame = np.zeros((4, 6, 1), np.uint8)
  with Player(str(tmp_path)) as player:
    player.step(frame)
  with pytest.raises(RuntimeError, match='closed'):
    player.step(frame)
  player.close()  # Again.


@pytest.mark.parametrize(
  'frame',
  [
    np.zeros((4, 6, 1), np.float32),
    np.zeros((4, 6, 1), np.int64),
    np.zeros((4, 6, 3), np.uint8),
    np.zeros((1, 4, 6, 1), np.uint8),
    np.zeros((0, 6, 1), np.uint8),
    np.zeros(6, np.uint8),
    None,
    'frame',
    [[1, 2], [3]],
  ],
)
def test_other_than_a_frame_is_refused(small_player, frame):
  refuses(small_player, r'A frame must be uint8 \[height, width, 1\]', frame)


@pytest.mark.parametrize(
  'reward',
  [None, np.nan, np.inf, -np.inf, 'high', [1.0], np.zeros(1), 1j, 1e300],
)
def test_other_than_a_reward_is_refused(small_player, reward):
  frame = np.zeros((4, 6, 1), np.uint8)
  refuses(small_player, 'A reward must be a finite number', frame, reward)


@pytest.mark.parametrize(
  ('done', 'instruction', 'message'),
  [
    (False, None, 'instruction must be a string'),
    (False, ['go'], 'instruction must be a string'),
    (np.zeros(2, bool), '', 'done must be a bool'),
    (None, '', 'done must be a bool'),
  ],
)
def test_other_arguments_are_refused(small_player, done, instruction, message):
  frame = np.zeros((4, 6, 1), np.uint8)
  refuses(small_player, message, frame, 0.0, done, instruction)


@pytest.mark.parametrize(
  'reward', [1, 2.5, True, np.float32(1), np.int64(3), np.bool_(0), np.array(1)]
)
def test_usual_kinds_of_numbers_are_rewards(small_player, reward):
  frame = np.zeros((4, 6), np.uint8)
  assert np.isfinite(small_player.step(frame, reward, np.bool_(0)).baseline)


@pytest.fixture(scope='module')
def small_player(tmp_path_factory):
  logdir = tmp_path_factory.mktemp('agent')
  save_trained_agent(logdir)
  with Player(str(logdir), seed=1) as player:
    yield player


def refuses(player, message, *arguments):
  """Checks that a step is refused in one sentence, and has no effect."""
  with pytest.raises(ValueError, match=message) as error:
    player.step(*arguments)
  assert '\n' not in str(error.value)
  output = player.step(np.zeros((4, 6, 1), np.uint8), 0.0, True)
  assert np.isfinite(output.baseline)


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
