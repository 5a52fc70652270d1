# Licensed under the Apache License, Version 2.0; see LICENSE.
"""DeepMind Lab's compiled maps: which are played, and where they are kept.

Many levels make a map for each episode, from its seed, and compile it, which
takes up to 40 s. With the compiled map at hand, an episode begins within half a
second. So the maps are kept in a folder that processes share
(`LocalLevelCache`), may be those of a limited number of seeds
(`episode_seeds`), and may be compiled while the episode before is played
(`AheadCompiler`).
"""

import contextlib
import hashlib
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
import uuid
import zlib

import numpy as np

import py_process

_MAP = '.map'  # A compiled map, with its digest behind.
_KEYS = '.keys'  # The keys of the maps with which an episode begins.
_TEMPORARY = '.tmp'  # What is being written, or was when its process died.
_OURS = (_MAP, _KEYS, _TEMPORARY)  # All that may be removed.
_DIGEST_BYTES = hashlib.sha256().digest_size

# What removals leave of the cache's bound. A process looks at the folder again
# once it has written 1/64 of what was free: so up to 64 processes together stay
# within the bound, and none lists thousands of files for each map.
_LEFT_FULL = 0.9
_SHARE = 64

# Maps that are compiled ahead. The name of the abstract sockets that a machine
# has for as many processes as it has cores: who binds one may compile.
_SLOT = '\0impala-dmlab-map-{user}-{number}'
_SLOT_SECONDS = 0.25  # Between two tries to get one.
# Added to the niceness. With more, actors on a busy machine would have to wait.
_NICENESS = 5


# --- Seeds ------------------------------------------------------------------


def map_seeds(level, seed, count):
  """Returns the seeds of a level's maps, even numbers below 2**31.

  More maps begin with the same ones.

  Args:
    level: name of the level, a path below game_scripts/levels.
    seed: int, of the training.
    count: int, how many.
  """
  sequence = np.random.SeedSequence([seed, zlib.crc32(level.encode())])
  return [int(word >> 2) * 2 for word in sequence.generate_state(count)]


def episode_seeds(seed, maps=(), is_test=False):
  """Yields the seeds of episodes, ints in [0, 2**31), without end.

  Args:
    seed: int, from which they are drawn.
    maps: list of the seeds that they are drawn from; if it is empty, from all,
      as in DeepMind's release.
    is_test: whether they are odd, so that none is in `maps`.
  """
  random_state = np.random.RandomState(seed)
  while True:
    if is_test:
      yield 2 * int(random_state.randint(0, 2**30 - 1)) + 1
    elif maps:
      yield maps[random_state.randint(len(maps))]
    else:
      yield int(random_state.randint(0, 2**31 - 1))


# --- The cache --------------------------------------------------------------


