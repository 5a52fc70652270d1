# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of environments: real libraries, DeepMind Lab by a stand-in."""

import contextlib
import functools
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types

import cloudpickle
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
import tree

import action_sets
import dmlab_choices
import dmlab_maps
import environments
import gym_kinds
import py_process
import vtrace
from helpers import alive

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_STAND_IN = os.path.join(_FOLDER, 'fake_deepmind_lab', 'deepmind_lab.py')
_PATIENCE = 30  # Seconds after which a wait counts as a hang.

_LARGE = 'contributed/dmlab30/'
_FORWARD = np.array(environments.DEFAULT_ACTION_SET[0], np.intc)
_FIRE = np.array(environments.DEFAULT_ACTION_SET[8], np.intc)

# Classes of this file travel to their processes by value: importing it there
# would take TensorFlow along.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _origin(module):
  spec = importlib.util.find_spec(module)
  return spec and spec.origin


# See conftest.py: environments' processes find one of the two.
needs_stand_in = pytest.mark.skipif(
  _origin('deepmind_lab') != _STAND_IN, reason='DeepMind Lab is installed'
)
needs_deepmind_lab = pytest.mark.skipif(
  _origin('deepmind_lab') == _STAND_IN, reason='needs DeepMind Lab'
)


@pytest.fixture(autouse=True)
def graph():
  with tf.Graph().as_default() as graph:
    yield graph


def _settings(**kwargs):
  defaults = environments.EnvironmentSettings(
    height=None,
    width=None,
    num_action_repeats=4,
    dataset_path='',
    level_cache_dir='level_cache',
    is_test=False,
  )
  return defaults._replace(**kwargs)


@contextlib.contextmanager
def _playing(level, seed=1, **settings):
  """Starts the environment of a level, as the program does."""
  settings = _settings(**settings)
  family = environments.family_of(level)
  spec = family.describe(level, settings)
  process = family.create(level, seed, settings, spec)
  process.start()
  try:
    yield process
  finally:
    process.close()


def _spec(level, **settings):
  return environments.family_of(level).describe(level, _settings(**settings))


def _refusal(level, **settings):
  """Returns the sentence with which a level is refused."""
  with pytest.raises(ValueError, match='Level') as error:
    _spec(level, **settings)
  sentence = str(error.value)
  assert repr(level) in sentence
  assert '\n' not in sentence
  assert sentence.endswith('.')
  assert not sentence.endswith('..')
  return sentence


def _frames(process, actions):
  """Returns the frames of an episode's beginning."""
  frames = [process.call('initial')[0]]
  for action in actions:
    frames.append(process.call('step', action).observation[0])
  return np.stack(frames)


# --- Which class plays what -------------------------------------------------


@pytest.mark.parametrize(
  ('level', 'family'),
  [
    ('gym:ALE/Pong-v5', environments.GymEnvironment),
    ('gym:VizdoomBasic-v1', environments.GymEnvironment),
    ('gym:CarRacing-v3', environments.GymEnvironment),
    ('gym:toy_gym:Rgb-v0', environments.GymEnvironment),
    ('seekavoid_arena_01', environments.PyProcessDmLab),
    (_LARGE + 'skymaze_irreversible_path_hard', environments.PyProcessDmLab),
  ],
)
def test_family_of_a_level(level, family):
  assert environments.family_of(level) is family


# --- DeepMind Lab, by the stand-in ------------------------------------------


@pytest.fixture
def lab(monkeypatch):
  """The stand-in in place of DeepMind Lab, in this process."""
  spec = importlib.util.spec_from_file_location('deepmind_lab', _STAND_IN)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setitem(sys.modules, 'deepmind_lab', module)
  return module


@pytest.fixture
def seeds(lab, monkeypatch):
  """The seeds of the episodes that start in this process."""
  seeds = []

  class Recording(lab.Lab):
    def reset(self, episode=-1, seed=None):
      seeds.append(seed)
      return super().reset(episode, seed)

  monkeypatch.setattr(lab, 'Lab', Recording)
  return seeds


def _dmlab(level='seekavoid_arena_01', repeats=4, seed=1, **kwargs):
  config = {'height': 5, 'width': 7}
  return environments.PyProcessDmLab(level, config, repeats, seed, **kwargs)


def test_dmlab_shows_the_frame_after_the_repeated_action(lab, seeds):
  env = _dmlab(repeats=3)
  frame, instruction = env.initial()
  assert instruction == ''
  np.testing.assert_array_equal(
    frame, lab.frame('seekavoid_arena_01', seeds[0], 0, 5, 7)
  )
  reward, done, (frame, _) = env.step(_FORWARD)
  assert (reward, done) == (3.0, False)
  np.testing.assert_array_equal(
    frame, lab.frame('seekavoid_arena_01', seeds[0], 3, 5, 7)
  )
  assert frame.dtype == np.uint8


def test_dmlab_reward_of_the_end_comes_with_the_next_episodes_frame(lab, seeds):
  env = _dmlab()
  env.initial()
  rewards, done = [], False
  while not done:
    reward, done, (frame, _) = env.step(_FIRE)
    rewards.append(reward)
  length = lab.episode_length('seekavoid_arena_01', seeds[0])
  assert len(rewards) == -(-length // 4)
  assert sum(rewards) == 10 * length + 100
  np.testing.assert_array_equal(
    frame, lab.frame('seekavoid_arena_01', seeds[1], 0, 5, 7)
  )


def _play_episodes(env, count):
  env.initial()
  while count:
    count -= env.step(_FORWARD)[1]


def test_dmlab_seeds_differ_between_episodes_and_reproduce(seeds):
  for seed in (1, 1, 2):
    _play_episodes(_dmlab(seed=seed), 3)
  first, again, other = np.reshape(seeds, (3, 4)).tolist()
  assert first == again
  assert len({*first, *other}) == 8


def test_dmlab_takes_each_action_of_the_paper(lab):
  specs = lab.Lab('seekavoid_arena_01', []).action_spec()
  # Table D.2: look left or right, look down or up, strafe, move, fire, jump,
  # crouch.
  assert environments.DEFAULT_ACTION_SET == (
    (0, 0, 0, 1, 0, 0, 0),  # Forward.
    (0, 0, 0, -1, 0, 0, 0),  # Backward.
    (0, 0, -1, 0, 0, 0, 0),  # Strafe left.
    (0, 0, 1, 0, 0, 0, 0),  # Strafe right.
    (-20, 0, 0, 0, 0, 0, 0),  # Look left.
    (20, 0, 0, 0, 0, 0, 0),  # Look right.
    (-20, 0, 0, 1, 0, 0, 0),  # Look left and move forward.
    (20, 0, 0, 1, 0, 0, 0),  # Look right and move forward.
    (0, 0, 0, 0, 1, 0, 0),  # Fire.
  )
  action_set = np.array(environments.DEFAULT_ACTION_SET)
  for action in action_set:  # int64: the graph's int32 is no matter of course.
    for value, spec in zip(action, specs, strict=True):
      assert spec['min'] <= value <= spec['max']
    env = _dmlab(repeats=1)
    env.initial()
    reward, _, _ = env.step(action)
    assert reward == action[3] + 10 * action[4]


def test_dmlab_gets_its_settings_as_strings(lab):
  config = {'height': 5, 'width': 7, 'fps': 30, 'logLevel': 'WARN'}
  env = environments.PyProcessDmLab('seekavoid_arena_01', config, 4, 1)
  assert env.initial()[0].shape == (5, 7, 3)
  with pytest.raises(RuntimeError, match='Invalid setting: hieght'):
    environments.PyProcessDmLab('seekavoid_arena_01', {'hieght': 5}, 4, 1)


def test_dmlab_level_without_instruction(lab, seeds):
  env = _dmlab('demos/extra_entities')
  frame, instruction = env.initial()
  assert instruction == ''
  np.testing.assert_array_equal(
    frame, lab.frame('demos/extra_entities', seeds[0], 0, 5, 7)
  )


def test_dmlab_instruction(lab, seeds):
  level = _LARGE + 'language_select_located_object'
  _, instruction = _dmlab(level).initial()
  assert instruction == lab.instruction(level, seeds[0]) != ''


def test_dmlab_runfiles_path(lab):
  _dmlab(runfiles_path='/some/where')
  assert lab.runfiles_path() == '/some/where'


def test_dmlab_closes(lab):
  env = _dmlab()
  env.initial()
  env.close()
  with pytest.raises(RuntimeError):
    env.step(_FORWARD)


def test_dmlab_compiles_a_map_once_for_all(lab, seeds, tmp_path):
  asked = []

  class Cache(environments.LocalLevelCache):
    def fetch(self, key, pk3_path):
      asked.append(super().fetch(key, pk3_path))
      return asked[-1]

  level = _LARGE + 'explore_goal_locations_small'
  for _ in range(2):
    _play_episodes(_dmlab(level, level_cache=Cache(str(tmp_path))), 1)
  assert asked == [False, False, True, True]
  maps = [path.read_bytes() for path in tmp_path.iterdir()]
  for seed in {*seeds}:  # A digest is behind each.
    assert sum(m.startswith(lab.map_of(level, seed)) for m in maps) == 1
  assert len(maps) == len({*seeds}) == 2


_EXPLORE = _LARGE + 'explore_goal_locations_small'
_LANGUAGE = _LARGE + 'language_select_located_object'


def test_dmlab_with_few_maps_compiles_each_once(lab, seeds, tmp_path):
  few = {'num_maps': 3, 'maps_seed': 5}
  for seed in (1, 2):  # Actors draw from the same.
    cache = environments.LocalLevelCache(str(tmp_path))
    _play_episodes(_dmlab(_EXPLORE, seed=seed, level_cache=cache, **few), 15)
  assert len(seeds) == 32
  assert len({*seeds}) == 3
  maps = [file for file in tmp_path.iterdir() if file.suffix == '.map']
  assert len(maps) == 3
  # The order differs between actors, and reproduces.
  first, other = seeds[:16], seeds[16:]
  seeds.clear()
  cache = environments.LocalLevelCache(str(tmp_path))
  _play_episodes(_dmlab(_EXPLORE, seed=1, level_cache=cache, **few), 15)
  assert seeds == first != other


def test_dmlab_test_plays_no_map_of_the_training(seeds, tmp_path):
  for seed in range(50):
    _dmlab(seed=seed, is_test=True).initial()
  assert len({*seeds}) == 50
  training = dmlab_maps.map_seeds('seekavoid_arena_01', 1, 1000)
  assert {seed % 2 for seed in seeds} == {1}
  assert {seed % 2 for seed in training} == {0}


def test_dmlab_compiles_a_map_beforehand_unless_it_is_there(
  lab, seeds, tmp_path
):
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, num_maps=2)
  assert [env.compile_map(np.int64(seed)) for seed in (4, 6, 4)] == [1, 1, 1]
  assert seeds == [4, 6]
  # Another size or data set shows the same map, another level another one.
  config = {'width': 20, 'datasetPath': 'dummy'}
  large = environments.PyProcessDmLab(
    _EXPLORE, config, 4, 1, level_cache=cache, num_maps=2
  )
  assert large.compile_map(4) == 1
  assert seeds == [4, 6]
  other = _dmlab(_LANGUAGE, level_cache=cache, num_maps=2)
  assert other.compile_map(4) == 1
  assert seeds == [4, 6, 4]
  # As does another setting.
  faster = environments.PyProcessDmLab(
    _EXPLORE, {'fps': 30}, 4, 1, level_cache=cache, num_maps=2
  )
  assert faster.compile_map(4) == 1
  assert seeds.pop() == 4
  assert seeds == [4, 6, 4]
  for path in tmp_path.glob('*.map'):
    path.unlink()
  assert env.compile_map(4) == 1
  assert seeds == [4, 6, 4, 4]
  (path,) = tmp_path.glob('*.map')
  assert path.read_bytes().startswith(lab.map_of(_EXPLORE, 4))


