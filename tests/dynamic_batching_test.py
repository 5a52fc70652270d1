# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of dynamic_batching: what callers and computations get, and when."""

import concurrent.futures
import gc
import os
import shutil
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import dynamic_batching
import native
import private_apis

_PATIENCE = 60  # Seconds after which a wait counts as a hang.

pytestmark = pytest.mark.skipif(
  not dynamic_batching.available(), reason='needs `make ops`'
)


@pytest.fixture(autouse=True)
def graph():
  with tf.Graph().as_default() as graph:
    yield graph


@pytest.fixture
def pool():
  """Threads for concurrent `session.run`s."""
  with concurrent.futures.ThreadPoolExecutor(256) as pool:
    yield pool


def _session(threads=8):
  return tf.Session(config=tf.ConfigProto(inter_op_parallelism_threads=threads))


def _in_ms(milliseconds):
  return tf.RunOptions(timeout_in_ms=milliseconds)


def _results(futures):
  return [future.result(_PATIENCE) for future in futures]


def _error(future):
  """Returns the OpError with which a `session.run` ended."""
  error = future.exception(_PATIENCE)
  assert isinstance(error, tf.errors.OpError), error
  return error


class ByHand:
  """A batcher driven by hand, with float32 requests and answers."""

  def __init__(
    self, pool, minimum=1, maximum=1024, timeout_ms=None, shape=(None,)
  ):
    self.pool = pool
    self.batcher = dynamic_batching._Batcher(minimum, maximum, timeout_ms)
    self._started = threading.Semaphore(0)
    self.request = tf.placeholder(tf.float32)
    shapes = None if shape is None else [[None, *shape]]
    with tf.control_dependencies([self._note_start()]):
      (self.computed,) = self.batcher.compute([self.request], [tf.float32])
    with tf.control_dependencies([self._note_start()]):
      (self.inputs,), self.id = self.batcher.get_inputs([tf.float32], shapes)
    self.answer = tf.placeholder(tf.float32)
    self.answered_id = tf.placeholder(tf.int64, [])
    self.set_outputs = self.batcher.set_outputs([self.answer], self.answered_id)
    self.statistics = self.batcher.statistics()
    self.close = self.batcher.close()
    self.session = _session()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.session.close()

  def _note_start(self):
    def note():
      self._started.release()
      return np.float32(0)

    return tf.numpy_function(note, [], tf.float32)

  def check_wait(self, futures, starts=None):
    """Checks that these wait, after as many starts as ever were made."""
    for _ in range(starts or len(futures)):
      assert self._started.acquire(timeout=_PATIENCE)
    # They are just before the batcher; now they have time to get into it.
    assert not concurrent.futures.wait(
      futures, 0.2, concurrent.futures.FIRST_COMPLETED
    ).done

  def call(self, value, options=None):
    """Starts a request; returns the future of its result."""
    return self.pool.submit(
      self.session.run, self.computed, {self.request: value}, options
    )

  def take(self, options=None):
    """Starts a get_inputs; returns the future of the inputs and the id."""
    return self.pool.submit(
      self.session.run, (self.inputs, self.id), options=options
    )

  def give(self, answer, computation_id):
    self.session.run(
      self.set_outputs,
      {self.answer: answer, self.answered_id: computation_id},
    )

  def check_works(self):
    """Has one request computed."""
    call = self.call([[4.0]])
    inputs, computation_id = self.take().result(_PATIENCE)
    np.testing.assert_array_equal(inputs, [[4.0]])
    self.give(inputs + 1, computation_id)
    np.testing.assert_array_equal(call.result(_PATIENCE), [[5.0]])


class Running:
  """A session with its queue runners, ended by the coordinator."""

  def __init__(self, threads=8):
    self._threads = threads

  def __enter__(self):
    self.session = _session(self._threads)
    self.session.run(tf.global_variables_initializer())
    self.coordinator = tf.train.Coordinator()
    tf.train.start_queue_runners(self.session, self.coordinator)
    return self.session

  def __exit__(self, *exc_info):
    self.coordinator.request_stop()
    self.coordinator.join(stop_grace_period_secs=_PATIENCE)
    self.session.close()


# What the callers and the function see.


