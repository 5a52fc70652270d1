# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the program: real trainings in processes of their own."""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest

import plot
from helpers import (
  ROOT,
  TESTS,
  TOY,
  Program,
  alive,
  checkpoint_step,
  descendants,
  run,
  training,
  wait_until,
)
from player import Player


def test_training_ends_at_the_last_frame_and_goes_on_from_there(tmp_path):
  logdir = str(tmp_path / 'log')
  code, output = run(
    *TOY, f'--logdir={logdir}', '--total_environment_frames=200'
  )
  assert code == 0, output
  assert checkpoint_step(logdir) == 200
  code, output = run(
    *TOY, f'--logdir={logdir}', '--total_environment_frames=400'
  )
  assert code == 0, output
  assert checkpoint_step(logdir) == 400
  episodes = plot.read_scalars(logdir)['gym:toy_gym:Grey-v0/episode_return']
  # Every episode of the toy has 10 steps; each step's reward is 10 times its
  # number plus the action of 0 to 2.
  assert len(episodes) >= 30
  assert all(550 <= value <= 570 for value in episodes[:, 1])
  code, output = run(
    *TOY, f'--logdir={logdir}', '--mode=test', '--test_num_episodes=3'
  )
  assert code == 0, output
  row = re.search(r'^gym:toy_gym:Grey-v0 +3 +(.*)$', output, re.MULTILINE)
  mean, _, _, low, high, _ = row.group(1).replace('-', '0').split()
  mean, low, high = float(mean), float(low), float(high)
  assert 550 <= low <= mean <= high <= 570
  player = Player(logdir)
  assert player.frame_shape == (4, 6, 1)
  assert player.step(np.zeros((4, 6), np.uint8)).action in (0, 1, 2)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_a_checkpoint_and_leaves_nothing(tmp_path, number):
  logdir = str(tmp_path / 'log')
  program = training(logdir)
  below = descendants(program.process.pid)
  assert len(below) >= 3  # A fork server and two environments.
  before = checkpoint_step(logdir)
  program.process.send_signal(number)
  assert program.finish() == 0, program.output
  assert f'{number.name}: saving a checkpoint' in program.output
  saved = checkpoint_step(logdir)
  assert saved >= before
  wait_until(lambda: not any(map(alive, below)))
  # It goes on exactly there: 20 frames are two updates.
  frames = saved + 20
  code, output = run(
    *TOY, f'--logdir={logdir}', f'--total_environment_frames={frames}'
  )
  assert code == 0, output
  assert checkpoint_step(logdir) == frames


def environment_of(program):
  """Returns the id of one environment's process of a training."""
  (server,) = [
    pid
    for pid in descendants(program.process.pid)
    if len(descendants(pid)) >= 2
  ]
  return descendants(server)[0]


def num_waits(pid):
  """Returns how often a process has waited: an environment, for each step."""
  with open(f'/proc/{pid}/status') as status:
    return int(
      re.search(r'\nvoluntary_ctxt_switches:\s*(\d+)', status.read())[1]
    )


def test_killed_environment_is_restarted_and_training_goes_on(tmp_path):
  logdir = str(tmp_path / 'log')
  program = training(logdir)
  os.kill(environment_of(program), signal.SIGKILL)
  line = program.wait_for('died with')
  assert 'exit code -9 (SIGKILL). Restart 1 of at most 10.' in line
  step = checkpoint_step(logdir)
  wait_until(lambda: checkpoint_step(logdir) > step)
  program.process.send_signal(signal.SIGTERM)
  assert program.finish() == 0, program.output


def test_environment_killed_too_often_ends_training_with_checkpoint(tmp_path):
  logdir = str(tmp_path / 'log')
  program = Program(*TOY, f'--logdir={logdir}', '--max_environment_restarts=0')
  # The first checkpoint, of no frames, comes with the start. The next would
  # come after ten minutes.
  wait_until(lambda: checkpoint_step(logdir) == 0)
  environment = environment_of(program)
  # More than the unrolls under way: the learner had some.
  wait_until(lambda: num_waits(environment) > 200)
  os.kill(environment, signal.SIGKILL)
  assert program.finish() == 1
  assert (
    'died with exit code -9 (SIGKILL). It was restarted 0' in program.output
  )
  assert 'Traceback' not in program.output
  assert checkpoint_step(logdir) > 0


def test_loss_that_is_not_finite_ends_training_and_keeps_checkpoint(tmp_path):
  logdir = str(tmp_path / 'log')
  frames = ['--total_environment_frames=40']
  assert run(*TOY, f'--logdir={logdir}', *frames)[0] == 0
  code, output = run(*TOY, f'--logdir={logdir}', '--learning_rate=1e38')
  assert code == 1
  assert 'The loss or its gradient is not finite' in output
  assert 'Traceback' not in output
  assert checkpoint_step(logdir) == 40


