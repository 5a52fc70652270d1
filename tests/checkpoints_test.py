# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of finding, reading and describing checkpoints."""

import pytest
import tensorflow.compat.v1 as tf

import checkpoints
from errors import UserError


@pytest.mark.parametrize('damaged', [None, '.index', '.data-00000-of-00001'])
def test_checkpoint_that_is_damaged_is_told(damaged, tmp_path):
  path = str(tmp_path / 'model.ckpt-7')
  with tf.Graph().as_default(), tf.Session() as session:
    tf.get_variable('weight', [3, 2])
    step = tf.train.get_or_create_global_step()
    session.run([tf.global_variables_initializer(), step.initializer])
    session.run(step.assign(7))
    tf.train.Saver().save(session, path, write_meta_graph=False)
  if damaged:
    with open(path + damaged, 'r+b') as file:
      file.truncate(5)
    with pytest.raises(UserError, match='can not be read'):
      checkpoints.read(path)
  else:
    shapes, frames = checkpoints.read(path)
    assert frames == 7
    assert shapes['weight'] == [3, 2]