def test_batched_results_equal_individual_ones(pool):
  rng = np.random.RandomState(1)
  weights = rng.randn(5, 3).astype(np.float32)

  @dynamic_batching.batch_fn
  def f(x):
    return tf.matmul(x, tf.constant(weights))

  x = tf.placeholder(tf.float32, [1, 5])
  y = f(x)
  xs = rng.randn(16, 1, 5).astype(np.float32)
  with Running() as session:
    ys = _results([pool.submit(session.run, y, {x: value}) for value in xs])
  np.testing.assert_allclose(ys, xs @ weights, rtol=1e-5)


def test_statistics_of_a_forced_pattern(pool):
  @dynamic_batching.batch_fn_with_options(3, 3, timeout_ms=None)
  def f(x):
    return x

  y = f(tf.zeros([1]))
  statistics = f.statistics()
  with Running() as session:
    assert tuple(session.run(statistics)) == (0, 0, 0.0)
    _results([pool.submit(session.run, y) for _ in range(6)])
    result = session.run(statistics)
  assert (result.batches, result.requests) == (2, 6)
  assert result.wait_seconds > 0
  assert [t.dtype for t in statistics] == [tf.int64, tf.int64, tf.float64]
  assert [t.shape.as_list() for t in statistics] == [[], [], []]


def test_statistics_before_a_call_in_the_graph():
  @dynamic_batching.batch_fn
  def f(x):
    return x

  with tf.Graph().as_default():
    f(tf.zeros([1]))
  with pytest.raises(ValueError, match='not called in this graph'):
    f.statistics()


def test_nests_and_strings(pool):
  @dynamic_batching.batch_fn_with_options(4, 4, timeout_ms=None)
  def f(x, pair, suffix):
    a, b = pair
    text = tf.strings.join([x['text'], suffix])
    return {'sum': [a + b, a - b], 'text': (text, tf.fill(tf.shape(text), 'x'))}

  text = tf.placeholder(tf.string, [1, 2])
  result = f(
    {'text': text}, (np.array([[1, 2]]), tf.constant([[3, 4]], tf.int64)),
    suffix=tf.constant([['!', '?']]),
  )  # fmt: skip
  long = b'long enough to be on the heap, for sure, and even longer than that'
  texts = [[[b'%d' % i, long * i]] for i in range(4)]
  with Running() as session:
    seen = _results([
      pool.submit(session.run, result, {text: value}) for value in texts
    ])  # fmt: skip
  for i, value in enumerate(seen):
    np.testing.assert_array_equal(value['sum'], [[[4, 6]], [[-2, -2]]])
    expected = [[b'%d!' % i, long * i + b'?']]
    np.testing.assert_array_equal(value['text'][0], expected)
    np.testing.assert_array_equal(value['text'][1], [[b'x', b'x']])


def test_static_shapes():
  seen = []

  def f(x, y):
    seen.append((x.shape.as_list(), y.shape.as_list()))
    return x, tf.matmul(y, tf.zeros([2, 3]))

  args = (
    tf.placeholder(tf.float32, [1, None, 7]),
    tf.placeholder(tf.float32, [None, 2]),
  )
  results = dynamic_batching.batch_fn(f)(*args)
  assert [r.shape.as_list() for r in results] == [[1, None, 7], [1, 3]]
  dynamic_batching.batch_fn_with_options(5, 5, timeout_ms=None)(f)(*args)
  dynamic_batching.batch_fn_with_options(5, 5, timeout_ms=9)(f)(*args)
  dynamic_batching.batch_fn_with_options(4, 5, timeout_ms=None)(f)(*args)
  unknown = [None, None, 7], [None, 2]
  assert seen == [unknown, ([5, None, 7], [5, 2]), unknown, unknown]


@pytest.mark.parametrize('width', [1 << 19, 100003])
def test_large_tensors(pool, width):
  @dynamic_batching.batch_fn_with_options(4, 4, timeout_ms=None)
  def f(x):
    return x + 1

  x = tf.placeholder(tf.uint8, [1, width])
  y = f(x)
  rng = np.random.RandomState(2)
  xs = rng.randint(0, 255, [8, 1, width]).astype(np.uint8)
  with Running() as session:
    ys = _results([pool.submit(session.run, y, {x: value}) for value in xs])
  np.testing.assert_array_equal(ys, xs + 1)


