# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Loads the compiled libraries of this project, which `make ops` builds.

A library that isn't built is no error: its module does the same more slowly, or
not at all, and the user is warned once of what that means. A library that is
there but doesn't load is an ImportError.

Environment processes import this file: TensorFlow is imported only where it is
needed.
"""

import ctypes
import functools
import importlib.util
import logging
import os

FOLDER = os.path.dirname(os.path.abspath(__file__))


class Library:
  """A library of TensorFlow operations and of C functions.

  Attributes:
    name: of the library's file, without its ending.
    ops: the Python module of its operations.
  """

  def __init__(self, name):
    import tensorflow.compat.v1 as tf

    self.name = name
    try:
      self.ops = tf.load_op_library(_path(name))
      self._functions = ctypes.CDLL(_path(name))
    except (tf.errors.OpError, OSError) as error:
      raise _import_error(name, error) from error

  def function(self, name, result, *arguments):
    """Returns a C function of the library.

    Args:
      name: its name.
      result: the ctypes type of what it returns, None for nothing.
      *arguments: the ctypes types of its arguments.

    Raises:
      ImportError: the library has no such function.
    """
    prototype = ctypes.CFUNCTYPE(result, *arguments)
    try:
      return prototype((name, self._functions))
    except AttributeError as error:  # It was built from other sources.
      raise _import_error(self.name, error) from error


@functools.cache
def load_library(name, consequence):
  """Loads a library of TensorFlow operations.

  Args:
    name: of its file, without `.so`.
    consequence: what it means that it isn't built, for the warning.

  Returns:
    `Library`; None, after one warning, if it isn't built.

  Raises:
    ImportError: it is there, but doesn't load.
  """
  if not os.path.exists(_path(name)):
    warn_not_built(name, consequence)
    return None
  return Library(name)


@functools.cache
def load_module(name):
  """Imports a compiled Python module.

  Args:
    name: of the module, and of its file without `.so`.

  Returns:
    The module. None if it isn't built: whoever uses it warns of that, since not
    every process that imports it should.

  Raises:
    ImportError: it is there, but doesn't load.
  """
  if not os.path.exists(_path(name)):
    return None
  spec = importlib.util.spec_from_file_location(name, _path(name))
  try:
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
  except ImportError as error:
    raise _import_error(name, error) from error
  return module


@functools.cache
def warn_not_built(name, consequence):
  """Warns, once, that a library isn't built, and of what that means."""
  logging.getLogger(__name__).warning(
    '%s.so is not built: %s. Run "make ops" to build it.', name, consequence
  )


def _path(name):
  return os.path.join(FOLDER, f'{name}.so')


def _import_error(name, error):
  return ImportError(
    f'{name}.so does not load, most likely because it was built for another '
    f'TensorFlow, Python or NumPy ({error}). Run "make clean ops" to rebuild '
    'it.'
  )
