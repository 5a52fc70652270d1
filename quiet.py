# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Imports TensorFlow without the messages that it prints, and without Keras.

The messages are kept until the import has ended, and are printed if it fails or
if the program dies in it, as on a processor that TensorFlow doesn't support.
"""

import contextlib
import os
import re
import signal
import sys


@contextlib.contextmanager
def start():
  """To import TensorFlow in; hides its messages, unless run with -v=1."""
  _open_standard_streams()
  with _without_keras(), _without_messages():
    yield


def _open_standard_streams():
  """Leads those that the program was started without to nowhere.

  Else a file would get the descriptor, and what libraries print.
  """
  fd = 0
  while fd <= 2:
    fd = os.open(os.devnull, os.O_RDWR)
  os.close(fd)
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115


@contextlib.contextmanager
def _without_keras():
  """Keeps TensorFlow from importing Keras, which takes a second and 60 MB.

  Later, Keras can be imported as usual.
  """
  if 'keras' in sys.modules:
    yield
    return
  # TensorFlow takes this for "not installed".
  sys.modules['keras._tf_keras'] = None
  try:
    yield
  finally:
    del sys.modules['keras._tf_keras']


@contextlib.contextmanager
def _without_messages():
  # Flags are parsed later than this is needed.
  if any(re.fullmatch(r'--?(v|verbosity)=[1-9]', arg) for arg in sys.argv):
    yield
    return
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  # There is nothing to hide then, and its threads would not survive the fork.
  if 'tensorflow' in sys.modules or not _is_open(2):
    yield
    return
  # Before its logging is set up, TensorFlow knows no level.
  with _shown_after_failures():
    yield


def _is_open(fd):
  try:
    os.fstat(fd)
  except OSError:
    return False
  return True


@contextlib.contextmanager
def _shown_after_failures():
  """Hides what is printed to standard error, but shows it after a failure.

  A failure is an exception, or the death of this program. As it can't print
  anything then, a child process waits for its end, and prints.
  """
  with contextlib.ExitStack() as stack:
    try:
      messages = os.memfd_create('messages')
      stack.callback(os.close, messages)
      success, report = os.pipe()
      stack.callback(os.close, success)
      stack.callback(os.close, report)
      child = os.fork()
    except OSError:  # The system's limits: then nothing is hidden.
      child = None
    else:
      stack.pop_all()
  if child is None:
    yield
    return
  if child == 0:
    os.close(report)  # Else the pipe would never end.
    _show_unless(success, messages)
  os.close(success)
  stderr = os.dup(2)
  os.dup2(messages, 2)
  try:
    yield
    with contextlib.suppress(BrokenPipeError):  # Somebody killed the child.
      os.write(report, b'1')
  finally:
    os.dup2(stderr, 2)
    for fd in (report, stderr, messages):
      os.close(fd)
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored.
      os.waitpid(child, 0)


def _show_unless(success, messages):
  """In the child: prints the messages unless a success is reported; exits."""
  try:
    # Signals of the terminal are for the program.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)
    if not os.read(success, 1):
      os.write(2, os.pread(messages, os.fstat(messages).st_size, 0))
  finally:
    os._exit(0)