def test_dmlab_level_without_maps_has_none_to_compile(seeds, tmp_path):
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(level_cache=cache, num_maps=2)
  assert [env.compile_map(4), env.compile_map(4)] == [0, 0]
  assert seeds == [4]


def test_dmlab_maps_within_an_episode_are_cached_but_not_needed_for_its_begin(
  lab, seeds, tmp_path
):
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_LANGUAGE, level_cache=cache, num_maps=2, maps_seed=1)
  _play_episodes(env, 1)
  length = lab.episode_length(_LANGUAGE, seeds[0])
  contents = [path.read_bytes() for path in tmp_path.glob('*.map')]
  for part in range(1 + length // lab.RESTART_FRAMES):
    expected = lab.map_of(_LANGUAGE, seeds[0], part=part)
    assert sum(content.startswith(expected) for content in contents) == 1
  assert env.compile_map(seeds[0]) == 1


# --- Maps that are compiled ahead ---


@pytest.fixture
def hits(monkeypatch):
  """Whether each map that this process asked for was in its cache."""
  hits = []

  def fetch(self, key, pk3_path):
    hits.append(original(self, key, pk3_path))
    return hits[-1]

  original = environments.LocalLevelCache.fetch
  monkeypatch.setattr(environments.LocalLevelCache, 'fetch', fetch)
  return hits


@pytest.fixture
def slots(monkeypatch):
  """This test's own slots, all there are; `processes` has what is started."""
  monkeypatch.setattr(
    dmlab_maps, '_SLOT', f'\0impala-test-{os.getpid()}-{{user}}-{{number}}'
  )
  monkeypatch.setattr(dmlab_maps, '_SLOT_SECONDS', 0)
  slots = types.SimpleNamespace(processes=[], exit_code=None)

  def start(self, seed, slot):
    if slots.exit_code is not None:
      arguments = [sys.executable, '-c', f'exit({slots.exit_code})']
      self._process = subprocess.Popen(arguments)
    else:
      original(self, seed, slot)
    slots.processes.append(self._process)

  original = dmlab_maps.AheadCompiler._start
  monkeypatch.setattr(dmlab_maps.AheadCompiler, '_start', start)
  return slots


@needs_stand_in
def test_dmlab_finds_the_next_map_compiled(seeds, slots, hits, tmp_path):
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, compiles_ahead=True)
  _play_episodes(env, 4)
  assert hits == [False, True, True, True, True]
  assert len(slots.processes) == 4
  env.close()
  # The episodes are those that are played without.
  ahead = seeds[:]
  seeds.clear()
  _play_episodes(_dmlab(_EXPLORE), 4)
  assert seeds == ahead
  # Nothing is noted of seeds that hardly come again.
  assert {path.suffix for path in tmp_path.iterdir()} == {'.map'}


@needs_stand_in
def test_dmlab_compiles_nothing_ahead_that_is_there(slots, hits, tmp_path):
  few = {'num_maps': 3, 'compiles_ahead': True}
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, **few)
  _play_episodes(env, 20)
  assert hits == [False] + [True] * 20
  assert len(slots.processes) == 2
  # Nor on a level that has no maps.
  cache = environments.LocalLevelCache(str(tmp_path))
  _play_episodes(_dmlab(level_cache=cache, compiles_ahead=True), 3)
  assert len(slots.processes) == 2


@needs_stand_in
def test_dmlab_compiles_itself_if_others_compile_on_all_cores(
  slots, hits, tmp_path, monkeypatch
):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1})
  taken = [dmlab_maps._take_slot() for _ in range(3)]
  assert taken[2] is None
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, compiles_ahead=True)
  _play_episodes(env, 2)
  assert hits == [False] * 3
  assert slots.processes == []
  taken[1].close()
  env.step(_FORWARD)
  assert len(slots.processes) == 1
  # It has taken that place, and leaves it when it ends.
  assert dmlab_maps._take_slot() is None
  slots.processes[0].wait(timeout=_PATIENCE)
  with dmlab_maps._take_slot():
    pass
  taken[0].close()


@needs_stand_in
def test_dmlab_compilation_ahead_has_lower_priority_and_ends_with_it(
  slots, hits, tmp_path, monkeypatch
):
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, compiles_ahead=True)
  env.initial()
  monkeypatch.setenv('FAKE_DMLAB_COMPILE_SECONDS', '1000')
  env.step(_FORWARD)
  (process,) = slots.processes
  nice = os.getpriority(os.PRIO_PROCESS, 0)
  deadline = time.monotonic() + _PATIENCE
  while os.getpriority(os.PRIO_PROCESS, process.pid) != nice + 5:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  env.close()
  assert process.returncode == -signal.SIGKILL


@needs_stand_in
def test_dmlab_compilation_ahead_dies_with_an_environment_that_is_killed(
  tmp_path,
):
  code = """
    import os, sys, time
    import numpy as np
    import dmlab_maps, environments
    dmlab_maps._SLOT = f'\\0impala-test-{os.getpid()}-{{user}}-{{number}}'
    env = environments.PyProcessDmLab(
      sys.argv[1], {'width': 7, 'height': 5}, 4, 1,
      level_cache=environments.LocalLevelCache(sys.argv[2]),
      compiles_ahead=True,
    )
    env.initial()
    os.environ['FAKE_DMLAB_COMPILE_SECONDS'] = '1000'
    env.step(np.zeros([7], np.intc))
    process = env._episodes._ahead._process
    while os.getpriority(os.PRIO_PROCESS, process.pid) != 5 + os.nice(0):
      time.sleep(0.01)
    print(process.pid, flush=True)
    time.sleep(1000)
  """
  folders = [os.path.dirname(environments.__file__), os.path.dirname(_STAND_IN)]
  with subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(code), _EXPLORE, tmp_path],
    stdout=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(folders)},
  ) as process:
    pid = int(process.stdout.readline())
    process.kill()
  deadline = time.monotonic() + _PATIENCE
  try:
    while alive(pid):
      assert time.monotonic() < deadline
      time.sleep(0.01)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)


@needs_stand_in
def test_dmlab_goes_on_if_nothing_can_be_compiled_ahead(
  slots, hits, tmp_path, caplog
):
  slots.exit_code = 3
  cache = environments.LocalLevelCache(str(tmp_path))
  env = _dmlab(_EXPLORE, level_cache=cache, compiles_ahead=True)
  _play_episodes(env, 2)
  assert hits == [False] * 3
  assert 'not compiled ahead: the process that should ended' in caplog.text
  assert 'exit code 3' in caplog.text
  env.close()


@needs_stand_in
def test_dmlab_in_its_process_caches_maps_where_the_user_says(tmp_path):
  level = _LARGE + 'explore_goal_locations_small'
  cache = tmp_path / 'new' / 'cache'
  for _ in range(2):
    with _playing(level, level_cache_dir=str(cache)) as process:
      frame, instruction = process.call('initial')
      assert frame.shape == (72, 96, 3)
      assert instruction == b''
      assert process.call('step', _FORWARD)[:2] == (4.0, False)
  assert len(list(cache.iterdir())) == 1


