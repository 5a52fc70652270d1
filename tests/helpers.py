# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the tests share: runs of the program, dummy inputs, saved agents."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time

import numpy as np
import tensorflow.compat.v1 as tf

import environments
from agent import Agent

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TESTS = os.path.join(ROOT, 'tests')
# Small and fast: frames of 4x6 pixels, episodes of 10 steps.
TOY = [
  '--level_name=gym:toy_gym:Grey-v0',
  '--height=4',
  '--width=6',
  '--num_action_repeats=1',
  '--torso=shallow',
  '--num_actors=2',
  '--batch_size=2',
  '--unroll_length=5',
]


class Program:
  """A run of experiment.py, whose lines can be waited for."""

  def __init__(
    self,
    *flags,
    root=ROOT,
    script='experiment.py',
    path=TESTS,
    prefix=(),
    cwd=None,
    env=(),
  ):
    self.process = subprocess.Popen(
      [*prefix, sys.executable, os.path.join(root, script), *flags],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      stdin=subprocess.DEVNULL,
      text=True,
      start_new_session=True,
      cwd=cwd,
      env={**os.environ, 'PYTHONPATH': path, **dict(env)},
    )
    _programs.append(self)
    self.output = ''
    self._lines = queue.Queue()
    # A thread of its own, so that waiting for a line can have a deadline.
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    # A ValueError: a test closed it.
    with contextlib.suppress(ValueError), self.process.stdout:
      for line in self.process.stdout:
        self._lines.put(line)
    self._lines.put(None)

  def wait_for(self, pattern, seconds=120):
    """Returns the next line in which a pattern is found."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(queue.Empty):
      while True:
        line = self._lines.get(timeout=max(0, deadline - time.monotonic()))
        if line is None:
          self._lines.put(None)  # For `finish`.
          break
        self.output += line
        if re.search(pattern, line):
          return line
    raise AssertionError(f'{pattern!r} not in:\n{self.output}')

  def finish(self):
    """Returns the exit code; `output` has all that was said."""
    try:
      self.process.wait(timeout=120)
      self._reader.join(timeout=30)  # Until no process can write any more.
      assert not self._reader.is_alive(), 'A process of the program goes on.'
    except subprocess.TimeoutExpired:
      self.kill()
      raise AssertionError(f'Still runs:\n{self.read_all()}') from None
    except BaseException:
      self.kill()
      raise
    self.read_all()
    return self.process.returncode

  def read_all(self):
    """Returns `output`, with what was said until now or to the end."""
    with contextlib.suppress(queue.Empty):
      while (line := self._lines.get(timeout=30)) is not None:
        self.output += line
    self._lines.put(None)
    return self.output

  def kill(self):
    """Ends the program if it still runs."""
    if self.process.poll() is None:
      self.process.kill()
      self.process.wait()


_programs = []  # Of the test that runs.


def end_programs():
  """Ends what a test that failed has left running."""
  while _programs:
    _programs.pop().kill()


def run(*flags, **kwargs):
  program = Program(*flags, **kwargs)
  return program.finish(), program.output


# Imports the program once, which takes longer than what many tests ask of it.
_RUN_EACH = """
import json, os, sys
from absl import app
import experiment
for arguments, path in json.load(sys.stdin):
  if os.fork():
    # Before the next child has it in its buffer, too.
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    continue
  output = os.open(path, os.O_CREAT | os.O_WRONLY)
  os.dup2(output, 1)
  os.dup2(output, 2)
  sys.argv[1:] = arguments
  app.run(experiment.main, flags_parser=experiment._parse_flags)
