# Licensed under the Apache License, Version 2.0; see LICENSE.
"""IMPALA: importance weighted actor-learner architectures (arXiv 1802.01561).

Actors play environments with a slightly old policy and send unrolls to a
learner, which corrects for the difference with V-trace:

  environment process --> actor loop --> queue --> staging --> learner
        ^                   |    ^                               |
        +------ action -----+    +---------- parameters ---------+

  python experiment.py --level_name=gym:VizdoomBasic-v1   # Trains.
  python experiment.py --level_name=gym:VizdoomBasic-v1 --mode=test

On many machines, the queue and the parameters are on the learner task, and
actor tasks reach them over the network (see `cluster`):

  python experiment.py --job_name=learner --task=0
  python experiment.py --job_name=actor --task=0   # And 1, 2, ...

This file has the graph of an actor, and the runs: `train`, `act` (an actor
task), `serve` (another learner task) and `test`. Their flags are in
`command_line`.
"""

import collections
import contextlib
import ctypes
import json
import os
import shlex
import signal
import sys
import time

import numpy as np
from absl import app, flags

import quiet

with quiet.start():
  import tensorflow.compat.v1 as tf

  import action_sets
  import checkpoints
  import chief
  import cluster
  import command_line
  import convolution
  import dynamic_batching
  import environments
  import evaluation
  import learner_client
  import levels
  import log_folder
  import memory
  import py_process
  from actors import ActorLoops, create_processes, draw_seeds
  from agent import Agent
  from command_line import (
    AGENT_FLAGS,
    FLAGS,
    RUN_FLAGS,
    UPKEEP_FLAGS,
    check_flags,
    flag_values,
    learner_of_flags,
    leave_rewards_to_popart,
    make_folder,
    not_writable,
    own_flags,
    take_flags,
  )
  from console import (
    REPORT_SECONDS,
    Console,
    hold_signals,
    prepare_output,
    print_line,
    stop_signals,
    watch,
  )
  from errors import UserError, explain
  from learner import NOT_FINITE
  from learner_loop import SESSION_LOST, LearnerLoop, SessionLost
  from level_assignment import LevelAssignment
  from map_compiler import MapCompiler
  from metrics import Metrics
  from player import Player
  from unrolls import ActorOutput, build_queue, build_unroll

__all__ = ['Agent', 'Player', 'build_actor', 'build_learner', 'test', 'train']

flags.adopt_module_key_flags(command_line)

_NUM_ATARI_ACTIONS = 18  # Of the console; most games have fewer of their own.

# --- The actor --------------------------------------------------------------

# What an actor takes from one unroll into the next.
ActorState = collections.namedtuple(
  'ActorState', 'agent_state env_state env_output agent_output'
)
# The graph of an actor. A run of `initial_state` starts the environment. A run
# with `state`, placeholders, fed plays one unroll: `output` is what it saw, an
# `ActorOutput` of [T + 1, ...], and `next_state` what to feed next.
ActorGraph = collections.namedtuple(
  'ActorGraph', 'initial_state state output next_state inference_statistics'
)


def build_actor(agent, env, level_name, action_set, noise_seed=None):
  """Builds the loop in which an actor plays one unroll.

  Args:
    agent: `Agent`.
    env: `FlowEnvironment`.
    level_name: string scalar, tensor or not.
    action_set: see `action_sets`.
    noise_seed: int32 scalar tensor. Actions are drawn from it and the number of
      the step in its episode, and so are the same in each run, whichever
      requests its inference was batched with. None draws them from the graph's
      random numbers.

  Returns:
    `ActorGraph`.
  """
  is_reproducible = noise_seed is not None
  level_name = tf.convert_to_tensor(level_name)

  @dynamic_batching.batch_fn
  def infer(last_action, env_output, agent_state):
    requests = (last_action, env_output), agent_state
    return (
      _infer_padded(agent, requests) if is_reproducible else agent(*requests)
    )

  initial_state = _build_initial_state(agent, env)
  state = tf.nest.map_structure(
    lambda t: tf.placeholder(t.dtype, t.shape), initial_state
  )
  actions, first_action = map(tf.constant, action_sets.table(action_set))

  def act(state):
    # The agent doesn't see the episode's return and length.
    env_output = state.env_output._replace(info=(), game_over=(), truncated=())
    agent_output, agent_state = infer(
      *_with_batch((state.agent_output.action, env_output, state.agent_state))
    )
    if is_reproducible:
      seed = [noise_seed, state.env_state.episode_step]
      agent_output = agent_output._replace(
        action=agent.draw(agent_output.policy_logits, seed)
      )
    agent_output = agent.at_level(agent_output, level_name)
    return _without_batch((agent_output, agent_state))

  def step(state, _):
    agent_output, agent_state = act(state)
    env_output, env_state = env.step(
      tf.gather(actions, first_action + agent_output.action), state.env_state
    )
    return ActorState(agent_state, env_state, env_output, agent_output)

  # Never run. It makes the variables: a loop can't.
  act(state)
  # One step after another: each depends on the state that the last returned.
  states = tf.scan(
    step, tf.range(FLAGS.unroll_length), state, parallel_iterations=1
  )
  env_outputs, agent_outputs = tf.nest.map_structure(
    lambda first, rest: tf.concat([first[tf.newaxis], rest], axis=0),
    (state.env_output, state.agent_output),
    (states.env_output, states.agent_output),
  )
  return ActorGraph(
    initial_state=initial_state,
    state=state,
    output=ActorOutput(
      level_name,
      state.agent_state,
      env_outputs,
      agent_outputs,
    ),
    next_state=tf.nest.map_structure(lambda t: t[-1], states),
    inference_statistics=infer.statistics(),
  )


