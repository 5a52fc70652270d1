# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the program: real trainings in processes of their own."""

import contextlib
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from absl import flags

import checkpoints
import plot
from helpers import (
  ROOT,
  TESTS,
  TOY,
  Program,
  alive,
  checkpoint_step,
  descendants,
  hashes,
  run,
  run_each,
  training,
  wait_until,
)
from player import Player

if not flags.FLAGS.is_parsed():
  flags.FLAGS(['train_test'])


def test_training_ends_at_the_last_frame_and_goes_on_from_there(tmp_path):
  logdir = str(tmp_path / 'log')
  code, output = run(
    *TOY, f'--logdir={logdir}', '--total_environment_frames=200'
  )
  assert code == 0, output
  assert checkpoint_step(logdir) == 200
  start, line = output.splitlines()
  assert start.startswith('learner on CPU')
  assert '200 of 200 frames, in this run by 20 updates; mean return 5' in line
  assert f'{logdir}/model.ckpt-200' in line
  assert f'experiment.py --mode=test --logdir={logdir}' in line
  code, output = run(
    *TOY,
    f'--logdir={logdir}',
    '--total_environment_frames=400',
    '--learning_rate=0.001',
    # Not set, as in many job scripts.
    env={'TF_CONFIG': ''},
  )
  assert code == 0, output
  settings, _, line = output.splitlines()
  assert '--learning_rate 0.00048 -> 0.001' in settings
  assert '--total_environment_frames 200 -> 400' in settings
  assert 'logdir' not in settings
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


@pytest.mark.parametrize(
  'number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
)
def test_signal_saves_a_checkpoint_and_leaves_nothing(tmp_path, number):
  logdir = str(tmp_path / 'log')
  program = training(logdir)
  below = descendants(program.process.pid)
  assert len(below) >= 3  # A fork server and two environments.
  before = checkpoint_step(logdir)
  program.process.send_signal(number)
  program.process.send_signal(number)  # As `timeout` does.
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


def test_training_whose_console_is_gone_goes_on(tmp_path):
  """As with `| head -1`, or a terminal that is closed."""
  logdir = str(tmp_path / 'log')
  program = training(logdir, '--save_checkpoint_secs=1')
  program.process.stdout.close()
  os.kill(environment_of(program), signal.SIGKILL)  # It is told.
  step = checkpoint_step(logdir)
  wait_until(lambda: checkpoint_step(logdir) > step)
  program.process.send_signal(signal.SIGHUP)
  assert program.process.wait(timeout=60) == 0
  saved = checkpoint_step(logdir)
  code, output = run(
    *TOY, f'--logdir={logdir}', f'--total_environment_frames={saved - 10}'
  )
  assert code == 0, output
  assert f'had {saved:,} frames of training before' in output
  assert checkpoint_step(logdir) == saved


def test_folder_can_be_copied_moved_and_named_freely(tmp_path):
  name = '~x [lr=0.001] *? ü'
  original, copy = tmp_path / name, tmp_path / f'copy {name}'
  # What a shell leaves alone, and a console that can't print the name.
  home = {
    'HOME': str(tmp_path),
    'LC_ALL': 'POSIX',
    'PYTHONIOENCODING': 'ascii',
  }
  code, output = run(
    *TOY, f'--logdir=~/{name}', '--total_environment_frames=60', env=home
  )
  assert code == 0, output
  assert output.isascii()
  # As older versions wrote it.
  state = original / 'checkpoint'
  text = state.read_text()
  state.write_text(text.replace('"model', f'"{original}/model'))
  assert str(original) in state.read_text()
  shutil.copytree(original, copy)
  before = hashes(original)
  for frames in (80, 100):
    code, output = run(
      *TOY,
      f'--logdir=~/copy {name}',
      f'--total_environment_frames={frames}',
      env=home,
    )
    assert code == 0, output
    # 20 frames are two updates.
    assert f'{frames} of {frames} frames, in this run by 2 updates' in output
  assert hashes(original) == before
  # The original moves, its state file still has its old place.
  moved = original.rename(tmp_path / 'moved [1]')
  code, output = run(
    *TOY, f'--logdir={moved}', '--mode=test', '--test_num_episodes=1'
  )
  assert code == 0, output
  with Player(str(moved)) as player:
    assert player.frame_shape == (4, 6, 1)
  assert {n: h for n, h in hashes(moved).items() if 'test/' not in n} == before
  (moved / 'checkpoint').write_text('')
  code, output = run(*TOY, f'--logdir={moved}', '--total_environment_frames=80')
  assert code == 0, output
  assert 'The file "checkpoint"' in output
  assert '80 of 80 frames, in this run by 2 updates' in output