def test_another_agents_checkpoint_is_refused_and_kept(tmp_path):
  logdir = tmp_path / 'log'
  frames = ['--total_environment_frames=40']
  assert run(*TOY, f'--logdir={logdir}', *frames)[0] == 0
  files = {path.name: path.read_bytes() for path in logdir.iterdir()}
  for other, difference in (
    ('--level_name=gym:ALE/Pong-v5', '[8, 8, 4, 16]'),
    ('--torso=deep', 'deep'),
    ('--height=40', 'linear'),
  ):
    code, output = run(*TOY, f'--logdir={logdir}', other)
    assert code == 2
    assert 'holds the checkpoint of another agent' in output
    assert difference in output
    assert len(output.splitlines()) == 1
  assert files == {path.name: path.read_bytes() for path in logdir.iterdir()}


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--num_actors=0', 'num_actors'),
    ('--batch_size=0', 'batch_size'),
    ('--unroll_length=0', 'unroll_length'),
    ('--torso=wide', 'torso'),
    ('--discounting=1.5', 'discounting'),
    ('--num_actor=3', 'num_actor'),
    ('--level_name=gym:NoSuchGame-v0', 'NoSuchGame'),
    ('--level_name=gym:CartPole-v1', 'image'),
    ('--logdir=/proc/log', '/proc/log can not be written'),
    ('--job_name=actor', 'needs a --task'),
    ('--task=1', 'has no --task=1'),
    ('--learner_address=here', 'is no host:port'),
    ('--learner_address=here:70000', 'is no host:port'),
    ('--seed=-1', 'seed'),
    ('--mode=test', 'no checkpoint'),
    ('--checkpoint=model.ckpt-1', '--mode=test'),
  ],
)
def test_impossible_flag_gets_one_sentence(tmp_path, flag, message):
  logdir = tmp_path / 'log'
  code, output = run(*TOY, f'--logdir={logdir}', flag)
  assert code == 2, output
  assert message in output
  assert len(output.splitlines()) <= 2, output
  assert 'Traceback' not in output
  assert not logdir.exists()


def test_deepmind_lab_that_is_missing_is_told(tmp_path):
  pytest.importorskip('deepmind_lab')  # The stand-in, hidden from the program.
  if 'fake' not in sys.modules['deepmind_lab'].__file__:
    pytest.skip('The real DeepMind Lab is installed.')
  code, output = run(f'--logdir={tmp_path / "log"}')
  assert code == 2
  assert 'needs DeepMind Lab, which is not installed' in output
  assert 'Dockerfile' in output
  assert '--level_name=gym:VizdoomBasic-v1' in output


FAKE_LAB = os.path.join(TESTS, 'fake_deepmind_lab')


def test_training_on_deepmind_labs_stand_in(tmp_path):
  code, output = run(
    f'--logdir={tmp_path / "log"}',
    f'--level_cache_dir={tmp_path / "maps"}',
    '--torso=shallow',
    '--unroll_length=5',
    '--total_environment_frames=80',
    path=FAKE_LAB,
  )
  assert code == 0, output
  assert checkpoint_step(tmp_path / 'log') == 80
  assert os.listdir(tmp_path / 'maps')


def test_psychlab_without_its_data_is_told(tmp_path):
  code, output = run(
    f'--logdir={tmp_path / "log"}', '--level_name=dmlab30', path=FAKE_LAB
  )
  assert code == 2
  assert 'psychlab_arbitrary_visuomotor_mapping' in output
  assert '--dataset_path' in output


def test_training_without_compiled_operations(tmp_path):
  for path in glob.glob(os.path.join(ROOT, '*.py')):
    shutil.copy(path, tmp_path)
  code, output = run(
    *TOY,
    f'--logdir={tmp_path / "log"}',
    '--total_environment_frames=100',
    root=tmp_path,
  )
  assert code == 0, output
  assert checkpoint_step(tmp_path / 'log') == 100
  assert output.count('make ops') == 2  # For each of the two libraries.


def test_agent_learns_to_answer_what_it_sees(tmp_path):
  """A bright square is in one third of the frame; its number is the answer."""
  logdir = str(tmp_path / 'log')
  level = 'gym:toy_gym:Thirds-v0'
  code, output = run(
    f'--level_name={level}',
    f'--logdir={logdir}',
    '--num_action_repeats=1',
    '--torso=shallow',
    '--num_actors=4',
    '--batch_size=4',
    '--unroll_length=20',
    '--height=36',
    '--width=48',
    '--learning_rate=0.0006',
    '--epsilon=0.01',
    '--entropy_cost=0.01',
    '--discounting=0.5',
    '--max_gradient_norm=40',
    '--total_environment_frames=30000',
  )
  assert code == 0, output
  returns = plot.read_scalars(logdir)[f'{level}/episode_return'][:, 1]
  # Ten answers, +1 or -1 each: chance is -10/3.
  assert returns[:50].mean() < 2
  assert returns[-100:].mean() > 8


def read_tests(logdir):
  """Returns (frames, mean return) of the tests in the background."""
  tag = 'test/gym:toy_gym:Grey-v0/mean_return'
  return plot.read_scalars(logdir).get(tag, [])


def test_training_tests_in_the_background_and_takes_the_test_along(tmp_path):
  logdir = str(tmp_path / 'log')
  program = training(
    logdir, '--test_interval_frames=100', '--test_num_episodes=3'
  )
  try:
    line = program.wait_for('test after')
    frames = int(re.search(r'after ([\d,]+)', line).group(1).replace(',', ''))
    assert frames >= 100
    with open(
      f'{logdir}/test/gym_toy_gym_Grey-v0-frames{frames}-seed1.json'
    ) as file:
      (row,) = json.load(file)['levels']
    assert row['episodes'] == 3
    # Training goes on, and so does the next test; both die with the program.
    wait_until(lambda: len(read_tests(logdir)) > 0)
    (step, mean, _), *_ = read_tests(logdir)
    assert (step, mean) == (frames, pytest.approx(row['mean']))
    wait_until(lambda: any(map(is_test, descendants(program.process.pid))))
    below = descendants(program.process.pid)
  finally:
    program.process.kill()
    program.finish()
  wait_until(lambda: not any(map(alive, below)))
  assert checkpoint_step(logdir) > frames


def is_test(pid):
  with contextlib.suppress(OSError):
    with open(f'/proc/{pid}/cmdline') as file:
      return '--mode=test' in file.read().split('\0')
  return False