def _infer_padded(agent, requests):
  """Runs the agent so that a row's results don't depend on the other rows.

  Products with a single row are computed in another way and round differently.
  With two rows or more, the results are the same in all batches.
  """
  batch_size = tf.shape(tf.nest.flatten(requests)[0])[0]
  padding = tf.cast(batch_size < 2, tf.int32)
  padded = tf.nest.map_structure(
    lambda t: tf.concat([t, t[:padding]], axis=0), requests
  )
  return tf.nest.map_structure(lambda t: t[:batch_size], agent(*padded))


def _build_initial_state(agent, env):
  """Starts the environment; no action led to its first observation."""
  env_output, env_state = env.initial()
  agent_state = _without_batch(agent.initial_state(1))
  return ActorState(agent_state, env_state, env_output, agent.initial_output())


def _with_batch(nest):
  return tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), nest)


def _without_batch(nest):
  return tf.nest.map_structure(lambda t: tf.squeeze(t, 0), nest)


# --- The learner ------------------------------------------------------------


def build_learner(
  agent, agent_state, env_outputs, agent_outputs, level_name=''
):
  """Builds the loss of a batch and its update, see `Learner.build`."""
  return learner_of_flags().build(
    agent, agent_state, env_outputs, agent_outputs, level_name
  )


# --- Building blocks of the runs --------------------------------------------


def _choose_game(num_actions=None, played=None):
  """Returns the `Game` that the flags ask for.

  Args:
    num_actions: int, of the agent that is to play it, if that is known.
    played: see `levels.choose_game`.
  """
  py_process.set_call_timeout(FLAGS.environment_timeout_secs or None)
  suite = FLAGS.level_name in levels.SUITES
  settings = environments.EnvironmentSettings(
    height=FLAGS.height if FLAGS['height'].present else None,
    width=FLAGS.width if FLAGS['width'].present else None,
    num_action_repeats=FLAGS.num_action_repeats,
    dataset_path=FLAGS.dataset_path,
    level_cache_dir=os.path.expanduser(FLAGS.level_cache_dir),
    is_test=FLAGS.mode == 'test',
    # One agent plays all levels, and so plays each alone in the same way.
    full_action_set=suite or num_actions == _NUM_ATARI_ACTIONS,
    dmlab=_dmlab_settings(),
  )
  return levels.choose_game(FLAGS.level_name, settings, played)


def _dmlab_settings():
  return environments.DmLabSettings(
    level_cache_bytes=int(FLAGS.level_cache_size_gb * 1e9) or None,
    num_maps=FLAGS.dmlab_maps,
    maps_seed=FLAGS.seed,
    renderer=FLAGS.renderer,
    runfiles_path=FLAGS.dmlab_runfiles_path,
    level_settings=FLAGS.dmlab_settings,
    action_set=FLAGS.dmlab_action_set,
    compiles_ahead=FLAGS.dmlab_compile_ahead and FLAGS.mode == 'train',
  )


@contextlib.contextmanager
def _new_graph(device=None):
  """Makes the default graph, whose operations are on a device by default."""
  with tf.Graph().as_default(), tf.device(device):
    # Each actor task draws other actions.
    is_actor = FLAGS.mode == 'train' and FLAGS.job_name == 'actor'
    tf.set_random_seed(
      draw_seeds(1, FLAGS.seed, FLAGS.task)[0] if is_actor else FLAGS.seed
    )
    tf.train.get_or_create_global_step()
    yield


def _new_agent(game, popart_levels=None):
  """Returns the `Agent` that the flags ask for.

  Args:
    game: `Game`.
    popart_levels: of an agent that was trained, see `Agent`.
  """
  if popart_levels is None:
    names = levels.training_names(game.names)
    popart_levels = names if FLAGS.popart else ()
  return Agent(
    action_sets.num_actions(game.spec.action_set),
    FLAGS.torso,
    FLAGS.precision,
    FLAGS.core,
    FLAGS.normalize_frames,
    popart_levels=popart_levels,
  )


