# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Offers a stand-in for DeepMind Lab to the tests where it isn't installed.

At the end of `sys.path`, so that the environments' processes, which inherit it,
find the stand-in too. The real one, where it is installed, comes first.
"""

import importlib.util
import os
import sys

import pytest

if importlib.util.find_spec('deepmind_lab') is None:
  sys.path.append(os.path.join(os.path.dirname(__file__), 'fake_deepmind_lab'))


@pytest.fixture(autouse=True)
def _programs_end_with_their_test():
  yield
  # Most tests run no program, and shall not pay for the import.
  if 'helpers' in sys.modules:
    sys.modules['helpers'].end_programs()
