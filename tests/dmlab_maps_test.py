# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of DeepMind Lab's compiled maps."""

import itertools
import logging
import os
import resource
import subprocess
import sys
import textwrap

import pytest

from dmlab_maps import LocalLevelCache, episode_seeds, map_seeds

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PATIENCE = 30  # Seconds after which a wait counts as a hang.
_DIGEST = 32  # Bytes behind each map.

# --- Seeds ------------------------------------------------------------------


def test_maps_belong_to_level_and_seed():
  seeds = map_seeds('level', 1, 100)
  assert len({*seeds}) == 100
  assert all(type(seed) is int for seed in seeds)  # DeepMind Lab needs that.
  assert all(0 <= seed < 2**31 and seed % 2 == 0 for seed in seeds)
  assert max(seeds) > 2**30
  assert map_seeds('level', 1, 100) == seeds
  # Who wants more maps can go on with those that are compiled.
  assert map_seeds('level', 1, 1000)[:100] == seeds
  assert not {*seeds} & {*map_seeds('level', 2, 100)}
  assert not {*seeds} & {*map_seeds('another', 1, 100)}


def _first(count, *args, **kwargs):
  return list(itertools.islice(episode_seeds(*args, **kwargs), count))


def test_episodes_draw_from_all_maps_alike():
  maps = map_seeds('level', 1, 5)
  drawn = _first(1000, 1, maps)
  # Five standard deviations of a binomial distribution around 200.
  assert all(137 < drawn.count(seed) < 263 for seed in maps)
  assert sum(map(drawn.count, maps)) == 1000
  assert drawn[:100] != _first(100, 2, maps)


@pytest.mark.parametrize('is_test', [False, True])
def test_episodes_of_any_number_of_maps_differ(is_test):
  seeds = _first(1000, 1, is_test=is_test)
  assert len({*seeds}) == 1000
  assert all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds)
  assert {seed % 2 for seed in seeds} == ({1} if is_test else {0, 1})
  assert _first(1000, 1, is_test=is_test) == seeds
  assert not {*seeds} & {*_first(1000, 2, is_test=is_test)}


# --- The cache --------------------------------------------------------------


class Files:
  """A cache in a folder, and what is written to it and fetched from it."""

  def __init__(self, folder, max_bytes=None):
    self.path = folder / 'cache'
    self.cache = LocalLevelCache(str(self.path), max_bytes)
    self._folder = folder

  def write(self, key, content):
    path = self._folder / 'written'
    path.write_bytes(content)
    self.cache.write(key, str(path))

  def fetch(self, key):
    path = self._folder / 'fetched'
    path.unlink(missing_ok=True)
    is_hit = self.cache.fetch(key, str(path))
    assert path.exists() == is_hit
    return path.read_bytes() if is_hit else None

  def stored(self):
    """Returns the keys, those that were used last behind."""
    files = sorted(self.path.iterdir(), key=lambda f: f.stat().st_mtime_ns)
    assert all(file.suffix == '.map' for file in files)
    return [file.stem for file in files]


@pytest.fixture
def files(tmp_path):
  return Files(tmp_path)


def test_cache_returns_what_was_written(tmp_path, files):
  assert files.fetch('key') is None
  files.write('key', b'map')
  assert files.fetch('key') == b'map'
  assert files.fetch('other') is None
  # Whoever constructs another on the folder finds the map as well.
  assert Files(tmp_path).fetch('key') == b'map'


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'changed', 'foreign'])
def test_damaged_map_is_missing_until_it_is_written_again(
  files, damage, caplog
):
  files.write('key', b'map' * 1000)
  path = files.path / 'key.map'
  content = path.read_bytes()
  path.write_bytes(
    {
      'truncated': content[:1500],
      'empty': b'',
      'changed': content.replace(b'map', b'mop', 1),
      'foreign': b'map' * 1000,  # As it is, without a digest.
    }[damage]
  )
  assert files.fetch('key') is None
  assert f'{path} is damaged' in caplog.text
  files.write('key', b'map' * 1000)
  assert files.fetch('key') == b'map' * 1000


def _age(files, *keys):
  """Makes keys the ones that were not used for the longest time, in order."""
  for i, key in enumerate(keys):
    os.utime(files.path / f'{key}.map', (i, i))


def test_least_recently_used_maps_are_removed_first(tmp_path):
  files = Files(tmp_path, max_bytes=4 * (1000 + _DIGEST))
  for key in 'abcd':
    files.write(key, key.encode() * 1000)
  assert sorted(files.stored()) == ['a', 'b', 'c', 'd']
  _age(files, 'a', 'b', 'c', 'd')
  assert files.fetch('a') == b'a' * 1000  # So that it isn't the oldest.
  files.write('e', b'e' * 1000)
  # Down to 90% of the bound, so that there is room for the next ones.
  assert files.stored() == ['d', 'a', 'e']