def _first_environment():
  """Returns the number, over all tasks, of this task's first environment."""
  return max(FLAGS.task, 0) * FLAGS.environments_per_actor


def _environment_seed(actor, restart=0):
  """Returns a seed, int32, that differs between actors, restarts and runs."""
  return draw_seeds(1, FLAGS.seed, _first_environment() + actor, restart)[0]


def _create_processes(game, count, seed_of=_environment_seed):
  return create_processes(game, count, seed_of, _first_environment())


def _warn_of_memory(game, count):
  """Tells beforehand if so many environments don't fit into the memory."""
  if game.family.MEGABYTES is None:
    return
  if game.settings.dmlab.compiles_ahead:
    count += len(os.sched_getaffinity(0))
  line = memory.describe_shortage(
    count, game.family.MEGABYTES, 'environment processes', memory.free_bytes()
  )
  if line:
    print_line(line)


def _build_actor_for(game, agent, processes, noise_seeds=None, assignment=None):
  """Builds the one graph of all actors, and the placeholder of their index.

  Args:
    game: `Game`.
    agent: `Agent`.
    processes: list of `PyProcess`, made by `_create_processes`.
    noise_seeds: for `build_actor`, a list of ints, one for each process.
    assignment: `LevelAssignment` of the actors; None if levels never change.
  """
  index = tf.placeholder(tf.int32, [], 'actor')
  env = environments.FlowEnvironment(py_process.choose(processes, index))
  if assignment is None or not assignment.balances:
    number = (_first_environment() + index) % len(game.names)
  else:
    # What it is when an unroll begins.
    number = tf.numpy_function(
      lambda i: np.int32(assignment.levels()[i]), [index], tf.int32
    )
  level_names = tf.constant(levels.training_names(game.names))
  level_name = tf.reshape(tf.gather(level_names, number), [])
  noise_seed = None if noise_seeds is None else tf.constant(noise_seeds)[index]
  actor = build_actor(agent, env, level_name, game.spec.action_set, noise_seed)
  return actor, index


def _build_actors(game, agent, count):
  """Builds the actors of a training that run here.

  Args:
    game: `Game`.
    agent: `Agent`.
    count: int, how many.

  Returns:
    The `Unroll` that a run plays, and a function of what to run with each and
    of what to call after it, that returns the `ActorLoops`.
  """
  _warn_of_memory(game, count)
  processes = _create_processes(game, count)
  assignment = LevelAssignment(
    len(game.levels),
    count,
    _first_environment(),
    balances=FLAGS.level_assignment == 'balanced',
  )
  actor, index = _build_actor_for(game, agent, processes, None, assignment)

  def loops(fetches, on_unroll):
    return ActorLoops(
      *(actor, index, processes, game, assignment, fetches, on_unroll),
      max_restarts=FLAGS.max_environment_restarts,
      seed_of=_environment_seed,
      unroll_length=FLAGS.unroll_length,
    )

  return build_unroll(actor), loops


def _session_config(num_actors):
  config = tf.ConfigProto(allow_soft_placement=True)
  # Two more than cores, as the learner's large operations hold a thread for
  # long: the actors' small ones needn't wait for them. Together with idle
  # threads that don't spin, it brings the deep network a tenth more frames/s.
  config.inter_op_parallelism_threads = (os.cpu_count() or 1) + 2
  config.experimental.disable_thread_spinning = True
  if not py_process.has_library():
    config.inter_op_parallelism_threads += num_actors
  if FLAGS.precision == 'bfloat16':
    rewrites = config.graph_options.rewrite_options
    rewrites.auto_mixed_precision_onednn_bfloat16 = rewrites.ON
    # Nearly all of the work is in the convolutions. With matrix products, the
    # LSTM's memory, the logits and parts of V-trace would be rounded as well.
    os.environ['TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_ALLOWLIST_REMOVE'] = (
      'MatMul'
    )
  return config


def _describe_device(role, only_cpu=False):
  """Returns a line on what computes the network.

  Args:
    role: string, what runs it.
    only_cpu: whether accelerators are not used.
  """
  has_gpu = not only_cpu and tf.config.list_physical_devices('GPU')
  words = [f'{role} on {"GPU:0" if has_gpu else "CPU"}']
  if FLAGS.torso == 'deep':
    words.append(convolution.kernels(FLAGS.precision))
  return ', '.join([*words, FLAGS.precision])


# --- Training ---------------------------------------------------------------


