# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Evaluation: plays the episodes of a test, and keeps their results.

In: an actor's graph with the parameters of a checkpoint. Out: `Results`, with a
table and files; videos. Which episodes are played is fixed beforehand, and each
has an environment process and seeds of its own. So the results don't depend on
the number of actors, on interruptions, or on how long episodes take.

`BackgroundTests` runs tests in another process during a training.
"""

import collections
import contextlib
import csv
import errno
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import tabulate
import tensorflow.compat.v1 as tf
from absl import logging

import action_sets
import actors
import checkpoints
import py_process
import video
from errors import UserError, describe_exit, explain
from scores import human_normalized

# Atari's and DeepMind Lab's own pace: 60 frames per second, 4 to a step.
_VIDEO_FRAMES_PER_SECOND = 15

# Whose versions decide the course of an episode, where they are installed.
_PACKAGES = (
  'tensorflow',
  'dm-sonnet',
  'numpy',
  'gymnasium',
  'ale-py',
  'minigrid',
  'opencv-python-headless',
  'vizdoom',
  'deepmind-lab',
)

# --- Results ------------------------------------------------------------------

# A played episode: its number among those of its level, its return, and its
# length in environment frames.
Episode = collections.namedtuple('Episode', 'number episode_return frames')

# The columns of the table and of the CSV file. `human_normalized` is the score
# in percent: random play is 0, human play 100.
LevelStatistics = collections.namedtuple(
  'LevelStatistics',
  'level episodes mean standard_error median min max human_normalized missing',
)


class Results:
  """The episodes of an evaluation by level; for use by many threads.

  Which episodes count is fixed beforehand, `num_episodes` of each level: taking
  those that end first would favour short ones.

  Each episode is a line of the file <path>.jsonl as soon as it has ended. The
  first line has the settings and versions. `save` writes <path>.json and
  <path>.csv, which sum up all episodes. If the program is killed, only the
  episodes under way are lost.
  """

  def __init__(
    self,
    path,
    settings,
    levels,
    num_episodes,
    references,
    aggregates,
    versions,
    facts,
  ):
    """Reads the episodes that the files have already.

    Args:
      path: of the files, without extension.
      settings: dict of what decides the course of the episodes, for JSON.
      levels: list of the levels' names.
      num_episodes: episodes to play on each.
      references: dict from level to the (human, random) returns that its score
        is normalised with; levels may be missing.
      aggregates: dict from the name of a suite's score to the function of the
        returns by level that computes it; empty for a single level.
      versions: dict from the names of libraries to their versions.
      facts: dict of what else readers of the JSON file should know.

    Raises:
      UserError: they were made with other settings or versions, or can't be
        read or written.
    """
    self.path = path
    self._settings = settings
    self._num_episodes = num_episodes
    self._references = references
    self._aggregates = aggregates
    self._versions = versions
    self._facts = facts
    self._lock = threading.Lock()
    self._episodes = {level: {} for level in levels}
    self._missing = {}
    with _explain_write_errors(path):
      self._load()

  def add(self, level, episode):
    """Takes an `Episode`, and writes it to the file.

    Raises:
      UserError: the file can't be written.
    """
    line = _json_line({'level': level, **episode._asdict()})
    with self._lock:
      with _explain_write_errors(self.path):
        _append(self._log, line)
      self._episodes[level][episode.number] = episode

  def give_up(self, level, reason):
    """Notes why a level can't be evaluated."""
    with self._lock:
      self._missing[level] = reason

  def has(self, level, number):
    """Returns whether an episode was played."""
    return number in self._episodes[level]

  @property
  def missing(self):
    """Dict from the levels that can't be evaluated to the reasons."""
    with self._lock:
      return dict(self._missing)

  def returns(self):
    """Dict from level to the returns of its episodes, in their order."""
    with self._lock:
      return {
        level: [
          episodes[number].episode_return
          for number in range(self._num_episodes)
          if number in episodes
        ]
        for level, episodes in self._episodes.items()
      }

  def num_played(self):
    """Returns the number of episodes that were played, of all levels."""
    return sum(map(len, self.returns().values()))

  def is_complete(self):
    """Returns whether all episodes of all levels were played."""
    return self.num_played() == self._num_episodes * len(self._episodes)

  def statistics(self):
    """Returns a list of `LevelStatistics`, None where there is no value."""
    missing = self.missing
    return [
      _statistics(
        level, returns, self._references.get(level), missing.get(level)
      )
      for level, returns in self.returns().items()
    ]

  def scores(self):
    """Returns the suite's scores by name; empty unless all is played."""
    if not self.is_complete():
      return {}
    returns = self.returns()
    return {
      name: aggregate(returns) for name, aggregate in self._aggregates.items()
    }

  def table(self):
    """Returns the statistics as text, the suite's scores below."""
    rows = [row._asdict() for row in self.statistics()]
    for row in rows:
      if row.pop('missing'):
        row['level'] += ' (missing)'
    text = tabulate.tabulate(
      [list(row.values()) for row in rows],
      [name.replace('_', ' ') for name in rows[0]],
      floatfmt='.2f',
      missingval='-',
    )
    lines = [
      f'human-normalised score, {name.replace("_", " ")}: {score:.2f} %'
      for name, score in self.scores().items()
    ]
    lines += [
      f'missing: {level}: {reason}' for level, reason in self.missing.items()
    ]
    return '\n'.join([text, *lines])

  def save(self):
    """Writes the files that sum up the episodes.

    Raises:
      UserError: they can't be written.
    """
    with self._lock:
      episodes = {
        level: [episodes[number]._asdict() for number in sorted(episodes)]
        for level, episodes in self._episodes.items()
      }
    rows = [row._asdict() for row in self.statistics()]
    content = {
      'settings': self._settings,
      'num_episodes': self._num_episodes,
      'is_complete': self.is_complete(),
      'scores': self.scores(),
      'levels': rows,
      **self._facts,
      'versions': self._versions,
      'episodes': episodes,
    }
    # A line for each entry: indentation would take seconds for a whole suite.
    entries = [
      f'"{name}": {json.dumps(value, allow_nan=False)}'
      for name, value in content.items()
    ]
    text = '{\n' + ',\n'.join(entries) + '\n}\n'

    def write_table(file):
      writer = csv.DictWriter(file, LevelStatistics._fields)
      writer.writeheader()
      writer.writerows(rows)

    with _explain_write_errors(self.path):
      _write(self.path + '.json', lambda file: file.write(text))
      _write(self.path + '.csv', write_table)

  @property
  def _log(self):
    return self.path + '.jsonl'

  def _load(self):
    """Takes the episodes in the files, and has the .jsonl file ready."""
    if os.path.exists(self._log):
      self._load_log()
      return
    # Before there were .jsonl files, the .json file had all there was.
    if os.path.exists(self.path + '.json'):
      self._load_summary()
    lines = [{'settings': self._settings, 'versions': self._versions}]
    lines += [
      {'level': level, **episode._asdict()}
      for level, episodes in self._episodes.items()
      for episode in episodes.values()
    ]
    text = b''.join(map(_json_line, lines)).decode()
    _write(self._log, lambda file: file.write(text))

  def _load_log(self):
    path = self._log
    with open(path, 'rb') as file:
      content = file.read()
    # The program was killed while it wrote the last line.
    size = content.rfind(b'\n') + 1
    with _explain_content_errors(path):
      header, *lines = map(json.loads, content[:size].splitlines())
      self._check(path, header)
      for line in lines:
        self._take(line.pop('level'), line)
    if size < len(content):
      os.truncate(path, size)

  def _load_summary(self):
    path = self.path + '.json'
    with open(path) as file, _explain_content_errors(path):
      content = json.load(file)
      self._check(path, content)
      for level, episodes in content['episodes'].items():
        for episode in episodes:
          self._take(level, episode)

  def _check(self, path, header):
    """Raises UserError if a file's settings or versions aren't ours."""
    versions = header.get('versions', {})
    pairs = [
      (name, header['settings'].get(name), ours)
      for name, ours in self._settings.items()
    ]
    # What is installed in one of both places alone isn't used by the level.
    pairs += [
      (f'version of {name}', versions[name], ours)
      for name, ours in self._versions.items()
      if name in versions
    ]
    for name, theirs, ours in pairs:
      if theirs != ours:
        raise UserError(
          f'{path} holds the results of another evaluation: its {name} is '
          f'{theirs!r}, here it is {ours!r}. Move it away to evaluate anew.'
        )

  def _take(self, level, episode):
    """Takes an episode of a file, a dict."""
    # Older files may have others. These episodes are played again.
    if math.isfinite(episode['episode_return']):
      self._episodes[level][episode['number']] = Episode(**episode)


