# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How errors are told to people.

In: exceptions, exit codes of processes. Out: one sentence each.
"""

import re
import signal


class UserError(Exception):
  """A mistake of the user, told in one sentence."""


def describe_exit(exit_code):
  """Returns how a process ended; -N is the exit code of signal N."""
  if exit_code >= 0:
    return f'exit code {exit_code}'
  return f'exit code {exit_code} ({signal.Signals(-exit_code).name})'


def last_line(error):
  """Returns the last line of an error's message, without what leads to it."""
  # TensorFlow's errors keep theirs in an attribute.
  text = getattr(error, 'message', None) or str(error)
  lines = [line for line in text.splitlines() if re.match(r'\w', line)]
  return lines[-1].rstrip('.') if lines else type(error).__name__
