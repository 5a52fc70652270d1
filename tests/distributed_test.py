# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of learner and actor tasks: real processes, killed and cut off."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import threading
import time

import pytest
from absl import flags
from absl.testing import flagsaver
from train_test import (
  TOY,
  Program,
  alive,
  checkpoint_step,
  descendants,
  wait_until,
)

import experiment
from experiment import tf

FLAGS = flags.FLAGS
if not FLAGS.is_parsed():
  FLAGS(['distributed_test'])


def free_port():
  with socket.socket() as listener:
    listener.bind(('localhost', 0))
    return listener.getsockname()[1]


class Tasks:
  """Tasks of one training; those that still run at the end are killed."""

  def __init__(self, logdir):
    self.logdir = str(logdir)
    self.address = f'localhost:{free_port()}'
    self._programs = []

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for program in self._programs:
      if program.process.poll() is None:
        program.process.kill()
        program.process.wait()
      program.process.stdout.close()

  def start(self, *flags):
    program = Program(*TOY, f'--learner_address={self.address}', *flags)
    self._programs.append(program)
    return program

  def learner(self, *flags):
    return self.start(
      '--job_name=learner',
      '--task=0',
      f'--logdir={self.logdir}',
      '--save_checkpoint_secs=1',
      *flags,
    )

  def actor(self, task, *flags):
    return self.start('--job_name=actor', f'--task={task}', *flags)

  def wait_for_training(self):
    """Waits until training has gone on."""
    step = checkpoint_step(self.logdir) or 0
    wait_until(lambda: (checkpoint_step(self.logdir) or 0) > step)


def test_tasks_train_to_the_last_frame_and_end(tmp_path):
  with Tasks(tmp_path) as tasks:
    # Actors may come first.
    actors = [tasks.actor(0), tasks.actor(1, '--environments_per_actor=3')]
    for task, actor in enumerate(actors):
      actor.wait_for(f'Actor {task} waits for the learner at {tasks.address}')
    learner = tasks.learner('--total_environment_frames=3000')
    below = [pid for a in actors for pid in descendants(a.process.pid)]
    assert learner.finish() == 0, learner.output
    for actor in actors:
      assert actor.finish() == 0, actor.output
      assert 'joined the learner' in actor.output
      assert 'ends: the learner is done' in actor.output
  assert checkpoint_step(tmp_path) == 3000
  wait_until(lambda: not any(map(alive, below)))


def test_tasks_are_killed_stopped_and_come_back(tmp_path):
  with Tasks(tmp_path) as tasks:
    learner = tasks.learner()
    victim, other = tasks.actor(0), tasks.actor(1)
    for _ in range(2):
      learner.wait_for(r'Actor [01] \(localhost:800[12]\) joined')
    tasks.wait_for_training()

    # An actor is killed: the others play on, and it may come back.
    below = descendants(victim.process.pid)
    victim.process.kill()
    learner.wait_for('Actor 0 .* is lost')
    assert not any(map(alive, below))
    tasks.wait_for_training()
    late = tasks.actor(0)
    learner.wait_for('Actor 0 .* joined')

    # An actor is stopped: the others play on, and so does it afterwards.
    other.process.send_signal(signal.SIGSTOP)
    learner.wait_for('Actor 1 .* is lost')
    tasks.wait_for_training()
    other.process.send_signal(signal.SIGCONT)
    learner.wait_for('Actor 1 .* joined')

    stranger = tasks.actor(2, '--unroll_length=7', '--torso=deep')
    assert stranger.finish() == 2
    assert 'The --torso of the learner' in stranger.output
    assert 'is shallow, that of actor 2 is deep' in stranger.output
    assert 'Traceback' not in stranger.output

    # The learner is killed: the actors wait for the next, who goes on.
    learner.process.kill()
    late.wait_for('Actor 0 waits for the learner')
    other.wait_for('Actor 1 waits for the learner')
    step = checkpoint_step(tmp_path)
    learner = tasks.learner()
    for _ in range(2):
      learner.wait_for(r'Actor [01] \(localhost:800[12]\) joined')
    tasks.wait_for_training()
    assert checkpoint_step(tmp_path) > step

    # Signals end an actor alone, and a learner with its actors.
    late.process.send_signal(signal.SIGTERM)
    assert late.finish() == 0, late.output
    learner.wait_for('Actor 0 .* left')
    learner.process.send_signal(signal.SIGINT)
    assert learner.finish() == 0, learner.output
    assert other.finish() == 0, other.output
    for program in (learner, late, other):
      assert 'Traceback' not in program.output


def test_actor_that_waits_ends_at_a_signal(tmp_path):
  with Tasks(tmp_path) as tasks:
    actor = tasks.actor(0)
    actor.wait_for('Actor 0 waits for the learner')
    actor.process.send_signal(signal.SIGTERM)
    assert actor.finish() == 0, actor.output
    assert 'Traceback' not in actor.output