def _json_line(value):
  return (json.dumps(value, allow_nan=False) + '\n').encode()


@contextlib.contextmanager
def _explain_content_errors(path):
  """Raises UserError for errors in the content of a results file."""
  try:
    yield
  except (ValueError, LookupError, TypeError, AttributeError):
    raise UserError(
      f'{path} can not be read: move it away to evaluate anew.'
    ) from None


@contextlib.contextmanager
def _explain_write_errors(path):
  """Raises UserError where the files of results can't be read or written."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'The results {path}.* can not be written ({error.strerror}): mend this; '
      'the same command plays the missing episodes.'
    ) from None


def _append(path, line):
  """Appends to a file all of a line, or on an error nothing."""
  with open(path, 'ab', buffering=0) as file:
    size = os.fstat(file.fileno()).st_size
    try:
      if file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      file.truncate(size)
      raise


def _statistics(level, returns, reference, missing):
  """Returns the `LevelStatistics` of a level's returns."""
  count = len(returns)
  if not count:
    return LevelStatistics(level, 0, *[None] * 6, missing)
  return LevelStatistics(
    level=level,
    episodes=count,
    mean=float(np.mean(returns)),
    standard_error=(
      float(np.std(returns, ddof=1) / np.sqrt(count)) if count > 1 else None
    ),
    median=float(np.median(returns)),
    min=min(returns),
    max=max(returns),
    human_normalized=(
      human_normalized(returns, *reference) if reference else None
    ),
    missing=missing,
  )


