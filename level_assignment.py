# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which level of a suite each actor plays.

In: what actors have played. Out: the number of each one's level, and when it
moves on to another.
"""

import threading

# An actor leaves a level that has so many times the mean of all levels' frames.
_AHEAD = 1.05


class LevelAssignment:
  """Gives levels to actors in turn and, if it balances, moves actors on.

  Levels differ in speed, some by 50 times. To balance, an actor whose episode
  has ended leaves a level that is ahead of the others in frames, for the one
  that is behind. So slow levels get more actors. For use by many threads.
  """

  def __init__(self, num_levels, num_actors, first, balances):
    """Gives the first levels, in turn.

    Args:
      num_levels: int.
      num_actors: int, actors of this program.
      first: int, number of the first actor among those of all programs.
      balances: bool, whether actors move. It goes by what the actors of this
        program have played.
    """
    self._levels = [(first + i) % num_levels for i in range(num_actors)]
    self.balances = balances
    self._frames = [0] * num_levels
    self._num_episodes = 0
    self._lock = threading.Lock()

  def levels(self):
    """Returns a list of the actors' levels, by number."""
    with self._lock:
      return list(self._levels)

  def after_unroll(self, actor, frames, has_ended):
    """Counts an unroll.

    Args:
      actor: int, who played it.
      frames: int, how many environment frames it has.
      has_ended: bool, whether an episode has ended in it.

    Returns:
      The number of the level that the actor is to play from now on, None if it
      goes on with its own.
    """
    with self._lock:
      own = self._levels[actor]
      self._frames[own] += frames
      self._num_episodes += bool(has_ended)
      total = sum(self._frames)
      if not (self.balances and has_ended) or (
        self._frames[own] <= _AHEAD * total / len(self._frames)
      ):
        return None
      # Those that play a level now will bring it forward, too: each by an
      # episode.
      episode_frames = total / self._num_episodes
      expected = list(self._frames)
      for other, level in enumerate(self._levels):
        if other != actor:
          expected[level] += episode_frames
      level = expected.index(min(expected))
      self._levels[actor] = level
      return None if level == own else level
