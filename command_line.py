# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The flags of the program: what they are, and whether they fit together.

In: the command line, TF_CONFIG, the flags of a training that goes on or is
tested. Out: `FLAGS`, complete and checked, or one sentence on what is wrong.
Only this file and `experiment.py` know the flags.
"""

import math
import os
import re
import tempfile

import tensorflow.compat.v1 as tf
from absl import flags

import cluster
import convolution
from console import print_line
from errors import UserError
from learner import Learner, LearnerSettings

FLAGS = flags.FLAGS

# What to run, and where.
flags.DEFINE_enum(
  'mode',
  'train',
  ['train', 'test', 'compile_maps'],
  'Train an agent, play with it, or compile the --dmlab_maps of each level of '
  'DeepMind Lab before a training.',
)
flags.DEFINE_string(
  'logdir',
  '/tmp/agent',
  'Folder of checkpoints and metrics. Training goes on from the checkpoint in '
  'it.',
)
flags.DEFINE_string(
  'level_name',
  'explore_goal_locations_small',
  'What to play: a level of DeepMind Lab, gym: and the id of a Gymnasium '
  'environment with images and finitely many actions, e.g. '
  'gym:VizdoomBasic-v1, gym:ALE/Pong-v5, or a whole suite: dmlab30, atari57.',
)
flags.DEFINE_integer(
  'test_num_episodes', 10, 'Episodes per level in test mode.', lower_bound=1
)
flags.DEFINE_string(
  'checkpoint',
  '',
  'The checkpoint to test, e.g. /tmp/agent/model.ckpt-1000; the last one in '
  '--logdir if this is not given.',
)
flags.DEFINE_integer(
  'task', -1, 'Number of this task; -1 is training on one machine.'
)
flags.DEFINE_enum(
  'job_name', 'learner', ['learner', 'actor'], 'Job of this task.'
)
flags.DEFINE_integer(
  'num_learners',
  1,
  'Synchronous learners, with an equal part of each batch and of the variables '
  'each: as many as --learner_addresses has, or, in training on one machine, '
  'one per GPU.',
  lower_bound=1,
)
flags.DEFINE_list(
  'learner_addresses',
  None,
  'host:port of each learner task, with commas between. At localhost only this '
  'host can reach a learner; else it listens on all interfaces, and whoever '
  'reaches it can do anything: only for networks that you trust.',
)
flags.DEFINE_string(
  'learner_address',
  'localhost:8000',
  'host:port of the learner task, where there is only one.',
)
flags.DEFINE_string(
  'actor_address',
  None,
  'host:port by which the learners call this actor task; by default, its '
  'address in the network of the learner, and any port that is free.',
)
flags.DEFINE_integer(
  'test_interval_frames',
  0,
  'Environment frames between two tests in the background of a training, in a '
  'process of their own; 0 is off.',
  lower_bound=0,
)
flags.DEFINE_string(
  'video_dir',
  '',
  'Folder for a video of the first test episode of each level; none without.',
)

# The size of the training.
flags.DEFINE_integer(
  'total_environment_frames',
  int(1e9),
  'Environment frames to train for, repeated actions included.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'num_actors',
  4,
  'Actors, with an environment process each. On many machines the actor tasks '
  'that the learner expects, for its reports alone; in test mode, how many '
  'episodes are played at once.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'environments_per_actor',
  1,
  'Environments of an actor task, which share its inference.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'batch_size', 2, 'Unrolls per update of the learner.', lower_bound=1
)
flags.DEFINE_integer(
  'unroll_length', 100, 'Agent steps per unroll.', lower_bound=1
)
flags.DEFINE_float(
  'replay_proportion',
  0.0,
  'Part of the unrolls of each batch that were learned from before, drawn from '
  'the last --replay_size; 0 is off, the paper has 0.5. They are not counted '
  'as frames: a training with 0.5 makes twice the updates.',
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_integer(
  'replay_size',
  10_000,
  "Unrolls that are kept to be replayed, in the learner's memory. They are not "
  'in checkpoints.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'seed',
  1,
  'Seed of networks, actions and environments.',
  lower_bound=0,
  upper_bound=2**31 - 1,
)
flags.DEFINE_integer(
  'save_checkpoint_secs', 600, 'Seconds between checkpoints.', lower_bound=1
)

# The environments.
flags.DEFINE_integer(
  'num_action_repeats',
  4,
  'Environment frames per agent step: each action is repeated so often.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'height',
  72,
  'Height of the frames in pixels. Atari uses 84 unless this is given.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'width',
  96,
  'Width of the frames in pixels. Atari uses 84 unless this is given.',
  lower_bound=1,
)
flags.DEFINE_string(
  'dataset_path',
  '',
  "Folder with the images 0001.png to 2400.png of DeepMind Lab's psychlab "
  'levels; or dummy, for plain colours in their place.',
)
flags.DEFINE_string(
  'level_cache_dir',
  '~/.cache/impala/dmlab_maps',
  "Folder for DeepMind Lab's compiled maps, shared by all its processes.",
)
flags.DEFINE_float(
  'level_cache_size_gb',
  10,
  'GB that the maps in --level_cache_dir take at most: those that were used '
  'least recently are removed first. 0 is no bound.',
  lower_bound=0,
)
flags.DEFINE_integer(
  'dmlab_maps',
  0,
  "How many maps training plays on each of DeepMind Lab's levels, chosen by "
  '--seed: once each was compiled, episodes begin at once. 0 is any number, a '
  'new one for each episode. Tests play other maps.',
  lower_bound=0,
)
flags.DEFINE_enum(
  'renderer',
  'software',
  ['software', 'hardware'],
  'What draws the frames of DeepMind Lab: the CPU, or a GPU through EGL.',
)
flags.DEFINE_string(
  'dmlab_runfiles_path',
  '',
  "Folder with DeepMind Lab's own files, if they are not where its module is.",
)
flags.DEFINE_string(
  'dmlab_settings',
  '',
  'Further settings of a level of DeepMind Lab, as key=value,key=value.',
)
flags.DEFINE_string(
  'dmlab_action_set',
  'paper',
  "The actions in DeepMind Lab: the paper's nine; popart, the fifteen of "
  'PopArt, which also look up and down, slower and faster; or a JSON file with '
  'a list of lists of seven numbers.',
)
flags.DEFINE_boolean(
  'dmlab_compile_ahead',
  True,
  'While an episode of DeepMind Lab is played, compile the map of the next one '
  'in another process: as many at once as there are cores, each with the '
  'memory of an environment.',
)
flags.DEFINE_enum(
  'level_assignment',
  'round_robin',
  ['round_robin', 'balanced'],
  'Which levels of a suite actors play: each the same one, in turn, as in the '
  'paper; or, at the end of an episode, one that is behind in frames, so that '
  'slow levels get more actors and all the same number of frames.',
)
flags.DEFINE_integer(
  'max_environment_restarts',
  10,
  'How often the environment process of an actor may fail (die, raise, or take '
  'too long) and be restarted before training stops, or that of a level before '
  'its test is given up.',
  lower_bound=0,
)
flags.DEFINE_float(
  'environment_timeout_secs',
  600,
  'Seconds after which an environment that neither starts nor answers counts '
  'as failed; 0 is off. DeepMind Lab may compile a map for a minute.',
  lower_bound=0,
)

# The agent and its loss.
flags.DEFINE_enum(
  'torso',
  'deep',
  ['deep', 'shallow'],
  "The paper's network of 15 convolutions, or the one of 2.",
)
flags.DEFINE_enum(
  'core',
  'lstm',
  ['lstm', 'none'],
  'The LSTM between torso and policy; or none, the feed-forward network of the '
  "paper's Atari agents: it sees the frame alone, neither the last action and "
  'reward nor an instruction.',
)
flags.DEFINE_boolean(
  'normalize_frames',
  True,
  'Shift and scale each pixel of the frames by its running mean and deviation '
  'in what the learner learned from. Without, as in the paper, frames are '
  'divided by 255.',
)
flags.DEFINE_enum(
  'precision',
  'float32',
  ['float32', 'bfloat16'],
  'Of what convolutions multiply on the CPU, and, where they are not our own '
  'operations for AVX-512, of what is between two of them. Everything else, '
  'parameters, losses and V-trace too, is float32.',
)
flags.DEFINE_float(
  'entropy_cost', 0.00025, 'Weight of the entropy bonus.', lower_bound=0
)
flags.DEFINE_float(
  'baseline_cost', 0.5, 'Weight of the baseline loss.', lower_bound=0
)
flags.DEFINE_float(
  'discounting',
  0.99,
  'Discount factor per agent step.',
  lower_bound=0,
  upper_bound=1,
)
flags.DEFINE_enum(
  'reward_clipping',
  'abs_one',
  ['abs_one', 'soft_asymmetric', 'none'],
  'abs_one clips rewards to [-1, 1]. soft_asymmetric takes 5 tanh(r / 5), '
  "times 0.3 if negative, as DeepMind's release does; the paper's appendix "
  'prints another formula. With --popart it is none.',
)
flags.DEFINE_boolean(
  'popart',
  False,
  'PopArt (arXiv 1809.04474): a baseline for each level, in units of its own, '
  "which follow the size of the level's returns. Rewards are not clipped.",
)
flags.DEFINE_float(
  'clip_rho_threshold',
  1.0,
  "V-trace's rho-bar: importance ratios in the targets of the baseline are at "
  'most this; 0 is off.',
  lower_bound=0,
)
flags.DEFINE_float(
  'clip_pg_rho_threshold',
  1.0,
  'Likewise in the policy gradient.',
  lower_bound=0,
)
flags.DEFINE_float(
  'vtrace_lambda',
  1.0,
  "Decay of V-trace's traces: with 1, targets look ahead to the end of the "
  'unroll, with 0 a single step.',
  lower_bound=0,
  upper_bound=1,
)

# The optimiser.
flags.DEFINE_enum(
  'optimizer',
  'rmsprop',
  ['rmsprop', 'adam'],
  "The paper's RMSProp; or Adam, with 0.9 and 0.999 as its decays.",
)
flags.DEFINE_float(
  'learning_rate',
  0.00048,
  'Learning rate at the start. The loss is a sum, so it depends on '
  '--batch_size and --unroll_length.',
  lower_bound=0,
)
flags.DEFINE_enum(
  'learning_rate_schedule',
  'linear',
  ['linear', 'constant'],
  'Linear: it falls to 0 at the last of --total_environment_frames.',
)
flags.DEFINE_float(
  'decay', 0.99, "RMSProp's decay.", lower_bound=0, upper_bound=1
)
flags.DEFINE_float('momentum', 0.0, "RMSProp's momentum.", lower_bound=0)
flags.DEFINE_float(
  'epsilon', 0.1, 'Epsilon of RMSProp, or of Adam.', lower_bound=0
)
flags.DEFINE_float(
  'max_gradient_norm',
  0.0,
  'Gradients of a larger global norm are scaled down to it; 0 is off.',
  lower_bound=0,
)

# What an agent's inputs and the variables of its checkpoints depend on: a test,
# or a training that goes on, can't have other values than the training had.
AGENT_FLAGS = (
  'dmlab_action_set',
  'optimizer',
  'torso',
  'core',
  'normalize_frames',
  'popart',
  'num_action_repeats',
  'height',
  'width',
)
# Which run it is. A test doesn't take these from the training.
RUN_FLAGS = (
  'mode',
  'logdir',
  'checkpoint',
  'job_name',
  'task',
  'num_learners',
  'learner_addresses',
  'learner_address',
  'actor_address',
  'test_interval_frames',
  'video_dir',
  'seed',
)
# Nor these, of the machine that it runs on.
MACHINE_FLAGS = ('num_actors', 'precision')
# How a training is looked after. Neither these nor `RUN_FLAGS` change what it
# learns: all others are its settings.
UPKEEP_FLAGS = (
  'dataset_path',
  'dmlab_compile_ahead',
  'dmlab_runfiles_path',
  'environment_timeout_secs',
  'level_cache_dir',
  'level_cache_size_gb',
  'max_environment_restarts',
  'renderer',
  'save_checkpoint_secs',
  'test_num_episodes',
)


def _expand_paths():
  """Expands a ~ that the shell left alone in the flags with paths.

  Raises:
    UserError: TensorFlow can't use the log folder's name.
  """
  paths = ('logdir', 'checkpoint', 'video_dir', 'dataset_path')
  for name in (*paths, 'dmlab_runfiles_path', 'dmlab_action_set'):
    FLAGS[name].value = os.path.expanduser(FLAGS[name].value)
  for name in ('logdir', 'checkpoint'):
    path = FLAGS[name].value
    # TensorFlow writes the names of files in UTF-8, whatever the locale is.
    if os.fsencode(path) != path.encode('utf-8', 'replace'):
      raise UserError(
        f'--{name}={path} is not UTF-8 in this locale: give another name, or '
        'set LC_ALL=C.UTF-8.'
      )


def check_flags():
  """Completes the flags; raises UserError if they make no sense together."""
  _expand_paths()
  for name, value in flag_values().items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'--{name}={value}: it must be a finite number.')
  if FLAGS.precision == 'bfloat16' and not convolution.has_bfloat16():
    FLAGS.precision = 'float32'
    print_line(
      'This processor has no instructions for bfloat16: float32 is used.'
    )
  if FLAGS.checkpoint and FLAGS.mode != 'test':
    raise UserError(
      '--checkpoint is for --mode=test: training goes on from the last '
      'checkpoint in --logdir.'
    )
  if FLAGS.mode != 'train':
    if FLAGS.task != -1:
      raise UserError(
        f'--task is for training: --mode={FLAGS.mode} runs on one machine.'
      )
    return
  num_replayed = learner_of_flags().num_replayed
  if FLAGS.replay_proportion and not 0 < num_replayed < FLAGS.batch_size:
    raise UserError(
      f'--replay_proportion={FLAGS.replay_proportion} of --batch_size='
      f'{FLAGS.batch_size} unrolls is {num_replayed}: at least one has to '
      'be replayed, and one fresh.'
    )
  if os.environ.get('TF_CONFIG'):
    _take_tf_config(os.environ['TF_CONFIG'])
  if FLAGS.task == -1 and (
    FLAGS['job_name'].present or FLAGS.job_name == 'actor'
  ):
    raise UserError(
      f'--job_name={FLAGS.job_name} needs a --task: 0, 1, 2 ... To train on '
      'this machine alone, leave both out.'
    )
  if FLAGS.task < -1:
    raise UserError(
      f'--job_name={FLAGS.job_name} has no --task={FLAGS.task}: tasks are '
      '0, 1, 2 ...'
    )
  _check_learners()
  for name, addresses in (
    ('learner_addresses', FLAGS.learner_addresses),
    ('actor_address', [FLAGS.actor_address or 'localhost:0']),
  ):
    for address in addresses:
      match = re.fullmatch(
        r'(?:[^\s\[\]:]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})', str(address)
      )
      if not match or int(match[1]) > 65535:
        raise UserError(f'--{name}={address} is no host:port.')


def _check_learners():
  """Completes the flags of the learners, see `check_flags`."""
  if FLAGS.learner_addresses is None:
    FLAGS.learner_addresses = [FLAGS.learner_address]
    if FLAGS.task != -1 and FLAGS.num_learners > 1:
      raise UserError(
        f'--num_learners={FLAGS.num_learners} needs the --learner_addresses of '
        'all learner tasks.'
      )
  else:
    if FLAGS['learner_address'].present:
      raise UserError(
        'Give --learner_address or --learner_addresses, not both.'
      )
    count = len(FLAGS.learner_addresses)
    if not count:
      raise UserError(
        '--learner_addresses is empty: give host:port of each learner.'
      )
    if FLAGS.num_learners not in (1, count) or count != len(
      set(FLAGS.learner_addresses)
    ):
      raise UserError(
        f'--learner_addresses={",".join(FLAGS.learner_addresses)} must have '
        f'an address for each of the --num_learners={FLAGS.num_learners}, and '
        'none of them twice.'
      )
    FLAGS.num_learners = count
  count = FLAGS.num_learners
  if FLAGS.job_name == 'learner' and FLAGS.task >= count:
    raise UserError(
      f'--job_name=learner has no --task={FLAGS.task}: with {count} '
      f'learner{"s" * (count > 1)}, the last is {count - 1}. More of them need '
      'their --learner_addresses.'
    )
  if FLAGS.task == -1 and count > 1:
    gpus = len(tf.config.list_physical_devices('GPU'))
    if gpus < count:
      raise UserError(
        f'--num_learners={count} needs as many GPUs on one machine, but it '
        f'has {gpus}: leave it out, or give a --task and the '
        '--learner_addresses of learner tasks on many machines.'
      )
  if FLAGS.job_name == 'actor' or FLAGS.task > 0:
    return  # Batches are the chief's.
  if FLAGS.batch_size % count:
    raise UserError(
      f'--batch_size={FLAGS.batch_size} can not be split evenly between '
      f'{count} learners: give a multiple of {count}.'
    )
  num_replayed = learner_of_flags().num_replayed
  if num_replayed % count:
    raise UserError(
      f'--replay_proportion={FLAGS.replay_proportion}: {num_replayed} of '
      f'{FLAGS.batch_size} unrolls of a batch can not be split evenly between '
      f'{count} learners: give another one.'
    )
  if num_replayed and FLAGS.replay_size < count:
    raise UserError(
      f'--replay_size={FLAGS.replay_size} must be at least 1 for each of '
      f'{count} learners.'
    )


def _take_tf_config(text):
  """Sets job, task and addresses as TF_CONFIG, a JSON string, has them."""
  for name, value in cluster.read_tf_config(text).items():
    flag = FLAGS[name]
    if flag.present and flag.value != value:
      raise UserError(
        f'--{name} is {flag.value}, but TF_CONFIG has {value}: leave one of '
        'them out.'
      )
    flag.value = value


def leave_rewards_to_popart():
  """Turns the clipping of rewards off with --popart.

  Raises:
    UserError: another kind is given.
  """
  if not FLAGS.popart:
    return
  clipping = FLAGS['reward_clipping']
  if clipping.present and clipping.value != 'none':
    raise UserError(
      '--popart learns from rewards as they are, but '
      f'--reward_clipping={clipping.value} is given: leave one of them out, or '
      'add --reward_clipping=none.'
    )
  clipping.value = 'none'


def take_flags(description, names=None):
  """Sets the flags that are not given as the training of the agent had them.

  Args:
    description: of the agent, see `checkpoints.find_description`.
    names: of the flags; None for all but those of a run and its machine.

  Raises:
    UserError: one that is given doesn't fit the agent.
  """
  height, width, _ = description['frame_shape']
  trained = {
    **description['flags'],
    'torso': description['torso'],
    'height': height,
    'width': width,
  }
  if names is None:
    names = trained.keys() - set(RUN_FLAGS + MACHINE_FLAGS)
  for name, value in trained.items():
    # Another version may have had other flags.
    if name not in names or name not in FLAGS:
      continue
    flag = FLAGS[name]
    if not flag.present:
      try:
        flag.parse(value)
      except flags.Error as error:
        raise UserError(f'Of the training: {error}') from None
    elif name in AGENT_FLAGS and flag.value != value:
      raise UserError(
        f'--{name} is {flag.value}, but the agent in {FLAGS.logdir} was '
        f'trained with {value}: leave it out, or give another --logdir.'
      )


def make_folder(flag, path):
  """Makes a folder; raises UserError if it can't be written."""
  try:
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise not_writable(flag, error) from None


def not_writable(flag, error):
  """Returns the `UserError` for the `OSError` of a flag's folder."""
  return UserError(
    f'--{flag}={FLAGS[flag].value} can not be written ({error.strerror}): '
    'give a folder that can.'
  )


def learner_of_flags():
  """Returns the `Learner` that the flags ask for."""
  return Learner(
    LearnerSettings(*(FLAGS[name].value for name in LearnerSettings._fields))
  )


def own_flags():
  """Returns a list of the flags of this program."""
  return FLAGS.get_flags_for_module(__name__)


def flag_values():
  """Returns a dict of the values of all flags of this program."""
  return {flag.name: flag.value for flag in own_flags()}