def _write(path, write):
  """Writes a file at once: readers see the old or the new content."""
  temporary = f'{path}.{os.getpid()}.tmp'  # Another program may write it, too.
  # Reasons may have characters of names of files that aren't text.
  with open(
    temporary, 'w', newline='', encoding='utf-8', errors='backslashreplace'
  ) as file:
    write(file)
  os.replace(temporary, path)


# --- Names and facts ----------------------------------------------------------


def results_path(logdir, level_name, frames, seed):
  """Returns the path, without extension, of the results of a checkpoint."""
  name = f'{_file_name(level_name)}-frames{frames}-seed{seed}'
  return os.path.join(logdir, 'test', name)


def video_path(video_dir, level, frames, seed):
  """Returns the path of the video of a level's first episode."""
  name = f'{_file_name(level)}-frames{frames}-seed{seed}.mp4'
  return os.path.join(video_dir, name)


def _file_name(level):
  return re.sub(r'[^\w.-]+', '_', level)


def episode_seeds(game, index, seed):
  """Returns the seeds of a test episode, of its environment and its actions.

  They are the same whether its level is tested alone or with its suite.

  Args:
    game: `Game`.
    index: int, of the episode: they go round after round through the levels.
    seed: int, of the test.
  """
  name = game.names[index % len(game.names)]
  number = index // len(game.names)
  return actors.draw_seeds(2, seed, zlib.crc32(name.encode()), number)


