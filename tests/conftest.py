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


# Files that take minutes. They are begun first, so that at the end no worker
# has one of them left while the other has nothing to do.
_LONG = ('distributed_test', 'train_test', 'test_mode_test')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture(autouse=True)
def _programs_end_with_their_test():
  yield
  # Most tests run no program, and shall not pay for the import.
  if 'helpers' in sys.modules:
    sys.modules['helpers'].end_programs()
