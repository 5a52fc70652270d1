# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Dynamic batching: concurrent calls of a function are computed as one batch.

Decorate a function of tensors with `batch_fn`. Every caller passes a batch of
one and gets a batch of one; the function itself sees the requests of all the
callers that wait at the time, concatenated:

```
@dynamic_batching.batch_fn
def policy(observation):   # [None, 72, 96, 3], one row per waiting caller.
  return network(observation)

action = policy(observation)  # [1, 72, 96, 3] -> [1, ...]
```

A `tf.train.QueueRunner` drives the computation, so it must be started, as
`tf.train.MonitoredSession` and `tf.train.start_queue_runners` do. Use the
session that runs the callers.
"""

import collections
import contextlib
import functools
import logging

import tensorflow.compat.v1 as tf

import native
import private_apis

BatchingStatistics = collections.namedtuple(
  'BatchingStatistics', 'batches requests wait_seconds'
)

# What a decorated function knows about the calls of it in one graph. `specs` is
# the nest of `tf.TensorSpec` of its arguments as a caller has them,
# `output_specs` that of its results.
_Built = collections.namedtuple('_Built', 'batcher specs output_specs')

_logger = logging.getLogger(__name__)


@functools.cache
def _library():
  """Returns the `native.Library` of the ops; None if they aren't built.

  Raises:
    ImportError: they are there, but don't load.
  """
  library = native.load_library(
    'dynamic_batching_ops',
    'dynamic batching is off, every call is computed on its own, which gives '
    'the same results more slowly',
  )
  if library is not None:
    for op_type in ('Compute', 'GetInputs', 'SetOutputs', 'Fail'):
      tf.no_gradient('DynamicBatcher' + op_type)
  return library


def available():
  """Returns whether the batching ops are built, else nothing is batched."""
  return _library() is not None


def batch_fn(f):
  """`batch_fn_with_options()` with the default options, as a decorator."""
  return batch_fn_with_options()(f)


def batch_fn_with_options(
  minimum_batch_size=1, maximum_batch_size=1024, timeout_ms=100, num_threads=1
):
  """Returns a decorator that batches the calls of a function.

  The decorated function takes and returns nests (`tf.nest`) of tensors of any
  numeric type or strings. Each argument of a call has leading (batch)
  dimension 1, and so has each result. The undecorated function sees arguments
  with a leading dimension between 1 and `maximum_batch_size`, statically
  unknown unless the options allow only one size, and must return tensors with
  the same leading dimension. It has no gradient.

  The first call in a graph builds the computation in that graph, outside of
  any loop or control dependency of the caller, so that the function may create
  variables. It's placed on the task of that caller, but its device type is
  free. All calls in a graph share it, and must agree in structure, dtypes and
  non-batch shapes.

  An error in the computation of a batch is the error of the calls in that
  batch. Those after it are computed as usual.

  Where the ops were not built (see `available`) the decorator logs a warning
  and the function is called as it is, unbatched.

  Args:
    minimum_batch_size: Python int. A batch is computed as soon as so many
      requests wait, or `timeout_ms` after the first of those waiting came.
    maximum_batch_size: Python int, the largest batch.
    timeout_ms: Python int, in milliseconds. 0: a request never waits for
      others; None: batches smaller than `minimum_batch_size` wait for ever.
    num_threads: Python int, how many batches are computed at once.

  Returns:
    A decorator. What it returns has a method `statistics()`, which returns a
    `BatchingStatistics` of scalar tensors for the current default graph:
    `batches` (int64) and `requests` (int64) that were handed to the function
    since the session began, and the sum over these requests of their
    `wait_seconds` (float64) until then. It raises ValueError if the function
    was not called in this graph.
    A call raises ValueError if an argument has no leading dimension of 1, the
    arguments are unlike those of the first call in this graph, or the function
    returns something without batch dimension; RuntimeError outside of a graph.

  Raises:
    ValueError: If an option is out of range.
  """
  _check_options(minimum_batch_size, maximum_batch_size, timeout_ms)
  if num_threads < 1:
    raise ValueError(f'num_threads must be at least 1, but is {num_threads}.')

  def decorator(f):
    if not available():
      return _unbatched(f)
    make_batcher = functools.partial(
      _Batcher, minimum_batch_size, maximum_batch_size, timeout_ms
    )
    batched = _BatchedFunction(f, make_batcher, num_threads)

    @functools.wraps(f)
    def call(*args, **kwargs):
      return batched(*args, **kwargs)

    call.statistics = batched.statistics
    return call

  return decorator


def _check_options(minimum_batch_size, maximum_batch_size, timeout_ms):
  if not 1 <= minimum_batch_size <= maximum_batch_size:
    raise ValueError(
      'Expected 1 <= minimum_batch_size <= maximum_batch_size, but saw '
      f'{minimum_batch_size} and {maximum_batch_size}.'
    )
  if timeout_ms is not None and timeout_ms < 0:
    raise ValueError(
      f'Expected timeout_ms to be None or at least 0, but saw {timeout_ms}.'
    )


def _unbatched(f):
  """Returns a function like `f` with the statistics of no batches."""

  @functools.wraps(f)
  def call(*args, **kwargs):
    return f(*args, **kwargs)

  call.statistics = lambda: BatchingStatistics(
    tf.constant(0, tf.int64),
    tf.constant(0, tf.int64),
    tf.constant(0.0, tf.float64),
  )
  return call


class _BatchedFunction:
  """A function with a batcher in each graph it's called in."""

  def __init__(self, f, make_batcher, num_threads):
    self._f = f
    self._make_batcher = make_batcher
    self._num_threads = num_threads

  def __call__(self, *args, **kwargs):
    arguments = tf.nest.map_structure(tf.convert_to_tensor, (args, kwargs))
    specs = tf.nest.map_structure(_request_spec, arguments)
    with tf.init_scope():
      built = self._built() or self._build(specs)
    _check_alike(built.specs, specs)
    flat_output_specs = tf.nest.flatten(built.output_specs)
    outputs = built.batcher.compute(
      tf.nest.flatten(arguments),
      [spec.dtype for spec in flat_output_specs],
      [spec.shape for spec in flat_output_specs],
    )
    return tf.nest.pack_sequence_as(built.output_specs, outputs)

  def statistics(self):
    with tf.init_scope():
      built = self._built()
    if built is None:
      raise ValueError('The batched function was not called in this graph.')
    return built.batcher.statistics()

  def _built(self):
    if tf.executing_eagerly():
      raise RuntimeError(
        'A batched function is for a tf.Graph that a tf.Session runs; there is '
        'nothing to batch in eager execution.'
      )
    # Kept in the graph: a reference to it from here would keep the graph alive.
    # A key that is no string isn't exported with the graph.
    found = tf.get_default_graph().get_collection_ref((_BatchedFunction, self))
    return found[0] if found else None

  def _build(self, specs):
    """Builds the computation in the default graph."""
    batcher = self._make_batcher()
    enqueue_ops = []
    for owner in range(self._num_threads):
      step, output_specs = self._build_step(batcher, specs, owner)
      enqueue_ops.append(step)
    tf.train.add_queue_runner(_BatchRunner(batcher, enqueue_ops))
    built = _Built(batcher, specs, output_specs)
    tf.get_default_graph().add_to_collection((_BatchedFunction, self), built)
    return built

  def _build_step(self, batcher, specs, owner):
    """Builds the computation of one batch.

    Args:
      batcher: `_Batcher`.
      specs: nest of `tf.TensorSpec`, the arguments of a request.
      owner: Python int, names the computation in case of an error.

    Returns:
      An op and the nest of `tf.TensorSpec` of a request's results.
    """
    flat_specs = tf.nest.flatten(specs)
    inputs, computation_id = batcher.get_inputs(
      [spec.dtype for spec in flat_specs],
      [spec.shape for spec in flat_specs],
      owner,
    )
    args, kwargs = tf.nest.pack_sequence_as(specs, inputs)
    with _on_task_of(batcher.device), _after(computation_id.op):
      outputs = tf.nest.map_structure(
        tf.convert_to_tensor, self._f(*args, **kwargs)
      )
    output_specs = tf.nest.map_structure(
      functools.partial(_result_spec, inputs[0].shape[0]), outputs
    )
    step = batcher.set_outputs(tf.nest.flatten(outputs), computation_id)
    return step, output_specs


