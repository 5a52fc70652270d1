# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Sends broken messages to both ends of a line; `make sanitize` watches them.

The messages are right ones with some words replaced, the same in every run.
"""

import concurrent.futures
import os
import random
import socket
import struct
import sys

import cloudpickle
import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import py_process

cloudpickle.register_pickle_by_value(sys.modules[__name__])

_PATIENCE = 60  # Seconds after which a wait counts as a hang.
_ROUNDS = 1000
_WORDS = [0, 1, 2, 3, 7, 8, 24, 300, 2**20, 2**31, 2**62, 2**63 - 1]

pytestmark = pytest.mark.skipif(
  not py_process.has_library(), reason='needs `make ops`'
)


def broken(rng, header, size):
  """Returns what a header and a bell become.

  Args:
    header: bytes.
    size: of the whole message.
  """
  words = list(struct.unpack(f'<{len(header) // 8}q', header))
  bell = [len(header), size]
  for _ in range(rng.randint(1, 3)):
    numbers = rng.choice([words, words, words, bell])
    number = rng.choice([*_WORDS, rng.randrange(64)])
    numbers[rng.randrange(len(numbers))] = rng.choice([-1, 1]) * number
  return struct.pack(f'<{len(words)}q', *words), struct.pack('<2q', *bell)


def write(channel, layout, header, bell):
  """Sends a message with another header and bell than those laid out."""
  channel._reserve(layout.size)
  channel._memory[: layout.size] = bytes(layout.size)
  channel._memory[: len(header)] = header
  channel._connection.send(bell)


def right_message(string, dtypes=()):
  """Lays out a message with strings, a matrix and a number."""
  return py_process._lay_out(
    string,
    dtypes,
    (
      (np.dtype(object), (2,), (3, 9)),
      (np.dtype(np.float32), (2, 3), (24,)),
      (np.dtype(np.int64), (), (8,)),
    ),
  )


def answer(connection, memory, header, bell, layout):
  """Answers one call; in a thread beside the session's."""
  channel = py_process._Channel(connection, memory)
  assert channel.wait()
  write(channel, layout, header, bell)


def test_broken_answers_fail_their_call_alone():
  rng = random.Random(1)
  layout = right_message('')
  outcomes = set()
  with (
    tf.Graph().as_default(),
    tf.Session() as session,
    concurrent.futures.ThreadPoolExecutor(1) as pool,
  ):
    number = tf.placeholder(tf.int64, [])
    # The first dimension is as the process likes.
    results = py_process._library().call(
      number,
      'method',
      [],
      [tf.string, tf.float32, tf.int64],
      [tf.TensorShape([None]), tf.TensorShape([None, 3]), tf.TensorShape([])],
    )
    call = session.make_callable(results, [number])
    for i in range(_ROUNDS):
      if i % 10 == 0:
        header, bell = layout.header, layout.bell
      else:
        header, bell = broken(rng, layout.header, layout.size)
      ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
      memory = os.memfd_create('fuzz')
      os.ftruncate(memory, 8)
      channel = py_process._Channel(ours, memory)
      py_process._library().open_channel(i, channel)
      answered = pool.submit(answer, theirs, memory, header, bell, layout)
      try:
        strings, matrix, _ = call(i)
      except tf.errors.OpError as error:
        outcomes.add(type(error).__name__)
        assert i % 10 != 0
      else:
        outcomes.add('results')
        assert all(isinstance(string, bytes) for string in strings)
        assert matrix.shape[1] == 3
      answered.result(_PATIENCE)
      py_process._library().close_channel(i)
      channel.close()
      theirs.close()
  assert outcomes >= {'results', 'InternalError', 'InvalidArgumentError'}


class Echo:
  """Returns what it gets."""

  def method(self, strings, matrix, number):
    return strings, matrix, number


def test_broken_requests_do_not_crash_the_process():
  rng = random.Random(2)
  layout = right_message('method', (7, 1, 9))
  process = py_process.PyProcess(Echo)
  process.start()
  outcomes = set()
  for i in range(_ROUNDS):
    if i % 10 == 0:
      header, bell = layout.header, layout.bell
    else:
      header, bell = broken(rng, layout.header, layout.size)
    channel = process._channel
    channel._connection.settimeout(_PATIENCE)
    write(channel, layout, header, bell)
    try:
      error, _, results = channel.receive()
    except (EOFError, ConnectionError):
      assert i % 10 != 0
      outcomes.add('end')
      assert process.exit_code(_PATIENCE) >= 0  # Not by a signal.
      process.restart()
      continue
    outcomes.add('error' if error else 'results')
    if i % 10 == 0:
      assert [np.shape(result) for result in results] == [(2,), (2, 3), ()]
  process.close()
  assert outcomes >= {'results', 'error'}