@needs_stand_in
def test_dmlab_in_the_graph_gets_actions_of_its_set(tmp_path):
  level = 'seekavoid_arena_01'
  settings = _settings(level_cache_dir=str(tmp_path), height=5, width=7)
  spec = environments.PyProcessDmLab.describe(level, settings)
  assert spec.frame_shape == (5, 7, 3)
  process = environments.PyProcessDmLab.create(level, 1, settings, spec)
  env = environments.FlowEnvironment(process.proxy)
  output, state = env.initial()
  assert output.observation[0].shape == (5, 7, 3)
  output, _ = env.step(tf.constant(spec.action_set)[8], state)
  with tf.train.SingularMonitoredSession(
    hooks=[py_process.PyProcessHook()]
  ) as session:
    assert session.run(output.reward) == 40.0


@needs_stand_in
def test_dmlab_test_plays_held_out_levels_with_a_mixer_seed_of_its_own(
  lab, seeds, tmp_path
):
  held_out = _LARGE + 'rooms_collect_good_objects_test'
  common = _LARGE + 'rooms_collect_good_objects_train'
  size = {'height': 5, 'width': 7, 'level_cache_dir': str(tmp_path)}
  for is_test in (False, True):
    _dmlab(seed=3, is_test=is_test).initial()
  for level, is_test, mixer_seed in (
    (held_out, True, 0x600D5EED),
    (common, True, 0x600D5EED),
    (common, False, 0),
  ):
    with _playing(level, seed=3, is_test=is_test, **size) as process:
      np.testing.assert_array_equal(
        process.call('initial')[0],
        lab.frame(level, seeds[is_test], 0, 5, 7, mixer_seed),
      )
      length = lab.episode_length(level, seeds[is_test])
      steps = [process.call('step', _FORWARD) for _ in range(length)]
    ends = [i for i, (_, done, _) in enumerate(steps) if done]
    assert ends[0] == (length - 1) // 4
    # A test doesn't begin another episode, which may take long.
    assert (len(ends) == 1) == is_test
    if is_test:
      assert not any(reward for reward, _, _ in steps[ends[0] + 1 :])
      np.testing.assert_array_equal(steps[-1][2][0], steps[ends[0]][2][0])
  with pytest.raises(py_process.ProcessError, match='Hold-out'):
    with _playing(held_out, **size):
      pass


@needs_stand_in
def test_dmlab_level_with_data(tmp_path):
  level = _LARGE + 'psychlab_continuous_recognition'
  assert '--dataset_path=dummy' in _refusal(level, dataset_path='')
  assert "'/nowhere' is not a folder" in _refusal(
    level, dataset_path='/nowhere'
  )
  folders = {'dataset_path': str(tmp_path), 'level_cache_dir': str(tmp_path)}
  assert '2,400 are missing, the first is 0001.png' in _refusal(
    level, **folders
  )
  # As Psychlab asks for them: '%04d.png', from 1 on.
  for number in range(1, 2401):
    (tmp_path / ('%04d.png' % number)).touch()  # noqa: UP031
  with _playing(level, **folders) as process:
    process.call('initial')
  (tmp_path / '2181.png').unlink()
  assert '1 are missing, the first is 2181.png' in _refusal(level, **folders)


@needs_stand_in
def test_dmlab_missing_image_aborts_the_process_but_a_dummy_needs_none(
  tmp_path,
):
  level = _LARGE + 'psychlab_continuous_recognition'
  config = {'height': 5, 'width': 7, 'datasetPath': str(tmp_path)}
  process = py_process.PyProcess(
    environments.PyProcessDmLab, level, config, 4, 1
  )
  process.start()
  with pytest.raises(py_process.ProcessError, match='died'):
    process.call('initial')
  assert process.exit_code(_PATIENCE) == -signal.SIGABRT
  process.close()
  with _playing(
    level, dataset_path='dummy', level_cache_dir=str(tmp_path)
  ) as process:
    process.call('initial')


@needs_stand_in
def test_dmlab_process_goes_on_with_another_level(lab, seeds, tmp_path):
  few = {'num_maps': 2, 'maps_seed': 3}
  with _playing(
    _EXPLORE,
    height=5,
    width=7,
    level_cache_dir=str(tmp_path),
    **_chosen(**few),
  ) as process:
    process.call('initial')
    arguments = environments.PyProcessDmLab.level_arguments(_LANGUAGE)
    process.restart(seed=8, **arguments)
    frame, instruction = process.call('initial')
  _dmlab(
    _LANGUAGE,
    seed=8,
    level_cache=environments.LocalLevelCache(str(tmp_path)),
    **few,
  ).initial()
  (seed,) = seeds
  assert seed in dmlab_maps.map_seeds(_LANGUAGE, 3, 2)
  np.testing.assert_array_equal(frame, lab.frame(_LANGUAGE, seed, 0, 5, 7))
  assert instruction.decode() == lab.instruction(_LANGUAGE, seed)


# --- What can be chosen for DeepMind Lab ---


def _chosen(**kwargs):
  return {'dmlab': environments.DmLabSettings(**kwargs)}


def test_dmlab_renderer_is_the_one_that_was_chosen(lab, monkeypatch):
  renderers = []

  class Recording(lab.Lab):
    def __init__(self, *args, renderer, **kwargs):
      renderers.append(renderer)
      super().__init__(*args, renderer=renderer, **kwargs)

  monkeypatch.setattr(lab, 'Lab', Recording)
  _dmlab()
  _dmlab(renderer='hardware')
  assert renderers == ['software', 'hardware']


@needs_stand_in
@pytest.mark.parametrize(
  ('level', 'chosen', 'reason'),
  [
    ('seekavoid_arena_1', {}, 'Level not found'),
    (_EXPLORE, {'renderer': 'EGL'}, 'Invalid renderer: EGL'),
    (_EXPLORE, {'level_settings': 'fps=30,hieght=4'}, 'Invalid setting: hieg'),
    (_EXPLORE, {'level_settings': 'fps=fast'}, 'Invalid setting: fps'),
  ],
)
def test_dmlab_refuses_before_the_start_what_it_does_not_know(
  level, chosen, reason
):
  sentence = _refusal(level, **_chosen(**chosen))
  assert 'can not be played: ' in sentence
  assert reason in sentence
  assert 'RuntimeError' not in sentence


@needs_stand_in
def test_dmlab_takes_other_levels_and_settings(tmp_path):
  chosen = _chosen(
    level_settings='fps=30, appendCommand=+set a=b',
    renderer='hardware',
    runfiles_path='/some/where',
  )
  with _playing(
    'demos/extra_entities', level_cache_dir=str(tmp_path), **chosen
  ) as process:
    assert process.call('initial')[0].shape == (72, 96, 3)


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('', {}),
    ('fps=30', {'fps': '30'}),
    ('fps=30, a=b=c,d=', {'fps': '30', 'a': 'b=c', 'd': ''}),
    ('fps', "'fps' is not"),
    ('fps=30,', "'' is not"),
    ('=30', "'=30' is not"),
    ('fps=30,width=96', 'width is set by --width'),
    ('datasetPath=/data', 'datasetPath is set by --dataset_path'),
  ],
)
def test_dmlab_settings_are_read_or_refused(text, expected):
  if isinstance(expected, dict):
    assert dmlab_choices.level_settings(text) == expected
  else:
    with pytest.raises(ValueError, match=expected):
      dmlab_choices.level_settings(text)


def test_dmlab_action_sets(lab, tmp_path):
  assert dmlab_choices.action_set('paper') == environments.DEFAULT_ACTION_SET
  popart = np.array(dmlab_choices.action_set('popart'))
  assert popart.shape == (15, 7)
  assert len(np.unique(popart, axis=0)) == 15
  # Left, right, up and down are as often there.
  assert popart[:, :3].sum(axis=0).tolist() == [0, 0, 0]
  own = tmp_path / 'own.json'
  own.write_text('[[0, 0, 0, 1, 0, 0, 0], [512, -512, 1, -1, 1, 1, 1]]')
  specs = lab.Lab('seekavoid_arena_01', []).action_spec()
  for actions in (popart, np.array(dmlab_choices.action_set(str(own)))):
    assert (actions >= [spec['min'] for spec in specs]).all()
    assert (actions <= [spec['max'] for spec in specs]).all()


@needs_stand_in
def test_dmlab_plays_with_another_action_set():
  spec = _spec('seekavoid_arena_01', **_chosen(action_set='popart'))
  assert spec.action_set.shape == (15, 7)
  assert spec.action_set.dtype == np.intc
  assert spec.action_set[14].tolist() == [0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
  'content',
  [
    None,
    'no JSON',
    '5',
    '[]',
    '[[0, 0, 0, 1, 0, 0, 0]]',
    '[[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]',
    '[[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 2, 0, 0, 0]]',
    '[[0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0.5, 0, 0, 0]]',
    '[[0, 0, 0, 1, 0, 0, 0], "0001000"]',
    '{"a": 1, "b": 2}',
  ],
)
def test_dmlab_action_set_that_can_not_be_gets_one_sentence(tmp_path, content):
  path = tmp_path / 'actions.json'
  if content is not None:
    path.write_text(content)
  sentence = _refusal_of_actions(str(path))
  assert f'--dmlab_action_set={path}' in sentence
  assert ('must have a list' in sentence) == (content is not None)


