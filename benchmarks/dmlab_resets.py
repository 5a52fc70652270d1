# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What do DeepMind Lab's maps cost, and what do fewer or earlier ones save?

Plays the tests' stand-in for DeepMind Lab, whose frames and maps take times
that are in the ratio of the real one's on explore_goal_locations_small. Nothing
is learned, so the frames/s are those that environments alone allow. In one half
of the table they share this machine's cores, in the other each sleeps instead
of working, as on a machine with a core for each. Run it on an otherwise idle
machine:

  python -m benchmarks.dmlab_resets
"""

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time

import numpy as np

import environments
import py_process
from benchmarks import common

_LEVEL = 'contributed/dmlab30/explore_goal_locations_small'
_FORWARD = np.array(environments.DEFAULT_ACTION_SET[0], np.intc)
_STAND_IN = os.path.join(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
  'tests',
  'fake_deepmind_lab',
)
# The real one's processor seconds; a quarter of its compilation and episode, so
# that there are many in a short time.
_TIMES = {
  'STEP_SECONDS': 0.00145,
  'COMPILE_SECONDS': 1.4,
  'EPISODE_FRAMES': 1350,
}
_NUM_CORES = 64  # Of the machine with a core for each.
_REPEATS = 4

_VARIANTS = {
  'each map is new': {},
  'compiled ahead': {'compiles_ahead': True},
  '20 maps': {'num_maps': 20},
  '20 maps, compiled ahead': {'num_maps': 20, 'compiles_ahead': True},
  '20 maps, compiled before': {'num_maps': 20},
}


class _ManyCores(environments.PyProcessDmLab):
  """As on a machine with many cores."""

  def __init__(self, level, config, *args, **kwargs):
    os.environ['FAKE_DMLAB_SLEEPS'] = '1'
    os.sched_getaffinity = lambda pid: range(_NUM_CORES)
    super().__init__(level, config, *args, **kwargs)


class _Actor(threading.Thread):
  """Plays, and keeps the times of its steps."""

  def __init__(self, process, is_over):
    super().__init__(daemon=True)
    self._process = process
    self._is_over = is_over
    self.steps = []  # When each ended, and how long a reset in it took.

  def run(self):
    self._process.call('initial')
    begin = time.monotonic()
    while not self._is_over.is_set():
      done = self._process.call('step', _FORWARD)[1]
      end = time.monotonic()
      self.steps.append((end, end - begin if done else 0.0))
      begin = end


def _measure(num_actors, cls, folder, seconds, kwargs):
  """Returns frames/s, and which share of their time actors wait for resets."""
  processes = [
    py_process.PyProcess(
      cls,
      _LEVEL,
      {'width': 96, 'height': 72},
      _REPEATS,
      seed,
      level_cache=environments.LocalLevelCache(folder),
      **kwargs,
    )
    for seed in range(num_actors)
  ]
  is_over = threading.Event()
  try:
    py_process.start_all(processes)
    actors = [_Actor(process, is_over) for process in processes]
    for actor in actors:
      actor.start()
    while not all(actor.steps for actor in actors):
      if not all(actor.is_alive() for actor in actors):
        raise RuntimeError('An environment failed.')
      time.sleep(0.1)
    begin = time.monotonic()
    time.sleep(seconds)
    end = time.monotonic()
    is_over.set()
    for actor in actors:
      actor.join()
  finally:
    py_process.close_all(processes)
  waits = [
    wait for actor in actors for t, wait in actor.steps if begin < t <= end
  ]
  return (
    len(waits) * _REPEATS / seconds,
    sum(waits) / (num_actors * seconds),
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--seconds', type=int, default=40, help='per row')
  parser.add_argument('--actors', type=int, nargs='+', default=[4, 16])
  args = parser.parse_args()
  sys.path.insert(0, _STAND_IN)
  for name, value in _TIMES.items():
    os.environ[f'FAKE_DMLAB_{name}'] = str(value)
  rows = []
  for cls, num_actors in itertools.product(
    (environments.PyProcessDmLab, _ManyCores), args.actors
  ):
    cores = os.cpu_count() if cls is not _ManyCores else 'one each'
    with tempfile.TemporaryDirectory() as parent:
      for variant, kwargs in _VARIANTS.items():
        # The last begins with the maps of the one before.
        if not variant.endswith('before'):
          folder = tempfile.mkdtemp(dir=parent)
        rate, share = _measure(num_actors, cls, folder, args.seconds, kwargs)
        print('.', end='', file=sys.stderr, flush=True)
        rows.append(
          [cores, num_actors, variant, f'{rate:,.0f}', f'{share:.0%}']
        )
  common.print_table(
    ['cores', 'actors', 'maps', 'frames/s', 'waits for resets'], rows
  )


if __name__ == '__main__':
  main()