def test_second_training_in_a_folder_is_refused_until_the_first_ends(tmp_path):
  logdir = tmp_path / 'log'
  # One checkpoint at the start, so that its files stay as they are.
  first = Program(*TOY, f'--logdir={logdir}')
  wait_until(lambda: checkpoint_step(logdir) == 0)
  before = hashes(logdir)
  code, output = run(*TOY, f'--logdir={logdir}', '--total_environment_frames=9')
  assert code == 2
  assert f'Another training uses {logdir}' in output
  assert f'process {first.process.pid} on ' in output
  assert len(output.splitlines()) == 1
  after = hashes(logdir)
  for files in (before, after):
    for name in [name for name in files if 'tfevents' in name]:
      del files[name]
  assert after == before
  # A test may run beside it.
  code, output = run(
    *TOY, f'--logdir={logdir}', '--mode=test', '--test_num_episodes=1'
  )
  assert code == 0, output
  assert first.process.poll() is None
  first.process.kill()
  first.finish()
  code, output = run(
    *TOY, f'--logdir={logdir}', '--total_environment_frames=20'
  )
  assert code == 0, output
  assert not (logdir / 'training.lock').exists()


_SERVER = (
  'import json, sys, tensorflow.compat.v1 as tf; '
  "tf.train.Server(json.loads(sys.argv[1]), 'other', 0).join()"
)
# A learner with an operation on another server, which is killed.
_LEARNER = """
import json, os, subprocess, sys
import tensorflow.compat.v1 as tf
import experiment
from helpers import wait_until

class Sums:  # What `LearnerLoop` needs of `Metrics`.
  global_step = 0

  def add(self, value):
    self.global_step = int(value)

experiment.FLAGS(['learner'])
cluster = json.loads(sys.argv[1])
other = subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]])
try:
  target = tf.train.Server(cluster, 'learner', 0).target
  with tf.Graph().as_default():
    with tf.device('/job:learner'):
      step = tf.train.get_or_create_global_step()
    with tf.device('/job:other'):
      one = tf.size(tf.random.uniform([1]), out_type=tf.int64)
    update = step.assign_add(one, read_value=True)
    metrics, coord = Sums(), tf.train.Coordinator()
    session = tf.train.MonitoredTrainingSession(target)
    learner = experiment.LearnerLoop(session, update, metrics, coord, 1e9)
    learner.start()
    wait_until(lambda: metrics.global_step > 10)
    other.kill()
    learner.join(timeout=60)
    print(type(learner.error).__name__, coord.should_stop(), flush=True)
finally:
  other.kill()
  other.wait()
  os._exit(0)  # Such a session can't be closed any more.
"""


def free_address():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