def test_empty_rows(pool):
  @dynamic_batching.batch_fn_with_options(2, 2, timeout_ms=None)
  def f(x):
    return x

  y = f(tf.zeros([1, 0, 3]))
  with Running() as session:
    ys = _results([pool.submit(session.run, y) for _ in range(2)])
  assert [y.shape for y in ys] == [(1, 0, 3)] * 2


def test_variables_although_called_in_a_loop(graph):
  @dynamic_batching.batch_fn_with_options(timeout_ms=0)
  def f(x):
    w = tf.get_variable('w', [], initializer=tf.constant_initializer(3.0))
    return x * w

  _, y = tf.while_loop(
    lambda i, _: i < 4, lambda i, y: (i + 1, f(y)), [0, tf.ones([1])]
  )
  (variable,) = tf.trainable_variables()
  assert variable.graph is graph
  lower = variable.assign_sub(1.0)
  with Running() as session:
    assert session.run(y) == [81.0]
    session.run(lower)  # Each batch reads the variables anew.
    assert session.run(y) == [16.0]


def test_initial_values_built_in_the_function_wait_for_no_batch(graph):
  def f(x):
    # As Sonnet modules do: the initial value is a tensor.
    w = tf.Variable(2 * tf.ones([]) + tf.ones([]))
    tf.add_to_collection('snapshot', w)
    return x * w

  y = dynamic_batching.batch_fn_with_options(timeout_ms=0)(f)(tf.ones([1]))
  (variable,) = tf.get_collection('snapshot')
  initialize = tf.global_variables_initializer()
  with _session() as session:
    session.run(initialize, options=_in_ms(1000 * _PATIENCE))
    assert session.run(variable, options=_in_ms(1000 * _PATIENCE)) == 3.0
  with Running() as session:
    assert session.run(y) == [3.0]


def test_computation_is_independent_of_the_callers_surroundings(graph):
  placed = []

  @dynamic_batching.batch_fn
  def f(x):
    placed.append(tf.identity(x))
    return placed[-1]

  with tf.device('/job:actor/task:3/device:GPU:0'):
    with tf.control_dependencies([tf.placeholder(tf.float32, name='never')]):
      result = f(tf.zeros([1]))
  assert all(o.type != 'Placeholder' for o in placed[0].op.control_inputs)
  assert placed[0].device == '/job:actor/task:3'
  cpu = '/job:actor/task:3/device:CPU:0'
  assert result.device == cpu
  ops = [o for o in graph.get_operations() if 'DynamicBatcher' in o.type]
  assert {o.device for o in ops} == {cpu}


def test_calls_share_the_batcher(pool):
  built = []

  @dynamic_batching.batch_fn_with_options(2, 2, timeout_ms=None)
  def f(x):
    built.append(x)
    return tf.fill(tf.shape(x), tf.reduce_sum(x))

  # Alike, but they aren't merged: a batch is two requests.
  ys = f(tf.ones([1])), f(tf.ones([1]))
  with Running() as session:
    np.testing.assert_array_equal(
      session.run(ys, options=_in_ms(1000 * _PATIENCE)), [[2.0], [2.0]]
    )
    assert session.run(f.statistics()).requests == 2
  assert len(built) == 1


@pytest.mark.parametrize(
  'other',
  [
    lambda: (tf.zeros([1, 3]),),
    lambda: ({'x': tf.zeros([1, 4])},),
    lambda: ({'x': tf.zeros([1, 3], tf.float64)},),
    lambda: ({'y': tf.zeros([1, 3])},),
    lambda: ({'x': tf.zeros([1, 3])}, tf.zeros([1])),
  ],
)
def test_unlike_call_is_refused(other):
  @dynamic_batching.batch_fn
  def f(x, y=None):
    del y
    return x

  f({'x': tf.zeros([1, 3])})
  with pytest.raises(ValueError, match=r'expected .*\(1, 3\).*but saw'):
    f(*other())
  f({'x': tf.ones([1, 3])})


@pytest.mark.parametrize('shape', [[], [2], [0, 3]])
def test_argument_without_batch_dimension_is_refused(shape):
  f = dynamic_batching.batch_fn(lambda x: x)
  with pytest.raises(ValueError, match='leading'):
    f(tf.zeros(shape))


def test_result_without_batch_dimension_is_refused():
  f = dynamic_batching.batch_fn(tf.reduce_sum)
  with pytest.raises(ValueError, match='must return tensors with leading'):
    f(tf.zeros([1]))


