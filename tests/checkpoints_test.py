# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of finding, reading and describing checkpoints."""

import shutil

import pytest
import tensorflow.compat.v1 as tf

import checkpoints
from errors import UserError

STEPS = (7, 40, 300)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with the checkpoints of three steps."""
  folder = tmp_path_factory.mktemp('saved')
  with tf.Graph().as_default(), tf.Session() as session:
    tf.get_variable('weight', [30, 20])
    step = tf.train.get_or_create_global_step()
    session.run(tf.global_variables_initializer())
    saver = tf.train.Saver()
    for number in STEPS:
      session.run(step.assign(number))
      saver.save(
        session, f'{folder}/model.ckpt', number, write_meta_graph=False
      )
  return folder


@pytest.fixture
def logdir(saved, tmp_path):
  """A copy of it: TensorFlow's state file names the original."""
  logdir = tmp_path / 'a [lr=0.001] *?'
  shutil.copytree(saved, logdir)
  assert str(saved) in (logdir / 'checkpoint').read_text()
  return logdir


def truncate(path, size):
  with open(path, 'r+b') as file:
    file.truncate(size)


def files_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('damaged', [None, '.index', '.data-00000-of-00001'])
def test_checkpoint_that_is_damaged_is_told(damaged, logdir):
  path = f'{logdir}/model.ckpt-7'
  if damaged:
    truncate(path + damaged, 5)
    with pytest.raises(UserError, match='can not be read'):
      checkpoints.read(path)
  else:
    shapes, frames = checkpoints.read(path)
    assert frames == 7
    assert shapes['weight'] == [30, 20]


def test_one_flipped_bit_makes_a_checkpoint_unreadable(logdir):
  path = logdir / 'model.ckpt-7.data-00000-of-00001'
  content = bytearray(path.read_bytes())
  content[1000] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match='can not be read'):
    checkpoints.read(f'{logdir}/model.ckpt-7')


@pytest.mark.parametrize(
  ('damage', 'step', 'told'),
  [
    (lambda logdir: None, 300, None),
    (lambda logdir: truncate(logdir / 'checkpoint', 0), 300, '"checkpoint"'),
    (lambda logdir: truncate(logdir / 'checkpoint', 9), 300, '"checkpoint"'),
    (
      lambda logdir: (logdir / 'checkpoint').write_bytes(b'\x80\xff\0'),
      300,
      '"checkpoint"',
    ),
    (lambda logdir: (logdir / 'checkpoint').unlink(), 300, '"checkpoint"'),
    (
      lambda logdir: truncate(logdir / 'model.ckpt-300.index', 0),
      40,
      'model.ckpt-300',
    ),
    (
      lambda logdir: (logdir / 'model.ckpt-300.index').unlink(),
      40,
      'model.ckpt-300',
    ),
    (
      lambda logdir: truncate(
        logdir / 'model.ckpt-300.data-00000-of-00001', 2000
      ),
      40,
      'model.ckpt-300',
    ),
    # As the user's guide says, to go on from an older one.
    (
      lambda logdir: (logdir / 'checkpoint').write_text(
        'model_checkpoint_path: "model.ckpt-7"'
      ),
      7,
      None,
    ),
  ],
)
def test_last_complete_checkpoint_is_found(logdir, damage, step, told, caplog):
  damage(logdir)
  before = files_of(logdir)
  expected = f'{logdir}/model.ckpt-{step}'
  assert checkpoints.latest(str(logdir)) == expected
  assert files_of(logdir) == before
  assert (caplog.text == '') == (told is None)
  assert (told or '') in caplog.text
  # TensorFlow itself finds it too, once the folder is prepared.
  unfinished = logdir / 'model.ckpt-500_temp'
  unfinished.mkdir()
  (unfinished / 'part-00000-of-00001.index').touch()
  checkpoints.prepare(str(logdir), expected)
  assert not unfinished.exists()
  logdir = logdir.rename(logdir.parent / 'plain')
  assert tf.train.latest_checkpoint(str(logdir)) == (
    f'{logdir}/model.ckpt-{step}'
  )


def test_folder_whose_checkpoints_are_all_damaged_is_told(logdir):
  for path in logdir.glob('*.index'):
    truncate(path, 10)
  with pytest.raises(UserError, match=r'No checkpoint in .* can be read'):
    checkpoints.latest(str(logdir))


def test_folder_without_checkpoints_begins_anew(tmp_path):
  (tmp_path / 'checkpoint').touch()
  assert checkpoints.latest(str(tmp_path)) is None
  assert checkpoints.latest(str(tmp_path / 'missing')) is None
  checkpoints.prepare(str(tmp_path), None)
  assert list(tmp_path.iterdir()) == []


def test_saver_deletes_old_checkpoints_of_its_own_folder_alone(saved, logdir):
  before = files_of(saved)
  checkpoints.prepare(str(logdir), checkpoints.latest(str(logdir)))
  with tf.Graph().as_default(), tf.Session() as session:
    weight = tf.get_variable('weight', [30, 20])
    step = tf.train.get_or_create_global_step()
    saver = checkpoints.Saver(max_to_keep=3)
    saver.restore(session, f'{logdir}/model.ckpt-300')
    saver.recover_last_checkpoints(
      [f'{logdir}/model.ckpt-{number}' for number in STEPS]
    )
    session.run([step.assign(400), weight.assign(weight + 1)])
    path = saver.save(
      session, f'{logdir}/model.ckpt', 400, write_meta_graph=False
    )
  assert path == f'{logdir}/model.ckpt-400'
  assert '/' not in (logdir / 'checkpoint').read_text()
  assert {path.name for path in logdir.glob('*.index')} == {
    f'model.ckpt-{number}.index' for number in (40, 300, 400)
  }
  assert checkpoints.read(path)[1] == 400
  assert checkpoints.latest(str(logdir)) == path
  assert files_of(saved) == before