def _request_spec(argument):
  """Returns the spec of a caller's argument with leading dimension 1."""
  shape = argument.shape
  if not shape.is_compatible_with(tf.TensorShape([1]).concatenate(shape[1:])):
    raise ValueError(
      'An argument of a batched function must have leading (batch) dimension '
      f'1, but saw {argument}.'
    )
  return tf.TensorSpec(_with_batch_size(1, shape), argument.dtype)


def _result_spec(batch_size, output):
  """Returns the spec of a caller's result, given the whole batch's."""
  shape = output.shape
  if shape.rank == 0 or not shape[:1].is_compatible_with([batch_size]):
    raise ValueError(
      'A batched function must return tensors with leading (batch) dimension '
      f'{batch_size}, but saw {output}.'
    )
  return tf.TensorSpec(_with_batch_size(1, shape), output.dtype)


def _with_batch_size(batch_size, shape):
  if shape.rank is None:
    return shape
  return tf.TensorShape([batch_size]).concatenate(shape[1:])


def _check_alike(expected, seen):
  """Raises ValueError unless a call's specs fit those of the first call."""
  try:
    tf.nest.assert_same_structure(expected, seen)
    alike = all(
      a.dtype == b.dtype and a.shape.is_compatible_with(b.shape)
      for a, b in zip(
        tf.nest.flatten(expected), tf.nest.flatten(seen), strict=True
      )
    )
  except (TypeError, ValueError):
    alike = False
  if not alike:
    raise ValueError(
      'All calls of a batched function in a graph must have arguments of the '
      f'same structure, dtypes and shapes: expected (args, kwargs) {expected}, '
      f'but saw {seen}.'
    )


