# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A log folder: one training at a time, and metrics on a disk that may be full.

In: the folder, events. Out: a lock, event files for TensorBoard.
"""

import contextlib
import fcntl
import itertools
import os
import socket
import threading
import time

import tensorflow.compat.v1 as tf
from absl import logging

from errors import UserError

_LOCK = 'training.lock'
_FLUSH_SECONDS = 10  # At most so much of the metrics is lost with a process.
_RETRY_SECONDS = 30  # From an error until the next file is begun.

# --- The lock ---------------------------------------------------------------


@contextlib.contextmanager
def lock(logdir):
  """Keeps other trainings out of a folder.

  The lock ends with the process, however that ends. Other machines see it if
  the file system that they share has locks: NFS, for one, does.

  Raises:
    UserError: another training has it, or the folder can't be written.
  """
  path = os.path.join(logdir, _LOCK)
  try:
    file = _open_locked(path, logdir)
  except OSError as error:
    raise UserError(
      f'{path} can not be written ({error.strerror}): make it writable, or '
      'give another --logdir.'
    ) from None
  with file:
    try:
      file.truncate(0)
      # On a full disk, it has no owner's name.
      with contextlib.suppress(OSError):
        os.write(
          file.fileno(),
          f'process {os.getpid()} on {socket.gethostname()}, since '
          f'{time.strftime("%Y-%m-%d %H:%M:%S")}'.encode(),
        )
      yield
    finally:
      # The folder may have been moved, and another one be in its place.
      if _is_at(file, path):
        os.remove(path)


def _open_locked(path, logdir):
  """Returns the file, open and locked."""
  while True:
    file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115
    try:
      # Not flock: processes that are forked would share it.
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
      with file:
        file.seek(0)
        owner = file.read() or 'another process'
      raise UserError(
        f'Another training uses {logdir}: {owner}. End it first, or give '
        'another --logdir.'
      ) from None
    except OSError as error:
      logging.warning(
        '%s can not be locked (%s): see to it that no other training uses it.',
        logdir,
        error.strerror,
      )
    # Else the last owner removed it in between.
    if _is_at(file, path):
      return file
    file.close()


def _is_at(file, path):
  """Returns whether an open file is the one that a path leads to."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except OSError:
    return False


# --- Event files ------------------------------------------------------------


class EventWriter:
  """Writes TensorFlow's event files; for use by many threads.

  It has the methods of the `event_writer` of a `tf.summary.FileWriter`, which
  prints a traceback and stops when the disk is full. This one tells it in a
  line, drops events, and tries again with a new file.
  """

  def __init__(self, logdir):
    self._logdir = logdir
    self._lock = threading.Lock()
    self._numbers = itertools.count()
    self._path = self._writer = None
    self._next_flush = 0
    self._next_try = 0

  def get_logdir(self):
    return self._logdir

  def add_event(self, event):
    """Takes a `tf.Event`; at the latest, the next one writes it."""
    with self._lock, self._errors_told():
      now = time.monotonic()
      if self._writer is None:
        if now < self._next_try:
          return
        self._begin()
      self._writer.write(event.SerializeToString())
      if now >= self._next_flush:
        self._next_flush = now + _FLUSH_SECONDS
        self._writer.flush()

  def flush(self):
    """Writes what was added."""
    with self._lock, self._errors_told():
      if self._writer is not None:
        self._writer.flush()

  def close(self):
    """Ends the file; an event that is added later begins another one."""
    with self._lock, self._errors_told():
      writer, self._writer = self._writer, None
      if writer is not None:
        writer.close()

  def reopen(self):
    """Needn't do anything."""

  def _begin(self):
    # Names sort by time, and none is used twice.
    name = (
      f'events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.'
      f'{os.getpid()}.{next(self._numbers)}'
    )
    self._path = os.path.join(self._logdir, name)
    self._writer = tf.io.TFRecordWriter(self._path)
    first = tf.Event(wall_time=time.time(), file_version='brain.Event:2')
    self._writer.write(first.SerializeToString())

  @contextlib.contextmanager
  def _errors_told(self):
    try:
      yield
    except tf.errors.OpError as error:
      self._writer = None
      with contextlib.suppress(OSError):
        if not os.path.getsize(self._path):
          os.remove(self._path)
      self._next_try = time.monotonic() + _RETRY_SECONDS
      logging.warning(
        'Metrics can not be written to %s (%s): those of the next %d s are '
        'lost.',
        self._logdir,
        error.message.rpartition('; ')[2],
        _RETRY_SECONDS,
      )