def test_bound_counts_what_others_wrote_and_removes_nothing_else(tmp_path):
  other, files = Files(tmp_path), Files(tmp_path, max_bytes=5000)
  for key in 'abcdefghij':
    other.write(key, b'1' * 1000)
  _age(files, *'abcdefghij')
  foreign = files.path / 'foreign'
  foreign.write_bytes(b'1' * 10_000)
  dead = files.path / 'x.map.0123.tmp'  # Its process died.
  dead.write_bytes(b'1' * 1000)
  os.utime(dead, (0, 0))
  files.write('k', b'1' * 1000)
  assert not dead.exists()
  assert foreign.read_bytes() == b'1' * 10_000
  foreign.unlink()
  assert files.stored() == ['h', 'i', 'j', 'k']


def test_notes_tell_which_maps_are_there(files):
  assert files.cache.noted('1') is None
  files.cache.note('1', ['a', 'b'])
  files.cache.note('2', [])
  assert files.cache.noted('2') == []
  assert files.cache.noted('1') is None
  files.write('a', b'map')
  assert files.cache.noted('1') is None
  files.write('b', b'map')
  assert files.cache.noted('1') == ['a', 'b']
  (files.path / 'a.map').unlink()
  assert files.cache.noted('1') is None


def test_cache_without_a_bound_removes_nothing(files):
  for key in 'abcdef':
    files.write(key, b'1' * 100_000)
  assert sorted(files.stored()) == list('abcdef')


def _run(code, count, *args):
  """Runs Python code in some processes, which begin at the same time.

  Each gets its number and `args`, and calls `begin()` when it is ready.
  """
  head = """
    import os, sys
    from dmlab_maps import LocalLevelCache, episode_seeds, map_seeds
    number = int(sys.argv[1])

    def begin():
      print('ready', flush=True)
      sys.stdin.readline()
  """
  code = textwrap.dedent(head) + textwrap.dedent(code)
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(number), *map(str, args)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=_ROOT,
    )
    for number in range(count)
  ]
  try:
    for process in processes:
      assert process.stdout.readline() == b'ready\n'
    for process in processes:
      process.stdin.write(b'\n')
      process.stdin.flush()
    for process in processes:
      process.communicate(timeout=_PATIENCE)
      assert process.returncode == 0
  finally:
    for process in processes:
      process.kill()


def test_cache_never_shows_a_part_of_a_file(tmp_path):
  # Two processes write each map, as soon as they can; two wait for it.
  code = """
    import time
    folder = sys.argv[2]
    cache = LocalLevelCache(folder)
    own, fetched = f'{folder}-own{number}', f'{folder}-fetched{number}'
    with open(own, 'wb') as file:
      file.write(bytes([number]) * 8_000_000)
    begin()
    for key in range(10):
      if number < 2:
        cache.write(str(key), own)
      while not cache.fetch(str(key), fetched):
        time.sleep(0)
      with open(fetched, 'rb') as file:
        data = file.read()
      assert data.count(data[:1]) == 8_000_000, len(data)
  """
  _run(code, 4, tmp_path / 'cache')
  # Nothing but the maps is left.
  names = sorted(os.listdir(tmp_path / 'cache'))
  assert names == [f'{key}.map' for key in range(10)]


def test_processes_that_share_a_full_cache_get_whole_maps_or_none(tmp_path):
  code = """
    import random
    folder, max_bytes = sys.argv[2], int(sys.argv[3])
    cache = LocalLevelCache(folder, max_bytes)
    own, fetched = f'{folder}-own{number}', f'{folder}-fetched{number}'
    draw = random.Random(number)
    begin()
    hits = 0
    for _ in range(400):
      key = draw.randrange(20)
      if cache.fetch(str(key), fetched):
        hits += 1
        with open(fetched, 'rb') as file:
          assert file.read() == bytes([key]) * 1000
      else:
        with open(own, 'wb') as file:
          file.write(bytes([key]) * 1000)
        cache.write(str(key), own)
    assert hits
  """
  max_bytes = 10 * (1000 + _DIGEST)
  _run(code, 4, tmp_path / 'cache', max_bytes)
  sizes = [file.stat().st_size for file in (tmp_path / 'cache').iterdir()]
  # Not emptied: at 90% of the bound, nobody removes any more.
  assert max_bytes // 2 < sum(sizes) <= max_bytes


def test_cache_on_a_full_disk_warns(files, tmp_path, caplog):
  written = tmp_path / 'written'
  written.write_bytes(b'1234' * 100_000)
  # No disk is full at hand, but files may be forbidden to grow.
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  with caplog.at_level(logging.WARNING):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
      files.cache.write('key', str(written))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, old)
  assert 'Map not cached' in caplog.text
  assert os.listdir(files.path) == []
  assert files.fetch('key') is None


def test_cache_in_an_impossible_folder_warns(tmp_path, caplog):
  (tmp_path / 'file').write_bytes(b'map')
  cache = LocalLevelCache(str(tmp_path / 'file' / 'cache'))
  assert not cache.fetch('key', str(tmp_path / 'fetched'))
  with caplog.at_level(logging.WARNING):
    cache.write('key', str(tmp_path / 'file'))
  assert 'Map not cached' in caplog.text