@pytest.mark.parametrize('options', [(0, 1, 1), (3, 2, 1), (1, 1, -1)])
def test_bad_options(options):
  with pytest.raises(ValueError, match='Expected'):
    dynamic_batching.batch_fn_with_options(*options)
  with pytest.raises(ValueError, match='Expected'):
    dynamic_batching._Batcher(*options)
  minimum, maximum, timeout_ms = options
  handle = dynamic_batching._library().ops.dynamic_batcher(
    minimum_batch_size=minimum,
    maximum_batch_size=maximum,
    timeout_ms=timeout_ms - 1,
  )
  with tf.Session() as session:
    with pytest.raises(tf.errors.InvalidArgumentError, match='Bad options'):
      session.run(handle)


def test_bad_number_of_threads():
  with pytest.raises(ValueError, match='num_threads'):
    dynamic_batching.batch_fn_with_options(num_threads=0)


def test_call_without_a_graph_is_refused():
  f = dynamic_batching.batch_fn(lambda x: x)

  def call():  # A new thread has no default graph, so it's eager.
    with pytest.raises(RuntimeError, match=r'tf\.Graph'):
      f(tf.zeros([1]))

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    pool.submit(call).result(_PATIENCE)


def test_no_gradient_flows():
  x = tf.zeros([1])
  y = dynamic_batching.batch_fn(lambda x: 2 * x)(x)
  assert tf.gradients(y, x) == [None]


def test_graphs_are_built_separately_and_not_kept_alive():
  built = []

  @dynamic_batching.batch_fn_with_options(timeout_ms=0)
  def f(x):
    built.append(weakref.ref(x.graph))
    return x

  for value in (1.0, 2.0):
    with tf.Graph().as_default():
      y = f(tf.fill([1], value))
      with Running() as session:
        assert session.run(y) == [value]
  assert len(built) == 2
  del y, session
  gc.collect()
  assert [graph() for graph in built] == [None, None]


def test_batcher_names_are_unique():
  batchers = [dynamic_batching._Batcher(1, 1, 0) for _ in range(3)]
  assert len({b.name for b in batchers}) == 3
  names = {b._handle.op.get_attr('shared_name') for b in batchers}
  assert len(names) == 3


def test_sessions_of_a_graph_have_batchers_of_their_own(pool):
  with ByHand(pool) as hand:
    hand.check_works()
    hand.session.run(hand.close)
    with tf.Session() as other:
      assert other.run(hand.statistics).batches == 0
      with pytest.raises(tf.errors.DeadlineExceededError):
        other.run(hand.inputs, options=_in_ms(10))  # Open: it waits.


def test_exported_graph_leaves_out_what_is_private(graph):
  dynamic_batching.batch_fn(lambda x: x)(tf.zeros([1]))
  meta_graph = tf.train.export_meta_graph(graph=graph)
  assert set(meta_graph.collection_def) == {tf.GraphKeys.QUEUE_RUNNERS}


# Batch size and time.


def test_minimum_is_waited_for_without_timeout(pool):
  with ByHand(pool, minimum=2, timeout_ms=None) as hand:
    first = hand.call([[1.0]])
    assert isinstance(
      _error(hand.take(_in_ms(200))), tf.errors.DeadlineExceededError
    )
    take = hand.take()
    second = hand.call([[2.0]])
    inputs, computation_id = take.result(_PATIENCE)
    assert sorted(inputs.ravel()) == [1.0, 2.0]
    hand.give(inputs, computation_id)
    np.testing.assert_array_equal(_results([first, second]), [[[1]], [[2]]])


def test_batches_are_as_large_as_the_maximum(pool):
  with ByHand(pool, minimum=1, maximum=4, timeout_ms=0) as hand:
    calls = [hand.call([[float(i)]]) for i in range(10)]
    hand.check_wait(calls)  # All are there before the first batch is taken.
    sizes = []
    while sum(sizes) < 10:
      inputs, computation_id = hand.take().result(_PATIENCE)
      sizes.append(len(inputs))
      hand.give(inputs * 2, computation_id)
    assert sizes == [4, 4, 2]
    assert [r.item() for r in _results(calls)] == [2.0 * i for i in range(10)]


