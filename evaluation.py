# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What an evaluation finds: its files and its table.

The files, `<path>.json` and `<path>.csv`, are rewritten as episodes end, so
that an evaluation which was interrupted goes on where it was.
"""

import collections
import csv
import json
import os
import threading

import numpy as np
import tabulate

# A played episode: its number among those of its level, its return, and its
# length in environment frames.
Episode = collections.namedtuple('Episode', 'number episode_return frames')

# The columns of the table and of the CSV file. `human_normalized` is the score
# in percent: random play is 0, human play 100.
LevelStatistics = collections.namedtuple(
  'LevelStatistics',
  'level episodes mean standard_error median min max human_normalized missing',
)


class OtherEvaluation(ValueError):
  """The files hold the results of another evaluation."""


class Results:
  """The episodes of an evaluation by level; for use by many threads.

  Which episodes are counted is fixed beforehand, `num_episodes` of each level:
  to take those that end first would favour short ones. `path` is that of the
  files, without extension.
  """

  def __init__(
    self, path, settings, levels, num_episodes, references, aggregates, facts
  ):
    """Takes up what the files hold already.

    Args:
      path: of the files, without extension.
      settings: dict of what decides the course of the episodes, for JSON.
      levels: list of the levels' names.
      num_episodes: episodes to play on each.
      references: dict from level to the (human, random) returns that its score
        is normalised with; levels may be missing.
      aggregates: dict from the name of a suite's score to the function of the
        returns by level that computes it; empty for what is no suite.
      facts: dict of what else readers should know, for JSON.

    Raises:
      OtherEvaluation: they were made with other settings.
    """
    self.path = path
    self._settings = settings
    self._num_episodes = num_episodes
    self._references = references
    self._aggregates = aggregates
    self._facts = facts
    self._lock = threading.Lock()
    self._episodes = {level: {} for level in levels}
    self._missing = {}
    self._is_saved = False
    self._load()

  def add(self, level, episode):
    """Takes an `Episode`."""
    with self._lock:
      self._episodes[level][episode.number] = episode
      self._is_saved = False

  def give_up(self, level, reason):
    """Notes why a level can't be evaluated."""
    with self._lock:
      self._missing[level] = reason
      self._is_saved = False

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
    """Writes the files, if there is something new."""
    with self._lock:
      if self._is_saved:
        return
      self._is_saved = True
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
      'episodes': episodes,
    }
    # A line for each entry: indentation would take seconds for a whole suite.
    entries = [f'"{name}": {json.dumps(v)}' for name, v in content.items()]
    text = '{\n' + ',\n'.join(entries) + '\n}\n'
    _write(self.path + '.json', lambda file: file.write(text))

    def write_table(file):
      writer = csv.DictWriter(file, LevelStatistics._fields)
      writer.writeheader()
      writer.writerows(rows)

    _write(self.path + '.csv', write_table)

  def _load(self):
    try:
      with open(self.path + '.json') as file:
        content = json.load(file)
    except FileNotFoundError:
      return
    except ValueError:
      raise OtherEvaluation(
        f'{self.path}.json can not be read: move it away to evaluate anew.'
      ) from None
    theirs = content['settings']
    for name, ours in self._settings.items():
      if theirs.get(name) != ours:
        raise OtherEvaluation(
          f'{self.path}.json holds the results of another evaluation: its '
          f'{name} is {theirs.get(name)!r}, here it is {ours!r}. Move it away '
          'to evaluate anew.'
        )
    for level, episodes in content['episodes'].items():
      for episode in episodes:
        self._episodes[level][episode['number']] = Episode(**episode)


def _statistics(level, returns, reference, missing):
  """Returns the `LevelStatistics` of a level's returns."""
  count = len(returns)
  if not count:
    return LevelStatistics(level, 0, *[None] * 6, missing)
  mean, score = float(np.mean(returns)), None
  if reference:
    human, rand = reference
    score = 100 * (mean - rand) / (human - rand)
  return LevelStatistics(
    level=level,
    episodes=count,
    mean=mean,
    standard_error=(
      float(np.std(returns, ddof=1) / np.sqrt(count)) if count > 1 else None
    ),
    median=float(np.median(returns)),
    min=min(returns),
    max=max(returns),
    human_normalized=score,
    missing=missing,
  )


def _write(path, write):
  """Writes a file at once: readers see the old or the new content."""
  temporary = path + '.tmp'
  with open(temporary, 'w', newline='') as file:
    write(file)
  os.replace(temporary, path)
