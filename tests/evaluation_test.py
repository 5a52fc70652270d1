# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of an evaluation's statistics and files."""

import csv
import importlib.metadata
import json
import resource

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import atari57
import dmlab30
import evaluation
import levels
import py_process
from errors import UserError, explain

VERSIONS = {'python': '3.11.2', 'gymnasium': '1.0'}


def make(
  path, levels=('a', 'b'), num_episodes=3, seed=1, versions=VERSIONS, **kwargs
):
  return evaluation.Results(
    path=str(path / 'results'),
    settings={'seed': seed},
    levels=list(levels),
    num_episodes=num_episodes,
    references=kwargs.get('references', {}),
    aggregates=kwargs.get('aggregates', {}),
    versions=versions,
    facts={'flags': {'torso': 'deep'}},
  )


def add(results, level, returns):
  for number, value in enumerate(returns):
    results.add(level, evaluation.Episode(number, value, 40))


def test_statistics_of_a_level(tmp_path):
  results = make(tmp_path, num_episodes=4, references={'a': (12.0, 2.0)})
  returns = [1.0, 7.0, 2.0, 20.0]
  add(results, 'a', returns)
  a, b = results.statistics()
  assert a.episodes == 4
  assert a.mean == np.mean(returns) == 7.5
  # sqrt((6.5^2 + .5^2 + 5.5^2 + 12.5^2) / 3) / sqrt(4)
  assert a.standard_error == pytest.approx(np.sqrt(229 / 3) / 2)
  assert (a.median, a.min, a.max) == (4.5, 1, 20)
  assert a.human_normalized == pytest.approx(100 * (7.5 - 2) / 10)
  assert a.missing is None
  assert b == evaluation.LevelStatistics('b', 0, *[None] * 7)


def test_files_hold_everything_and_are_taken_up(tmp_path):
  results = make(tmp_path)
  add(results, 'a', [1.0, 2.5, 3.0])
  results.give_up('b', 'no, "never"')
  results.save()
  content = json.loads((tmp_path / 'results.json').read_text())
  assert content['settings'] == {'seed': 1}
  assert content['flags'] == {'torso': 'deep'}
  assert content['versions'] == VERSIONS
  assert content['episodes']['a'][1] == {
    'number': 1,
    'episode_return': 2.5,
    'frames': 40,
  }
  assert not content['is_complete']
  with open(tmp_path / 'results.csv') as file:
    a, b = csv.DictReader(file)
  assert (a['level'], a['episodes'], float(a['mean'])) == ('a', '3', 6.5 / 3)
  assert (b['level'], b['mean'], b['missing']) == ('b', '', 'no, "never"')

  again = make(tmp_path)
  assert again.returns() == {'a': [1.0, 2.5, 3.0], 'b': []}
  assert again.has('a', 2)
  assert not again.has('b', 0)
  # What failed may work now.
  assert not again.missing
  add(again, 'b', [5.0] * 3)
  assert again.is_complete()
  # More episodes go on from those; of fewer, only the first count.
  again.save()
  assert not make(tmp_path, num_episodes=4).is_complete()
  assert make(tmp_path, num_episodes=2).returns()['a'] == [1.0, 2.5]


@pytest.mark.parametrize('name', ['results.jsonl', 'results.json'])
def test_results_of_another_evaluation_are_refused_and_kept(tmp_path, name):
  """Also those of older versions, which have the .json file alone."""
  results = make(tmp_path)
  add(results, 'a', [1.0])
  results.save()
  if name == 'results.json':
    (tmp_path / 'results.jsonl').unlink()
  before = (tmp_path / name).read_bytes()
  with pytest.raises(UserError, match=f'{name} .* seed is 1, here it is 2'):
    make(tmp_path, seed=2)
  with pytest.raises(
    UserError, match=r"gymnasium is '1\.0', here it is '1\.1'"
  ):
    make(tmp_path, versions={**VERSIONS, 'gymnasium': '1.1'})
  assert (tmp_path / name).read_bytes() == before
  # What is installed in one of both places alone doesn't matter.
  assert make(tmp_path, versions={'python': '3.11.2', 'x': '1'}).has('a', 0)
  (tmp_path / name).write_text('{\n')
  for damaged in tmp_path.iterdir():
    if damaged.name not in (name, 'results.csv'):
      damaged.unlink()
  with pytest.raises(UserError, match=f'{name} can not be read'):
    make(tmp_path)
  assert (tmp_path / name).read_text() == '{\n'