def versions(levels):
  """Returns the versions of what decides the course of an episode.

  Args:
    levels: list of levels; a name may begin with a module, as in
      gym:my_levels:MyLevel-v0.

  Returns:
    Dict from the names of Python and of installed packages to versions.
  """
  matches = [re.match(r'gym:(\w+)[\w.]*:', level) for level in levels]
  modules = {match[1] for match in matches if match}
  # It takes a second.
  owners = importlib.metadata.packages_distributions() if modules else {}
  packages = {name for module in modules for name in owners.get(module, [])}
  found = {'python': platform.python_version()}
  for name in [*_PACKAGES, *sorted(packages.difference(_PACKAGES))]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


# --- Episodes -----------------------------------------------------------------


# What a test sees of an unroll: outputs of [T + 1, ...] as in `ActorOutput`.
TestUnroll = collections.namedtuple(
  'TestUnroll', 'done info frame action baseline'
)


class TestLoops(tf.train.SessionRunHook):
  """Plays the episodes of a test that the results don't have yet.

  Some threads take them one after another. Each starts the episode's process,
  plays to the end, and closes the process.
  """

  def __init__(
    self,
    actor,
    index,
    processes,
    game,
    results,
    num_workers,
    max_restarts,
    video_path=None,
  ):
    """Prepares the loops; the session's start starts them.

    Args:
      actor: `ActorGraph`.
      index: int placeholder, which process plays.
      processes: list of `PyProcess`, one per episode, round after round through
        the levels.
      game: `Game`.
      results: `Results`.
      num_workers: int, how many episodes are played at once.
      max_restarts: int, how often an episode is begun anew after a failure,
        before its level is given up.
      video_path: function from a level's name to the path of the video of its
        first episode; None for no videos.
    """
    self._actor = actor
    self._index = index
    self._processes = processes
    self._game = game
    self._names = game.names
    self._results = results
    self._max_attempts = 1 + max_restarts
    self._video_path = video_path
    self._episodes = collections.deque()
    for episode in range(len(processes)):
      name, number = self._identify(episode)
      is_done = results.has(name, number) and (
        not self._is_recorded(number) or os.path.exists(video_path(name))
      )
      if not is_done and name not in results.missing:
        self._episodes.append(episode)
    self.num_workers = min(num_workers, len(self._episodes))
    # The processes that run. Their threads close them; so does `stop`, as this
    # ends what the threads wait for.
    self._running = set()
    self._lock = threading.Lock()
    self._threads = []
    self.coord = None

  def after_create_session(self, session, coord):
    self.coord = coord
    env_outputs = self._actor.output.env_outputs
    agent_outputs = self._actor.output.agent_outputs
    self._start = actors.make_start(session, self._actor, self._index)
    self._unroll = actors.make_unroll(
      session,
      self._actor,
      self._index,
      TestUnroll(env_outputs.done, env_outputs.info, [], [], []),
    )
    self._unroll_for_video = actors.make_unroll(
      session,
      self._actor,
      self._index,
      TestUnroll(
        env_outputs.done,
        env_outputs.info,
        env_outputs.observation[0],
        agent_outputs.action,
        agent_outputs.baseline,
      ),
    )
    self._threads = actors.start_threads(coord, [self._run] * self.num_workers)

  def is_running(self):
    return any(thread.is_alive() for thread in self._threads)

  def wait_for_end(self, seconds):
    """Waits some seconds; returns whether all threads have ended."""
    self.coord.wait_for_stop(timeout=seconds)
    return not self.is_running()

  def stop(self):
    """Ends the episodes under way."""
    self.coord.request_stop()
    while self.is_running():
      with self._lock:
        running = list(self._running)
      py_process.close_all(running)
      time.sleep(0.1)

  def _identify(self, episode):
    """Returns the level's name and the episode's number in it."""
    number, level = divmod(episode, len(self._names))
    return self._names[level], number

  def _is_recorded(self, number):
    """Returns whether there is a video of a level's episode."""
    return self._video_path is not None and number == 0

  def _run(self):
    while not self.coord.should_stop():
      try:
        episode = self._episodes.popleft()
      except IndexError:
        return
      self._attempt(episode)

  def _attempt(self, episode):
    """Plays an episode; gives its level up if it fails again and again."""
    name, number = self._identify(episode)
    for attempt in range(1, self._max_attempts + 1):
      if name in self._results.missing or self.coord.should_stop():
        return
      try:
        info = self._run_process(episode)
      except (tf.errors.OpError, py_process.ProcessError) as error:
        if self.coord.should_stop():
          return
        reason = self._explain(episode, error)
      else:
        # The sum of finite rewards may be too large for float32.
        if np.isfinite(info.episode_return):
          self._results.add(name, self._episode(number, info))
          return
        reason = f'its return is {info.episode_return}'
      logging.warning(
        '%s, episode %d: %s (attempt %d of %d).',
        name,
        number,
        reason,
        attempt,
        self._max_attempts,
      )
    self._results.give_up(name, f'{reason} ({self._max_attempts} attempts)')

  def _episode(self, number, info):
    """Returns the `Episode` with a `StepOutputInfo` at its end."""
    frames = int(info.episode_step) * self._game.settings.num_action_repeats
    return Episode(number, float(info.episode_return), frames)

  def _run_process(self, episode):
    """Plays an episode in a process that is started for it."""
    process = self._processes[episode]
    try:
      # Before its start: `stop` ends a constructor that hangs as well.
      with self._lock:
        self._running.add(process)
      process.start()
      return self._play(episode)
    finally:
      with self._lock:
        self._running.discard(process)
      # It may take a while, so the lock isn't held.
      process.close()

  def _play(self, episode):
    """Returns the `StepOutputInfo` of the episode's end."""
    name, number = self._identify(episode)
    if not self._is_recorded(number):
      return self._play_to_the_end(episode, self._unroll, lambda unroll: None)
    path = self._video_path(name)
    try:
      with video.record(path, _VIDEO_FRAMES_PER_SECOND) as add:
        return self._play_to_the_end(
          episode,
          self._unroll_for_video,
          functools.partial(self._add_to_video, add),
        )
    except OSError as error:
      raise UserError(
        f'The video {path} can not be written ({error.strerror}): make room, '
        'or give another --video_dir.'
      ) from None

  def _play_to_the_end(self, episode, run, see):
    """Runs unrolls, shows each to `see`, and returns the last info."""
    state = self._start(episode)
    while not self.coord.should_stop():
      unroll, state = run(episode, *state)
      see(unroll)
      end = _end(unroll)
      if end is not None:
        return type(unroll.info)(*(values[end] for values in unroll.info))
    raise tf.errors.CancelledError(None, None, 'The test was stopped.')

  def _add_to_video(self, add, unroll):
    end = _end(unroll)
    action_set = self._game.spec.action_set
    # The action that was chosen at a frame is in the next entry.
    for t in range(len(unroll.done) - 1 if end is None else end):
      lines = [
        f'return {unroll.info.episode_return[t]:.2f}   '
        f'value {unroll.baseline[t + 1]:.3f}',
        f'action {action_sets.describe(action_set, unroll.action[t + 1])}',
      ]
      add(self._picture(unroll.frame[t]), lines)
    if end is not None:
      # The last frame is shown for a second, with the return after its action.
      lines[0] = f'return {unroll.info.episode_return[end]:.2f}, the end'
      for _ in range(_VIDEO_FRAMES_PER_SECOND):
        add(self._picture(unroll.frame[end - 1]), lines)

  def _picture(self, frame):
    return self._game.family.picture(frame, self._game.spec)

  def _explain(self, episode, error):
    """Returns why an episode could not be played."""
    failure = py_process.failure(error)
    if failure is None:
      return explain(error)
    if failure.traceback:
      logging.error('%s', failure.traceback)
    if failure.reason == 'died':
      exit_code = self._processes[episode].exit_code(timeout=1.0)
      return f'its process died with {describe_exit(exit_code)}'
    return f'its process {failure.reason}'


