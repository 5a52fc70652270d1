# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Compiles the maps of DeepMind Lab's levels before a training.

In: what is played, and how many maps each level has. Out: the maps in the cache
of the training. What is there already is not compiled again.
"""

import collections
import threading

import py_process
from dmlab_maps import LocalLevelCache, map_seeds

# After so many failures, the rest of a level's maps is given up.
_MAX_FAILURES = 3
_NEARLY_FULL = 0.8  # Of its bound: the cache may have removed maps.


class MapCompiler:
  """Threads that each compile with a process of the level at hand.

  A context: it starts them, and ends them with their processes.
  """

  def __init__(self, game, num_workers):
    """Prepares to compile.

    Args:
      game: `levels.Game` of `environments.PyProcessDmLab`.
      num_workers: int, how many maps are compiled at once.
    """
    self._game = game
    self._names = dict(zip(game.levels, game.names, strict=True))
    settings = game.settings.dmlab
    self._todo = collections.deque(
      (level, seed)
      for level in game.levels
      for seed in map_seeds(level, settings.maps_seed, settings.num_maps)
    )
    self.num_maps = len(self._todo)
    self.num_done = 0
    self._without_maps = set()
    self._failures = {}  # Lists of reasons by level.
    self._num_missing = 0
    self._lock = threading.Lock()
    self._is_stopped = False
    self._running = {}  # (level, process) by thread.
    self._threads = [
      threading.Thread(target=self._run, daemon=True)
      for _ in range(num_workers)
    ]

  def __enter__(self):
    for thread in self._threads:
      thread.start()
    return self

  def __exit__(self, *_):
    with self._lock:
      self._is_stopped = True
      running = [process for _, process in self._running.values()]
    py_process.close_all(running)
    for thread in self._threads:
      thread.join()

  def wait_for_end(self, seconds):
    """Waits some seconds for the end; returns whether it has come."""
    for thread in self._threads:
      thread.join(seconds)
      if thread.is_alive():
        return False
    return True

  def is_complete(self):
    """Returns whether all maps are compiled."""
    return self.num_done == self.num_maps and not self._num_missing

  def summary(self):
    """Returns lines on what was done."""
    settings = self._game.settings
    cache = LocalLevelCache(settings.level_cache_dir)
    num_bytes, bound = cache.num_bytes(), settings.dmlab.level_cache_bytes
    names = sorted(self._names[level] for level in self._without_maps)
    lines = [f'{", ".join(names)}: no maps to compile.'] if names else []
    lines += [
      f'{self._names[level]}: {len(reasons)} failures, the first: {reasons[0]}'
      for level, reasons in self._failures.items()
    ]
    lines.append(
      f'{self.num_done - self._num_missing:,} of {self.num_maps:,} episodes '
      f'have their maps; {settings.level_cache_dir} has {num_bytes / 1e9:.3f} '
      'GB of maps.'
    )
    if bound is not None and num_bytes > _NEARLY_FULL * bound:
      lines.append(
        f'It may have at most {bound / 1e9:g} GB, so that maps may have been '
        'removed again: give a higher --level_cache_size_gb.'
      )
    return lines

  def _run(self):
    while (task := self._take()) is not None:
      level, seed = task
      try:
        if self._process_of(level).call('compile_map', seed) == 0:
          self._without_maps.add(level)
      except py_process.ProcessError as error:
        if self._is_stopped:
          break
        self._fail(level, error)
        self._end_process()
      with self._lock:
        self.num_done += 1
    self._end_process()

  def _take(self):
    """Returns the next level and seed; None at the end."""
    with self._lock:
      while self._todo and not self._is_stopped:
        level, seed = self._todo.popleft()
        if level in self._without_maps:
          self.num_done += 1
        elif len(self._failures.get(level, ())) >= _MAX_FAILURES:
          self.num_done += 1
          self._num_missing += 1
        else:
          return level, seed
    return None

  def _process_of(self, level):
    """Returns this thread's process, which plays the level."""
    of_level, process = self._running.get(threading.get_ident(), (None, None))
    if of_level == level:
      return process
    self._end_process()
    game = self._game
    process = game.family.create(level, 0, game.settings, game.spec)
    with self._lock:
      if self._is_stopped:
        raise py_process.ProcessError('No process is started any more.')
      self._running[threading.get_ident()] = level, process
    process.start()
    return process

  def _end_process(self):
    with self._lock:
      _, process = self._running.pop(threading.get_ident(), (None, None))
    if process is not None:
      process.close()

  def _fail(self, level, error):
    failure = py_process.failure(error)
    reason = ' '.join((failure.reason if failure else str(error)).split())
    with self._lock:
      self._failures.setdefault(level, []).append(f'its process {reason}')
      self._num_missing += 1
