# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the test mode."""

import json
import os
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

import checkpoints
import convolution
import dmlab30
import environments
import evaluation
import experiment
import toy_gym
from errors import UserError
from helpers import ROOT, TESTS, TOY, Program, run, save_agent, wait_until
from levels import Game

FLAGS = flags.FLAGS
if not FLAGS.is_parsed():
  FLAGS(['test_mode_test'])

FAKE_LAB = os.path.join(TESTS, 'fake_deepmind_lab')
LENGTHS = 'gym:toy_gym:Lengths-v0'


def flags_of(logdir, level_name=LENGTHS, **kwargs):
  return {
    'mode': 'test',
    'logdir': str(logdir),
    'level_name': level_name,
    'height': 4,
    'width': 6,
    'num_action_repeats': 1,
    'torso': 'shallow',
    'unroll_length': 10,
    **kwargs,
  }


def play(logdir, **kwargs):
  """Runs the test mode; returns the content of its JSON file."""
  with flagsaver.flagsaver(**flags_of(logdir, **kwargs)):
    # As if given on the command line.
    FLAGS['height'].present = FLAGS['width'].present = 1
    experiment.test()
  return read(logdir)


def play_with(*arguments):
  """Runs the test mode with flags as given on the command line."""
  with flagsaver.flagsaver():
    FLAGS(['experiment.py', '--mode=test', *arguments])
    experiment.test()


def read(logdir):
  (path,) = (logdir / 'test').glob('*.json')

  def refuse(name):
    raise ValueError(f'{name} is no JSON.')

  return json.loads(path.read_text(), parse_constant=refuse)


def num_played(logdir):
  """Returns the number of episodes that were written, of a test under way."""
  logs = list(logdir.glob('test/*.jsonl'))
  # The first line has the settings.
  return logs[0].read_bytes().count(b'\n') - 1 if logs else 0


def first_lengths(seeds):
  """Plays the first episode of each seed, and returns their lengths."""
  lengths = []
  for seed in seeds:
    env = toy_gym.Lengths()
    env.reset(seed=seed)
    lengths.append(env.length)
  return lengths


def test_short_episodes_are_not_favoured_and_seeds_decide(tmp_path, capsys):
  """A test that took the first 12 episodes to end would see short ones."""
  one, two = tmp_path / 'one', tmp_path / 'two'
  save_agent(one)
  save_agent(two)
  content = play(one, num_actors=6, test_num_episodes=12)
  episodes = content['episodes'][LENGTHS]
  assert [episode['number'] for episode in episodes] == list(range(12))
  with flagsaver.flagsaver(seed=1):
    game = Game(None, [LENGTHS], None, None, None, {})
    seeds = [evaluation.episode_seeds(game, index, 1)[0] for index in range(12)]
  lengths = first_lengths(seeds)
  assert 3 <= lengths.count(60) <= 9
  assert [episode['frames'] for episode in episodes] == lengths
  for episode, length in zip(episodes, lengths, strict=True):
    # The actions of 0 to 2, of some policy.
    actions = episode['episode_return'] - (100 if length == 60 else 0)
    assert 0 <= actions <= 2 * length
  returns = [episode['episode_return'] for episode in episodes]
  (row,) = content['levels']
  assert row['mean'] == pytest.approx(np.mean(returns))
  table = capsys.readouterr().out
  assert f'{np.mean(returns):.2f}' in table
  # Their actions, too, don't depend on what is played at the same time.
  alone = play(two, num_actors=1, test_num_episodes=12, unroll_length=50)
  assert alone['episodes'] == content['episodes']
  # More episodes are played on top of these. Another seed has other ones.
  more = play(two, num_actors=3, test_num_episodes=14)['episodes'][LENGTHS]
  assert more[:12] == episodes
  assert len(more) == 14