def _end(unroll):
  """Returns the index at which a `TestUnroll` ends its episode, or None."""
  # The first entry is the last one of the unroll before.
  ends = np.flatnonzero(unroll.done[1:])
  return 1 + ends[0] if ends.size else None


# --- Test in the background of a training -----------------------------------

# Runs the Python program in the other arguments, and is killed when the process
# with the id in its first argument ends.
_CHILD = (
  'import os, sys, py_process; py_process.die_with(int(sys.argv[1])); '
  'os.execv(sys.executable, [sys.executable, *sys.argv[2:]])'
)


class BackgroundTests(tf.train.SessionRunHook):
  """Tests checkpoints in another process while the training goes on.

  The learner's thread saves a checkpoint, and `poll`, which the main thread
  calls, starts its test. There is one test at a time.
  """

  def __init__(self, metrics, logdir, interval_frames, arguments, path_of):
    """Prepares the tests.

    Args:
      metrics: `Metrics`, which gets the results.
      logdir: folder of the training.
      interval_frames: int, environment frames between two tests.
      arguments: function from a checkpoint's path to the arguments for Python
        that run its test.
      path_of: function from a checkpoint's frames to the path, without
        extension, of the results of its test.
    """
    self._metrics = metrics
    self._interval_frames = interval_frames
    self._arguments = arguments
    self._path_of = path_of
    self._folder = os.path.join(logdir, 'test')
    self._log = os.path.join(self._folder, 'background.log')
    self._next_frames = None
    self._checkpoint = None  # Of the next test, or of that under way.
    self._process = None

  def begin(self):
    # The training's saver may delete a checkpoint before it is read.
    self._saver = checkpoints.Saver(max_to_keep=1)

  def after_create_session(self, session, coord):
    self._schedule(session.run(tf.train.get_global_step()))

  def before_run(self, run_context):
    return tf.train.SessionRunArgs(tf.train.get_global_step())

  def after_run(self, run_context, run_values):
    if run_values.results < self._next_frames or self._checkpoint:
      return
    session = run_context.session
    frames = session.run(tf.train.get_global_step())
    self._schedule(frames)
    # Else the saver tells it.
    with contextlib.suppress(OSError):
      os.makedirs(self._folder, exist_ok=True)
    self._checkpoint = self._saver.save(
      session,
      os.path.join(self._folder, 'model.ckpt'),
      frames,
      write_meta_graph=False,
    )

  def poll(self, console):
    """Reports a test that ended, and starts the next one."""
    self.report(console)
    if self._checkpoint and self._process is None:
      try:
        self._start()
      except OSError as error:
        console.print_line(f'A test can not be started: {error}.')
        self._checkpoint = None

  def report(self, console):
    """Logs and prints the results of a test if it has ended."""
    if self._process is None or self._process.poll() is None:
      return
    try:
      # 1 means that levels are missing. Otherwise there was no test; the file,
      # if there is one, is of an earlier one.
      if self._process.returncode not in (0, 1):
        raise ValueError('The test ended early.')
      frames = int(self._checkpoint.rpartition('-')[2])
      line = self._metrics.add_test(self._path_of(frames) + '.json')
    except (OSError, ValueError):
      line = f'The test of {self._checkpoint} failed, see {self._log}.'
    console.print_line(line)
    # Last: as soon as it is None, the learner's thread may save the next one.
    self._process = None
    self._checkpoint = None

  def close(self):
    """Ends a test under way."""
    if self._process is not None:
      self._process.terminate()
      try:
        self._process.wait(timeout=10)
      except subprocess.TimeoutExpired:
        self._process.kill()
        self._process.wait()

  def _schedule(self, frames):
    interval = self._interval_frames
    self._next_frames = (frames // interval + 1) * interval

  def _start(self):
    with open(self._log, 'a') as log:
      self._process = subprocess.Popen(
        [
          sys.executable,
          '-c',
          _CHILD,
          str(os.getpid()),
          *self._arguments(self._checkpoint),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # A Ctrl-C is for the training.
        env={
          **os.environ,
          'PYTHONPATH': os.pathsep.join(sys.path),
          'CUDA_VISIBLE_DEVICES': '-1',  # The training uses its whole memory.
        },
      )