def _on_task_of(device):
  """Returns a device scope: the job and task of `device`, no device type."""
  spec = tf.DeviceSpec.from_string(device)
  return _only_on(spec.replace(device_type=None, device_index=None).to_string())


@contextlib.contextmanager
def _only_on(device):
  """A device scope that ignores the scopes around it."""
  with tf.device(None), tf.device(device):
    yield


@contextlib.contextmanager
def _after(op):
  """Ops built within run after `op`, except those that initialize variables.

  Otherwise a step would read variables when it begins to wait for a batch.

  Args:
    op: `tf.Operation`.

  Yields:
    None.
  """
  variables = []

  def creator(next_creator, **kwargs):
    variables.append(next_creator(**kwargs))
    return variables[-1]

  with tf.control_dependencies([op]), tf.variable_creator_scope(creator):
    yield
  # Initial values may have been built within. They mustn't wait for a batch.
  for initializing in _ancestors([v.initializer for v in variables]):
    _remove_control_input(initializing, op)


def _ancestors(ops):
  """Returns the set of `ops` and all ops they depend on."""
  found = set()
  todo = list(ops)
  while todo:
    op = todo.pop()
    if op not in found:
      found.add(op)
      todo += [tensor.op for tensor in op.inputs] + op.control_inputs
  return found


def _remove_control_input(op, control_input):
  if control_input in op.control_inputs:
    others = [
      other for other in op.control_inputs if other is not control_input
    ]
    private_apis.replace_control_inputs(op, others)


class _BatchRunner(tf.train.QueueRunner):
  """A QueueRunner that goes on after the error of a batch.

  `enqueue_ops[i]` must compute a batch that it gets as owner `i`.
  """

  def __init__(self, batcher, enqueue_ops):
    super().__init__(
      queue=batcher,
      enqueue_ops=enqueue_ops,
      queue_closed_exception_types=(tf.errors.CancelledError,),
    )
    with _only_on(batcher.device):
      self._code = tf.placeholder(tf.int32, [], 'error_code')
      self._message = tf.placeholder(tf.string, [], 'error_message')
    self._fail_ops = {
      op: batcher.fail(owner, self._code, self._message)
      for owner, op in enumerate(enqueue_ops)
    }

  def _run(self, sess, enqueue_op, coord=None):
    """Computes batches until the end (the body of a thread)."""
    try:
      self._compute_batches(sess, enqueue_op, coord)
    except (tf.errors.CancelledError, RuntimeError):
      pass  # The batcher or the session (hence RuntimeError) was closed.
    except Exception as e:
      if coord:
        coord.request_stop(e)
      else:
        _logger.exception('The computation of batches ends.')
        self._exceptions_raised.append(e)
    finally:
      self._leave(sess)

  def _compute_batches(self, sess, enqueue_op, coord):
    step = sess.make_callable(enqueue_op)
    fail = sess.make_callable(
      self._fail_ops[enqueue_op], feed_list=[self._code, self._message]
    )
    while not (coord and coord.should_stop()):
      try:
        step()
      except (tf.errors.AbortedError, tf.errors.UnavailableError):
        raise  # MonitoredSession answers these with a new session.
      except tf.errors.OpError as e:
        batch_failed = fail(e.error_code, e.message)
        if not batch_failed:
          raise

  def _leave(self, sess):
    """Closes the batcher after the last thread: callers would wait for ever."""
    with self._lock:
      self._runs_per_session[sess] -= 1
      if self._runs_per_session[sess]:
        return
    try:
      sess.run(self.close_op)
    except (RuntimeError, tf.errors.OpError) as e:
      _logger.debug('Ignored, for it ends anyway: %s', e)