def train():
  """Trains until the last frame, an error, or a signal.

  With actors on this machine, or as the learner task of many.
  """
  checkpoint = checkpoints.latest(FLAGS.logdir)
  # Without a checkpoint, it is that of a training which failed at its start.
  description = checkpoint and checkpoints.find_description(checkpoint)
  if description:
    take_flags(description, AGENT_FLAGS)
    game = _choose_game(description['num_actions'])
  else:
    game = _choose_game()
  leave_rewards_to_popart()
  tasks = None if FLAGS.task == -1 else _cluster()
  with _new_graph(tasks and tasks.learner_device()), stop_signals() as signals:
    training = _prepare_chief(game, tasks) if tasks else _prepare_alone(game)
    py_process.reserve_descriptors(len(training.actors.processes))
    make_folder('logdir', FLAGS.logdir)
    with log_folder.lock(FLAGS.logdir):
      _prepare_log_folder(game, description)
      _run_training(game, training, signals)
  _exit_if_moved(signals)


def _prepare_log_folder(game, description):
  """Checks that the training can go on in its folder, and describes it there.

  Args:
    game: `Game`.
    description: of the agent that is in the folder; None without one.

  Raises:
    UserError: it can't.
  """
  logdir = FLAGS.logdir
  height, width, _ = game.spec.frame_shape  # By default, those of the levels.
  values = {**flag_values(), 'height': height, 'width': width}
  settings = {
    name: value
    for name, value in values.items()
    if name not in RUN_FLAGS + UPKEEP_FLAGS
  }
  checkpoint = checkpoints.latest(logdir)
  if checkpoint:
    checkpoints.check_agent(checkpoints.read(checkpoint)[0], logdir)
    if description:
      for line in checkpoints.describe_changes(description, settings):
        print_line(line)
  try:
    checkpoints.prepare(logdir, checkpoint)
    checkpoints.save_description(
      logdir, game.spec, FLAGS.torso, values, settings, game.names
    )
  except OSError as error:
    raise not_writable('logdir', error) from None


def _run_training(game, training, signals):
  """Runs the session of a training, and says what came of it."""
  actors, tasks = training.actors, training.tasks
  has_others = tasks is not None and len(tasks.learners) > 1
  metrics = Metrics(
    FLAGS.logdir,
    FLAGS.level_name,
    game.names,
    actors,
    learner_of_flags().frames_per_update,
    FLAGS.num_action_repeats,
  )
  tests = _background_tests(metrics)
  # Only the chief's task writes checkpoints.
  saver = checkpoints.Saver(
    sharded=tasks is None, allow_empty=True, defer_build=True
  )
  target, config = '', _session_config(FLAGS.num_actors)
  print_line(_describe_device('learner'))
  if tasks:
    tasks.start_server(config)
    print_line(tasks.describe())
    target, config = tasks.session(config)
    if not chief.wait_for_learners(tasks, signals):
      return
  try:
    with tf.train.MonitoredTrainingSession(
      master=target,
      checkpoint_dir=FLAGS.logdir,
      scaffold=tf.train.Scaffold(saver=saver),
      save_checkpoint_secs=FLAGS.save_checkpoint_secs,
      save_summaries_secs=REPORT_SECONDS,
      save_summaries_steps=None,
      log_step_count_steps=None,
      save_graph_def=False,
      stop_grace_period_secs=5,
      config=config,
      hooks=[actors, tests] if FLAGS.test_interval_frames else [actors],
    ) as session:
      metrics.global_step = int(actors.session.run(tf.train.get_global_step()))
      learner = LearnerLoop(
        *(session, training.update, metrics, actors.coord),
        total_frames=FLAGS.total_environment_frames,
      )
      learner.start()
      if has_others:
        _watch_learners(training, learner, saver, metrics, signals, tests)
      else:
        _watch_training(actors, metrics, signals, tests)
      actors.coord.request_stop()
      actors.close(goes_on=bool(learner.error) or _is_moved(signals))
      # An update under way is finished.
      with contextlib.suppress(*SESSION_LOST):
        actors.session.run(training.end_waits)
      learner.join()
      # Raised inside of the session's context, it keeps the session from
      # saving a last checkpoint.
      if learner.error:
        raise learner.error
      if saver.error:
        # The session saves the last checkpoint, unless it tried just before.
        _save(saver, actors.session, metrics.global_step)
    # The session's end keeps some errors of other threads to itself.
    actors.coord.raise_requested_exception()
    if has_others and not _is_moved(signals):
      actors.end_learners(tasks, target, config)
  finally:
    tests.close()
    py_process.close_all(actors.processes)
  _report_end(metrics, learner.num_updates, saver.error)