def test_lost_session_ends_the_learner_with_its_error():
  """A monitored session would silently begin anew in another session."""
  cluster = {'learner': [free_address()], 'other': [free_address()]}
  result = subprocess.run(
    [sys.executable, '-c', _LEARNER, json.dumps(cluster), _SERVER],
    env={**os.environ, 'PYTHONPATH': f'{ROOT}:{TESTS}'},
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert result.stdout == 'SessionLost True\n', result.stderr


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 40 MB: a checkpoint has 8."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=40m', 'none', str(disk)]
  if os.geteuid() or subprocess.run(mount, check=False).returncode:
    pytest.skip('Disks can not be mounted here.')
  yield disk
  subprocess.run(['umount', str(disk)], check=True)


def fill(disk):
  """Writes a file until the disk is full; returns it."""
  file = disk / 'large'
  with contextlib.suppress(OSError), open(file, 'wb', buffering=0) as large:
    while True:
      large.write(bytes(100_000))
  return file


def test_full_disk_loses_neither_training_nor_checkpoints(small_disk):
  logdir = small_disk / 'log'
  program = training(
    logdir, '--test_interval_frames=500', '--test_num_episodes=1'
  )
  large = fill(small_disk)
  line = program.wait_for('can not be saved')
  assert 'No space left on device' in line
  kept = checkpoints.latest(str(logdir))
  assert str(checkpoints.read(kept)[1]) in kept
  large.unlink()
  wait_until(lambda: checkpoints.latest(str(logdir)) != kept)
  # And at the end of the training.
  fill(small_disk)
  kept = checkpoints.latest(str(logdir))
  program.process.send_signal(signal.SIGTERM)
  assert program.finish() == 1, program.output
  assert 'Traceback' not in program.output
  assert 'make room' in program.output.splitlines()[-1]
  assert checkpoints.latest(str(logdir)) == kept
  names = {path.name.rpartition('.')[0] for path in logdir.glob('model*')}
  assert len(names) == len(list(logdir.glob('model*.index')))
  code, output = run(*TOY, f'--logdir={logdir}')
  assert code == 2
  assert 'can not be written (No space left on device)' in output
  assert checkpoints.latest(str(logdir)) == kept


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


def test_optimizer_and_learning_rate_go_on(tmp_path):
  """After 300 updates, a single one more."""
  logdir = str(tmp_path / 'log')
  for frames in (3000, 3010):
    code, output = run(
      *TOY,
      f'--logdir={logdir}',
      f'--total_environment_frames={frames}',
      '--learning_rate=0.001',
      '--decay=0.99',
    )
    assert code == 0, output
  rates = plot.read_scalars(logdir)['learning_rate']
  assert rates[-1, 0] == 3010
  np.testing.assert_allclose(rates[-1, 1], 0.001 * 10 / 3010, rtol=1e-4)
  before, after = (
    tf.train.load_variable(
      f'{logdir}/model.ckpt-{frames}', 'agent/policy_logits/w/RMSProp'
    )
    for frames in (3000, 3010)
  )
  # They begin with 1. An update adds a hundredth of the squared gradient.
  assert before.min() < 0.1
  assert np.all(after >= 0.99 * before * (1 - 1e-5))
  assert after.min() < 0.1


def test_replayed_frames_and_episodes_are_not_counted(tmp_path):
  logdir = str(tmp_path / 'log')
  code, output = run(
    *TOY,
    *(f'--logdir={logdir}', '--total_environment_frames=300'),
    *('--replay_proportion=0.5', '--replay_size=50'),
  )
  assert code == 0, output
  assert 'Replay: 1 of each batch of unrolls' in output
  # An unroll has 5 frames, an episode 10: of two actors, one each is under way.
  assert '300 of 300 frames, in this run by 60 updates' in output
  assert checkpoint_step(logdir) == 300
  episodes = plot.read_scalars(logdir)['gym:toy_gym:Grey-v0/episode_return']
  assert 28 <= len(episodes) <= 30


def test_another_agents_checkpoint_is_refused_and_kept(tmp_path):
  logdir = tmp_path / 'log'
  frames = ['--total_environment_frames=40']
  assert run(*TOY, f'--logdir={logdir}', *frames)[0] == 0
  files = {path.name: path.read_bytes() for path in logdir.iterdir()}
  others = {
    '--level_name=gym:ALE/Pong-v5': 'here it is [4, 6, 4]',
    '--torso=deep': '--torso is deep, but the agent',
    '--core=none': '--core is none, but the agent',
    '--popart': '--popart is True, but the agent',
    '--height=40': '--height is 40, but the agent',
    # The same variables, but they have learned what this changes.
    '--num_action_repeats=4': '--num_action_repeats is 4, but the agent',
  }
  outputs = tmp_path / 'outputs'
  outputs.mkdir()
  answers = run_each(
    [[*TOY, f'--logdir={logdir}', other] for other in others], outputs
  )
  for (code, output), message in zip(answers, others.values(), strict=True):
    assert code == 2, output
    assert message in output
    assert len(output.splitlines()) == 1
  assert files == {path.name: path.read_bytes() for path in logdir.iterdir()}


IMPOSSIBLE = {
  '--num_actors=0': 'num_actors',
  '--batch_size=0': 'batch_size',
  '--unroll_length=0': 'unroll_length',
  '--torso=wide': 'torso',
  '--discounting=1.5': 'discounting',
  '--replay_proportion=0.2': 'of --batch_size=2 unrolls is 0',
  '--replay_proportion=0.5 --replay_size=10000000000': 'give a smaller',
  '--popart --reward_clipping=abs_one': 'add --reward_clipping=none',
  '--num_actor=3': 'num_actor',
  '--level_name=gym:NoSuchGame-v0': 'NoSuchGame',
  '--level_name=gym:CartPole-v1': 'image',
  '--logdir=/proc/log': '/proc/log can not be written',
  '--logdir=/tmp/\udcff': 'is not UTF-8',
  '--job_name=actor': 'needs a --task',
  '--task=1': 'has no --task=1',
  '--learner_address=here': 'is no host:port',
  '--learner_address=here:70000': 'is no host:port',
  '--learner_address=::1:8000': 'is no host:port',
  '--seed=-1': 'seed',
  '--mode=test': 'no checkpoint',
  '--checkpoint=model.ckpt-1': '--mode=test',
}


@pytest.fixture(scope='module')
def refusals(tmp_path_factory):
  """What the program says to each of them, and whether it made its folder."""
  logdirs = [tmp_path_factory.mktemp('refused') / 'log' for _ in IMPOSSIBLE]
  answers = run_each(
    [
      [*TOY, f'--logdir={logdir}', *flag.split()]
      for logdir, flag in zip(logdirs, IMPOSSIBLE, strict=True)
    ],
    tmp_path_factory.mktemp('outputs'),
  )
  return {
    flag: (*answer, logdir.exists())
    for flag, answer, logdir in zip(IMPOSSIBLE, answers, logdirs, strict=True)
  }


@pytest.mark.parametrize('flag', IMPOSSIBLE)
def test_impossible_flag_gets_one_sentence(refusals, flag):
  code, output, has_folder = refusals[flag]
  assert code == 2, output
  assert IMPOSSIBLE[flag] in output
  assert len(output.splitlines()) <= 2, output
  assert 'Traceback' not in output
  assert not has_folder


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
    '--unroll_length=20',
    '--total_environment_frames=1600',
    '--dmlab_maps=2',
    path=FAKE_LAB,
  )
  assert code == 0, output
  assert checkpoint_step(tmp_path / 'log') == 1600
  # Each actor has played several episodes.
  assert len(list((tmp_path / 'maps').glob('*.map'))) == 2


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
  assert output.count('make ops') == 3  # For each of the three libraries.


