# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of what is seen of the import of TensorFlow."""

import os
import signal
import subprocess
import sys

import pytest

from helpers import ROOT

# Prints as TensorFlow does, from C++, and then does what its argument says.
_PROGRAM = """
import os, sys
import quiet
before = os.listdir('/proc/self/fd'), os.listdir('/proc/self/task')
with quiet.start():
  os.write(2, b'from C++\\n' * 1000)
  print('from Python', file=sys.stderr)
  exec(sys.argv[1])
print('after', file=sys.stderr)
assert (os.listdir('/proc/self/fd'), os.listdir('/proc/self/task')) == before
try:
  os.waitpid(-1, 0)
except ChildProcessError:
  print('no child')
"""


def run(*arguments, program=('-c', _PROGRAM), path=()):
  """Returns the exit code, output and errors of a program."""
  result = subprocess.run(
    [sys.executable, *program, *arguments],
    # Without the levels of messages that our modules set in these tests.
    env={
      'PATH': os.environ['PATH'],
      'PYTHONPATH': os.pathsep.join([*path, ROOT]),
    },
    capture_output=True,
    text=True,
    timeout=120,
  )
  return result.returncode, result.stdout, result.stderr


def test_import_that_succeeds_shows_nothing_and_leaves_nothing():
  assert run('pass') == (0, 'no child\n', 'after\n')


@pytest.mark.parametrize('flag', ['-v=1', '--verbosity=1'])
def test_everything_is_shown_if_asked_for(flag):
  code, _, errors = run('pass', flag)
  assert code == 0
  assert errors == 'from C++\n' * 1000 + 'from Python\nafter\n'


@pytest.mark.parametrize(
  ('action', 'exit_code', 'last_line'),
  [
    ('raise ImportError("no AVX")', 1, 'ImportError: no AVX'),
    ('os.abort()', -signal.SIGABRT, 'from Python'),
    ('os.kill(os.getpid(), 4)', -signal.SIGILL, 'from Python'),
    ('sys.exit("no AVX")', 1, 'no AVX'),
  ],
)
def test_import_that_fails_shows_everything(action, exit_code, last_line):
  code, _, errors = run(action)
  assert code == exit_code
  assert errors.startswith('from C++\n' * 1000 + 'from Python\n')
  assert errors.splitlines()[-1] == last_line


@pytest.mark.parametrize('action', ['os.abort()', 'raise ImportError("no")'])
def test_programs_show_why_tensorflow_dies(tmp_path, action):
  folder = tmp_path / 'tensorflow'
  folder.mkdir()
  (folder / '__init__.py').write_text(
    f'import os\nos.write(2, b"needs AVX")\n{action}\n'
  )
  program = [os.path.join(ROOT, 'experiment.py')]
  code, output, errors = run(program=program, path=[str(tmp_path)])
  assert code != 0
  assert 'needs AVX' in errors
  assert output == ''


def test_start_of_the_program_is_silent():
  program = ('-c', 'import experiment, keras')
  assert run(program=program) == (0, '', '')


def test_closed_standard_error_is_no_error():
  program = 'import os, quiet; os.close(2)\nwith quiet.start(): print("inside")'
  assert run(program=('-c', program)) == (0, 'inside\n', '')