def _refusal_of_actions(path):
  with pytest.raises(ValueError, match='--dmlab_action_set') as error:
    dmlab_choices.action_set(path)
  assert '\n' not in str(error.value)
  return str(error.value)


def test_dmlab_that_is_not_installed(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  sentence = _refusal('seekavoid_arena_01')
  assert 'DeepMind Lab, which is not installed' in sentence
  assert 'Dockerfile' in sentence
  # The level it recommends must be one.
  recommended = sentence.split('--level_name=')[1].rstrip('.')
  assert _spec(recommended).frame_shape == (72, 96, 3)


# --- DeepMind Lab itself ----------------------------------------------------


@needs_deepmind_lab
@pytest.mark.parametrize(
  'level', ['seekavoid_arena_01', _LARGE + 'explore_goal_locations_small']
)
def test_real_dmlab(level, tmp_path):
  with _playing(level, level_cache_dir=str(tmp_path)) as process:
    frame, instruction = process.call('initial')
    assert frame.shape == (72, 96, 3)
    assert frame.dtype == np.uint8
    assert isinstance(instruction, bytes)
    for action in environments.DEFAULT_ACTION_SET:
      reward, done, (following, _) = process.call(
        'step', np.array(action, np.intc)
      )
      assert reward.dtype == np.float32
      assert not done
    assert (following != frame).any()
  assert any(tmp_path.iterdir()) == ('explore' in level)


@needs_deepmind_lab
def test_real_dmlab_episode_ends_and_the_next_begins(tmp_path):
  with _playing('seekavoid_arena_01', level_cache_dir=str(tmp_path)) as process:
    first, _ = process.call('initial')
    num_steps, done = 0, False
    while not done:
      _, done, (frame, _) = process.call('step', _FORWARD)
      num_steps += 1
      assert num_steps <= 60 * 60  # Of an hour; an episode takes a minute.
    assert frame.shape == first.shape
    assert (frame != first).any()
    assert not process.call('step', _FORWARD)[1]


@needs_deepmind_lab
def test_real_dmlab_seeds_reproduce(tmp_path):
  frames = []
  for seed in (1, 1, 2):
    with _playing(
      _LARGE + 'explore_goal_locations_small',
      seed=seed,
      level_cache_dir=str(tmp_path),
    ) as process:
      frames.append(process.call('initial')[0])
  np.testing.assert_array_equal(frames[0], frames[1])
  assert (frames[0] != frames[2]).any()


# --- In the graph -----------------------------------------------------------


class Scripted:
  """Episodes of 3 steps; shows its calls and the last action."""

  def __init__(self):
    self._calls = 0
    self._steps = 0

  def initial(self):
    return self._observation(-1)

  def step(self, action):
    self._calls += 1
    self._steps = self._steps % 3 + 1
    reward = float(self._calls)
    return reward, self._steps == 3, self._observation(action)

  def _observation(self, action):
    return np.array([self._calls, action], np.int32), f'call {self._calls}'

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    observation = (
      py_process.ArraySpec((2,), np.int32),
      py_process.ArraySpec((), object),
    )
    if method_name == 'initial':
      return observation
    return (
      py_process.ArraySpec((), np.float32),
      py_process.ArraySpec((), np.bool_),
      observation,
    )


# What seven steps with the actions 10, 11, ... must give.
_REWARDS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
_DONE = [False, False, True, False, False, True, False]
_RETURNS = [1.0, 3.0, 6.0, 4.0, 9.0, 15.0, 7.0]
_STEPS = [1, 2, 3, 1, 2, 3, 1]
_SEEN = [[n, 9 + n] for n in range(1, 8)]
_TEXTS = [b'call %d' % n for n in range(1, 8)]
_ACTIONS = np.arange(10, 17, dtype=np.int32)


def _run(*fetches):
  with tf.train.SingularMonitoredSession(
    hooks=[py_process.PyProcessHook()]
  ) as session:
    return session.run(fetches)


def _check_seven_steps(output):
  np.testing.assert_array_equal(output.reward, _REWARDS)
  np.testing.assert_array_equal(output.done, _DONE)
  np.testing.assert_array_equal(output.info.episode_return, _RETURNS)
  np.testing.assert_array_equal(output.info.episode_step, _STEPS)
  np.testing.assert_array_equal(output.observation[0], _SEEN)
  np.testing.assert_array_equal(output.observation[1], _TEXTS)


def test_flow_starts_with_done_and_empty_accounts():
  process = py_process.PyProcess(Scripted)
  output, state = environments.FlowEnvironment(process.proxy).initial()
  output, state = _run(output, state)
  assert output.reward == 0.0
  assert output.done
  assert output.info == state == (0.0, 0)
  np.testing.assert_array_equal(output.observation[0], [0, -1])
  assert output.observation[1] == b'call 0'


def test_flow_keeps_accounts_and_order_of_unrolled_steps():
  env = environments.FlowEnvironment(py_process.PyProcess(Scripted).proxy)
  initial, state = env.initial()
  outputs = []
  for action in _ACTIONS:
    output, state = env.step(tf.constant(action), state)
    outputs.append(output)
  initial, outputs, state = _run(initial, outputs, state)
  np.testing.assert_array_equal(initial.observation[0], [0, -1])
  _check_seven_steps(tf.nest.map_structure(lambda *t: np.stack(t), *outputs))
  # The state goes on after an end from nothing; here one step later.
  assert state == (7.0, 1)


def test_flow_state_after_an_end_is_zero():
  env = environments.FlowEnvironment(py_process.PyProcess(Scripted).proxy)
  _, state = env.initial()
  for _ in range(3):
    output, state = env.step(tf.constant(0), state)
  output, state = _run(output, state)
  assert output.info == (6.0, 3)
  assert state == (0.0, 0)


def test_flow_runs_even_if_only_the_state_is_asked_for():
  env = environments.FlowEnvironment(py_process.PyProcess(Scripted).proxy)
  _, state = env.initial()
  for action in _ACTIONS:
    _, state = env.step(tf.constant(action), state)
  assert _run(state) == ((7.0, 1),)


@pytest.mark.parametrize('parallel_iterations', [1, 10])
def test_flow_in_a_while_loop(parallel_iterations):
  env = environments.FlowEnvironment(py_process.PyProcess(Scripted).proxy)
  output, state = env.initial()
  arrays = tf.nest.map_structure(
    lambda tensor: tf.TensorArray(tensor.dtype, 7, element_shape=tensor.shape),
    output,
  )

  def step(i, state, flat):
    output, state = env.step(tf.constant(_ACTIONS)[i], state)
    leaves = tf.nest.flatten(output)
    flat = [a.write(i, leaf) for a, leaf in zip(flat, leaves, strict=True)]
    return i + 1, state, flat

  _, _, flat = tf.while_loop(
    lambda i, *_: i < 7,
    step,
    (0, state, tf.nest.flatten(arrays)),
    parallel_iterations=parallel_iterations,
  )
  output = tf.nest.pack_sequence_as(output, [a.stack() for a in flat])
  _check_seven_steps(*_run(output))


def test_flow_in_a_scan():
  env = environments.FlowEnvironment(py_process.PyProcess(Scripted).proxy)
  output, _ = tf.scan(
    lambda last, action: env.step(action, last[1]),
    tf.constant(_ACTIONS),
    env.initial(),
  )
  _check_seven_steps(*_run(output))


# --- Gymnasium --------------------------------------------------------------

_TOY_SIZE = {'height': 4, 'width': 6}


def test_gym_grey_frames_get_a_channel():
  for level in ('gym:toy_gym:Grey-v0', 'gym:toy_gym:Grey3d-v0'):
    assert _spec(level, **_TOY_SIZE).frame_shape == (4, 6, 1)
    with _playing(level, **_TOY_SIZE, num_action_repeats=1) as process:
      frame, instruction = process.call('initial')
      assert frame.dtype == np.uint8
      assert frame.shape == (4, 6, 1)
      assert instruction == b''
      step = process.call('step', 2)
      assert step[:2] == (12.0, False)
      frame, _ = step.observation
      assert frame[0, [0, 1, 3], 0].tolist() == [1, 1, 2]
      np.testing.assert_array_equal(
        frame[1:, :, 0], 10 * np.arange(18).reshape(3, 6)
      )


def test_gym_colours_are_kept():
  assert _spec('gym:toy_gym:Rgb-v0').frame_shape == (72, 96, 3)
  with _playing('gym:toy_gym:Rgb-v0', **_TOY_SIZE) as process:
    frame, _ = process.call('initial')
    assert frame[1, 2].tolist() == [20, 21, 22]


def test_gym_dict_gives_the_image_and_the_text():
  with _playing('gym:toy_gym:Dict-v0', **_TOY_SIZE) as process:
    frame, instruction = process.call('initial')
    assert frame[1, 2].tolist() == [20, 21, 22]
    assert instruction == b'find the exit'


def test_gym_dict_with_an_image_of_another_name():
  with _playing('gym:toy_gym:Named-v0', **_TOY_SIZE) as process:
    assert process.call('initial')[0][2, :, 0].tolist() == list(
      range(60, 120, 10)
    )


def test_gym_actions_may_start_anywhere():
  level = 'gym:toy_gym:Start-v0'
  assert _spec(level).action_set.tolist() == [-1, 0, 1]
  with _playing(level, num_action_repeats=1) as process:
    process.call('initial')
    rewards = [process.call('step', a).reward for a in (-1, 0, 1)]
  assert rewards == [9, 20, 31]


@pytest.mark.parametrize(
  ('name', 'action_set'),
  [
    ('binary', [[0, 1]] * 3),
    ('grid', [[[0, 1]] * 2] * 2),
    ('one', [[0, 1, 2]]),
    ('discrete', [[0, 1], [-1, 0, 1]]),
    ('tuple', [[0, 1, 2], [[0, 1]] * 2]),
    (
      'dict',
      {'buttons': {'10': [0, 1], '9': [0, 1, 2, 3]}, 'turn': [4, 5, 6]},
    ),
  ],
)
def test_gym_actions_may_be_made_of_several(name, action_set):
  """The environment gets them in its own structure and with its own types."""
  level = f'gym:toy_gym:Composed-v0?actions={name}'
  spec = _spec(level, **_TOY_SIZE)
  told = action_sets.to_json(spec.action_set)
  assert told['action_set'] == action_set
  counts = action_sets.num_actions(spec.action_set)
  rows, first = action_sets.table(spec.action_set)
  heads = tree.flatten_up_to(told['num_actions'], action_set)
  with _playing(level, **_TOY_SIZE, num_action_repeats=1) as process:
    process.call('initial')
    for choice in range(4):
      action = np.minimum(choice, np.array(counts) - 1)
      chosen = [head[i] for head, i in zip(heads, action, strict=True)]
      reward = process.call('step', rows[first + action]).reward
      assert reward == sum(10**i * number for i, number in enumerate(chosen))
  read = action_sets.from_json(json.loads(json.dumps(told)))
  assert action_sets.to_json(read) == told


def test_actions_are_told_as_the_environment_takes_them():
  lab = np.array(environments.DEFAULT_ACTION_SET)
  told = [
    action_sets.describe(lab, 7),
    action_sets.describe(_spec('gym:toy_gym:Start-v0').action_set, 0),
    *(
      action_sets.describe(
        _spec(f'gym:toy_gym:Composed-v0?actions={name}').action_set, action
      )
      for name, action in (('tuple', [2, 0, 1]), ('dict', [1, 3, 0]))
    ),
  ]
  assert told == [
    '[20 0 0 1 0 0 0]',
    '-1',
    '[2 [0 1]]',
    '{buttons: {10: 1 9: 3} turn: 4}',
  ]


def test_gym_repeats_sum_the_rewards_and_stop_at_the_end():
  with _playing('gym:toy_gym:Grey-v0', **_TOY_SIZE) as process:
    process.call('initial')
    steps = [process.call('step', action) for action in (0, 1, 2, 0)]
  rewards, done, observations, game_over, _ = zip(*steps, strict=True)
  # 10 + ... + 40, 50 + ... + 80 and an action of 1, 90 + 100 and one of 2.
  assert rewards == (100.0, 264.0, 194.0, 100.0)
  assert done == game_over == (False, False, True, False)
  told = [frame[0, :2, 0].tolist() for frame, _ in observations]
  assert told == [[4, 1], [8, 1], [0, 2], [4, 2]]


def _check_cut(steps, end, reward):
  """Checks that step `end`, of some reward, is cut off, and no other step."""
  for i, step in enumerate(steps):
    is_cut = i == end + 1
    assert step.done == step.game_over == step.truncated == is_cut
  assert steps[end].reward == reward
  assert steps[end + 1].reward == 0


@pytest.mark.parametrize(('name', 'length'), [('Cut', 10), ('Limit', 5)])
def test_gym_truncation_has_an_entry_of_its_own(name, length):
  with _playing(
    f'gym:toy_gym:{name}-v0', **_TOY_SIZE, num_action_repeats=1
  ) as process:
    process.call('initial')
    steps = [process.call('step', 1) for _ in range(length + 2)]
  _check_cut(steps, length - 1, 10 * length + 1)
  told = [
    step.observation[0][0, :2, 0].tolist() for step in steps[length - 1 :]
  ]
  # The last of the episode, the first of the next one, and its second.
  assert told == [[length, 1], [0, 2], [1, 2]]


def test_gym_truncation_in_the_midst_of_repeated_actions():
  with _playing('gym:toy_gym:Limit-v0', **_TOY_SIZE) as process:
    process.call('initial')
    steps = [process.call('step', 0) for _ in range(4)]
  _check_cut(steps, 1, 50.0)
  assert [step.reward for step in steps] == [100.0, 50.0, 0.0, 100.0]


def test_gym_end_that_is_also_a_limit_is_an_end():
  level = 'gym:toy_gym:Grey-v0?max_episode_steps=10'
  with _playing(level, **_TOY_SIZE, num_action_repeats=1) as process:
    process.call('initial')
    steps = [process.call('step', 0) for _ in range(11)]
  assert [step.done for step in steps] == [False] * 9 + [True, False]
  assert [step.game_over for step in steps] == [step.done for step in steps]
  assert not any(step.truncated for step in steps)


@pytest.mark.parametrize('name', ['Cut', 'Grey'])
def test_gym_test_is_over_at_any_end(name):
  with _playing(
    f'gym:toy_gym:{name}-v0', **_TOY_SIZE, num_action_repeats=1, is_test=True
  ) as process:
    process.call('initial')
    steps = [process.call('step', 1) for _ in range(15)]
  assert [step.done for step in steps] == [False] * 9 + [True] + [False] * 5
  assert steps[9].game_over
  assert steps[9].reward == 101
  assert steps[9].observation[0][0, :2, 0].tolist() == [10, 1]
  _check_silence(steps[9:])


def _unroll(level, actions, **settings):
  """Returns a `StepOutput` of [len(actions)], of a level in the graph."""
  settings = _settings(**settings)
  family = environments.family_of(level)
  spec = family.describe(level, settings)
  process = family.create(level, 1, settings, spec)
  env = environments.FlowEnvironment(process.proxy)
  output, _ = tf.scan(
    lambda last, action: env.step(action, last[1]),
    tf.constant(actions, tf.int32),
    env.initial(),
  )
  return _run(output)[0]


def test_gym_accounts_leave_out_the_entry_of_a_truncation():
  output = _unroll(
    'gym:toy_gym:Grey-v0?length=3&truncates=true', [0] * 9, num_action_repeats=1
  )
  np.testing.assert_array_equal(
    output.info.episode_return, [10, 30, 60, 60, 10, 30, 60, 60, 10]
  )
  np.testing.assert_array_equal(
    output.info.episode_step, [1, 2, 3, 3, 1, 2, 3, 3, 1]
  )
  np.testing.assert_array_equal(np.flatnonzero(output.game_over), [3, 7])
  np.testing.assert_array_equal(output.truncated, output.game_over)
  np.testing.assert_array_equal(output.done, output.game_over)


@pytest.mark.parametrize('is_cut', [True, False])
def test_true_values_are_what_a_learner_as_described_converges_to(is_cut):
  # Each step gives 1; episodes of 3 steps. If time only cuts them off, what is
  # to come is the same everywhere: 1 / (1 - discounting).
  discounting, num_steps = 0.9, 11
  output = _unroll(
    f'gym:toy_gym:Ones-v0?length=3&truncates={is_cut}',
    [0] * num_steps,
    num_action_repeats=1,
  )
  if is_cut:
    values = np.full(num_steps + 1, 1 / (1 - discounting))
  else:
    left = 3 - np.arange(num_steps + 1) % 3
    values = (1 - discounting**left) / (1 - discounting)
  values = values.astype(np.float32)[:, np.newaxis]
  truncated, done = output.truncated[:, np.newaxis], output.done[:, np.newaxis]
  assert truncated.any() == is_cut
  assert done.any()
  # As the module's docstring says.
  returns = vtrace.from_importance_weights(
    log_rhos=np.log(np.linspace(0.5, 2, num_steps))[:, np.newaxis],
    discounts=np.where(done, 0, discounting),
    rewards=np.where(truncated, values[:-1], output.reward[:, np.newaxis]),
    values=values[:-1],
    bootstrap_value=values[-1],
  )
  with tf.Session() as session:
    targets, advantages = session.run(returns)
  np.testing.assert_allclose(targets, values[:-1], rtol=1e-5)
  np.testing.assert_allclose(advantages, 0, atol=1e-5)


def test_gym_frames_are_resized():
  rows = 10 * np.arange(18.0).reshape(3, 6)
  with _playing('gym:toy_gym:Grey-v0', height=8, width=12) as process:
    larger = process.call('initial')[0]
  np.testing.assert_array_equal(
    larger[2:, :, 0], rows.repeat(2, axis=0).repeat(2, axis=1)
  )
  with _playing('gym:toy_gym:Rgb-v0', height=2, width=3) as process:
    smaller = process.call('initial')[0]
  means = rows[1:].reshape(2, 3, 2).mean((0, 2))
  np.testing.assert_allclose(smaller[1, :, 1], means + 1, atol=0.5)


def _random_numbers(seed):
  with _playing('gym:toy_gym:Grey-v0', seed=seed, **_TOY_SIZE) as process:
    frames = [process.call('initial')[0]]
    for _ in range(5):
      for _ in range(3):
        frame, _ = process.call('step', 0).observation
      frames.append(frame)
  return [int(frame[0, 2, 0]) for frame in frames]


def test_gym_seeds_differ_between_episodes_and_reproduce():
  first, again, other = map(_random_numbers, (1, 1, 2))
  assert first == again
  assert first != other
  assert len(set(first)) > 3


@pytest.mark.parametrize(
  ('level', 'reason'),
  [
    ('gym:CartPole-v1', 'it shows no image'),
    ('gym:toy_gym:Float-v0', 'it shows no image.*float32'),
    ('gym:toy_gym:ChannelsFirst-v0', r'it shows no image.*\(3, 4, 6\)'),
    ('gym:toy_gym:Vector-v0', r'it shows no image.*\(5,\)'),
    ('gym:toy_gym:Text-v0', 'it shows no image.*Text'),
    *(
      (
        level,
        'its actions must be Discrete, MultiDiscrete or MultiBinary, or a '
        f'Tuple or Dict of these, but there is {what}',
      )
      for level, what in (
        ('gym:toy_gym:Composed-v0?actions=box', r'Box\(-1.0, 1.0, \(3,\)'),
        ('gym:toy_gym:Composed-v0?actions=part', r'Box\(-1.0, 1.0, \(3,\)'),
        ('gym:toy_gym:Composed-v0?actions=nothing', r'Tuple\(\)'),
        ('gym:VizdoomDeathmatch-v1', r'Box\(.*\(3,\)'),
      )
    ),
    ('gym:NoSuchThing-v0', "`NoSuchThing` doesn't exist"),
    ('gym:toy_gym:NoSuchThing-v0', "`NoSuchThing` doesn't exist"),
    ('gym:ALE/Pongg-v5', 'Did you mean: `Pong`'),
    ('gym:no_such_module:Grey-v0', "No module named 'no_such_module'"),
  ],
)
def test_gym_refuses_in_one_sentence(level, reason):
  sentence = _refusal(level)
  assert sentence.startswith(f'Level {level!r} can not be played: ')
  assert re.search(reason, sentence), sentence


# --- Rewards, actions and arguments of Gymnasium environments ---------------


@pytest.mark.parametrize(
  ('reward', 'value'),
  [
    ('nan', 'nan'),
    ('inf', '-inf'),
    ('large', '1e+39'),
    ('none', 'None'),
    ('text', 'much'),
    ('several', '[1. 1.]'),
  ],
)
def test_gym_reward_that_is_no_finite_number_is_an_error(reward, value):
  level = f'gym:toy_gym:Rewarding-v0?reward={reward}'
  with _playing(level, num_action_repeats=1) as process:
    process.call('initial')
    for _ in range(2):
      process.call('step', 0)
    with pytest.raises(py_process.ProcessError) as error:
      process.call('step', 0)
  sentence = str(error.value).rstrip().rpartition('ValueError: ')[2]
  assert sentence == (
    f'{level} gave {value} as the reward of step 3 of a game, but rewards must '
    'be finite numbers'
  )


@pytest.mark.parametrize(
  ('reward', 'value'), [('bool', 1.0), ('array', 2.5), ('fraction', 2.5)]
)
def test_gym_rewards_of_other_types(reward, value):
  level = f'gym:toy_gym:Rewarding-v0?reward={reward}'
  with _playing(level, num_action_repeats=1) as process:
    process.call('initial')
    rewards = [process.call('step', 0).reward for _ in range(4)]
  assert rewards == [10, 20, value, 40]


def test_dmlab_reward_that_is_no_finite_number_is_an_error(lab, monkeypatch):
  env = _dmlab(repeats=3)
  env.initial()
  env.step(_FORWARD)
  monkeypatch.setattr(lab.Lab, 'step', lambda *args, **kwargs: float('nan'))
  with pytest.raises(ValueError, match=r'seekavoid_arena_01 gave nan .* 2 '):
    env.step(_FORWARD)


def test_gym_actions_are_integers_of_the_spaces_dtype():
  with _playing('gym:toy_gym:Typed-v0', num_action_repeats=1) as process:
    process.call('initial')
    assert [process.call('step', a).reward for a in range(3)] == [1, 1, 1]


def test_gym_arguments_are_given_to_the_environment():
  level = 'gym:toy_gym:Grey-v0?start=-1&layout=Rgb&truncates=true&length=2'
  assert _spec(level).action_set.tolist() == [-1, 0, 1]
  assert _spec(level).frame_shape == (72, 96, 3)
  with _playing(level, num_action_repeats=1) as process:
    process.call('initial')
    steps = [process.call('step', 1) for _ in range(3)]
  _check_cut(steps, 1, 21)


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('3', 3),
    ('-2.5', -2.5),
    ('true', True),
    ('True', True),
    ('False', False),
    ('None', None),
    ('null', None),
    ('[1,2]', [1, 2]),
    ('"3"', '3'),
    ('a%26b', 'a&b'),
    ('RES_160X120', 'RES_160X120'),
    ('', ''),
  ],
)
def test_gym_values_of_arguments(text, value):
  name, arguments = gym_kinds.parse_level(f'gym:m:A-v0?x={text}&y=1')
  assert name == 'm:A-v0'
  assert arguments == {'x': value, 'y': 1}
  assert type(arguments['x']) is type(value)


