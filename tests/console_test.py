# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of what a user sees of a run."""

import os
import subprocess
import sys

from console import Console, watch
from helpers import ROOT


def test_report_without_a_terminal_is_lines(capsys):
  console = Console(1000, 100, 'frames')
  console.progress(150)
  console.report(200, ['below'])
  console.close()
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('20.0% of 1,000 frames, ')
  assert second == '  below'


def test_watch_polls_until_the_end():
  polls = []
  watch(lambda seconds: len(polls) == 3, [], lambda: polls.append(None))
  assert len(polls) == 3


def test_watch_ends_with_a_signal():
  received = []
  watch(lambda seconds: False, received, lambda: received.append('signal'))
  assert received == ['signal']


def test_reader_that_is_gone_does_not_end_the_program():
  """As with `| head -1`: writing fails from the second line on."""
  code = (
    'import sys, console\n'
    'c = console.Console(1000, 0, "frames")\n'
    'print("first", flush=True)\n'
    'sys.stdin.readline()\n'
    'for _ in range(100):\n'
    '  console.print_line("x" * 1000)\n'
    'c.report(10, ["line"])\n'
    'c.close()\n'
    'sys.stderr.write("end")\n'
  )
  with subprocess.Popen(
    [sys.executable, '-c', code],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, 'PYTHONPATH': ROOT},
  ) as process:
    assert process.stdout.readline() == b'first\n'
    process.stdout.close()
    process.stdin.write(b'go on\n')
    process.stdin.flush()
    assert process.stderr.read() == b'end'
    assert process.wait(timeout=60) == 0