def _watch_learners(training, learner, saver, metrics, signals, tests):
  """As `_watch_training`, but begins anew if another learner ends."""
  actors = training.actors
  try:
    _watch_training(actors, metrics, signals, tests)
    actors.coord.raise_requested_exception()
    if learner.error:
      raise learner.error
    return
  except cluster.LearnerLeaves as error:
    reason = error
    # Its variables can still be read.
    actors.coord.request_stop()
    actors.session.run(training.end_waits)
    learner.join()
    _save(saver, actors.session, metrics.global_step)
  except (SessionLost, tf.errors.OpError) as error:
    if not training.tasks.is_loss(error):
      raise
    reason = error
  tests.close()
  _begin_anew(reason, signals, metrics.global_step)


def _save(saver, session, global_step):
  path = os.path.join(FLAGS.logdir, 'model.ckpt')
  saver.save(session, path, global_step, write_meta_graph=False)


# So often training begins anew with no update in between, and all learners
# there: then it isn't for want of one.
_MAX_BEGINNINGS = 5
_BEGINNINGS = 'IMPALA_BEGINNINGS'  # In the environment: frames, and how often.


def _begin_anew(reason, signals, global_step):
  """Starts this program again, which waits for all learners to be there.

  A session over a learner that is gone can't be closed.
  """
  if signals:  # It can't be saved any more.
    print_line(
      f'A learner is gone ({explain(reason)}): the last checkpoint in '
      f'{FLAGS.logdir} is kept.'
    )
    os._exit(_MOVED if _is_moved(signals) else 1)
  frames, _, count = os.environ.get(_BEGINNINGS, '').partition(':')
  count = int(count) + 1 if frames == str(global_step) else 1
  if count > _MAX_BEGINNINGS:
    print_line(f'Training began anew {count - 1} times, and fails: {reason}')
    os._exit(1)
  os.environ[_BEGINNINGS] = f'{global_step}:{count}'
  print_line(
    f'A learner is gone ({explain(reason)}): training goes on from the last '
    f'checkpoint in {FLAGS.logdir} once it is back.'
  )
  for fd in map(int, os.listdir('/proc/self/fd')):
    if fd > 2:
      # That which listed the folder is closed.
      with contextlib.suppress(OSError):
        os.set_inheritable(fd, False)
  hold_signals()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# The exit code of a task that was told to end by SIGTERM, and not by its user:
# that of sysexits.h for "try again later".
_MOVED = os.EX_TEMPFAIL


def _is_moved(signals):
  """Returns whether this task is to end, and to go on elsewhere.

  Cluster managers send SIGTERM to a task that they move.
  """
  return FLAGS.task != -1 and signal.SIGTERM in signals


def _exit_if_moved(signals, is_done=False):
  if _is_moved(signals) and not is_done:
    print_line(
      f'SIGTERM: this task ends with exit code {_MOVED}, to be started again. '
      'The other tasks wait for it.'
    )
    sys.exit(_MOVED)


def _report_end(metrics, num_updates, save_error):
  """Prints what a training has reached, and what can be done next.

  Exits with code 1 if its last checkpoint could not be saved.
  """
  if save_error:
    _exit(f'{save_error}: make room and start the training again.', 1)
  frames, total = metrics.global_step, FLAGS.total_environment_frames
  mean_return = metrics.latest_return()
  if num_updates:
    line = f'Trained for {frames:,} of {total:,} frames, in this run by '
    line += f'{num_updates:,} updates; '
    line += (
      'no episode ended'
      if mean_return is None
      else f'mean return {mean_return:.2f}'
    )
  else:
    line = f'The agent had {frames:,} frames of training before, '
    line += f'--total_environment_frames is {total:,}'
  goes_on = (
    'to train on, give a higher --total_environment_frames'
    if frames >= total
    else 'the same command trains on'
  )
  script, logdir = map(shlex.quote, (sys.argv[0], FLAGS.logdir))
  print_line(
    f'{line}. Checkpoint: {checkpoints.latest(FLAGS.logdir)}. Next: {goes_on}; '
    f'to test, python {script} --mode=test --logdir={logdir}'
  )


# What a training is made of: `Actors`, the `Update`, the op that ends all waits
# of actors and learners for another, and the `Cluster`; None on one machine.
Training = collections.namedtuple('Training', 'actors update end_waits tasks')


def _prepare_alone(game):
  """Builds a `Training` whose actors run here."""
  agent = _new_agent(game)
  unroll, build_loops = _build_actors(game, agent, FLAGS.num_actors)
  queue = build_queue(unroll)
  actors = build_loops(queue.enqueue(unroll), lambda actor, values: True)
  devices = [None]
  if FLAGS.num_learners > 1:
    devices = [f'/gpu:{k}' for k in range(FLAGS.num_learners)]
  update, end_learners = learner_of_flags().build_training(
    agent, [queue] * len(devices), devices
  )
  end_actors = queue.queue.close(cancel_pending_enqueues=True)
  return Training(actors, update, tf.group(end_actors, end_learners), None)


