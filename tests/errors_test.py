# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of how errors are told."""

import pytest
import tensorflow.compat.v1 as tf

from errors import describe_exit, explain


@pytest.mark.parametrize(
  ('exit_code', 'expected'),
  [
    (0, 'exit code 0'),
    (3, 'exit code 3'),
    (-9, 'exit code -9 (SIGKILL)'),
    (-40, 'exit code -40'),  # A real-time signal has no name.
    (None, 'no exit code yet'),
  ],
)
def test_exits_are_described(exit_code, expected):
  assert describe_exit(exit_code) == expected


def test_error_of_another_task_is_a_line():
  message = (
    'Graph execution error:\n\nFrom /job:learner/replica:0/task:1:\n'
    'Socket closed\nAdditional GRPC error information from remote target '
    '/job:learner/replica:0/task:1 while calling /tensorflow.WorkerService/Run'
    '\n:{"grpc_message":"Socket closed"}'
  )
  error = tf.errors.UnavailableError(None, None, message)
  assert explain(error) == 'Socket closed'