@pytest.mark.parametrize(
  ('level', 'reason'),
  [
    ('gym:toy_gym:Grey-v0?length', 'as in key=value&key=value'),
    (
      'gym:toy_gym:Grey-v0?lenght=3',
      "has no argument 'lenght', but layout, length, start, truncates",
    ),
    # Of a class that passes what it doesn't know on to the class it is of.
    (
      'gym:toy_levels:MyLevel-v0?lenght=3',
      "has no argument 'lenght', but .* length, .* see_through_walls",
    ),
    ('gym:VizdoomBasic-v1?no_such=3', 'ViZDoom has no setting no_such=3'),
    ('gym:VizdoomBasic-v1?screen_format=X', 'no setting screen_format=X'),
    ('gym:VizdoomBasic-v1?frame_skip=2', 'set by --num_action_repeats'),
    ('gym:ALE/Pong-v5?frameskip=2', 'set by --num_action_repeats'),
    ('gym:ALE/Pong-v5?sticky=2', "has no argument 'sticky', but .*difficulty"),
    ('gym:no/such/file.cfg', 'there is no file /.*/no/such/file.cfg'),
    # The whole message, which has two lines.
    (
      'gym:toy_gym:Secretive-v0',
      'played: no licence file see http://localhost.$',
    ),
  ],
)
def test_gym_refuses_arguments_in_one_sentence(level, reason):
  assert re.search(reason, _refusal(level)), _refusal(level)