def test_timeout_runs_from_the_first_request(pool):
  with ByHand(pool, minimum=3, timeout_ms=2000) as hand:
    take = hand.take()
    hand.check_wait([take, hand.call([[1.0]])])
    # Another request comes in the second half of the time.
    with pytest.raises(concurrent.futures.TimeoutError):
      take.result(timeout=1.0)
    hand.call([[2.0]])
    inputs, _ = take.result(_PATIENCE)
    np.testing.assert_array_equal(inputs, [[1.0], [2.0]])
    # 2.0 and about 0.8; were the timeout restarted, about 3.2 and 2.0.
    assert 2.0 <= hand.session.run(hand.statistics).wait_seconds < 4.0


def test_timeout_may_have_passed_before_get_inputs(pool):
  with ByHand(pool, minimum=2, timeout_ms=1) as hand:
    call = hand.call([[1.0]])
    hand.check_wait([call])
    assert len(hand.take().result(_PATIENCE)[0]) == 1


def test_later_requests_time_out_too(pool):
  with ByHand(pool, minimum=2, timeout_ms=20) as hand:
    for _ in range(5):
      hand.check_works()


def test_timeout_0_does_not_wait(pool):
  with ByHand(pool, minimum=2, timeout_ms=0) as hand:
    hand.check_works()


def test_outputs_out_of_order(pool):
  with ByHand(pool, maximum=1) as hand:
    calls = {value: hand.call([[value]]) for value in (1.0, 2.0)}
    (first, first_id), (second, second_id) = (
      hand.take().result(_PATIENCE) for _ in range(2)
    )
    hand.give(second * 10, second_id)
    assert calls[second.item()].result(_PATIENCE) == second * 10
    assert not calls[first.item()].done()
    hand.give(first * 10, first_id)
    assert calls[first.item()].result(_PATIENCE) == first * 10


def test_two_computations_at_once(pool):
  together = threading.Barrier(2, timeout=_PATIENCE)

  @dynamic_batching.batch_fn_with_options(1, 1, timeout_ms=0, num_threads=2)
  def f(x):
    def meet(x):
      together.wait()
      return x

    y = tf.numpy_function(meet, [x], tf.float32)
    y.set_shape(x.shape)
    return y

  x = tf.placeholder(tf.float32, [1])
  y = f(x)
  with Running() as session:
    calls = [pool.submit(session.run, y, {x: [v]}) for v in (1.0, 2.0)]
    assert _results(calls) == [[1.0], [2.0]]


def test_hundreds_of_callers(pool):
  @dynamic_batching.batch_fn_with_options(
    maximum_batch_size=32, timeout_ms=1, num_threads=2
  )
  def f(x, i):
    return x + tf.cast(i, tf.float32)

  x = tf.placeholder(tf.float32, [1])
  _, y = tf.while_loop(
    lambda i, _: i[0] < 20, lambda i, y: (i + 1, f(y, i)), [tf.constant([0]), x]
  )
  with Running() as session:
    calls = [pool.submit(session.run, y, {x: [v]}) for v in range(256)]
    np.testing.assert_array_equal(
      _results(calls), np.arange(256)[:, None] + 190.0
    )
    result = session.run(f.statistics())
  assert result.requests == 256 * 20
  assert 256 * 20 / 32 <= result.batches < 256 * 20


# Errors.


@pytest.mark.parametrize(
  ('bad', 'saw'),
  [
    (1.0, 'float[]'),
    ([1.0], 'float[1]'),
    (np.zeros([0, 1]), 'float[0,1]'),
    ([[1.0], [2.0]], 'float[2,1]'),
    ([[1.0, 2.0]], 'float[1,2]'),
  ],
)
def test_bad_request_fails_alone(pool, bad, saw):
  with ByHand(pool, shape=(1,)) as hand:
    hand.check_works()
    error = _error(hand.call(bad))
    assert isinstance(error, tf.errors.InvalidArgumentError)
    assert 'expected' in error.message
    assert f'saw ({saw})' in error.message
    hand.check_works()


def test_bad_request_before_the_first_get_inputs_fails_alone(pool):
  with ByHand(pool, shape=(1,)) as hand:
    bad = hand.call([[1.0, 2.0]])
    hand.check_wait([bad])
    take = hand.take()
    assert 'but saw (float[1,2])' in _error(bad).message
    call = hand.call([[1.0]])
    inputs, computation_id = take.result(_PATIENCE)
    hand.give(inputs, computation_id)
    assert call.result(_PATIENCE) == [[1.0]]


