# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Imports TensorFlow without what it tells of itself."""

import contextlib
import os
import re
import sys


@contextlib.contextmanager
def start():
  """Drops what TensorFlow tells while it starts, unless run with -v=1."""
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