class _Batcher:
  """A batcher in the default graph, whose ops the user has to run.

  Its resource is on the CPU of the task that the device scope names where the
  batcher is made. So are all its ops, in whatever scope they are built.

  After `close`, and if the step that runs them is cancelled, all ops below but
  `statistics` and `close` end with a Cancelled error.
  """

  def __init__(self, minimum_batch_size, maximum_batch_size, timeout_ms):
    """Makes a batcher.

    Args:
      minimum_batch_size: Python int, see `batch_fn_with_options`.
      maximum_batch_size: Python int.
      timeout_ms: Python int or None.

    Raises:
      ValueError: If an option is out of range.
      RuntimeError: If the ops are not built.
    """
    _check_options(minimum_batch_size, maximum_batch_size, timeout_ms)
    library = _library()
    if library is None:
      raise RuntimeError('The batching ops are not built: run "make ops".')
    self._ops = library.ops
    self._batch_size = None
    if timeout_ms is None and minimum_batch_size == maximum_batch_size:
      self._batch_size = maximum_batch_size
    with tf.name_scope('dynamic_batcher') as scope, tf.device('/device:CPU:0'):
      self._handle = self._ops.dynamic_batcher(
        minimum_batch_size=minimum_batch_size,
        maximum_batch_size=maximum_batch_size,
        timeout_ms=-1 if timeout_ms is None else timeout_ms,
        shared_name=scope.rstrip('/'),
      )

  @property
  def name(self):
    """The name of the operation that makes the batcher."""
    return self._handle.op.name

  @property
  def device(self):
    """The device of the batcher, a string."""
    return self._handle.device

  def compute(self, flat_args, output_dtypes, output_shapes=None):
    """Has a request computed as part of a batch.

    The step fails with InvalidArgument if the arguments have another leading
    dimension than 1 or are unlike what `get_inputs` asks for or what the
    requests of the batch look like; with the error of the computation if that
    fails. Other requests are not affected.

    Args:
      flat_args: list of tensors, [1, ...] each.
      output_dtypes: list of `tf.DType`.
      output_shapes: optional list of `tf.TensorShape`, what is known of the
        results. The leading dimension is 1, whatever is given.

    Returns:
      A list of tensors of these dtypes, [1, ...] each.
    """
    shapes = [_with_batch_size(1, shape) for shape in output_shapes or ()]
    with _only_on(self.device):
      return self._ops.dynamic_batcher_compute(
        self._handle, flat_args, Toutputs=output_dtypes, output_shapes=shapes
      )

  def get_inputs(self, input_dtypes, input_shapes=None, owner=None):
    """Waits for a batch.

    All calls for one batcher must ask for the same dtypes and shapes.

    Args:
      input_dtypes: list of `tf.DType`.
      input_shapes: optional list of `tf.TensorShape`, what is known of the
        requests' arguments. The leading dimension is ignored.
      owner: optional Python int >= 0 that names the computation for `fail`. To
        be used for one computation at a time.

    Returns:
      A list of tensors [batch_size, ...], where the batch size is statically
      known if the options allow only one, and the computation id, an int64
      scalar, for `set_outputs`, which may run in a later step.
    """
    shapes = [
      _with_batch_size(self._batch_size, tf.TensorShape(shape))
      for shape in input_shapes or ()
    ]
    with _only_on(self.device):
      inputs, computation_id = self._ops.dynamic_batcher_get_inputs(
        self._handle,
        Tinputs=input_dtypes,
        input_shapes=shapes,
        owner=-1 if owner is None else owner,
      )
    return inputs, computation_id

  def set_outputs(self, flat_outputs, computation_id):
    """Hands each request of a computation its row of the outputs.

    Fails with InvalidArgument if no such computation is running, and, as do the
    requests, if the outputs don't have the dtypes they ask for or a row for
    each.

    Args:
      flat_outputs: list of tensors, [batch_size, ...] each.
      computation_id: int64 scalar from `get_inputs`.

    Returns:
      An op.
    """
    with _only_on(self.device):
      return self._ops.dynamic_batcher_set_outputs(
        self._handle, flat_outputs, computation_id
      )

  def fail(self, owner, code, message):
    """Fails the requests of the last computation of an owner.

    If a step fails after its `get_inputs`, its computation id is lost. Only the
    owner tells then which computation it was.

    Args:
      owner: Python int, as given to `get_inputs`.
      code: int32 scalar, the error's code (`tf.errors.OpError.error_code`).
      message: string scalar.

    Returns:
      A bool scalar: False if there's no such computation or its outputs were
      set successfully.
    """
    with _only_on(self.device):
      return self._ops.dynamic_batcher_fail(
        self._handle, code, message, owner=owner
      )

  def close(self, cancel_pending_enqueues=False, name=None):
    """Ends all waits in the batcher, present and future, with Cancelled.

    Args:
      cancel_pending_enqueues: ignored; a queue has it, and a `QueueRunner`
        passes it.
      name: optional name of the op.

    Returns:
      An op.
    """
    del cancel_pending_enqueues
    with _only_on(self.device):
      return self._ops.dynamic_batcher_close(self._handle, name=name)

  def statistics(self):
    """Returns a `BatchingStatistics` of this batcher's totals."""
    with _only_on(self.device):
      return BatchingStatistics(
        *self._ops.dynamic_batcher_statistics(self._handle)
      )