@pytest.mark.parametrize(
  ('arguments', 'output_dtypes', 'saw'),
  [
    (lambda: [tf.zeros([1], tf.int32)], [tf.float32], '(int32[1])'),
    (lambda: [tf.zeros([1])] * 2, [tf.float32], '(float[1], float[1])'),
  ],
)
def test_request_of_other_dtypes_fails_alone(
  pool, arguments, output_dtypes, saw
):
  with ByHand(pool) as hand:
    hand.check_works()
    bad = hand.batcher.compute(arguments(), output_dtypes)
    error = _error(pool.submit(hand.session.run, bad))
    assert isinstance(error, tf.errors.InvalidArgumentError)
    assert f'expected (float[1,?]), but saw {saw}' in error.message
    hand.check_works()


@pytest.mark.parametrize(
  ('shape', 'output_dtype'), [([1, 2], tf.float32), ([1, 1], tf.int32)]
)
def test_request_unlike_its_batch_fails_alone(pool, shape, output_dtype):
  with ByHand(pool, minimum=2, shape=None) as hand:
    bad = hand.batcher.compute([tf.zeros(shape)], [output_dtype])
    first = hand.call([[1.0]])
    hand.check_wait([first])
    error = _error(pool.submit(hand.session.run, bad))
    assert isinstance(error, tf.errors.InvalidArgumentError)
    assert 'expected inputs (float[1,1]) and outputs (float)' in error.message
    second = hand.call([[2.0]])
    inputs, computation_id = hand.take().result(_PATIENCE)
    hand.give(inputs, computation_id)
    np.testing.assert_array_equal(_results([first, second]), [[[1]], [[2]]])


def test_get_inputs_unlike_the_first_fails_alone(pool):
  with ByHand(pool) as hand:
    hand.check_works()
    bad = hand.batcher.get_inputs([tf.int32], [[None]])
    error = _error(pool.submit(hand.session.run, bad))
    assert 'expected (float[1,?]), but saw (int32[1])' in error.message
    hand.check_works()


@pytest.mark.parametrize(
  ('answer', 'saw'),
  [(1.0, 'float[]'), ([1.0], 'float[1]'), ([[1.0]] * 3, 'float[3,1]')],
)
def test_outputs_without_a_row_for_each_request(pool, answer, saw):
  with ByHand(pool, minimum=2) as hand:
    calls = [hand.call([[1.0]]) for _ in range(2)]
    _, bad_id = hand.take().result(_PATIENCE)
    with pytest.raises(tf.errors.InvalidArgumentError) as setting:
      hand.give(answer, bad_id)
    for error in [setting.value, *map(_error, calls)]:
      assert isinstance(error, tf.errors.InvalidArgumentError)
      assert 'leading dimension 2' in error.message
      assert f'saw ({saw})' in error.message
    calls = [hand.call([[1.0]]) for _ in range(2)]
    hand.give(*hand.take().result(_PATIENCE))
    np.testing.assert_array_equal(_results(calls), [[[1]], [[1]]])


@pytest.mark.parametrize(
  'outputs',
  [lambda: [tf.zeros([1], tf.int32)], lambda: [tf.zeros([1])] * 2],
)
def test_outputs_of_wrong_number_or_dtype(pool, outputs):
  with ByHand(pool) as hand:
    set_bad_outputs = hand.batcher.set_outputs(outputs(), hand.answered_id)
    call = hand.call([[1.0]])
    _, bad_id = hand.take().result(_PATIENCE)
    with pytest.raises(
      tf.errors.InvalidArgumentError, match=r'expected \(float\).*but saw'
    ):
      hand.session.run(set_bad_outputs, {hand.answered_id: bad_id})
    assert 'Bad outputs' in _error(call).message
    hand.check_works()


def test_unknown_computation(pool):
  with ByHand(pool) as hand:
    call = hand.call([[1.0]])
    _, computation_id = hand.take().result(_PATIENCE)
    with pytest.raises(tf.errors.InvalidArgumentError, match='No computation'):
      hand.give([[1.0]], computation_id + 1)
    hand.give([[1.0]], computation_id)
    with pytest.raises(tf.errors.InvalidArgumentError, match='No computation'):
      hand.give([[1.0]], computation_id)
    assert call.result(_PATIENCE) == [[1.0]]