def test_actions_of_several_heads_are_reproduced(tmp_path):
  level = 'gym:toy_gym:Composed-v0?actions=dict'
  contents = []
  for name, others in (
    ('one', {'num_actors': 1, 'video_dir': str(tmp_path / 'videos')}),
    ('two', {'num_actors': 3, 'unroll_length': 7}),
    ('three', {'seed': 2}),
  ):
    save_agent(tmp_path / name, num_actions=(2, 4, 3))
    contents.append(
      play(tmp_path / name, level_name=level, test_num_episodes=3, **others)
    )
  one, two, three = (content['episodes'] for content in contents)
  assert one == two != three
  # Ten steps, of whose actions the last digit is 0 or 1, the middle one 0 to 3,
  # and the first one 4 to 6.
  returns = [episode['episode_return'] for episode in one[level]]
  assert all(4000 <= value <= 6310 for value in returns)
  assert len(set(returns)) > 1
  assert os.listdir(tmp_path / 'videos')
  # Of as many logits, but other heads.
  save_agent(tmp_path / 'other', num_actions=(3, 4, 2))
  with pytest.raises(UserError, match='agent/policy_logits_2_4_3/w is missing'):
    play(tmp_path / 'other', level_name=level)


def test_killed_test_goes_on_to_the_same_result(tmp_path):
  killed, whole = tmp_path / 'killed', tmp_path / 'whole'
  save_agent(killed)
  save_agent(whole)
  arguments = [
    f'--{name}={value}'
    for name, value in flags_of(killed, test_num_episodes=300).items()
  ]
  program = subprocess.Popen(
    [sys.executable, os.path.join(ROOT, 'experiment.py'), *arguments],
    env={**os.environ, 'PYTHONPATH': TESTS},
    stdout=subprocess.DEVNULL,
  )
  try:
    while num_played(killed) < 5:
      assert program.poll() is None
      time.sleep(0.05)
  finally:
    program.kill()
    program.wait()
  assert num_played(killed) < 300
  count = num_played(killed) + 10
  resumed = play(killed, test_num_episodes=count, num_actors=3)
  assert resumed['is_complete']
  uninterrupted = play(whole, test_num_episodes=count, num_actors=2)
  # Of the killed one, episodes beyond the last of these may be there as well.
  assert resumed['levels'] == uninterrupted['levels']
  assert (
    resumed['episodes'][LENGTHS][:count] == uninterrupted['episodes'][LENGTHS]
  )


def test_interrupted_test_sums_up_what_was_played(tmp_path):
  save_agent(tmp_path)
  arguments = flags_of(tmp_path, test_num_episodes=300).items()
  program = Program(*(f'--{name}={value}' for name, value in arguments))
  try:
    wait_until(
      lambda: num_played(tmp_path) >= 5 or program.process.poll() is not None
    )
    program.process.terminate()
    assert program.finish() == 1
  finally:
    program.process.kill()
  assert 'Interrupted: the same command' in program.output
  content = read(tmp_path)
  assert not content['is_complete']
  count = num_played(tmp_path)
  assert len(content['episodes'][LENGTHS]) == count >= 5
  assert content['levels'][0]['episodes'] == count


def test_level_that_keeps_crashing_is_missing(tmp_path, capsys):
  level = 'gym:toy_gym:Dies-v0'
  save_agent(tmp_path)
  with pytest.raises(SystemExit) as error:
    play(tmp_path, level_name=level, max_environment_restarts=1)
  assert error.value.code == 1
  (row,) = read(tmp_path)['levels']
  assert 'SIGKILL' in row['missing']
  assert '2 attempts' in row['missing']
  assert row['missing'] in capsys.readouterr().out


def describe(logdir, num_actions=3, frame_shape=(4, 6, 1), **flag_values):
  """Describes an agent as its training does."""
  values = {'level_name': LENGTHS, 'num_action_repeats': 2, **flag_values}
  spec = environments.EnvironmentSpec(np.arange(num_actions), frame_shape)
  checkpoints.save_description(str(logdir), spec, 'shallow', values, {})