"""


def run_each(flag_lists, folder):
  """Runs the program with each of some lists of flags.

  Args:
    flag_lists: list of lists of flags.
    folder: where this keeps files.

  Returns:
    List of pairs of the exit code and the output.
  """
  paths = [os.path.join(folder, str(k)) for k in range(len(flag_lists))]
  result = subprocess.run(
    [sys.executable, '-c', _RUN_EACH],
    input=json.dumps(list(zip(flag_lists, paths, strict=True))),
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': TESTS},
    timeout=240,
    check=True,
  )
  outputs = [pathlib.Path(path).read_text(errors='replace') for path in paths]
  return list(zip(map(int, result.stdout.split()), outputs, strict=True))


def checkpoint_step(logdir):
  """Returns the frames of the last checkpoint, by its name; None without."""
  steps = [
    int(re.search(r'ckpt-(\d+)', path).group(1))
    for path in glob.glob(os.path.join(logdir, 'model.ckpt-*.index'))
  ]
  return max(steps, default=None)


def wait_until(condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.1)


def descendants(pid):
  """Returns the ids of the processes below `pid`."""
  children = {}
  for entry in filter(str.isdigit, os.listdir('/proc')):
    try:
      with open(f'/proc/{entry}/stat') as stat:
        parent = int(stat.read().rpartition(')')[2].split()[1])
    except OSError:
      continue
    children.setdefault(parent, []).append(int(entry))
  found, todo = [], [pid]
  while todo:
    below = children.get(todo.pop(), [])
    found += below
    todo += below
  return found


def hashes(folder):
  """Returns a dict from the files below a folder to their content's hashes."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in pathlib.Path(folder).rglob('*')
    if path.is_file()
  }


def alive(pid):
  try:
    with open(f'/proc/{pid}/stat') as stat:
      return stat.read().rpartition(')')[2].split()[0] != 'Z'
  except OSError:
    return False


def training(logdir, *flags):
  """Starts a training without end, and returns it once it has checkpoints."""
  program = Program(
    *TOY, f'--logdir={logdir}', '--save_checkpoint_secs=1', *flags
  )
  wait_until(
    lambda: (
      (checkpoint_step(logdir) or 0) > 0 or program.process.poll() is not None
    )
  )
  return program


# --- Graphs -----------------------------------------------------------------

NUM_ACTIONS = 3
FRAME = (12, 16, 3)


def env_outputs(random, shape, instructions=('',)):
  """Returns a `StepOutput` of random NumPy values with leading dimensions."""
  done = random.random(shape) < 0.3
  # Of two ends, one was a lost life or an end, the other a time limit.
  truncated = done & (np.cumsum(done, axis=0) % 2 == 0)
  return environments.StepOutput(
    reward=random.normal(size=shape).astype(np.float32) * 2,
    info=environments.StepOutputInfo(
      np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    ),
    done=done,
    game_over=done,
    truncated=truncated,
    observation=(
      random.integers(0, 256, (*shape, *FRAME), np.uint8),
      random.choice(np.array(instructions, object), shape),
    ),
  )


def constants(nest):
  return tf.nest.map_structure(tf.constant, nest)


def run_graph(fetches, feed_dict=None):
  with tf.Session() as session:
    session.run(tf.global_variables_initializer())
    return session.run(fetches, feed_dict)


def save_agent(
  logdir, num_actions=3, frame_shape=(4, 6, 1), step=40, popart_levels=()
):
  """Saves a shallow agent with random weights; returns the checkpoint."""
  with tf.Graph().as_default():
    tf.set_random_seed(5)
    global_step = tf.train.get_or_create_global_step()
    agent = Agent(
      num_actions,
      'shallow',
      normalize_frames=True,
      popart_levels=popart_levels,
    )
    inputs = environments.StepOutput(
      tf.zeros([1]),
      (),
      tf.zeros([1], tf.bool),
      (tf.zeros([1, *frame_shape], tf.uint8), tf.constant([''])),
    )
    action = tf.zeros([1, *np.shape(num_actions)], tf.int32)
    agent((action, inputs), agent.initial_state(1))
    with tf.Session() as session:
      session.run(tf.global_variables_initializer())
      session.run(global_step.assign(step))
      return tf.train.Saver().save(
        session, os.path.join(logdir, 'model.ckpt'), global_step
      )