def test_deleted_batcher_is_an_error(pool):
  with ByHand(pool) as hand:
    handle = hand.batcher._handle
    with tf.control_dependencies(
      [tf.raw_ops.DestroyResourceOp(resource=handle)]
    ):
      compute = hand.batcher.compute([tf.zeros([1])], [tf.float32])
      get_inputs = hand.batcher.get_inputs([tf.float32])
    for op in (compute, get_inputs):
      error = _error(pool.submit(hand.session.run, op))
      assert isinstance(error, tf.errors.NotFoundError)


def test_error_in_the_function_fails_its_batch_only(pool):
  @dynamic_batching.batch_fn_with_options(1, 1, timeout_ms=0, num_threads=2)
  def f(x):
    return tf.check_numerics(x, 'this one is bad')

  x = tf.placeholder(tf.float32, [1])
  y = f(x)
  values = [float(i) if i % 4 else np.nan for i in range(40)]
  with tf.train.MonitoredSession() as session:
    calls = [pool.submit(session.run, y, {x: [v]}) for v in values]
    for value, call in zip(values, calls, strict=True):
      if np.isnan(value):
        error = _error(call)
        assert isinstance(error, tf.errors.InvalidArgumentError)
        assert 'this one is bad' in error.message
      else:
        assert call.result(_PATIENCE) == [value]
    assert not session.should_stop()
    assert session.run(y, {x: [1.0]}) == [1.0]


def test_bad_results_of_the_function_fail_its_batch_only():
  @dynamic_batching.batch_fn_with_options(timeout_ms=0)
  def f(x):
    return tf.cond(x[0] < 0, lambda: tf.concat([x, x], 0), lambda: x)

  x = tf.placeholder(tf.float32, [1])
  y = f(x)
  with tf.train.MonitoredSession() as session:
    for _ in range(3):
      with pytest.raises(tf.errors.InvalidArgumentError, match='Bad outputs'):
        session.run(y, {x: [-1.0]})
      assert session.run(y, {x: [1.0]}) == [1.0]


def test_failed_batch_by_hand(pool):
  with ByHand(pool) as hand:
    code = tf.errors.DATA_LOSS
    fail = hand.batcher.fail(7, code, 'spilled')
    take = hand.batcher.get_inputs([tf.float32], [[None, None]], owner=7)
    assert not hand.session.run(fail)
    call = hand.call([[1.0]])
    hand.session.run(take)
    assert hand.session.run(fail)
    error = _error(call)
    assert isinstance(error, tf.errors.DataLossError)
    assert 'spilled' in error.message
    assert not hand.session.run(fail)
    hand.check_works()


# The end of waiting.


def _start_all_kinds_of_waiting(hand):
  """Starts them in a batcher with minimum 2.

  Args:
    hand: `ByHand` that wasn't used yet.

  Returns:
    The futures of two running requests, a waiting one and a waiting get_inputs,
    and the id of the running computation.
  """
  running = [hand.call([[1.0]]) for _ in range(2)]
  take = hand.take()
  _, computation_id = take.result(_PATIENCE)
  futures = [*running, hand.call([[2.0]]), hand.take()]
  hand.check_wait(futures, starts=5)
  return futures, computation_id


def test_close_wakes_all_waiters(pool):
  with ByHand(pool, minimum=2) as hand:
    futures, computation_id = _start_all_kinds_of_waiting(hand)
    hand.session.run(hand.close)
    futures += [hand.call([[1.0]]), hand.take()]
    for future in futures:
      error = _error(future)
      assert isinstance(error, tf.errors.CancelledError)
      assert 'closed' in error.message
    with pytest.raises(tf.errors.CancelledError):
      hand.give([[1.0], [1.0]], computation_id)
    hand.session.run(hand.close)


def test_session_close_wakes_all_waiters(pool):
  with ByHand(pool, minimum=2) as hand:
    futures, _ = _start_all_kinds_of_waiting(hand)
    hand.session.close()
    for future in futures:
      assert isinstance(_error(future), tf.errors.CancelledError)


def test_session_close_ends_queue_runners(pool):
  @dynamic_batching.batch_fn
  def f(x):
    return x

  f(tf.zeros([1]))
  session = _session()
  threads = tf.train.start_queue_runners(session)
  session.close()
  for thread in threads:
    thread.join(_PATIENCE)
    assert not thread.is_alive()
  (runner,) = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
  assert runner.exceptions_raised == []