def test_test_needs_the_log_folder_alone(tmp_path, monkeypatch):
  """And ignores what another version of the program had."""
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
  checkpoint = save_agent(tmp_path)
  describe(tmp_path, discounting=0.9, seed=7, num_actors=500, no_flag=1)
  code, output = run('--mode=test', f'--logdir={tmp_path}')
  assert code == 0, output
  assert 'test on CPU, float32\n' in output
  content = read(tmp_path)
  assert content['settings']['level_name'] == LENGTHS
  assert content['settings']['num_action_repeats'] == 2
  assert content['settings']['frame_shape'] == [4, 6, 1]
  assert content['settings']['seed'] == 1
  assert content['flags']['discounting'] == 0.9
  # The level may be another one; here, of the training's own background tests.
  (tmp_path / 'test').mkdir(exist_ok=True)
  for path in tmp_path.glob('model.ckpt-*'):
    path.rename(tmp_path / 'test' / path.name)
  checkpoint = tmp_path / 'test' / os.path.basename(checkpoint)
  play_with(
    f'--logdir={tmp_path / "other"}',
    f'--checkpoint={checkpoint}',
    '--level_name=gym:toy_gym:Grey-v0',
  )
  assert (
    read(tmp_path / 'other')['settings']['level_name'] == 'gym:toy_gym:Grey-v0'
  )


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--num_action_repeats=1', '--num_action_repeats is 1, .* with 2'),
    ('--height=5', '--height is 5, .* trained with 4'),
    ('--torso=deep', '--torso is deep, .* trained with shallow'),
  ],
)
def test_other_inputs_than_the_agents_are_refused(tmp_path, flag, message):
  save_agent(tmp_path)
  describe(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    play_with(f'--logdir={tmp_path}', flag)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'test').exists()
  # The same values may be given.
  play_with(
    f'--logdir={tmp_path}',
    '--num_action_repeats=2',
    '--height=4',
    '--torso=shallow',
    '--test_num_episodes=1',
  )


def test_start_tells_device_and_kernels(tmp_path, monkeypatch):
  """Where an accelerator is asked for, but can't be used, this is seen."""
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '-1')
  code, output = run(
    *TOY,
    f'--logdir={tmp_path}',
    '--torso=deep',
    '--total_environment_frames=10',
  )
  assert code == 0, output
  has_own = convolution.available()
  kernels = 'AVX-512' if has_own else "TensorFlow's"
  assert output.startswith(f'learner on CPU, {kernels} convolutions, float32\n')


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_flag_that_is_no_finite_number_is_refused(value):
  """It could not be written as JSON."""
  with flagsaver.flagsaver():
    FLAGS(['experiment.py', f'--entropy_cost={value}'])
    with pytest.raises(UserError, match=r'entropy_cost=.* finite number'):
      experiment.check_flags()


@pytest.mark.parametrize('text', ['{"flags": ', '{}', '[]', ''])
def test_damaged_description_gets_one_sentence(tmp_path, text):
  save_agent(tmp_path)
  (tmp_path / 'agent.json').write_text(text)
  with pytest.raises(UserError, match=r'agent\.json, .* can not be read'):
    play_with(f'--logdir={tmp_path}')


def test_agent_of_all_games_plays_one_with_all_actions(tmp_path):
  """Pong alone has 6 actions; the agent chooses among the console's 18."""
  pytest.importorskip('ale_py')
  save_agent(tmp_path, num_actions=18, frame_shape=(84, 84, 4))
  describe(
    tmp_path, 18, (84, 84, 4), level_name='atari57', num_action_repeats=4
  )
  play_with(
    f'--logdir={tmp_path}',
    '--level_name=gym:ALE/Pong-v5',
    '--test_num_episodes=1',
  )
  (row,) = read(tmp_path)['levels']
  assert -21 <= row['mean'] <= 21


@pytest.mark.parametrize('name', ['Huge', 'Nan'])
def test_episode_without_a_return_is_a_failure(tmp_path, capsys, name):
  save_agent(tmp_path)
  with pytest.raises(SystemExit):
    play(
      tmp_path,
      level_name=f'gym:toy_rewards:{name}-v0',
      max_environment_restarts=1,
    )
  (row,) = read(tmp_path)['levels']
  assert row['episodes'] == 0
  assert row['mean'] is None
  assert {'Huge': 'inf', 'Nan': 'nan'}[name] in row['missing']
  assert row['missing'].endswith('(2 attempts)')
  assert row['missing'] in capsys.readouterr().out


