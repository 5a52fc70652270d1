# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of native: libraries that are there, missing, broken, or outdated."""

import ast
import ctypes
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import native

_PATIENCE = 120  # Seconds after which a program counts as hung.
_OPS = [
  *('convolution_ops', 'dynamic_batching_ops', 'py_process_ops'),
  'recurrence_ops',
]

needs_ops = pytest.mark.skipif(
  not all(
    os.path.exists(os.path.join(native.FOLDER, f'{name}.so'))
    for name in [*_OPS, 'py_process_callee']
  ),
  reason='needs `make ops`',
)


def run(folder, code, working_directory=None):
  """Runs code with a copy of `native` that is in a folder.

  Returns:
    What it printed, and its messages.
  """
  shutil.copy(native.__file__, folder)
  result = subprocess.run(
    [sys.executable, '-c', 'import native\n' + code],
    cwd=working_directory or folder,
    env={**os.environ, 'PYTHONPATH': str(folder), 'TF_CPP_MIN_LOG_LEVEL': '3'},
    capture_output=True,
    text=True,
    timeout=_PATIENCE,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout, result.stderr


# What of TensorFlow and of ours is there afterwards.
_IMPORTED = """
import sys
names = {name.partition('.')[0] for name in sys.modules}
print(sorted(names & {'tensorflow', 'convolution', 'py_process'}))
"""


def test_what_is_not_built_is_told_once(tmp_path):
  output, messages = run(
    tmp_path,
    """
for _ in range(2):
  print(native.load_library('some_ops', 'all takes twice as long'))
  print(native.load_module('some_module'))
  native.warn_not_built('some_module', 'nothing else changes')
"""
    + _IMPORTED,
  )
  assert output == 4 * 'None\n' + '[]\n'
  assert messages == (
    'some_ops.so is not built: all takes twice as long. Run "make ops" to '
    'build it.\n'
    'some_module.so is not built: nothing else changes. Run "make ops" to '
    'build it.\n'
  )


@pytest.mark.parametrize(
  'load', ["load_library('broken', '')", "load_module('broken')"]
)
def test_what_does_not_load_has_one_wording(tmp_path, load):
  (tmp_path / 'broken.so').write_bytes(b'\x7fELF and no more')
  output, messages = run(
    tmp_path,
    f"""
for _ in range(2):
  try:
    native.{load}
  except ImportError as error:
    print(error)
""",
  )
  assert 'broken' not in messages
  first, second = output.splitlines()
  assert first == second
  assert first.startswith(
    'broken.so does not load, most likely because it was built for another '
    'TensorFlow, Python or NumPy ('
  )
  assert first.endswith('). Run "make clean ops" to rebuild it.')


@needs_ops
def test_libraries_are_found_from_any_working_directory(tmp_path):
  folder, elsewhere = tmp_path / 'folder', tmp_path / 'elsewhere'
  for path in (folder, elsewhere):
    path.mkdir()
  for name in ('dynamic_batching_ops', 'py_process_callee'):
    shutil.copy(os.path.join(native.FOLDER, f'{name}.so'), folder)
    # Of the same name, and not ours.
    (elsewhere / f'{name}.so').write_bytes(b'nothing')
  output, _ = run(
    folder,
    """
print(native.load_module('py_process_callee').__file__)
print(hasattr(native.load_library('dynamic_batching_ops', '').ops,
              'dynamic_batcher'))
""",
    elsewhere,
  )
  assert output == f'{folder}/py_process_callee.so\nTrue\n'


@needs_ops
def test_module_needs_no_tensorflow(tmp_path):
  shutil.copy(os.path.join(native.FOLDER, 'py_process_callee.so'), tmp_path)
  output, _ = run(
    tmp_path,
    "print(native.load_module('py_process_callee').__name__)" + _IMPORTED,
  )
  assert output == 'py_process_callee\n[]\n'


@needs_ops
def test_function_that_a_library_lacks_is_an_import_error():
  library = native.load_library('convolution_ops', '')
  supported = library.function(
    'ImpalaConvolutionSupported', ctypes.c_bool, ctypes.c_bool
  )
  assert supported(False) in (False, True)
  with pytest.raises(ImportError, match='make clean ops'):
    library.function('ImpalaOfAnOlderVersion', None)


def test_imports_none_of_ours():
  ours = {path.stem for path in pathlib.Path(native.FOLDER).glob('*.py')}
  assert {'convolution', 'native', 'py_process'} <= ours
  imported = set()
  for node in ast.walk(ast.parse(pathlib.Path(native.__file__).read_text())):
    if isinstance(node, ast.Import):
      imported.update(name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
      imported.add(node.module)
  assert 'ctypes' in imported
  assert not imported & ours