def _prepare_chief(game, tasks):
  """Builds a `Training` of learner tasks, whose actors are tasks as well.

  Args:
    game: `Game`.
    tasks: `Cluster`.
  """
  variables, unroll = _actor_specs(game)
  tasks.place_variables(variables)
  agent = _new_agent(game)
  devices = [tasks.learner_device(k) for k in range(len(tasks.learners))]
  update, end_learners = learner_of_flags().build_training(
    agent, [_build_learner_queue(unroll, device) for device in devices], devices
  )
  registry = chief.ActorRegistry(
    cluster.SharedState(tasks.learner_device()),
    _task_requirements(game),
    FLAGS.num_actors,
    devices,
  )
  return Training(registry, update, end_learners, tasks)


def _build_learner_queue(unroll, device):
  with tf.device(device):
    return build_queue(unroll)


def _cluster():
  """Returns the `Cluster` that this task is in."""
  learners = FLAGS.learner_addresses
  is_learner = FLAGS.job_name == 'learner'
  return cluster.Cluster(
    *(learners, FLAGS.job_name, FLAGS.task),
    address=learners[FLAGS.task] if is_learner else FLAGS.actor_address,
  )


def _actor_specs(game):
  """Returns the variables of an actor task, and its `Unroll` of specs."""
  with _new_graph():
    agent = _new_agent(game)
    actor, _ = _build_actor_for(game, agent, _create_processes(game, 1))
    return agent.variables, tf.nest.map_structure(
      lambda t: tf.TensorSpec(t.shape, t.dtype), build_unroll(actor)
    )


def _task_requirements(game):
  """Returns what learner and actor tasks must agree on, as JSON."""
  return json.dumps(
    {
      '--num_learners': FLAGS.num_learners,
      '--level_name': FLAGS.level_name,
      '--torso': FLAGS.torso,
      '--core': FLAGS.core,
      '--normalize_frames': FLAGS.normalize_frames,
      '--popart': FLAGS.popart,
      '--unroll_length': FLAGS.unroll_length,
      '--num_action_repeats': FLAGS.num_action_repeats,
      'frame size (--height, --width)': list(game.spec.frame_shape),
      'number of actions': action_sets.num_actions(game.spec.action_set),
    }
  )


def _watch_training(actors, metrics, signals, tests):
  """Shows the progress until the training stops, or a signal comes."""
  console = Console(
    FLAGS.total_environment_frames, metrics.global_step, 'frames'
  )

  def poll():
    latest = metrics.latest_return()
    console.progress(
      metrics.global_step, '' if latest is None else f'return {latest:.2f}'
    )
    for line in actors.membership_changes():
      console.print_line(line)
    tests.poll(console)

  def report():
    console.report(metrics.global_step, metrics.report())

  watch(actors.coord.wait_for_stop, signals, poll, report)
  if signals:
    console.print_line(
      f'{signals[0].name}: saving a checkpoint, then ending. '
      'Once more ends at once.'
    )
  tests.report(console)
  console.close()


def _background_tests(metrics):
  """Returns the `BackgroundTests` of a training."""

  def arguments(checkpoint):
    return [
      os.path.abspath(__file__),
      *(
        flag.serialize()
        for flag in own_flags()
        if flag.present and flag.name not in ('job_name', 'task')
      ),
      '--mode=test',
      f'--checkpoint={checkpoint}',
      # On many machines, --num_actors is the number of tasks.
      f'--num_actors={min(FLAGS.num_actors, os.cpu_count() or 1)}',
    ]

  return evaluation.BackgroundTests(
    metrics, FLAGS.logdir, FLAGS.test_interval_frames, arguments, _results_path
  )


# --- An actor task ----------------------------------------------------------


def act():
  """Plays as an actor task until the learner is done, an error, or a signal."""
  first = _first_environment()
  played = range(first, first + FLAGS.environments_per_actor)
  if FLAGS.level_assignment == 'balanced':
    played = None  # It may be any.
  game = _choose_game(played=played)
  tasks = _cluster()
  with _new_graph(tasks.actor_device()), stop_signals() as signals:
    agent = _new_agent(game)
    unroll, build_loops = _build_actors(
      game, agent, FLAGS.environments_per_actor
    )
    py_process.reserve_descriptors(FLAGS.environments_per_actor)
    tasks.place_variables(agent.variables)
    config = _session_config(FLAGS.environments_per_actor)
    config.device_count['GPU'] = 0  # Accelerators belong to the learner.
    tasks.start_server(config)
    client = learner_client.ActorClient(
      *(tasks, _task_requirements(game), config, signals),
      lambda device: _build_learner_queue(unroll, device),
      [*agent.variables, tf.train.get_global_step()],
    )
    loops = build_loops(unroll, client.on_unroll)
    print_line(_describe_device(f'actor {FLAGS.task}', only_cpu=True))
    print_line(tasks.describe())
    heartbeats = learner_client.Heartbeats(client, loops)
    try:
      if client.join():
        heartbeats.start()
        target, config = tasks.session(config, with_learners=False)
        with tf.train.MonitoredSession(
          tf.train.ChiefSessionCreator(master=target, config=config),
          hooks=[client, loops],
          stop_grace_period_secs=5,
        ):
          watch(
            lambda seconds: (
              heartbeats.has_ended() or loops.coord.wait_for_stop(seconds)
            ),
            signals,
            poll=lambda: None,
          )
          loops.coord.request_stop()
          client.leave()
          loops.close()
        heartbeats.raise_error()
      reason = 'the learner is done' if client.is_done else 'stopped'
      print_line(f'Actor {FLAGS.task} ends: {reason}.')
    finally:
      loops.close()
  _exit_if_moved(signals, client.is_done)