def test_suite_with_levels_that_can_not_be_played(tmp_path, capsys):
  """The stand-in for DeepMind Lab knows some of the levels, and has no data."""
  deepmind_lab = pytest.importorskip('deepmind_lab')
  if 'fake' not in deepmind_lab.__file__:
    pytest.skip('The real DeepMind Lab is installed.')
  save_agent(tmp_path, num_actions=9, frame_shape=(4, 6, 3))
  with pytest.raises(SystemExit) as error:
    play(
      tmp_path,
      level_name='dmlab30',
      test_num_episodes=2,
      max_environment_restarts=0,
      level_cache_dir=str(tmp_path / 'maps'),
      num_action_repeats=4,
    )
  assert error.value.code == 1
  content = read(tmp_path)
  rows = {row['level']: row for row in content['levels']}
  assert list(rows) == list(dmlab30.LEVEL_MAPPING.values())
  played = {level for level, row in rows.items() if row['episodes'] == 2}
  # The held-out levels are among them.
  assert played == {
    'explore_goal_locations_small',
    'language_select_located_object',
    'rooms_collect_good_objects_test',
    'rooms_exploit_deferred_effects_test',
  }
  for level, row in rows.items():
    if level in played:
      assert row['missing'] is None
      assert row['human_normalized'] is not None
    elif level == 'psychlab_continuous_recognition':
      assert '--dataset_path' in row['missing']
    elif level == 'rooms_watermaze':
      assert 'Level not found' in row['missing']
    else:
      assert row['missing']
  assert content['scores'] == {}
  table = capsys.readouterr().out
  assert 'rooms_watermaze (missing)' in table
  assert 'human-normalised score' not in table


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'checkpoint': '/none/model.ckpt-1'}, '/none/model.ckpt-1 does not exist'),
    ({'torso': 'deep'}, 'holds the checkpoint of another agent'),
    ({'level_name': 'gym:toy_gym:Rgb-v0'}, 'checkpoint of another agent'),
  ],
)
def test_impossible_test_gets_one_sentence(tmp_path, kwargs, message):
  save_agent(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    play(tmp_path, **kwargs)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'test').exists()


def test_chosen_checkpoint_is_tested_and_results_are_told_apart(tmp_path):
  first = save_agent(tmp_path)
  save_agent(tmp_path, step=80)
  content = play(tmp_path, checkpoint=first, test_num_episodes=1)
  assert content['settings']['frames'] == 40
  with pytest.raises(UserError, match='num_action_repeats is 1'):
    play(tmp_path, checkpoint=first, test_num_episodes=1, num_action_repeats=2)


def test_video_shows_the_first_episode_of_a_level(tmp_path):
  """Its frames are those that the environment shows for the episode's seed."""
  save_agent(tmp_path)
  level = 'gym:toy_gym:Grey-v0'
  videos = tmp_path / 'videos'
  content = play(
    tmp_path,
    level_name=level,
    test_num_episodes=2,
    video_dir=str(videos),
    unroll_length=4,
  )
  (path,) = videos.iterdir()
  assert path.name == 'gym_toy_gym_Grey-v0-frames40-seed1.mp4'
  with av.open(str(path)) as container:
    assert container.streams.video[0].codec_context.name == 'h264'
    frames = [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]
  # Ten steps, and the last frame for another second.
  assert len(frames) == 10 + 15
  # 4x6 pixels, each 56 times as large, above the text.
  assert frames[0].shape[1] == 336
  for step, frame in enumerate(frames[:10]):
    # The first pixel is the number of the step, the second row rises by 10.
    assert np.mean(frame[10:46, 10:46]) == pytest.approx(step, abs=6)
    assert np.mean(frame[66:102, 290:326]) == pytest.approx(50, abs=6)
  assert all(frame[224:].max() > 200 for frame in frames)  # The text.
  assert np.abs(frames[0][224:].astype(int) - frames[9][224:]).max() > 100

  # What was played is not played again, unless its video is missing.
  path.unlink()
  again = play(
    tmp_path, level_name=level, test_num_episodes=2, video_dir=str(videos)
  )
  assert path.exists()
  assert again['episodes'] == content['episodes']


def test_video_that_can_not_be_written_gets_one_sentence(tmp_path):
  """The error of the thread that plays ends the test."""
  save_agent(tmp_path)
  videos = tmp_path / 'videos'
  video = videos / 'gym_toy_gym_Grey-v0-frames40-seed1.mp4'
  video.mkdir(parents=True)
  with pytest.raises(UserError, match=r'mp4 can not be written \(Is a dir'):
    play(tmp_path, level_name='gym:toy_gym:Grey-v0', video_dir=str(videos))
  assert list(videos.iterdir()) == [video]