class LocalLevelCache:
  """Keeps compiled maps in a folder; many processes may use it at once.

  DeepMind Lab calls `fetch` and `write`. A map that was damaged on the disk
  counts as missing. What was not used for the longest time is removed first.
  """

  def __init__(self, cache_dir, max_bytes=None):
    """Uses a folder, which is made with the first map.

    Args:
      cache_dir: path of the folder.
      max_bytes: int, of all maps in it; None for no bound.
    """
    self._cache_dir = cache_dir
    self._max_bytes = max_bytes
    self._bytes_until_look = 0
    self._asked = None

  def fetch(self, key, pk3_path):
    """Copies the map `key` to the file `pk3_path`; returns whether it could."""
    if self._asked is not None:
      self._asked.append(key)
    path = self._path(key)
    content = self._read(path)
    if content is None:
      return False
    compiled, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    try:
      if hashlib.sha256(compiled).digest() != digest:
        logging.getLogger(__name__).warning(
          'The map %s is damaged: it is compiled anew.', path
        )
        os.unlink(path)
        return False
      with open(pk3_path, 'wb') as file:
        file.write(compiled)
    except OSError:
      return False
    # Its time says when it was used last. It may be another user's.
    with contextlib.suppress(OSError):
      os.utime(path)
    return True

  def write(self, key, pk3_path):
    """Stores the file `pk3_path` as the map `key`."""
    path = self._path(key)
    if os.path.exists(path):
      return
    try:
      with open(pk3_path, 'rb') as file:
        compiled = file.read()
    except OSError as error:
      _warn(error)
    else:
      self._store(path, compiled + hashlib.sha256(compiled).digest())

  @contextlib.contextmanager
  def recording(self):
    """Yields a list, which gets the keys that are asked for meanwhile."""
    self._asked = []
    try:
      yield self._asked
    finally:
      self._asked = None

  def note(self, name, keys):
    """Notes with which maps the episode of a name begins."""
    path = self._keys_path(name)
    content = '\n'.join(keys).encode()
    if self._read(path) == content:
      with contextlib.suppress(OSError):
        os.utime(path)
    else:
      self._store(path, content)

  def noted(self, name):
    """Returns the keys that `note` got, if their maps are all here, or None."""
    content = self._read(self._keys_path(name))
    if content is None:
      return None
    keys = content.decode(errors='replace').split()
    is_complete = all(os.path.exists(self._path(key)) for key in keys)
    return keys if is_complete else None

  def num_bytes(self):
    """Returns how much room the cache's files take."""
    return sum(size for _, size, _ in self._files())

  def _path(self, key):
    return os.path.join(self._cache_dir, key + _MAP)

  def _keys_path(self, name):
    digest = hashlib.sha256(name.encode()).hexdigest()
    return os.path.join(self._cache_dir, digest + _KEYS)

  def _read(self, path):
    """Returns the content of a file; None without one."""
    try:
      with open(path, 'rb') as file:
        return file.read()
    except OSError:
      return None

  def _store(self, path, content):
    """Writes a file at once, and makes room for what comes next.

    Another process may read or write the same file: it must see all or nothing
    of it. And a full disk must not end the training.
    """
    temporary = f'{path}.{uuid.uuid4().hex}{_TEMPORARY}'
    try:
      os.makedirs(self._cache_dir, exist_ok=True)
      with open(temporary, 'wb') as file:
        file.write(content)
      os.replace(temporary, path)
      self._bytes_until_look -= len(content)
      if self._max_bytes is not None and self._bytes_until_look <= 0:
        self._make_room()
    except OSError as error:
      _warn(error)
      with contextlib.suppress(OSError):
        os.unlink(temporary)

  def _make_room(self):
    """Removes what was not used for the longest time, if there is too much.

    Processes that do so at the same time remove the same files.
    """
    files = self._files()
    total = sum(size for _, size, _ in files)
    if total > self._max_bytes:
      for _, size, path in sorted(files):
        if total <= _LEFT_FULL * self._max_bytes:
          break
        with contextlib.suppress(FileNotFoundError):
          os.unlink(path)
        total -= size
    self._bytes_until_look = (self._max_bytes - total) / _SHARE

  def _files(self):
    """Returns (time, bytes, path) of each of the cache's files."""
    files = []
    with contextlib.suppress(FileNotFoundError):
      with os.scandir(self._cache_dir) as entries:
        for entry in filter(lambda e: e.name.endswith(_OURS), entries):
          with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.path))
    return files


def _warn(error):
  logging.getLogger(__name__).warning('Map not cached: %s', error)


# --- The episodes of an environment -----------------------------------------