# --- Another learner --------------------------------------------------------


def serve():
  """Computes as a learner task for the chief, learner 0, until it is done."""
  game = _choose_game(played=[0])
  tasks = _cluster()
  _actor_specs(game)  # Loads the operations that the chief will use here.
  with _new_graph(), stop_signals() as signals:
    config = _session_config(0)
    tasks.start_server(config)
    print_line(_describe_device(f'learner {FLAGS.task}'))
    print_line(tasks.describe())
    client = learner_client.LearnerClient(
      tasks, _task_requirements(game), config, signals
    )
    client.join()
    while not (client.is_done or signals):
      client.watch_end()
      time.sleep(cluster.HEARTBEAT_SECONDS)
    if signals and not client.is_done:
      client.announce_leaving()
      chief.wait_for_chief_to_end(tasks)
    client.leave()
  reason = 'learner 0 is done' if client.is_done else 'stopped'
  print_line(f'Learner {FLAGS.task} ends: {reason}.')
  _exit_if_moved(signals, client.is_done)


# --- Test -------------------------------------------------------------------


def test():
  """Plays --test_num_episodes on each level, and reports the results.

  Exits with code 1 if not all of them could be played.
  """
  checkpoint = checkpoints.find(FLAGS.logdir, FLAGS.checkpoint)
  shapes, frames = checkpoints.read(checkpoint)
  description = checkpoints.find_description(checkpoint)
  if description:
    take_flags(description)
    game = _choose_game(description['num_actions'])
    popart_levels = checkpoints.popart_levels(description)
  else:  # A checkpoint of an older version, or copied without it.
    game = _choose_game()
    popart_levels = None
  with _new_graph(), stop_signals() as signals:
    agent = _new_agent(game, popart_levels)
    # Round after round through the levels.
    count = FLAGS.test_num_episodes * len(game.names)
    seeds = [
      evaluation.episode_seeds(game, index, FLAGS.seed)
      for index in range(count)
    ]
    processes = _create_processes(game, count, lambda index: seeds[index][0])
    actor, index = _build_actor_for(
      game, agent, processes, [noise_seed for _, noise_seed in seeds]
    )
    checkpoints.check_agent(shapes, FLAGS.checkpoint or FLAGS.logdir)
    results = _open_results(game, checkpoint, frames)
    loops = evaluation.TestLoops(
      *(actor, index, processes, game, results),
      num_workers=FLAGS.num_actors,
      max_restarts=FLAGS.max_environment_restarts,
      video_path=_video_path(frames),
    )
    py_process.reserve_descriptors(loops.num_workers)
    if loops.num_workers:
      print_line(_describe_device('test'))
      with tf.train.MonitoredSession(
        tf.train.ChiefSessionCreator(
          scaffold=tf.train.Scaffold(saver=checkpoints.Saver(allow_empty=True)),
          config=_session_config(loops.num_workers),
          checkpoint_filename_with_path=checkpoint,
        ),
        hooks=[loops],
      ):
        try:
          _watch_test(loops, results, signals)
        finally:
          loops.stop()
          results.save()
    else:
      results.save()
  print_line(results.table())
  print_line(f'Results: {results.path}.json, {results.path}.csv')
  if signals:
    print_line('Interrupted: the same command plays the missing episodes.')
  if not results.is_complete():
    sys.exit(1)


def _results_path(frames):
  return evaluation.results_path(
    FLAGS.logdir, FLAGS.level_name, frames, FLAGS.seed
  )


def _video_path(frames):
  """Returns a function from levels to paths of videos; None if none is asked.

  Raises:
    UserError: the folder can't be written.
  """
  if not FLAGS.video_dir:
    return None
  make_folder('video_dir', FLAGS.video_dir)
  return lambda level: evaluation.video_path(
    FLAGS.video_dir, level, frames, FLAGS.seed
  )