# Of the trainings that learn a toy with a bright square.
LEARNING = [
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
]


def test_agent_learns_to_answer_what_it_sees(tmp_path):
  """A bright square is in one third of the frame; its number is the answer."""
  logdir = str(tmp_path / 'log')
  level = 'gym:toy_gym:Thirds-v0'
  code, output = run(
    f'--level_name={level}',
    f'--logdir={logdir}',
    *LEARNING,
    '--total_environment_frames=30000',
  )
  assert code == 0, output
  returns = plot.read_scalars(logdir)[f'{level}/episode_return'][:, 1]
  # Ten answers, +1 or -1 each: chance is -10/3.
  assert returns[:50].mean() < 2
  assert returns[-100:].mean() > 8


def test_agent_learns_actions_of_several_heads(tmp_path):
  """A bright square is in a third and a half; only both right are an answer."""
  logdir = str(tmp_path / 'log')
  level = 'gym:toy_gym:Sixths-v0'
  train = [
    f'--level_name={level}',
    f'--logdir={logdir}',
    *LEARNING,
    '--core=none',
    '--learning_rate_schedule=constant',
  ]
  # The second goes on where the first ended.
  for frames in (4800, 9600):
    code, output = run(*train, f'--total_environment_frames={frames}')
    assert code == 0, output
  assert 'in this run by 60 updates' in output
  returns = plot.read_scalars(logdir)[f'{level}/episode_return'][:, 1]
  # Ten answers, +1 or -1 each. Chance is -20/3; with one of the two always
  # right, and the other by chance, it is 0.
  assert returns[:50].mean() < -3
  assert returns[-100:].mean() > 4


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