def test_results_of_older_versions_are_taken_up(tmp_path):
  """Their one file holds the episodes, in whose returns there may be NaN."""
  (tmp_path / 'results.json').write_text(
    '{"settings": {"seed": 1}, "levels": [], "episodes": {"a": ['
    '{"number": 0, "episode_return": 1.5, "frames": 40}, '
    '{"number": 1, "episode_return": NaN, "frames": 40}], "b": []}}'
  )
  results = make(tmp_path)
  assert results.returns() == {'a': [1.5], 'b': []}
  add(results, 'b', [3.0])
  (tmp_path / 'results.json').unlink()
  assert make(tmp_path).returns() == {'a': [1.5], 'b': [3.0]}


def test_each_episode_is_appended_when_it_ends(tmp_path):
  """What was written is not written again, and nothing has to be saved."""
  results = make(tmp_path, num_episodes=500)
  log = tmp_path / 'results.jsonl'
  file, sizes = log.stat().st_ino, []
  for number in range(500):
    results.add('a', evaluation.Episode(number, 1.0, 40))
    sizes.append(log.stat().st_size)
  assert log.stat().st_ino == file
  assert set(np.diff(sizes)) <= {sizes[1] - sizes[0] + n for n in range(3)}
  assert [path.name for path in tmp_path.iterdir()] == ['results.jsonl']
  assert make(tmp_path, num_episodes=500).num_played() == 500


def test_half_a_line_is_no_episode(tmp_path):
  """Wherever the program is killed while it writes the last line."""
  results = make(tmp_path)
  add(results, 'a', [1.0])
  log = tmp_path / 'results.jsonl'
  start = log.stat().st_size
  results.add('a', evaluation.Episode(1, -22.25, 4000))
  whole = log.read_bytes()
  for size in range(start, len(whole)):
    log.write_bytes(whole[:size])
    again = make(tmp_path)
    assert again.returns() == {'a': [1.0], 'b': []}
    again.add('a', evaluation.Episode(1, 7.0, 40))
    assert make(tmp_path).returns() == {'a': [1.0, 7.0], 'b': []}


def test_two_programs_may_append(tmp_path):
  one, other = make(tmp_path), make(tmp_path)
  add(one, 'a', [1.0, 2.0])
  add(other, 'a', [1.0])
  add(other, 'b', [3.0])
  assert make(tmp_path).returns() == {'a': [1.0, 2.0], 'b': [3.0]}
  other.save()
  one.save()
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['results.csv', 'results.json', 'results.jsonl']


