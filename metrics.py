# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Metrics of a training.

In: the values of the learner's updates, statistics of the actors, results of
tests. Out: summaries for TensorBoard, and the same as lines for people.
"""

import collections
import json
import threading
import time

import numpy as np
import six
import tensorflow.compat.v1 as tf

import levels
import log_folder
import private_apis

_EPISODES = 100  # Episodes per level in the averages of the reports.


class Metrics:
  """Collects what the learner and the actors do, and reports it."""

  def __init__(
    self,
    logdir,
    level_name,
    level_names,
    actors,
    frames_per_update,
    num_action_repeats,
  ):
    """Prepares for a training.

    Args:
      logdir: folder of the summaries.
      level_name: string, the level or suite that is played.
      level_names: list of the levels in it.
      actors: `actors.Actors`.
      frames_per_update: int, environment frames of a batch.
      num_action_repeats: int, environment frames per agent step.
    """
    self._writer = tf.summary.FileWriter(logdir)
    self._writer.event_writer = log_folder.EventWriter(logdir)
    # For the session's hooks, too.
    private_apis.cache_summary_writer(logdir, self._writer)
    self._level_name = level_name
    self._num_levels = len(level_names)
    self._aggregates = levels.aggregates(level_name)
    self._actors = actors
    self._frames_per_update = frames_per_update
    self._num_action_repeats = num_action_repeats
    self._lock = threading.Lock()
    self._episodes = {
      level: collections.deque(maxlen=_EPISODES) for level in level_names
    }
    self._frames = dict.fromkeys(level_names, 0)  # Since the start of this run.
    # Returns since the suite's last score, which needs one of each level.
    self._returns = collections.defaultdict(list)
    self._last_inference = np.zeros(3)
    self._last_update = time.monotonic()
    self._busy_seconds = 0.0  # Of the last update, apart from its wait.
    self._reported_wait = 0.0  # Of a wait that has not ended yet.
    self._begin_period()
    self.global_step = None

  def add(self, update):
    """Takes the values of an `Update`."""
    now = time.monotonic()
    with self._lock:
      self._updates.append(update)
      # All learners step together: they wait for the slowest.
      waited = update.wait_seconds.max()
      self._busy_seconds = now - self._last_update - waited
      self._last_update = now
      self.global_step = int(update.learner.global_step)
      frames_per_unroll = self._frames_per_update // len(update.level_name)
      # One row per unroll.
      for name, game_over, returns, steps in zip(
        update.level_name,
        update.game_over.T,
        update.info.episode_return.T,
        update.info.episode_step.T,
        strict=True,
      ):
        level = six.ensure_str(name)
        self._frames[level] += frames_per_unroll
        for i in np.flatnonzero(game_over):
          self._add_episode(level, returns[i], steps[i])

  def latest_return(self):
    """Returns the mean return of the last episodes, None before the first."""
    with self._lock:
      returns = [r for episodes in self._episodes.values() for r, _ in episodes]
    return np.mean(returns) if returns else None

  def report(self):
    """Writes the metrics of the period that ends now.

    Returns:
      A list of lines that say the same to people.
    """
    restarts, *inference = self._actors.statistics()
    inference = np.array(inference)
    membership, membership_lines = self._actors.membership()
    with self._lock:
      now = time.monotonic()
      updates, seconds = self._updates, now - self._begin
      wait_share = self._wait_seconds(now) / seconds
      self._begin_period()
      played = {
        level: (len(episodes), *np.mean(episodes, axis=0))
        for level, episodes in self._episodes.items()
        if episodes
      }
      frames_of = dict(self._frames)
    batches, requests, waited = inference - self._last_inference
    self._last_inference = inference
    if not updates:
      self._write({'learner_wait_share': wait_share, **membership})
      return [
        'No update of the learner in this period: it waits for data '
        f'{wait_share:.0%} of the time.',
        *membership_lines,
      ]
    frames = len(updates) * self._frames_per_update
    values = {
      'environment_frames_per_second': frames / seconds,
      'agent_steps_per_second': frames / self._num_action_repeats / seconds,
      'learner_updates_per_second': len(updates) / seconds,
      'learner_wait_share': wait_share,
      'queue_size': np.mean([u.queue_size for u in updates]),
      'policy_lag_updates': np.mean([u.policy_lag for u in updates]),
      'inference_batch_size': requests / max(batches, 1),
      'inference_wait_seconds': waited / max(requests, 1),
      'environment_restarts': restarts,
      **membership,
    }
    values.update(_of_each_learner(updates, seconds))
    for level, (_, mean_return, mean_steps) in played.items():
      values[f'{level}/mean_return'] = mean_return
      values[f'{level}/mean_frames'] = mean_steps * self._num_action_repeats
    for level, count in frames_of.items():
      values[f'{level}/environment_frames'] = count
    self._write(values)
    return [
      *self._lines(values, played, updates[-1].learner),
      *_level_lines(frames_of),
      *membership_lines,
    ]

  def _wait_seconds(self, now):
    """Returns how long the learner waited for data in the period so far.

    The wait under way counts as well. How long it is can't be seen from here:
    the update that follows it is taken to be as long as the last one.
    """
    under_way = max(0.0, now - self._last_update - self._busy_seconds)
    ended = sum(update.wait_seconds.max() for update in self._updates)
    waited = ended + under_way - self._reported_wait
    self._reported_wait = under_way
    return min(max(0.0, waited), now - self._begin)

  def _begin_period(self):
    self._begin = time.monotonic()
    self._updates = []

  def _add_episode(self, level, episode_return, steps):
    self._episodes[level].append((episode_return, steps))
    self._returns[level].append(episode_return)
    values = {
      f'{level}/episode_return': episode_return,
      f'{level}/episode_frames': steps * self._num_action_repeats,
    }
    if self._aggregates and len(self._returns) == self._num_levels:
      for name, aggregate in self._aggregates.items():
        values[f'{self._level_name}/training_{name}'] = aggregate(self._returns)
      self._returns.clear()
    self._write(values)

  def add_test(self, path):
    """Writes the results of a test.

    Args:
      path: of the JSON file of its `evaluation.Results`.

    Returns:
      A line that says the same to people.

    Raises:
      ValueError: the test isn't complete.
    """
    with open(path) as file:
      content = json.load(file)
    for row in content['levels']:
      # Short episodes end first: the mean of a part would be wrong.
      if not row['missing'] and row['episodes'] < content['num_episodes']:
        raise ValueError(f'{path} is not complete.')
    suite = self._level_name
    scores = {f'{suite}/{name}': s for name, s in content['scores'].items()}
    levels = {
      f'{row["level"]}/{tag}': row[name]
      for row in content['levels']
      for name, tag in (
        ('mean', 'mean_return'),
        ('human_normalized', 'human_normalized'),
      )
      if row[name] is not None
    }
    values = {f'test/{n}': value for n, value in {**scores, **levels}.items()}
    frames = content['settings']['frames']
    self._write(values, frames)
    # A suite has too many levels for a line.
    lines = [f'{n} {value:.2f}' for n, value in (scores or levels).items()]
    return f'test after {frames:,} frames: {", ".join(lines)}'

  def _write(self, values, step=None):
    self._writer.add_summary(
      tf.Summary(
        value=[
          tf.Summary.Value(tag=tag, simple_value=value)
          for tag, value in values.items()
        ]
      ),
      self.global_step if step is None else step,
    )

  def _lines(self, values, played, learner):
    value = values.__getitem__
    lines = [
      f'{level}: return {mean_return:.2f}, '
      f'{value(f"{level}/mean_frames"):.0f} frames (mean of the last {count} '
      'episodes)'
      for level, (count, mean_return, _) in played.items()
    ]
    return [
      *(lines or ['No episode ended yet.']),
      f'actors: {value("environment_frames_per_second"):.0f} environment '
      f'frames/s, {value("agent_steps_per_second"):.0f} agent steps/s, '
      f'inference batch {value("inference_batch_size"):.1f} after '
      f'{1000 * value("inference_wait_seconds"):.1f} ms, '
      f'{value("environment_restarts"):.0f} environment restarts',
      f'learner: {value("learner_updates_per_second"):.2f} updates/s, waits '
      f'for data {value("learner_wait_share"):.0%} of the time, queue '
      f'{value("queue_size"):.1f} of 1 unroll, policy lag '
      f'{value("policy_lag_updates"):.1f} updates',
      *_describe_learners(values),
      f'losses: total {learner.total_loss:.3g}, policy gradient '
      f'{learner.policy_gradient_loss:.3g}, baseline '
      f'{learner.baseline_loss:.3g}, entropy {learner.entropy:.3f}, '
      f'gradient norm {learner.gradient_norm:.3g}, learning rate '
      f'{learner.learning_rate:.3g}',
    ]


def _level_lines(frames_of):
  """Returns a line on the shares of a suite's levels, from frames by level."""
  if len(frames_of) == 1:
    return []
  total = sum(frames_of.values())
  fewest, most = (pick(frames_of, key=frames_of.get) for pick in (min, max))
  return [
    f'levels: frames of each {frames_of[fewest] / total:.1%} to '
    f'{frames_of[most] / total:.1%} of all; fewest {fewest}, most {most}'
  ]


def _of_each_learner(updates, seconds):
  """Returns metrics, a dict, of each of several learners; empty if of one.

  They make each update together. The learner that waits longest for its batch
  has too few actors, or slow ones.
  """
  waits = np.sum([update.wait_seconds for update in updates], axis=0) / seconds
  queues = np.mean([update.queue_size for update in updates], axis=0)
  values = {}
  if len(waits) > 1:
    for k, (wait, queue) in enumerate(zip(waits, queues, strict=True)):
      values[f'learner_{k}/wait_share'] = min(wait, 1.0)
      values[f'learner_{k}/queue_size'] = queue
  return values


def _describe_learners(values):
  """Returns a line that says to people what `_of_each_learner` measured."""
  waits = {
    name.partition('/')[0]: share
    for name, share in values.items()
    if name.endswith('/wait_share')
  }
  if not waits:
    return []
  return [
    'learners wait for data: '
    + ', '.join(f'{name[8:]}: {share:.0%}' for name, share in waits.items())
    + ' of the time'
  ]