# --- What environments are, whatever their names ----------------------------


def _frames_of(level, **settings):
  """Returns frames, instructions and rewards of the beginning of a game."""
  with _playing(level, **settings) as process:
    observations, rewards = [process.call('initial')], []
    for action in (2, 2, 1, 3) * 5:
      step = process.call('step', action)
      observations.append(step.observation)
      rewards.append(step.reward)
  frames, instructions = zip(*observations, strict=True)
  return np.stack(frames), instructions, np.array(rewards)


@pytest.mark.parametrize(
  ('name', 'library'),
  [
    ('MiniGrid-DoorKey-5x5-v0', 'minigrid'),
    ('BabyAI-GoToObj-v0', 'minigrid'),
    ('ALE/Pong-v5', 'ale_py'),
    ('VizdoomBasic-v1', 'vizdoom.gymnasium_wrapper'),
  ],
)
def test_module_before_the_id_changes_nothing(name, library):
  level, other = f'gym:{name}', f'gym:{library}:{name}'
  for ours, theirs in zip(_spec(level), _spec(other), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  for ours, theirs in zip(_frames_of(level), _frames_of(other), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_minigrid_level_of_a_user_is_seen_as_a_picture():
  level = 'gym:toy_levels:MyLevel-v0'
  with _playing(level, num_action_repeats=1, height=56, width=56) as process:
    frame, instruction = process.call('initial')
    steps = [process.call('step', 0) for _ in range(6)]
  assert instruction == b'walk to the end'
  # Of 7x7 fields of 8x8 pixels: the agent is in the midst of the last row, and
  # sees the green goal 3 fields ahead.
  assert frame.shape == (56, 56, 3)
  goal = frame[24:32, 24:32].reshape(-1, 3)
  assert goal[:, 1].mean() > 2 * goal[:, [0, 2]].mean()
  # Its own limit is a cut.
  _check_cut(steps, 4, 0)


def test_minigrid_wrappers_of_a_user_are_kept():
  # The program draws what these show as codes: the whole level, 6x3 fields.
  size = {'height': 24, 'width': 48, 'num_action_repeats': 1}
  whole, _, _ = _frames_of('gym:toy_levels:MyWhole-v0', **size)
  goal = whole[0][8:16, 32:40].reshape(-1, 3)
  assert goal[:, 1].mean() > 2 * goal[:, [0, 2]].mean()
  # And this one shows it as a picture, in its own size.
  drawn, _, _ = _frames_of(
    'gym:toy_levels:MyDrawn-v0', height=15, width=30, num_action_repeats=1
  )
  goal = drawn[0][5:10, 20:25].reshape(-1, 3)
  assert goal[:, 1].mean() > 2 * goal[:, [0, 2]].mean()
  assert 'dict with an image' in _refusal('gym:toy_levels:MyCodes-v0')


def test_atari_game_of_a_user_is_preprocessed():
  spec = _spec('gym:toy_levels:MyPong-v0')
  assert spec.frame_shape == (84, 84, 4)
  frames, _, rewards = _frames_of('gym:ALE/Pong-v5')
  frames_, _, rewards_ = _frames_of('gym:toy_levels:MyPong-v0')
  np.testing.assert_array_equal(frames, frames_)
  np.testing.assert_array_equal(2 * rewards, rewards_)
  # People see the newest of the four.
  picture = environments.family_of('gym:toy_levels:MyPong-v0').picture(
    frames[5], spec
  )
  np.testing.assert_array_equal(picture, frames[5][..., 3:])
  assert "takes no argument 'frameskip'" in _refusal(
    'gym:toy_levels:MyRigidPong-v0'
  )
  assert 'register it without' in _refusal(
    'gym:toy_levels:MyPreprocessedPong-v0'
  )


def test_atari_arguments_of_a_user():
  level = 'gym:ALE/Breakout-v5?full_action_space=true'
  assert _spec('gym:ALE/Breakout-v5').action_set.tolist() == [0, 1, 2, 3]
  assert _spec(level).action_set.tolist() == list(range(18))
  # 400 frames, of which up to 30 are no-ops, 4 to a step.
  level = 'gym:ALE/Pong-v5?max_num_frames_per_episode=400'
  with _playing(level) as process:
    process.call('initial')
    steps = [process.call('step', 0) for _ in range(102)]
  (end,) = (i for i, step in enumerate(steps) if step.truncated)
  assert 92 <= end - 1 <= 100
  _check_cut(steps[: end + 1], end - 1, steps[end - 1].reward)
  # The next game begins like a game, not like the last one's end.
  assert steps[end].done
  assert steps[end].observation[0].std() > 0


def test_vizdoom_scenario_of_a_user_is_repeated_by_the_engine():
  frames, _, rewards = _frames_of(_DOOM)
  frames_, _, rewards_ = _frames_of('gym:toy_levels:MyDoom-v0')
  np.testing.assert_array_equal(frames, frames_)
  np.testing.assert_array_equal(rewards, rewards_)


def test_vizdoom_scenario_file(tmp_path, monkeypatch):
  import vizdoom

  for ending in ('cfg', 'wad'):
    shutil.copy(
      os.path.join(vizdoom.scenarios_path, f'basic.{ending}'),
      tmp_path / f'mine.{ending}',
    )
  config = tmp_path / 'mine.cfg'
  text = config.read_text().replace('basic.wad', 'mine.wad')
  config.write_text(
    text.replace('episode_timeout = 300', 'episode_timeout = 40')
  )
  monkeypatch.chdir(tmp_path)
  frames, _, _ = _frames_of(_DOOM)
  for level in ('gym:mine.cfg', f'gym:{config}?living_reward=-2'):
    assert _spec(level).action_set.tolist() == [0, 1, 2, 3]
    with _playing(level) as process:
      frame, _ = process.call('initial')
      steps = [process.call('step', 0) for _ in range(12)]
    np.testing.assert_array_equal(frame, frames[0])
    _check_cut(steps, 9, -8 if 'living' in level else -4)


def test_minigrid_mission_is_the_instruction():
  level = 'gym:MiniGrid-DoorKey-5x5-v0'
  assert _spec(level).action_set.tolist() == list(range(7))
  with _playing(level, num_action_repeats=1) as process:
    frame, instruction = process.call('initial')
    assert (
      instruction == b'use the key to open the door and then get to the goal'
    )
    assert frame.shape == (72, 96, 3)
    # A picture, and not the codes of objects, which are small numbers.
    assert frame.max() > 100
    turned, _ = process.call('step', 0).observation
    assert (turned != frame).any()


# --- Atari ------------------------------------------------------------------


class RawAtari:
  """The game itself, with the paper's preprocessing by hand."""

  def __init__(self, game, seed):
    import ale_py
    import gymnasium

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    self._env = gymnasium.make(
      f'ALE/{game}-v5',
      frameskip=1,
      repeat_action_probability=0.0,
      obs_type='grayscale',
    )
    self._reset = self._env.reset(seed=seed)
    self._beginning = self._env.unwrapped.clone_state(include_rng=True)

  def start(self, num_noops=None):
    """Starts the game; `num_noops` is by default what Gymnasium draws."""
    self._env.unwrapped.restore_state(self._beginning)
    screen, info = self._reset
    if num_noops is None:
      num_noops = self._env.unwrapped.np_random.integers(1, 31)
    for _ in range(num_noops):
      screen, _, _, _, info = self._env.step(0)
    self.lives = info['lives']
    self._stack = [screen] * 4

  def step(self, action):
    """Returns the reward, and whether the game is over."""
    total_reward, screens = 0.0, []
    for _ in range(4):
      screen, reward, terminated, truncated, info = self._env.step(action)
      screens.append(screen)
      total_reward += reward
      self.lives = info['lives']
      if terminated or truncated:
        return total_reward, True
    self._stack = [*self._stack[1:], np.maximum(*screens[-2:])]
    return total_reward, False

  def shows(self, frame):
    """Returns whether an environment's frame is what this one would show."""
    # A screen's first: most games that differ do so there.
    return all(
      np.abs(frame[..., n] - _shrunk(self._stack[n])).max() <= 1  # Rounding.
      for n in reversed(range(4))
    )


@functools.cache
def _area_weights(size, smaller):
  """Returns the matrix [smaller, size] of pixels' shares in larger pixels."""
  edges = np.arange(smaller + 1)[:, None] * size / smaller
  covered = np.clip(edges - np.arange(size), 0, 1)
  return (np.diff(covered, axis=0) * smaller / size).astype(np.float32)


def _shrunk(screen):
  """Shrinks a screen to 84x84, each pixel the mean of the area it covers."""
  rows, columns = (_area_weights(size, 84) for size in screen.shape)
  return rows @ screen.astype(np.float32) @ columns.T


def _fits(game, num_noops, initial, actions, steps):
  """Returns whether a raw game gives the frames and rewards of `steps`."""
  game.start(num_noops)
  return game.shows(initial) and all(
    game.step(action) == (step.reward, False)
    and game.shows(step.observation[0])
    for action, step in zip(actions, steps, strict=True)
  )


def test_atari_is_preprocessed_as_in_the_paper():
  spec = _spec('gym:ALE/Pong-v5')
  assert spec.action_set.tolist() == list(range(6))
  assert spec.frame_shape == (84, 84, 4)
  actions = np.random.RandomState(0).randint(6, size=40)
  all_noops = []
  for seed in (1, 2):
    with _playing('gym:ALE/Pong-v5', seed=seed) as process:
      initial, instruction = process.call('initial')
      steps = [process.call('step', action) for action in actions]
    assert instruction == b''
    assert initial.dtype == np.uint8
    # Only one number of no-ops at the start leads to these steps.
    game = RawAtari('Pong', seed)
    all_noops += [
      num_noops
      for num_noops in range(33)
      if _fits(game, num_noops, initial, actions, steps)
    ]
  assert len(all_noops) == 2
  assert min(all_noops) >= 1
  assert max(all_noops) <= 30
  assert all_noops[0] != all_noops[1]


def test_atari_frames_of_another_size():
  size = {'height': 42, 'width': 50}
  assert _spec('gym:ALE/Pong-v5', **size).frame_shape == (42, 50, 4)
  with _playing('gym:ALE/Pong-v5', **size) as process:
    frame, _ = process.call('initial')
  assert frame.shape == (42, 50, 4)
  assert frame.std() > 0


def test_atari_seeds_reproduce_and_differ():
  actions = np.random.RandomState(0).randint(6, size=20)
  frames = []
  for seed in (1, 1, 2):
    with _playing('gym:ALE/Pong-v5', seed=seed) as process:
      frames.append(_frames(process, actions))
  np.testing.assert_array_equal(frames[0], frames[1])
  assert (frames[0] != frames[2]).any()


_SERVE, _LEFT = 1, 3


def _check_silence(steps):
  """Checks that nothing happens after the first of some steps."""
  last, _ = steps[0].observation
  assert len(steps) > 1
  for step in steps[1:]:
    assert (step.reward, step.done, *step[3:]) == (0, False, False, False)
    np.testing.assert_array_equal(step.observation[0], last)


def _play_breakout(is_test):
  """Serves and stays in the corner, until all lives must be lost.

  Returns:
    The actions and steps, and the raw game that should follow them.
  """
  actions = [_SERVE, _LEFT] * 120
  game = RawAtari('Breakout', seed=1)
  game.start()
  with _playing('gym:ALE/Breakout-v5', is_test=is_test) as process:
    assert game.shows(process.call('initial')[0])
    steps = [process.call('step', action) for action in actions]
  return actions, steps, game


def test_atari_life_lost_ends_the_episode_in_training_but_not_the_game():
  lives_at_ends = []
  actions, steps, game = _play_breakout(False)
  for action, step in zip(actions, steps, strict=True):
    lives = game.lives
    reward, is_over = game.step(action)
    assert step.reward == reward
    assert step.done == (game.lives < lives)
    assert step.game_over == is_over
    assert not step.truncated
    if step.done:
      lives_at_ends.append(game.lives)
    if is_over:
      break
    assert game.shows(step.observation[0])
  assert lives_at_ends == [4, 3, 2, 1, 0]


def test_atari_life_lost_does_not_end_the_episode_in_test():
  actions, steps, game = _play_breakout(True)
  for action, step in zip(actions, steps, strict=True):
    assert game.step(action) == (step.reward, step.done)
    assert step.game_over == step.done
    frame, _ = step.observation
    assert game.shows(frame)
    if step.done:
      break
  assert game.lives == 0
  # Its end is not followed by another game.
  _check_silence(steps[[step.done for step in steps].index(True) :])


def test_atari_accounts_are_those_of_the_whole_game():
  output = _unroll('gym:ALE/Breakout-v5', [_SERVE, _LEFT] * 120)
  (end, *_) = np.flatnonzero(output.game_over)
  assert np.flatnonzero(output.done).tolist().index(end) == 4  # Of 5 lives.
  assert output.info.episode_step[end] == end + 1
  assert output.info.episode_return[end] == output.reward[: end + 1].sum() > 0
  assert output.info.episode_step[end + 1] == 1
  assert output.info.episode_return[end + 1] == output.reward[end + 1]


def test_atari_suite_has_all_actions_and_half_an_hour_per_game():
  level = 'gym:ALE/Pong-v5'
  assert _spec(level).action_set.tolist() == list(range(6))
  # Skiing alone doesn't know the actions that fire.
  for level in ('gym:ALE/Pong-v5', 'gym:ALE/Skiing-v5'):
    spec = _spec(level, full_action_set=True)
    assert spec.action_set.tolist() == list(range(18))
    with _playing(level, full_action_set=True) as process:
      process.call('initial')
      for action in spec.action_set:
        process.call('step', action)
  env = environments.GymEnvironment('ALE/Pong-v5', 4, 1)
  try:
    ale = env._env.unwrapped.ale
    assert ale.getInt('max_num_frames_per_episode') == 108_000
  finally:
    env.close()


# --- ViZDoom ----------------------------------------------------------------

_DOOM = 'gym:VizdoomBasic-v1'


def test_vizdoom_episodes():
  spec = _spec(_DOOM)
  assert spec.action_set.tolist() == [0, 1, 2, 3]
  assert spec.frame_shape == (72, 96, 3)
  with _playing(_DOOM) as process:
    frame, instruction = process.call('initial')
    assert frame.std() > 10
    assert instruction == b''
    # Without moving: 300 tics, 4 to a step, at a reward of -1 each.
    steps = [process.call('step', 0) for _ in range(77)]
  _check_cut(steps, 74, -4.0)
  last, first = steps[74].observation[0], steps[75].observation[0]
  assert last.std() > 10
  assert first.std() > 10
  # The engine shows nothing after the limit: the frame before it stays.
  np.testing.assert_array_equal(last, steps[73].observation[0])
  assert (first != last).any()


@pytest.mark.parametrize(
  ('level', 'num_buttons'),
  [
    ('gym:VizdoomBasic-MultiBinary-v1', 3),
    ('gym:VizdoomBasic-MultiBinary-v1?use_multi_binary_action_space=False', 3),
    ('gym:VizdoomFreedoom1E1M1-S1-v0', 19),
    # Without the mouse, whose movements are continuous.
    (
      'gym:VizdoomDeathmatch-MultiBinary-v1'
      '?available_buttons=["TURN_LEFT", "TURN_RIGHT", "ATTACK"]',
      3,
    ),
  ],
)
def test_vizdoom_presses_several_buttons_at_once(level, num_buttons):
  spec = _spec(level)
  assert action_sets.num_actions(spec.action_set) == (2,) * num_buttons
  rows, first = action_sets.table(spec.action_set)
  with _playing(level) as process:
    process.call('initial')
    frames = []
    for action in (0, 1):
      for _ in range(6):
        pressed = np.full(num_buttons, action)
        step = process.call('step', rows[first + pressed])
      frames.append(step.observation[0].copy())
  assert frames[0].shape == (72, 96, 3)
  assert (frames[0] != frames[1]).any()  # A shot at least.


def test_car_racing_is_steered_by_buttons_alone():
  pytest.importorskip('Box2D')
  assert re.search(r'there is Box\(', _refusal('gym:CarRacing-v3'))
  level = 'gym:CarRacing-v3?continuous=False'
  assert _spec(level).action_set.tolist() == list(range(5))
  with _playing(level) as process:
    frame, _ = process.call('initial')
    assert frame.shape == process.call('step', 3).observation[0].shape


def test_vizdoom_player_who_dies_ends_the_episode():
  with _playing('gym:VizdoomTakeCover-v1', num_action_repeats=12) as process:
    process.call('initial')
    steps = [process.call('step', 0) for _ in range(200)]
  ends = [step for step in steps if step.done]
  assert ends
  for step in steps:
    assert step.done == step.game_over
    assert not step.truncated


def test_vizdoom_test_is_over_at_its_limit():
  with _playing(_DOOM, is_test=True) as process:
    process.call('initial')
    steps = [process.call('step', 0) for _ in range(80)]
  assert [step.done for step in steps] == [False] * 74 + [True] + [False] * 5
  assert [step.game_over for step in steps] == [step.done for step in steps]
  assert [step.reward for step in steps] == [-4.0] * 75 + [0.0] * 5
  _check_silence(steps[74:])


def test_vizdoom_seeds_reproduce_and_differ():
  frames = []
  for seed in (1, 1, 2):
    with _playing(_DOOM, seed=seed) as process:
      frames.append(_frames(process, [1] * 80))
  np.testing.assert_array_equal(frames[0], frames[1])
  assert (frames[0][:10] != frames[2][:10]).any()
  # The second episode is another one.
  assert (frames[0][75] != frames[0][0]).any()


def _helpers(process):
  """Returns the pids in a process's group, and the shared memory they map."""
  pids, files = set(), set()
  for path in glob.glob('/proc/[0-9]*'):
    pid = int(os.path.basename(path))
    with contextlib.suppress(OSError):
      if os.getpgid(pid) == process.pid:
        pids.add(pid)
        with open(f'{path}/maps') as maps:
          files |= {
            word for word in maps.read().split() if word.startswith('/dev/shm/')
          }
  return pids, files


@pytest.mark.parametrize('is_killed', [False, True])
def test_vizdoom_leaves_nothing_behind(is_killed):
  with _playing(_DOOM) as process:
    process.call('initial')
    process.call('step', 0)
    pids, files = _helpers(process)
    assert len(pids) >= 2  # Python and the engine.
    assert all(map(os.path.exists, files))
    (folder,) = {os.readlink(f'/proc/{process.pid}/cwd')}
    if is_killed:
      os.kill(process.pid, signal.SIGKILL)
      assert process.exit_code(timeout=_PATIENCE) == -signal.SIGKILL
  remains = [folder, *files, *(f'/proc/{pid}' for pid in pids)]
  deadline = time.monotonic() + _PATIENCE
  while any(map(os.path.exists, remains)):
    assert time.monotonic() < deadline, remains
    time.sleep(0.01)


# --- Whose libraries --------------------------------------------------------


def test_program_imports_no_library_and_repeats_no_warning():
  code = """
    import sys
    import environments

    def imported():
      libraries = {'gymnasium', 'cv2', 'ale_py', 'vizdoom', 'minigrid'}
      return libraries.intersection(sys.modules)

    assert not imported(), imported()
    import tensorflow.compat.v1  # Keras brings OpenCV along, where it is.
    before = imported()
    assert before <= {'cv2'}, before
    settings = environments.EnvironmentSettings(
      *(None, None, 4, '', '/tmp', False)
    )
    for level in sys.argv[1:]:
      family = environments.family_of(level)
      spec = family.describe(level, settings)
      for seed in (1, 2):
        process = family.create(level, seed, settings, spec)
        process.start()
        process.call('initial')
        process.call('step', spec.action_set[0])
        process.close()
    assert imported() == before, imported()
  """
  # The one without its version is warned of.
  levels = ['gym:ALE/Pong-v5', 'gym:VizdoomBasic', 'gym:MiniGrid-Empty-5x5-v0']
  result = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code), *levels],
    cwd=os.path.dirname(environments.__file__),
    capture_output=True,
    text=True,
    timeout=2 * _PATIENCE,
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr.count('WARN:') == 1, result.stderr
  assert 'A.L.E' not in result.stderr, result.stderr
  assert result.stdout == ''