def test_full_disk_is_told_in_one_sentence(tmp_path):
  """Here, files can't grow beyond a size."""
  results = make(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  size = (tmp_path / 'results.jsonl').stat().st_size
  resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
  try:
    with pytest.raises(UserError, match=r'results\.\* can not be written') as e:
      add(results, 'a', [1.0])
    assert '\n' not in str(e.value)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  again = make(tmp_path)
  assert again.num_played() == 0
  add(again, 'a', [2.0])
  assert make(tmp_path).returns()['a'] == [2.0]


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_json_has_numbers_alone(tmp_path, value):
  results = make(tmp_path)
  with pytest.raises(ValueError, match='not JSON compliant'):
    add(results, 'a', [value])
  assert make(tmp_path).num_played() == 0


def test_versions_of_a_levels_own_package_are_compared():
  versions = evaluation.versions(
    ['gym:pytest.levels:Level-v0', 'gym:ALE/Pong-v5']
  )
  assert versions['pytest'] == importlib.metadata.version('pytest')
  assert versions['gymnasium'] == importlib.metadata.version('gymnasium')
  assert 'pytest' not in evaluation.versions(['gym:ALE/Pong-v5'])


class Fails:
  """For a process: each method raises in another way."""

  MESSAGE = 'no licence file\nsee http://example.com\n  and ask'

  def __init__(self, fails=False):
    if fails:
      raise OSError(self.MESSAGE)

  def step(self):
    raise OSError(self.MESSAGE)

  def chained(self):
    try:
      self.step()
    except OSError as error:
      raise RuntimeError('no level') from error

  def without_message(self):
    raise KeyError

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    return py_process.ArraySpec((), np.float32)


def reason(error):
  return py_process.failure(error).reason.partition(':\n')[2]


def test_reason_of_a_failure_is_the_whole_message():
  """As raised in a constructor, by a call, and by an operation of a graph."""
  whole = f'OSError: {Fails.MESSAGE}'
  with pytest.raises(py_process.ProcessError) as error:
    py_process.PyProcess(Fails, fails=True).start()
  assert reason(error.value) == whole
  with tf.Graph().as_default(), tf.Session() as session:
    process = py_process.PyProcess(Fails)
    names = ('step', 'chained', 'without_message')
    results = {name: getattr(process.proxy, name)() for name in names}
    process.start()
    try:
      for name, expected in zip(
        names, (whole, 'RuntimeError: no level', 'KeyError'), strict=True
      ):
        with pytest.raises(py_process.ProcessError) as error:
          process.call(name)
        assert reason(error.value) == expected
        with pytest.raises(tf.errors.OpError) as error:
          session.run(results[name])
        assert reason(error.value) == expected
    finally:
      process.close()
  with tf.Graph().as_default(), tf.Session() as session:
    with pytest.raises(tf.errors.OpError) as error:
      session.run(tf.debugging.check_numerics(tf.constant(np.nan), 'A fault.'))
    assert explain(error.value).startswith('A fault. : Tensor had NaN')
    assert 'node' not in explain(error.value)
  assert explain(ValueError('one.')) == 'one'
  assert explain(ValueError()) == 'ValueError'


@pytest.mark.parametrize('name', ['dmlab30', 'atari57'])
def test_scores_of_a_suite_equal_the_formula(tmp_path, name):
  """Level i has episodes that score 10 i - 10 and 10 i + 10 percent."""
  suite = levels.SUITES[name]
  module = {'dmlab30': dmlab30, 'atari57': atari57}[name]
  names = list(module.LEVEL_MAPPING.values())
  references = levels.reference_scores(names)
  results = make(
    tmp_path,
    names,
    num_episodes=2,
    references=references,
    aggregates=suite.aggregates,
  )
  expected = 10.0 * np.arange(len(names))
  for level, percent in zip(names, expected, strict=True):
    human, rand = module.HUMAN_SCORES[level], module.RANDOM_SCORES[level]
    assert not results.scores()  # Not before all is played.
    add(
      results,
      level,
      [rand + (percent + d) / 100 * (human - rand) for d in (-10, 10)],
    )
  np.testing.assert_allclose(
    [row.human_normalized for row in results.statistics()], expected, atol=1e-6
  )
  scores = results.scores()
  if name == 'dmlab30':
    # 0, 10, ... 290 percent.
    assert scores['no_cap'] == pytest.approx(145)
    assert scores['cap_100'] == pytest.approx((550 + 19 * 100) / 30)
  else:
    # 0, 10, ... 560 percent.
    assert scores['median'] == pytest.approx(280)
    assert scores['mean'] == pytest.approx(280)
  table = results.table()
  assert all(level in table for level in names)
  for title, score in scores.items():
    assert f'{title.replace("_", " ")}: {score:.2f} %' in table