def test_error_outside_a_batch_stops_the_program():
  @dynamic_batching.batch_fn
  def f(x):
    return x

  y = f(tf.zeros([1]))
  (runner,) = tf.get_collection(tf.GraphKeys.QUEUE_RUNNERS)
  lost = tf.raw_ops.DestroyResourceOp(resource=runner.queue._handle)
  for op in runner.enqueue_ops:
    get_inputs = op.inputs[-1].op
    get_inputs._add_control_input(lost)
  session = _session()
  coordinator = tf.train.Coordinator()
  threads = tf.train.start_queue_runners(session, coordinator)
  with pytest.raises(tf.errors.NotFoundError):
    coordinator.join(threads, stop_grace_period_secs=_PATIENCE)
  with pytest.raises(tf.errors.CancelledError):
    session.run(y)


def test_cancelled_request_leaves_its_batch_to_be(pool):
  with ByHand(pool, minimum=2) as hand:
    gone = _error(hand.call([[1.0]], _in_ms(100)))
    assert isinstance(gone, tf.errors.DeadlineExceededError)
    calls = [hand.call([[2.0]]), hand.call([[3.0]])]
    inputs, computation_id = hand.take().result(_PATIENCE)
    assert sorted(inputs.ravel()) == [2.0, 3.0]
    hand.give(inputs, computation_id)
    np.testing.assert_array_equal(_results(calls), [[[2]], [[3]]])


def test_cancelled_request_leaves_the_running_batch_alone(pool):
  with ByHand(pool, minimum=2) as hand:
    gone, stays = hand.call([[1.0]], _in_ms(1000)), hand.call([[2.0]])
    inputs, computation_id = hand.take().result(_PATIENCE)
    assert len(inputs) == 2
    assert isinstance(_error(gone), tf.errors.DeadlineExceededError)
    hand.give(inputs, computation_id)
    assert stays.result(_PATIENCE) == [[2.0]]


def test_cancelled_get_inputs_takes_nothing(pool):
  with ByHand(pool) as hand:
    assert isinstance(
      _error(hand.take(_in_ms(50))), tf.errors.DeadlineExceededError
    )
    hand.check_works()


def test_cancellation_beside_traffic(pool):
  """Some of many requests are cancelled at any point of their lives."""
  f = dynamic_batching.batch_fn_with_options(4, 8, timeout_ms=2)(
    lambda x: 2 * x
  )
  x = tf.placeholder(tf.float32, [1])
  y = f(x)

  def call(session, i):
    options = _in_ms(1 + i % 7) if i % 3 else None
    try:
      return session.run(y, {x: [i]}, options=options) == [2.0 * i]
    except tf.errors.DeadlineExceededError:
      return options is not None

  with Running() as session:
    calls = [pool.submit(call, session, i) for i in range(1500)]
    assert all(_results(calls))


# The library.


def _import_copy(tmp_path, code=''):
  for module in (native, private_apis, dynamic_batching):
    shutil.copy(module.__file__, tmp_path)
  code = 'import dynamic_batching as db, tensorflow.compat.v1 as tf\n' + code
  return subprocess.run(
    [sys.executable, '-c', code],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
    timeout=5 * _PATIENCE,
  )


def test_missing_library_means_no_batching(tmp_path):
  result = _import_copy(
    tmp_path,
    """
f = db.batch_fn(lambda x: 2 * x)
g = db.batch_fn_with_options(5, 5, timeout_ms=None)(lambda x: 3 * x)
assert not db.available()
with tf.Graph().as_default(), tf.Session() as session:
  assert session.run(f(tf.ones([1]))) == [2]
  assert session.run(g(tf.ones([1]))) == [3]
  assert session.run(f.statistics()) == (0, 0, 0.0)
""",
  )
  assert result.returncode == 0, result.stderr
  assert result.stderr.count('make ops') == 1
  assert result.stderr.count('dynamic batching is off') == 1


def test_library_that_does_not_load_is_an_error(tmp_path):
  (tmp_path / 'dynamic_batching_ops.so').write_bytes(b'\x7fELF and no more')
  result = _import_copy(tmp_path, 'db.batch_fn(lambda x: x)')
  assert result.returncode != 0
  message = result.stderr.strip().splitlines()[-1]
  assert message.startswith('ImportError')
  assert 'built for another TensorFlow' in message
  assert 'make clean ops' in message