def test_environment_processes_resize_in_one_thread():
  with _playing('gym:toy_gym:Rgb-v0', height=400, width=600) as process:
    process.call('initial')
    assert len(os.listdir(f'/proc/{process.pid}/task')) == 1


def test_environment_processes_do_without_tensorflow():
  with _playing('gym:toy_gym:Rgb-v0') as process:
    with open(f'/proc/{process.pid}/maps') as maps:
      assert 'tensorflow' not in maps.read()


def test_module_in_the_current_folder_is_found_however_the_program_is_called(
  tmp_path,
):
  for folder in ('program', 'current'):
    (tmp_path / folder).mkdir()
  (tmp_path / 'current' / 'my_own_levels.py').write_text('import toy_gym\n')
  script = tmp_path / 'program' / 'script.py'
  code = """
    import environments
    settings = environments.EnvironmentSettings(
      *(4, 6, 4, '', '/tmp', False)
    )
    level = 'gym:my_own_levels:Grey-v0'
    spec = environments.GymEnvironment.describe(level, settings)
    process = environments.GymEnvironment.create(level, 1, settings, spec)
    process.start()
    print(process.call('initial')[0].shape)
  """
  script.write_text(textwrap.dedent(code))
  places = [os.path.dirname(environments.__file__), _FOLDER]
  result = subprocess.run(
    [sys.executable, script],
    cwd=tmp_path / 'current',
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(places)},
    capture_output=True,
    text=True,
    timeout=2 * _PATIENCE,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == '(4, 6, 1)\n'
