# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of failing environments: real trainings in processes of their own."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import tensorflow.compat.v1 as tf

import actors
import plot
from helpers import ROOT, TESTS, TOY, checkpoint_step, run


def train(tmp_path, step, *flags):
  """Trains with an environment whose `step` begins with some code."""
  (tmp_path / 'faulty.py').write_text(
    textwrap.dedent("""
      import os, sys, time
      import gymnasium as gym
      import toy_gym

      class Faulty(toy_gym.Toy):
        def step(self, action):
          if self._num_steps == 7:
            self.fail()
          return super().step(action)

        def fail(self):
          """)
    + f'    {step}\n'
    + "\ngym.register('Faulty-v0', Faulty, kwargs={'layout': 'Grey'})\n"
  )
  logdir = str(tmp_path / 'log')
  code, output = run(
    *TOY,
    f'--logdir={logdir}',
    '--level_name=gym:faulty:Faulty-v0',
    '--num_actors=1',
    '--batch_size=1',
    *flags,
    path=f'{tmp_path}:{TESTS}',
  )
  return code, output, logdir


def test_exceptions_are_restarted_and_told_with_the_environments_traceback(
  tmp_path,
):
  code, output, _ = train(
    tmp_path,
    "raise ArithmeticError('no licence\\nsee http://a.b')",
    '--max_environment_restarts=2',
  )
  assert code == 1
  assert output.count('Restart 1 of at most 2.') == 1
  assert output.count('Restart 2 of at most 2.') == 1
  assert output.count('It was restarted 2 times before') == 1
  # The seeds differ, or the same would happen again.
  assert len(set(re.findall(r'seed (\d+)', output))) == 3
  assert 'actor 0 (gym:faulty:Faulty-v0' in output
  assert 'from step 5 of a game on, raised in step' in output
  # For each failure the environment's own lines, and its whole message twice:
  # below its traceback and in the sentence.
  assert output.count('in fail\n') == 3
  assert output.count('ArithmeticError: no licence\nsee http://a.b') == 6
  for foreign in ('tensorflow', 'actors.py", line', 'py_process.py", line'):
    assert foreign not in output
  # Each takes the lines of its way through gymnasium, and no more.
  assert len(output.splitlines()) < 75


@pytest.mark.parametrize(
  ('step', 'reason'),
  [
    ('time.sleep(1000)', 'took more than 2 seconds for step'),
    ('sys.exit(3)', 'died with exit code 3'),
  ],
)
def test_environments_that_hang_or_exit_are_restarted(tmp_path, step, reason):
  code, output, logdir = train(
    tmp_path,
    step,
    '--environment_timeout_secs=2',
    '--max_environment_restarts=1',
  )
  assert code == 1
  assert f'{reason}. Restart 1 of at most 1.' in output
  assert f'{reason}. It was restarted 1 times before' in output
  assert 'Traceback' not in output
  assert checkpoint_step(logdir) is not None


def test_too_few_descriptors_are_told_before_anything_is_made(tmp_path):
  logdir = tmp_path / 'log'
  code, output = run(
    *TOY,
    f'--logdir={logdir}',
    '--num_actors=16',
    prefix=('prlimit', '--nofile=60:60'),
  )
  assert code == 1
  assert 'open files for 16 environment processes, but may have 60' in output
  assert len(output.splitlines()) == 1
  assert not logdir.exists()


def test_failure_at_the_first_start_is_told_with_actor_and_level(tmp_path):
  """The level could be looked at, but then it can't be started."""
  (tmp_path / 'once.py').write_text(
    textwrap.dedent(f"""
      import pathlib
      import gymnasium as gym
      import toy_gym

      class Once(toy_gym.Toy):
        def __init__(self, layout):
          marker = pathlib.Path({str(tmp_path / 'marker')!r})
          if marker.exists():
            raise RuntimeError('the second time')
          marker.touch()
          super().__init__(layout)

      gym.register('Once-v0', Once, kwargs={{'layout': 'Grey'}})
    """)
  )
  code, output = run(
    *TOY,
    f'--logdir={tmp_path / "log"}',
    '--level_name=gym:once:Once-v0',
    '--num_actors=1',
    path=f'{tmp_path}:{TESTS}',
  )
  assert code == 1
  last = output[output.index('experiment.py: ') :]
  assert 'actor 0 (gym:once:Once-v0, seed ' in last
  assert 'at its start, raised' in last
  assert last.rstrip().endswith('RuntimeError: the second time.')
  # No checkpoint: another command may say what the agent is.
  (tmp_path / 'marker').unlink()
  code, output = run(
    *TOY,
    f'--logdir={tmp_path / "log"}',
    '--num_actors=1',
    '--core=none',
    '--total_environment_frames=20',
  )
  assert code == 0, output


def test_reports_tell_how_many_actors_have_begun():
  loops = actors.ActorLoops(
    *(None, None, [None] * 3, None, None, None),
    on_unroll=lambda actor, values: False,  # It ends.
    max_restarts=0,
    seed_of=None,
    unroll_length=1,
  )
  loops.coord = tf.train.Coordinator()
  assert loops.membership() == (
    {'actors_begun': 0},
    ['actors: 0 of 3 have begun'],
  )
  for number in (2, 0):
    loops._run(number, lambda actor: ['state'], lambda *_: (None, ['state']))
  assert loops.membership()[1] == ['actors: 2 of 3 have begun']
  loops._run(1, lambda actor: ['state'], lambda *_: (None, ['state']))
  assert loops.membership() == ({'actors_begun': 3}, [])


# Its first level takes no time, its second 20 ms for a step; episodes of both
# have lengths of their own.
_SUITE = """
import time, types
import gymnasium as gym
import toy_gym

class Slow(toy_gym.Toy):
  def step(self, action):
    time.sleep(0.02)
    return super().step(action)

gym.register('Fast-v0', toy_gym.Toy, kwargs={'layout': 'Grey', 'length': 12})
gym.register('Slow-v0', Slow, kwargs={'layout': 'Grey', 'length': 7})

if __name__ == '__main__':
  import sys
  from absl import app
  import experiment, levels
  names = ['gym:unequal:Fast-v0', 'gym:unequal:Slow-v0']
  module = types.SimpleNamespace(
    LEVEL_MAPPING=dict(zip(names, names)), HUMAN_SCORES={}, RANDOM_SCORES={}
  )
  levels.SUITES['two'] = levels.Suite(module, '', {})
  app.run(experiment.main, flags_parser=experiment._parse_flags)
"""


def test_balanced_levels_get_the_same_number_of_frames(tmp_path):
  (tmp_path / 'unequal.py').write_text(_SUITE)
  logdir = str(tmp_path / 'log')
  result = subprocess.run(
    [
      sys.executable,
      'unequal.py',
      *TOY,
      f'--logdir={logdir}',
      '--level_name=two',
      '--level_assignment=balanced',
      '--num_actors=4',
      '--total_environment_frames=1600',
    ],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': f'{ROOT}:{TESTS}'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=120,
  )
  assert result.returncode == 0, result.stdout
  # Nobody was given up, or restarted by mistake.
  assert 'process' not in result.stdout
  scalars = plot.read_scalars(logdir)
  frames = {}
  for name, length in (('Fast', 12), ('Slow', 7)):
    lengths = scalars[f'gym:unequal:{name}-v0/episode_frames'][:, 1]
    # The unrolls of an actor that moves have the name of what it plays.
    assert set(lengths) == {length}
    frames[name] = lengths.sum()
  share = frames['Slow'] / sum(frames.values())
  # With two actors for each, it would be a quarter or less.
  assert 0.35 < share < 0.65, frames
