# Licensed under the Apache License, Version 2.0; see LICENSE.
"""How errors are told to people.

In: exceptions, exit codes of processes. Out: one sentence each.
"""

import contextlib
import re
import signal


class UserError(Exception):
  """A mistake of the user, told in one sentence."""


def describe_exit(exit_code):
  """Returns how a process ended.

  Args:
    exit_code: int, -N if signal N ended it; None if it has not ended yet.
  """
  if exit_code is None:
    return 'no exit code yet'
  with contextlib.suppress(ValueError):  # It is none, or has no name.
    return f'exit code {exit_code} ({signal.Signals(-exit_code).name})'
  return f'exit code {exit_code}'


def explain(error):
  """Returns the whole message of an error, without what TensorFlow adds.

  That is where the operation was made, and its node.
  """
  # TensorFlow's errors keep theirs in an attribute.
  text = getattr(error, 'message', None) or str(error)
  # Which task of a cluster it is of.
  text = re.sub(r'(?m)^(Graph execution error:\n+)?From /job:.*:\n', '', text)
  text = text.partition('\nAdditional GRPC error information')[0]
  text = re.split(r'\n\s*\[\[\{\{node ', text)[0]
  text = re.split(r"(?m)^Node: '.*'\n", text)[-1]
  return text.strip().rstrip('.') or type(error).__name__