class Episodes:
  """Begins the episodes of a `deepmind_lab.Lab`."""

  def __init__(self, lab, seeds, cache, name=None, ahead=None):
    """Takes an environment.

    Args:
      lab: `deepmind_lab.Lab`.
      seeds: iterator of ints, of the episodes.
      cache: the `LocalLevelCache` of `lab`; None if `name` and `ahead` are.
      name: string, of all but the seed that the maps depend on, if it shall be
        noted which maps the seeds have; None if seeds will hardly come again.
      ahead: `AheadCompiler`, None to compile maps when they are needed.
    """
    self._lab = lab
    self._seeds = seeds
    self._cache = cache
    self._name = name
    self._ahead = ahead
    self._next = None  # The seed of the next episode, if it is chosen yet.

  def begin(self):
    """Begins the next episode."""
    seed = next(self._seeds) if self._next is None else self._next
    self._next = None
    if self._ahead is None:
      self._reset(seed)
      return
    self._ahead.finish()
    # Only levels that compile maps are worth it.
    if self._reset(seed):
      self._next = next(self._seeds)
      if self._noted(self._next) is None:
        self._ahead.want(self._next)

  def step(self):
    """Is to be called now and then while an episode is played."""
    if self._ahead is not None:
      self._ahead.poll()

  def compile(self, seed):
    """Has the cache hold the maps with which the episode of a seed begins.

    Args:
      seed: int.

    Returns:
      The number of these maps; some levels have none to compile.
    """
    keys = self._noted(seed)
    return len(self._reset(seed) if keys is None else keys)

  def close(self):
    """Ends what is compiled ahead."""
    if self._ahead is not None:
      self._ahead.close()

  def _reset(self, seed):
    """Resets to the episode of a seed; returns the keys of its first maps."""
    if self._cache is None:
      self._lab.reset(seed=seed)
      return []
    with self._cache.recording() as keys:
      self._lab.reset(seed=seed)
    if self._name is not None:
      self._cache.note(f'{self._name} {seed}', keys)
    return keys

  def _noted(self, seed):
    """Returns the keys of a seed's maps if all are in the cache, else None."""
    return self._name and self._cache.noted(f'{self._name} {seed}')


class AheadCompiler:
  """Has maps compiled by another process, at lower priority.

  All of a user's programs on a machine together run as many of these processes
  at once as it has cores; each takes the memory of an environment. A map that
  gets its turn too late is compiled by the environment itself.
  """

  def __init__(self, level, options, runfiles_path=None):
    """Takes what maps are compiled for.

    Args:
      level: name of the level.
      options: dict of the arguments of `deepmind_lab.Lab`, with a `level_cache`
        that can be pickled.
      runfiles_path: folder with DeepMind Lab's files, None for its own.
    """
    self._arguments = level, options, runfiles_path
    self._seed = None  # Of the map that waits for its turn.
    self._next_try = 0
    self._process = None

  def want(self, seed):
    """Asks for the maps with which the episode of a seed begins."""
    self._seed = seed
    self._next_try = 0

  def poll(self):
    """Starts the compilation that was asked for, if it is its turn."""
    if self._seed is None or time.monotonic() < self._next_try:
      return
    self._next_try = time.monotonic() + _SLOT_SECONDS
    slot = _take_slot()
    if slot is not None:
      seed, self._seed = self._seed, None
      with slot:
        self._start(seed, slot)

  def finish(self):
    """Waits for a compilation under way; one that was not begun is dropped."""
    self._seed = None
    if self._process is not None:
      code = self._process.wait()
      self._process = None
      if code:
        # The environment will meet the reason itself, if it is one that stays.
        logging.getLogger(__name__).warning(
          'A map was not compiled ahead: the process that should ended with '
          'exit code %d.',
          code,
        )

  def close(self):
    """Ends a compilation under way."""
    self._seed = None
    if self._process is not None:
      self._process.kill()
      self._process.wait()
      self._process = None

  def _start(self, seed, slot):
    self._process = subprocess.Popen(
      [sys.executable, '-c', 'import dmlab_maps; dmlab_maps.compile_one()'],
      stdin=subprocess.PIPE,
      pass_fds=[slot.fileno()],  # It stays bound until the process ends.
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )
    with contextlib.suppress(BrokenPipeError), self._process.stdin as file:
      pickle.dump((os.getpid(), *self._arguments, seed), file)


def _take_slot():
  """Returns a bound socket; None if as many compile as there are cores."""
  for number in range(len(os.sched_getaffinity(0))):
    slot = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
      slot.bind(_SLOT.format(user=os.getuid(), number=number))
      return slot
    except OSError:
      slot.close()
  return None


def compile_one():
  """Compiles the map that an `AheadCompiler` describes on standard input."""
  parent, level, options, runfiles_path, seed = pickle.load(sys.stdin.buffer)
  # However the environment ends: it may be killed.
  py_process.die_with(parent)
  os.nice(_NICENESS)
  import deepmind_lab

  if runfiles_path:
    deepmind_lab.set_runfiles_path(runfiles_path)
  lab = deepmind_lab.Lab(level, ['RGB_INTERLEAVED'], **options)
  lab.reset(seed=seed)
  lab.close()
