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


def explain(error):
  """Returns the whole message of an error, without what leads to it.

  Args:
    error: exception. Its text may have a traceback, as those of environment
      processes, or what TensorFlow adds: where the operation was made, and its
      node.

  Returns:
    String, of several lines if the message has several.
  """
  # TensorFlow's errors keep theirs in an attribute.
  text = getattr(error, 'message', None) or str(error)
  text = re.split(r'\n\s*\[\[\{\{node ', text)[0]
  text = re.split(r"(?m)^Node: '.*'\n", text)[-1]
  # The last frame's lines of code are indented, the message is not.
  frames = re.split(r'(?m)^  File ".*", line \d+.*\n', text)
  if len(frames) > 1:
    text = re.sub(r'\A(\s.*\n)+', '', frames[-1])
  return text.strip().rstrip('.') or type(error).__name__