def _open_results(game, checkpoint, frames):
  """Returns the `evaluation.Results` of what the flags ask for."""
  make_folder('logdir', os.path.dirname(_results_path(frames)))
  results = evaluation.Results(
    path=_results_path(frames),
    settings={
      'level_name': FLAGS.level_name,
      'checkpoint': os.path.basename(checkpoint),
      'checkpoint_sha256': checkpoints.fingerprint(checkpoint),
      'frames': frames,
      'seed': FLAGS.seed,
      'num_action_repeats': FLAGS.num_action_repeats,
      'frame_shape': list(game.spec.frame_shape),
      'precision': FLAGS.precision,
    },
    levels=game.names,
    num_episodes=FLAGS.test_num_episodes,
    references=levels.reference_scores(game.names),
    aggregates=levels.aggregates(FLAGS.level_name),
    versions=evaluation.versions(game.names),
    facts={'flags': flag_values()},
  )
  for name, reason in game.missing.items():
    results.give_up(name, str(reason))
  return results


def _watch_test(loops, results, signals):
  """Shows the progress until all episodes are played, or a signal comes."""
  total = FLAGS.test_num_episodes * len(results.returns())
  console = Console(total, results.num_played(), 'episodes')

  def poll():
    console.progress(results.num_played())

  def report():
    if not console.is_live:
      print_line(f'{results.num_played()} of {total} episodes')

  watch(loops.wait_for_end, signals, poll, report)
  console.close()


# --- Maps ---------------------------------------------------------------------


def compile_maps():
  """Compiles the maps of a training; exits with code 1 if some are missing."""
  if not FLAGS.dmlab_maps:
    raise UserError(
      '--mode=compile_maps needs --dmlab_maps, how many maps each level has in '
      'the training.'
    )
  game = _choose_game()
  if game.family is not environments.PyProcessDmLab:
    raise UserError(
      f'--mode=compile_maps is for levels of DeepMind Lab: {FLAGS.level_name} '
      'has no maps to compile.'
    )
  with _new_graph(), stop_signals() as signals:
    compiler = MapCompiler(game, num_workers=os.cpu_count() or 1)
    console = Console(compiler.num_maps, 0, 'maps')
    with compiler:
      watch(
        compiler.wait_for_end,
        signals,
        poll=lambda: console.progress(compiler.num_done),
        report=lambda: console.report(compiler.num_done, []),
      )
    console.close()
  for line in compiler.summary():
    print_line(line)
  if signals:
    print_line('Interrupted: the same command compiles the rest.')
  if not compiler.is_complete():
    sys.exit(1)


# --- Main -------------------------------------------------------------------


# malloc.h
_M_ARENA_MAX = -8


def _limit_arenas():
  """Has threads share what others freed.

  By default glibc keeps it apart for up to 8 arenas per processor: 70 MB more
  with 48 actors, while 2 per processor are as fast.
  """
  if 'MALLOC_ARENA_MAX' not in os.environ:
    with contextlib.suppress(AttributeError):  # Another library of C.
      ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2 * (os.cpu_count() or 1))


def main(_):
  prepare_output()
  # For modules with environments; last, as its files may be named as ours.
  sys.path.append(os.getcwd())
  _limit_arenas()
  tf.logging.set_verbosity(
    tf.logging.INFO if FLAGS.verbosity > 0 else tf.logging.ERROR
  )
  try:
    check_flags()
    if FLAGS.mode == 'test':
      test()
    elif FLAGS.mode == 'compile_maps':
      compile_maps()
    elif FLAGS.job_name == 'actor':
      act()
    elif FLAGS.task > 0:
      serve()
    else:
      train()
  except KeyboardInterrupt:  # Before anything was started.
    sys.exit(128 + signal.SIGINT)
  except UserError as error:
    _exit(error, 2)
  except py_process.ProcessError as error:
    failure = py_process.failure(error)
    if failure and failure.traceback:
      print(failure.traceback, file=sys.stderr)
      error = f'An environment process {failure.reason}'
    _exit(error, 1)
  except (SessionLost, *SESSION_LOST) as error:
    _exit(
      f"TensorFlow's session was lost ({explain(error)}): training stops. "
      f'Started again, it goes on from the last checkpoint in {FLAGS.logdir}.',
      1,
    )
  except tf.errors.InvalidArgumentError as error:
    if NOT_FINITE not in str(error):
      raise
    _exit(
      f'{NOT_FINITE}: training stops, the last checkpoint in {FLAGS.logdir} '
      'is kept. A lower --learning_rate or a --max_gradient_norm may help.',
      1,
    )


def _exit(error, code):
  with contextlib.suppress(OSError):  # Nobody may be there to read it.
    print(f'experiment.py: {error}', file=sys.stderr)
  sys.exit(code)


def _parse_flags(argv):
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    _exit(error, 2)


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
