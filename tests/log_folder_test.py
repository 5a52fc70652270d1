# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of event files; the lock is tested with real trainings."""

import tensorflow.compat.v1 as tf

import log_folder
import plot
import private_apis


def scalar(value):
  return tf.Summary(value=[tf.Summary.Value(tag='a', simple_value=value)])


def test_metrics_that_can_not_be_written_are_told_and_later_ones_are_kept(
  tmp_path, caplog, monkeypatch
):
  logdir = tmp_path / 'log'
  with tf.Graph().as_default():
    writer = tf.summary.FileWriter(str(logdir))
  writer.event_writer = log_folder.EventWriter(str(logdir))
  writer.add_summary(scalar(1.0), 10)
  writer.close()
  moved = logdir.rename(tmp_path / 'moved')
  writer.add_summary(scalar(2.0), 20)
  assert 'Metrics can not be written' in caplog.text
  # Not at each of them.
  caplog.clear()
  writer.add_summary(scalar(3.0), 30)
  assert caplog.text == ''
  moved.rename(logdir)
  # As if the time were over.
  monkeypatch.setattr(writer.event_writer, '_next_try', 0)
  writer.add_summary(scalar(4.0), 40)
  writer.flush()
  assert plot.read_scalars(str(logdir))['a'][:, :2].tolist() == [
    [10, 1],
    [40, 4],
  ]


def test_session_hooks_get_the_cached_writer(tmp_path):
  with tf.Graph().as_default():
    writer = tf.summary.FileWriter(str(tmp_path))
  private_apis.cache_summary_writer(str(tmp_path), writer)
  assert tf.summary.FileWriterCache.get(str(tmp_path)) is writer
