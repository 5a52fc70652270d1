# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Imports TensorFlow without what it tells of itself, and without Keras."""

import contextlib
import os
import re
import sys


@contextlib.contextmanager
def start():
  """To import TensorFlow in; drops what it tells, unless run with -v=1."""
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
  # Before its logging is set up, TensorFlow knows no level.
  stderr = os.dup(2)
  with open(os.devnull, 'w') as devnull:
    os.dup2(devnull.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)
