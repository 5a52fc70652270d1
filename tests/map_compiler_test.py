# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the compilation of maps, with the stand-in for DeepMind Lab."""

import os
import signal

import pytest
import tensorflow.compat.v1 as tf
from absl import flags
from absl.testing import flagsaver

import dmlab_maps
import environments
import experiment
import levels
from errors import UserError
from helpers import TESTS, Program, wait_until
from map_compiler import MapCompiler

if not flags.FLAGS.is_parsed():
  flags.FLAGS(['map_compiler_test'])

_FAKE_LAB = os.path.join(TESTS, 'fake_deepmind_lab')
_EXPLORE = 'explore_goal_locations_small'


@pytest.fixture
def lab():
  """The stand-in, which the environments' processes find, too."""
  module = pytest.importorskip('deepmind_lab')
  if 'fake' not in module.__file__:
    pytest.skip('The real DeepMind Lab is installed.')
  return module


def compile_maps(folder, level_name=_EXPLORE, num_maps=4, max_bytes=None):
  """Returns the `MapCompiler` after its end, for --seed=3."""
  settings = environments.EnvironmentSettings(
    *(4, 6, 4, 'dummy', str(folder), False),
    dmlab=environments.DmLabSettings(max_bytes, num_maps, 3),
  )
  game = levels.choose_game(level_name, settings)
  with tf.Graph().as_default(), MapCompiler(game, num_workers=2) as compiler:
    while not compiler.wait_for_end(1):
      assert compiler.num_done <= compiler.num_maps
  assert compiler.num_done == compiler.num_maps
  return compiler


def maps(folder):
  """Returns a dict from the maps in a folder to the numbers of their files."""
  return {
    path.read_bytes()[:-32]: path.stat().st_ino for path in folder.glob('*.map')
  }


def expected_maps(lab, name, count):
  level = f'contributed/dmlab30/{name}'
  return {
    lab.map_of(level, seed) for seed in dmlab_maps.map_seeds(level, 3, count)
  }


def test_all_maps_of_a_level_are_compiled_once(lab, tmp_path):
  compiler = compile_maps(tmp_path)
  assert compiler.is_complete()
  assert compiler.summary()[0].startswith('4 of 4 episodes have their maps')
  before = maps(tmp_path)
  assert before.keys() == expected_maps(lab, _EXPLORE, 4)
  # More of them begin with these.
  assert compile_maps(tmp_path, num_maps=6).is_complete()
  after = maps(tmp_path)
  assert after.keys() == expected_maps(lab, _EXPLORE, 6)
  assert before.items() <= after.items()


def test_suite_with_levels_that_fail_and_levels_without_maps(lab, tmp_path):
  compiler = compile_maps(tmp_path, 'dmlab30', num_maps=5)
  assert not compiler.is_complete()
  assert maps(tmp_path).keys() == (
    expected_maps(lab, _EXPLORE, 5)
    | expected_maps(lab, 'language_select_located_object', 5)
  )
  # Of levels without maps, each of the two workers tries one episode at most.
  assert len(list(tmp_path.glob('*.keys'))) <= 2 * 5 + 4 * 2
  # The stand-in knows six levels of the suite's 30; two of them compile.
  without, *failed, last = compiler.summary()
  assert without == (
    'psychlab_arbitrary_visuomotor_mapping, psychlab_continuous_recognition, '
    'rooms_collect_good_objects_train, rooms_exploit_deferred_effects_train: '
    'no maps to compile.'
  )
  assert len(failed) == 24
  for line in failed:
    assert ' failures, the first: its process raised in its constr' in line
    assert 'Level not found' in line
    assert '\n' not in line
  assert last.startswith('30 of 150 episodes have their maps')


def test_cache_that_is_too_small_for_the_maps_is_told(lab, tmp_path):
  size = len(expected_maps(lab, _EXPLORE, 1).pop())
  compiler = compile_maps(tmp_path, num_maps=30, max_bytes=20 * size)
  assert '--level_cache_size_gb' in compiler.summary()[-1]
  assert len(maps(tmp_path)) < 20
  compiler = compile_maps(tmp_path, num_maps=30, max_bytes=100 * size)
  assert '--level_cache_size_gb' not in compiler.summary()[-1]


def test_interrupted_compilation_goes_on(lab, tmp_path):
  folder = tmp_path / 'maps'
  program = Program(
    '--mode=compile_maps',
    '--seed=3',
    '--dmlab_maps=12',
    f'--level_cache_dir={folder}',
    '--height=4',
    '--width=6',
    path=_FAKE_LAB,
    env={'FAKE_DMLAB_COMPILE_SECONDS': '0.5'},
  )
  wait_until(lambda: len(maps(folder)) >= 3)
  program.process.send_signal(signal.SIGINT)
  assert program.finish() == 1, program.output
  assert 'Interrupted: the same command compiles the rest.' in program.output
  before = maps(folder)
  assert 3 <= len(before) < 12
  assert compile_maps(folder, num_maps=12).is_complete()
  after = maps(folder)
  assert after.keys() == expected_maps(lab, _EXPLORE, 12)
  assert before.items() <= after.items()


@pytest.mark.parametrize(
  ('kwargs', 'sentence'),
  [
    ({}, 'needs --dmlab_maps'),
    (
      {'dmlab_maps': 2, 'level_name': 'gym:toy_gym:Grey-v0'},
      'gym:toy_gym:Grey-v0 has no maps to compile',
    ),
  ],
)
def test_impossible_compilation_gets_one_sentence(tmp_path, kwargs, sentence):
  folder = tmp_path / 'maps'
  with flagsaver.flagsaver(
    mode='compile_maps', level_cache_dir=str(folder), **kwargs
  ):
    with pytest.raises(UserError, match=sentence):
      experiment.compile_maps()
  assert not folder.exists()
