# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of py_process with real processes, which are really killed."""

import collections
import concurrent.futures
import contextlib
import inspect
import itertools
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
from unittest import mock

import cloudpickle
import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import native
import py_process

# The processes shall not import this module, and TensorFlow with it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

_MODULE = py_process.__file__
_PATIENCE = 120  # Seconds after which a wait counts as a hang.
_SOON = 5  # Seconds in which deaths are noticed.
_FLOATS = ['float16', 'float32', 'float64', 'complex64', 'complex128']
_INTEGERS = [
  f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)
]
_DTYPES = ['bool', *_FLOATS, *_INTEGERS]

ArraySpec = py_process.ArraySpec

needs_op = pytest.mark.skipif(
  not py_process.has_library(), reason='needs `make ops`'
)


class Base:
  """Takes its specs from a dict by method: None is a method without results."""

  SPECS = {}

  @classmethod
  def _tensor_specs(cls, method_name, kwargs, constructor_kwargs):
    del kwargs, constructor_kwargs
    return cls.SPECS[method_name]


class Counter(Base):
  """Counts calls, and does what else the tests ask for."""

  SPECS = {
    'next': ArraySpec((), np.int32),
    'add': ArraySpec((), np.int32),
    'nap': ArraySpec((), np.int32),
    'fail': ArraySpec((), np.int32),
    'kill_itself': ArraySpec((), np.int32),
    'leave': ArraySpec((), np.int32),
    'exit': ArraySpec((), np.int32),
    'reset': (),
  }

  def __init__(self, start=0):
    self._count = start

  def next(self):
    self._count += 1
    return self._count

  def add(self, a, b):
    return a + b

  def nap(self, seconds, answer):
    time.sleep(float(seconds))
    return answer

  def fail(self, message):
    raise ValueError('a message: ' + message.decode())

  def kill_itself(self, number):
    # TensorFlow, which this module imports, may answer a SIGSEGV with SIGABRT.
    if number != signal.SIGKILL:
      signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

  def leave(self, code):
    os._exit(code)

  def exit(self, code):
    sys.exit(int(code))

  def reset(self):
    self._count = 0


class Echo(Base):
  """Returns what it gets."""

  def __init__(self, spec):
    pass

  def echo(self, value):
    return value

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del method_name, kwargs
    return constructor_kwargs['spec']


class Inspector(Base):
  """Tells of the process it is in."""

  SPECS = {'look': ArraySpec((), object)}

  def __init__(self):
    import tempfile

    self._text = '|'.join(
      [
        ','.join(sorted({'absl', 'sonnet', 'tensorflow'} & set(sys.modules))),
        os.getcwd(),
        os.environ['TMPDIR'],
        tempfile.gettempdir(),
        str(os.getsid(0)),
        ' '.join(
          sorted(
            os.readlink(f'/proc/self/fd/{fd}')
            for fd in os.listdir('/proc/self/fd')
            if os.path.exists(f'/proc/self/fd/{fd}') or int(fd) > 2
            if os.path.islink(f'/proc/self/fd/{fd}') and int(fd) > 2
          )
        ),
      ]
    )

  def look(self):
    with open('left-behind', 'w'):
      return self._text


@pytest.fixture(autouse=True)
def graph():
  """A graph of the test's own; its processes don't survive it."""
  with tf.Graph().as_default() as graph:
    yield graph
    py_process.close_all(graph.get_collection('py_process_processes'))


@pytest.fixture
def pool():
  with concurrent.futures.ThreadPoolExecutor(64) as pool:
    yield pool


def _start(cls, *args, **kwargs):
  process = py_process.PyProcess(cls, *args, **kwargs)
  process.start()
  return process


def _session(threads=2):
  return tf.Session(config=tf.ConfigProto(inter_op_parallelism_threads=threads))


def _run(fetches, feed=None):
  with _session() as session:
    return session.run(fetches, feed)


def _eventually(condition):
  deadline = time.monotonic() + _SOON
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def _is_alive(pid):
  """Returns whether a process runs; zombies of init's don't count."""
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rsplit(')', 1)[1].split()[0] not in 'ZX'
  except (FileNotFoundError, ProcessLookupError):
    return False


# --- Arguments and results --------------------------------------------------


def test_methods_get_arguments_and_return_results():
  process = _start(Counter, start=5)
  proxy = process.proxy
  assert _run(proxy.next()) == 6
  assert _run(proxy.add(tf.constant(2), 3)) == 5
  assert _run(proxy.add(b=np.int32(2), a=40)) == 42
  assert process.call('next') == 7


def test_method_without_results_is_an_operation():
  process = _start(Counter, 5)
  assert _run(process.proxy.reset()) is None
  assert _run(process.proxy.next()) == 1
  assert process.call('reset') == ()


@pytest.mark.parametrize('dtype', _DTYPES)
def test_dtypes_arrive_unchanged(dtype):
  value = np.asarray([[0, 1, 2], [100, 101, 1]]).astype(dtype)
  process = _start(Echo, ArraySpec((2, None), dtype))
  for result in (
    _run(process.proxy.echo(value)),
    process.call('echo', value),
  ):
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize('shape', [(), (0,), (3, 0, 2), (1, 1, 1, 1, 2), (9,)])
def test_shapes_arrive_unchanged(shape):
  value = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
  process = _start(Echo, ArraySpec(shape, np.int16))
  result = _run(process.proxy.echo(value))
  assert result.shape == shape
  np.testing.assert_array_equal(result, value)


def test_strings_arrive_unchanged():
  strings = ['', 'red', 'Grüße 迷路', b'\0a\0', b'\xff\xfe', 'x' * 100000]
  encoded = [s.encode() if isinstance(s, str) else s for s in strings]
  process = _start(Echo, ArraySpec((None,), object))
  assert _run(process.proxy.echo(encoded)).tolist() == encoded
  assert process.call('echo', np.array(strings, object)).tolist() == encoded
  process = _start(Echo, ArraySpec((), object))
  for string, expected in zip(strings, encoded, strict=True):
    assert _run(process.proxy.echo(string)) == expected


def test_memory_grows_in_both_directions():
  class Large(Base):
    SPECS = {
      'make': ArraySpec((None,), np.uint8),
      'sum': ArraySpec((), np.int64),
    }

    def make(self, size):
      return (np.arange(size) % 251).astype(np.uint8)

    def sum(self, array):
      return array.sum(dtype=np.int64)

  process = _start(Large)
  size = tf.placeholder(tf.int64)
  array = tf.placeholder(tf.uint8)
  made, total = process.proxy.make(size), process.proxy.sum(array)
  with _session() as session:
    for n in (3, 30_000_000, 3, 1_000_000, 40_000_000, 0, 40_000_000, 3):
      expected = (np.arange(n) % 251).astype(np.uint8)
      np.testing.assert_array_equal(session.run(made, {size: n}), expected)
    for n in (3, 90_000_000, 3, 7, 90_000_000):
      assert session.run(total, {array: np.full(n, 2, np.uint8)}) == 2 * n


def test_nests_keep_their_structure():
  Point = collections.namedtuple('Point', 'x y')

  class Nested(Base):
    SPECS = {
      'get': {
        'b': Point(tf.TensorSpec([], tf.float32), tf.TensorSpec([2], tf.bool)),
        'a': (tf.TensorSpec([], tf.string),),
      }
    }

    def get(self):
      return {'b': Point(1.5, np.array([True, False])), 'a': ('ä',)}

  process = _start(Nested)
  for result in (_run(process.proxy.get()), process.call('get')):
    assert list(result) == ['a', 'b'] or list(result) == ['b', 'a']
    assert result['a'] == ('ä'.encode(),)
    assert result['b'].x == 1.5
    assert result['b'].y.tolist() == [True, False]


def test_tuples_may_hold_other_nests():
  Point = collections.namedtuple('Point', 'x y')

  class Nested(Base):
    number = ArraySpec((), np.int32)
    SPECS = {
      'get': (
        number,
        {'b': number, 'a': (number,)},
        (),
        (number, [number, Point(number, (number, number))]),
        number,
      )
    }

    def get(self):
      return 0, {'b': 2, 'a': (1,)}, (), (3, [4, Point(5, (6, 7))]), np.int32(8)

  process = _start(Nested)
  expected = (0, {'b': 2, 'a': (1,)}, (), (3, [4, Point(5, (6, 7))]), 8)
  assert process.call('get') == expected
  assert _run(process.proxy.get()) == expected


def test_python_numbers_take_the_promised_dtype():
  class Numbers(Base):
    SPECS = {
      'get': [ArraySpec((), t) for t in (np.float32, np.uint8, np.bool_)]
    }

    def get(self):
      return [1, 255, True]

  assert _run(_start(Numbers).proxy.get()) == [1.0, 255, True]


class Script(Base):
  """Returns what it was made with, one after the other."""

  def __init__(self, dtype, results):
    self._results = iter(results)

  def next(self):
    return next(self._results)

  @staticmethod
  def _tensor_specs(method_name, kwargs, constructor_kwargs):
    del method_name, kwargs
    return ArraySpec(None, constructor_kwargs['dtype'])


def _received(result, dtype):
  """Returns what must arrive of a result: an array, of bytes if of strings."""
  array = np.array(result, dtype)
  for index in np.ndindex(array.shape) if array.dtype == object else ():
    if isinstance(array[index], str):
      array[index] = array[index].encode()
  return array


@pytest.fixture(params=['compiled', 'Python'])
def answer_calls(request):
  """The end of a line in an environment process, in both languages."""
  if request.param == 'Python':
    return py_process._answer_calls
  return pytest.importorskip('py_process_callee').answer_calls


class _Line:
  """A line to an object in a thread instead of a process."""

  def __init__(self, answer_calls, target):
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    memory = os.memfd_create('test')
    os.ftruncate(memory, 1)
    self.caller = py_process._Channel(ends[0], memory)
    self.callee = py_process._Channel(ends[1], os.dup(memory))
    self._thread = threading.Thread(
      target=answer_calls, args=(self.callee, target), daemon=True
    )
    self._thread.start()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.caller.hang_up()
    self._thread.join(_PATIENCE)
    assert not self._thread.is_alive()
    self.caller.close()
    self.callee.close()

  def call(self, method, dtypes=(), arguments=()):
    """Returns the traceback of an exception, and the results."""
    numbers = tuple(py_process._DTYPES[np.dtype(dtype)] for dtype in dtypes)
    self.caller.send(method, numbers, arguments)
    error, _, results = self.caller.receive()
    return error, results


class _Giver:
  """Returns what it is told to, and keeps what it gets."""

  def __init__(self):
    self.result = None
    self.arguments = None

  def call(self, *arguments):
    self.arguments = arguments
    return self.result


@pytest.mark.parametrize(
  ('dtype', 'results'),
  [
    (
      np.float32,
      [
        1.5,
        -0.5,
        -2,
        3,
        True,
        False,
        np.float32(3.5),
        np.float32(-3.5),
        np.float64(4.5),
        np.float64(-4.5),
        np.array(5.5, np.float32),
        np.array(-5.5, np.float32),
        np.arange(6, dtype=np.float32),
        np.arange(6, 12, dtype=np.float32),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(3, 2).T,
        np.arange(12, dtype=np.float32)[::2],
        np.arange(1, 13, dtype=np.float32)[::2],
        np.zeros([3, 0], np.float32),
      ],
    ),
    (
      object,
      [
        'red',
        'tan',
        b'tan',
        b'\0a\0',
        'door',
        '',
        np.str_('key'),
        np.str_('yek'),
        np.array('key', object),
        np.array(['a', 'b'], object),
        np.array(['c', b'd'], object),
        np.array(['ef', ''], object),
        np.array(['gh', 'i']),
        np.array([], object),
      ],
    ),
  ],
  ids=['numbers', 'strings'],
)
def test_results_do_not_depend_on_the_ones_before(dtype, results, answer_calls):
  giver = _Giver()
  with _Line(answer_calls, giver) as line:
    for result in itertools.chain(*itertools.product(results, repeat=2)):
      giver.result = result
      error, (received,) = line.call('call', [dtype])
      received, expected = np.asarray(received, dtype), _received(result, dtype)
      assert not error
      assert received.shape == expected.shape
      assert received.tolist() == expected.tolist()


_ARGUMENTS = [
  *(np.dtype(dtype).type(1) for dtype in _DTYPES),
  *(np.ones([2, 1], dtype) for dtype in _DTYPES),
  np.float32(2.5),
  np.arange(6, dtype=np.uint8).reshape(2, 3),
  np.arange(6, dtype=np.uint8).reshape(3, 2).T,
  np.zeros([0, 3], np.float64),
  np.array(b'red', object),
  np.array('Grüße', object),
  np.array(b'', object),
  np.array([b'a', b'bc'], object),
  np.array([[b'ab'], [b'c']], object),
  np.array([], object),
]


def _is_like(argument, received):
  expected = _received(argument, argument.dtype)
  if expected.dtype == object and not expected.shape:
    return type(received) is bytes and received == expected[()]
  return (
    received.dtype == expected.dtype
    and received.shape == expected.shape
    and received.tolist() == expected.tolist()
    and (received.shape != () or isinstance(received, np.generic))
  )


@pytest.mark.parametrize('num_arguments', [0, 1, 2])
def test_arguments_do_not_depend_on_the_ones_before(
  num_arguments, answer_calls
):
  giver = _Giver()
  with _Line(answer_calls, giver) as line:
    for arguments in itertools.product(_ARGUMENTS, repeat=num_arguments):
      for _ in range(2):
        assert line.call('call', (), arguments) == ('', [])
        assert all(map(_is_like, arguments, giver.arguments))
        assert len(giver.arguments) == num_arguments


def test_arguments_are_copies(answer_calls):
  """The next messages go to the same memory."""
  giver = _Giver()
  with _Line(answer_calls, giver) as line:
    kept = []
    for i in range(4):
      line.call('call', (), [np.full(3, i)])
      kept.append(*giver.arguments)
  assert np.stack(kept).tolist() == [[i] * 3 for i in range(4)]


@pytest.mark.parametrize(
  'error',
  [ValueError('ü'), EOFError(), ConnectionError(), ProcessLookupError()],
)
def test_calls_go_on_after_an_exception(error, answer_calls):
  class Raiser(_Giver):
    def fail(self):
      raise error

  raiser = Raiser()
  with _Line(answer_calls, raiser) as line:
    for raiser.result in range(4):
      trace, results = line.call('fail', [np.int32])
      assert type(error).__name__ in trace
      assert 'in fail' in trace
      assert results == []
      assert line.call('call', [np.int32]) == ('', [raiser.result])
      assert 'AttributeError' in line.call('missing')[0]
      assert 'TypeError' in line.call('fail', (), [np.int32(1)])[0]


def test_calls_go_on_after_a_broken_request(answer_calls):
  giver = _Giver()
  layout = py_process._lay_out('call', (), ((np.dtype('int32'), (), (4,)),))
  header = bytearray(layout.header)
  assert header[32] == 3  # The argument's dtype.
  header[32] = 14  # bfloat16, which NumPy doesn't have.
  with _Line(answer_calls, giver) as line:
    for _ in range(2):
      assert line.call('call', (), [np.int32(5)]) == ('', [])
      line.caller._memory[: len(header)] = header
      line.caller._connection.send(layout.bell)
      error, _, results = line.caller.receive()
      assert 'KeyError: 14' in error
      assert results == []


def test_default_timeout_of_sockets_is_not_for_calls(answer_calls):
  giver = _Giver()
  socket.setdefaulttimeout(0.01)
  try:
    line = _Line(answer_calls, giver)
  finally:
    socket.setdefaulttimeout(None)
  with line:
    for _ in range(2):
      time.sleep(0.1)
      assert line.call('call') == ('', [])


@pytest.mark.parametrize(
  ('good', 'bad'),
  [
    ((1.0, 2.0), [(1.0,), 1.0, (), None, (1.0, 2.0, 3.0), (1.0, (2.0, 3.0))]),
    (1.0, [(), None, (1.0, 2.0)]),
    ((), [1.0, (1.0,)]),
    (None, [1.0, (1.0,)]),
  ],
)
def test_numbers_of_results_are_as_promised(good, bad, answer_calls):
  giver = _Giver()
  expected = [] if good is None else np.ravel(good).tolist()
  with _Line(answer_calls, giver) as line:
    for result in bad:
      for giver.result in (good, good, result, good):
        error, results = line.call('call', [np.float32] * len(expected))
        if giver.result is good:
          assert (error, results) == ('', expected)
        else:
          assert f'promise {len(expected)}' in error


def test_deep_nests_are_results_or_errors(answer_calls):
  giver = _Giver()
  with _Line(answer_calls, giver) as line:
    for depth, is_good in ((1, True), (10, True), (10**6, False), (3, True)):
      giver.result = 1.5
      for _ in range(depth):
        giver.result = (giver.result,)
      error, results = line.call('call', [np.float32])
      assert ('RecursionError' in error, results) == (
        (False, [1.5]) if is_good else (True, [])
      )


def test_calls_leave_no_memory_behind(answer_calls):
  results = (np.ones([100, 100], np.uint8)[:, ::2], 'x' * 5000, 1.5, True)
  dtypes = [np.uint8, object, np.float32, np.bool_]
  arguments = [
    np.ones(5000, np.uint8),
    np.float32(1),
    np.array('y' * 5000, object),
    np.array(['z' * 5000], object),
  ]

  class Fresh(_Giver):
    def call(self, *arguments):
      return (*results,)

    def fail(self):
      raise ValueError('x' * 5000)

  counts, memory = [], []
  tracemalloc.start()
  for _ in range(3):
    with _Line(answer_calls, Fresh()) as line:
      for _ in range(100):
        error, received = line.call('call', dtypes, arguments)
        assert not error
        assert 'ValueError' in line.call('fail')[0]
    del line, received
    counts.append([sys.getrefcount(v) for v in (*results, np.dtype('u1'))])
    memory.append(tracemalloc.get_traced_memory()[0])
  tracemalloc.stop()
  assert counts[1] == counts[2]
  assert memory[2] - memory[1] < 100_000  # The data of five calls.


def test_methods_do_not_depend_on_each_other():
  class Two(Base):
    SPECS = {
      'whole': (ArraySpec((), np.int32), ArraySpec((), object)),
      'half': (ArraySpec((), np.float32), ArraySpec((), object)),
    }

    def whole(self, number, text):
      return int(number), text

    half = whole

  process = _start(Two)
  for number, text in enumerate(['a', 'b', 'cd', 'ef', 'ef', '', 'g'] * 2):
    for method, dtype in (('whole', np.int32), ('half', np.float32)):
      result = process.call(method, number, text)
      assert result == (number, text.encode())
      assert result[0].dtype == dtype


@pytest.mark.parametrize(
  ('dtype', 'first', 'second'),
  [
    ('float32', 1.5, 2.5),
    ('float32', 1.5, -1.0),
    ('float32', 1.5, np.inf),
    ('float32', 1, 2),
    ('float32', np.float64(1.5), np.float64(2.5)),
    ('float64', -3, True),
    ('int64', -7, 2**62),
    ('int32', 7, -7),
    ('uint8', 7, 255),
    ('bool', True, False),
    ('object', 'tan', 'red'),
    ('object', b'tan', b'red'),
    ('int32', np.int32(1), np.int32(2)),
    ('uint8', np.zeros([2, 3], np.uint8), np.ones([2, 3], np.uint8)),
    ('uint8', np.zeros([2, 3], np.uint8), np.ones([2, 6], np.uint8)[:, ::2]),
    # Has a dtype object of its own.
    (
      'uint8',
      pickle.loads(pickle.dumps(np.ones(2, np.uint8))),
      np.ones(2, 'u1'),
    ),
  ],
)
def test_calls_like_the_ones_before_are_not_worked_out(dtype, first, second):
  giver = _Giver()
  answer_calls = pytest.importorskip('py_process_callee').answer_calls
  with _Line(answer_calls, giver) as line:
    giver.result = (), (first,), first
    for i in range(3):
      line.call('call', [dtype, dtype], [np.int32(i)])
    giver.result = (), (second,), second
    with mock.patch.multiple(
      line.callee, read_layout=mock.DEFAULT, answer=mock.DEFAULT
    ) as channel:
      error, results = line.call('call', [dtype, dtype], [np.int32(7)])
    assert not error
    assert not any(method.called for method in channel.values())
    assert giver.arguments == (7,)
  expected = _received(second, dtype)
  for result in results:
    assert np.asarray(result).tolist() == expected.tolist()


@pytest.mark.parametrize(
  ('dtype', 'good', 'bad', 'message'),
  [
    (np.uint8, 255, 256, 'OverflowError'),
    (np.uint8, 255, 1.5, 'float64'),
    (np.int32, 7, np.int64(7), 'int64'),
    (np.float32, np.zeros(2, np.float32), np.zeros(2, np.int32), 'int32'),
    (np.float32, np.zeros(2, np.float32), np.zeros(1, np.float64), 'float64'),
    (np.complex64, 2.5, np.array('x', object), 'object'),
    (object, np.array(['a'], object), np.array([1], object), 'can not be sent'),
    (object, 'x', np.zeros(1, '>f4'), 'can not be sent'),
    (object, 'x', True, 'is bool'),
    (np.float32, 1.0, (1.0, 2.0), 'returned 2 values'),
    pytest.param(np.float32, 1.0, 10**400, 'OverflowError', id='huge'),
    (np.int64, 1, 2**70, 'OverflowError'),
    (np.bool_, True, 7, 'int64'),
    (np.int32, np.zeros(2, '<i4'), np.ones(2, '>i4'), 'can not be sent'),
  ],
)
def test_bad_results_among_good_ones_are_errors(dtype, good, bad, message):
  process = _start(Script, dtype, [good, good, bad, good, bad, bad, good])
  for is_good in (True, True, False, True, False, False, True):
    if is_good:
      result = np.asarray(process.call('next'), dtype)
      assert result.tolist() == _received(good, dtype).tolist()
    else:
      with pytest.raises(py_process.ProcessError, match=message):
        process.call('next')


def test_class_sees_python_values_when_it_gives_specs():
  seen = []

  class Seeing:
    def __init__(self, a, *, b, **others):
      self._arguments = (a, b, others['c'])

    def get(self, x, y):
      return repr((self._arguments, type(x).__name__, y.decode()))

    @staticmethod
    def _tensor_specs(method_name, kwargs, constructor_kwargs):
      seen.append((method_name, kwargs, constructor_kwargs))
      return tf.TensorSpec([], tf.string)

  process = _start(Seeing, [1, 'x'], b=None, c={'d': 2})
  result = process.proxy.get(np.float32(1), y='z')
  assert seen == [
    (
      'get',
      {'x': np.float32(1), 'y': 'z'},
      {'a': [1, 'x'], 'b': None, 'c': {'d': 2}},
    )
  ]
  assert _run(result) == b"(([1, 'x'], None, {'d': 2}), 'float32', 'z')"


def test_static_shapes_are_known():
  process = py_process.PyProcess(Echo, ArraySpec((3, None), np.float32))
  result = process.proxy.echo(np.zeros([3, 1], np.float32))
  assert result.shape.as_list() == [3, None]
  assert result.dtype == tf.float32


def test_unknown_methods_and_arguments_fail_at_graph_building():
  proxy = py_process.PyProcess(Counter).proxy
  with pytest.raises(AttributeError, match="Counter has no method 'nexd'"):
    proxy.nexd  # noqa: B018
  with pytest.raises(TypeError, match='argument'):
    proxy.add(1)
  with pytest.raises(TypeError, match='argument'):
    py_process.PyProcess(Counter, strat=1)


def test_identical_calls_are_separate_calls():
  process = _start(Counter)
  calls = [process.proxy.next() for _ in range(4)]
  with tf.control_dependencies([process.proxy.next()]):
    total = tf.add_n(calls) * 0
  assert sorted(_run(calls)) == [1, 2, 3, 4]
  _run(total)
  assert process.call('next') == 10  # 4 + 5 and this one.


def test_choice_of_a_process_at_run_time():
  processes = [_start(Counter, start) for start in (10, 20, 30)]
  index = tf.placeholder(tf.int32, [])
  result = py_process.choose(processes, index).next()
  with _session() as session:
    assert [session.run(result, {index: i}) for i in (2, 0, 2, 1)] == [
      31,
      11,
      32,
      21,
    ]


# --- Errors -----------------------------------------------------------------


@pytest.mark.parametrize(
  ('value', 'spec', 'message'),
  [
    ((1, 2), ArraySpec((), np.int32), r'returned 2 values.*promise 1'),
    (np.float64([1]), ArraySpec((1,), np.float32), r'double.*promise float'),
    (1.5, ArraySpec((), np.int32), r'double.*promise int32'),
    ('x', ArraySpec((), np.int32), r'string.*promise int32'),
    (np.zeros([2, 3]), ArraySpec((3, None), np.float64), r'2,3.*promise.*3,\?'),
    (np.zeros([2]), ArraySpec((), np.float64), r'\[2\].*promise.*\[\]'),
    (np.array(['2026'], 'M8[Y]'), ArraySpec((1,), np.int64), r'datetime64'),
    (np.array([1, None]), ArraySpec((2,), object), 'int can not be sent'),
  ],
)
@needs_op
def test_results_other_than_promised_are_errors(value, spec, message):
  class Liar(Base):
    SPECS = {'get': spec, 'fine': ArraySpec((), np.int32)}

    def get(self):
      return value

    def fine(self):
      return 1

  process = _start(Liar)
  with pytest.raises(tf.errors.OpError, match='(?s)' + message):
    _run(process.proxy.get())
  with pytest.raises(py_process.ProcessError):
    process.call('get')
  assert _run(process.proxy.fine()) == 1


def test_exception_arrives_with_its_traceback():
  process = _start(Counter)
  with pytest.raises(tf.errors.OpError) as error:
    _run(process.proxy.fail('Grüße'))
  line = Counter.fail.__code__.co_firstlineno + 1
  assert (
    f'{os.path.basename(__file__)}", line {line}, in fail'
    in error.value.message
  )
  assert 'ValueError: a message: Grüße' in error.value.message
  assert _run(process.proxy.next()) == 1
  with pytest.raises(py_process.ProcessError, match='a message: x'):
    process.call('fail', 'x')


_MESSAGES = [
  'no licence file\nsee http://example.org',
  'array([[1, 2]]) [[{{node x}}]]\n\n\t [[{{node y}}]]\nTraceback (most',
  'The environment process died. An environment process took more than 1; it',
  'Grüße',
]


class Raiser(Base):
  """Raises what it is told to."""

  SPECS = {'step': ArraySpec((), np.int32), 'chain': (), 'next': ()}

  def __init__(self, message=None):
    if message is not None:
      raise ValueError(message)

  def step(self, message):
    self._look_up(message)

  def _look_up(self, message):
    raise ValueError(message.decode())

  def chain(self, message):
    try:
      self._look_up(message)
    except ValueError as error:
      raise LookupError('an outer message\n') from error

  def next(self):
    pass


def _error_of(call, *args):
  try:
    call(*args)
  except (tf.errors.OpError, py_process.ProcessError) as error:
    return error
  raise AssertionError('There was no error.')


def _line_of(function, text):
  """Returns the number of the line of a function that has a text."""
  lines, first = inspect.getsourcelines(function)
  return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize('message', _MESSAGES)
def test_failure_tells_the_message_and_the_environments_own_frames(message):
  process = _start(Raiser)
  operation = process.proxy.step(message)
  frames = [
    f'line {_line_of(Raiser.step, "_look_up(")}, in step',
    f'line {_line_of(Raiser._look_up, "raise")}, in _look_up',
  ]
  for error in (
    _error_of(_run, operation),
    _error_of(process.call, 'step', message),
  ):
    failure = py_process.failure(error)
    assert failure.reason == f'raised in step:\nValueError: {message}'
    lines = failure.traceback.split('\n')
    assert lines[0] == 'Traceback (most recent call last):'
    assert [
      line.split(', ', 1)[1] for line in lines if 'File' in line
    ] == frames
    assert failure.traceback.endswith(f'\nValueError: {message}')
  process.restart()
  assert process.exit_code() is None
  assert process.call('next') == ()


@pytest.mark.parametrize('message', _MESSAGES)
def test_failure_of_a_constructor(message):
  process = py_process.PyProcess(Raiser, message)
  failure = py_process.failure(_error_of(process.start))
  assert failure.reason == f'raised in its constructor:\nValueError: {message}'
  assert f'line {_line_of(Raiser.__init__, "raise")}, in' in failure.traceback
  assert failure.traceback.count(', in ') == 1
  assert process.exit_code() == 1
  process.restart(message=None)
  assert process.call('next') == ()


def test_failure_has_the_causes_of_an_exception():
  failure = py_process.failure(
    _error_of(_start(Raiser).call, 'chain', 'an inner message')
  )
  assert failure.reason == 'raised in chain:\nLookupError: an outer message'
  assert 'ValueError: an inner message' in failure.traceback
  assert 'direct cause' in failure.traceback
  assert 'py_process.py' not in failure.traceback


def test_failures_without_an_exception():
  process = _start(Counter)
  dead = process.proxy.leave(3)
  assert py_process.failure(_error_of(_run, dead)) == ('died', '')
  process.restart()
  error = _error_of(process.call, 'leave', 3)
  assert py_process.failure(error) == ('died', '')
  process = _start(Script, np.float32, [1.0, np.zeros(1)])
  process.call('next')
  failure = py_process.failure(_error_of(_run, process.proxy.next()))
  assert re.match(r'Result 0 of next is (double|float64)\[1\], its', failure[0])


def test_errors_of_the_program_are_no_failures():
  error = _error_of(_run, tf.debugging.check_numerics(np.nan, 'not finite'))
  assert py_process.failure(error) is None
  error = _error_of(py_process.PyProcess(Counter).call, 'next')
  assert py_process.failure(error) is None


def test_exit_of_a_constructor():
  class Exiting(Base):
    def __init__(self, code):
      sys.exit(code)

  for code, expected in ((3, 3), (None, 0), ('no licence', 1)):
    process = py_process.PyProcess(Exiting, code)
    with pytest.raises(
      py_process.ProcessError, match=f'died with exit code {expected}'
    ):
      process.start()


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    (b'caf\xe9'.decode(errors='surrogateescape'), b'caf\xe9'),
    ('y\ud800', b'y?'),
  ],
)
def test_text_without_encoding_arrives(text, expected, answer_calls):
  giver = _Giver()
  with _Line(answer_calls, giver) as line:
    for giver.result in ('tan', text, text, 'red'):
      error, (received,) = line.call('call', [object])
      assert not error
      assert received == (
        expected if giver.result is text else giver.result.encode()
      )


def test_exception_in_constructor_ends_all():
  class Broken(Base):
    def __init__(self):
      raise KeyError('no such level')

  class Slow(Base):
    def __init__(self):
      time.sleep(60)

  processes = [
    py_process.PyProcess(cls) for cls in (Counter, Broken, Slow, Counter)
  ]
  py_process._CLOSE_SECONDS, before = 0.2, py_process._CLOSE_SECONDS
  try:
    with pytest.raises(
      py_process.ProcessError, match=r'(?s)Traceback.*no such'
    ):
      tf.train.SingularMonitoredSession(hooks=[py_process.PyProcessHook()])
  finally:
    py_process._CLOSE_SECONDS = before
  assert None not in [process.exit_code() for process in processes]
  assert not any(_is_alive(process.pid) for process in processes)


def test_death_in_constructor_is_an_error():
  class Suicidal(Base):
    def __init__(self):
      os._exit(3)

  with pytest.raises(py_process.ProcessError, match='exit code 3'):
    _start(Suicidal)


def test_calls_of_processes_that_do_not_run_fail():
  process = py_process.PyProcess(Counter)
  result = process.proxy.next()
  with pytest.raises(tf.errors.OpError, match='start it first'):
    _run(result)
  process.start()
  assert _run(result) == 1
  process.close()
  with pytest.raises(tf.errors.OpError, match='start it first'):
    _run(result)
  with pytest.raises(py_process.ProcessError, match='start it first'):
    process.call('next')


def test_hook_starts_and_ends_processes():
  processes = [py_process.PyProcess(Counter, i) for i in range(3)]
  results = [process.proxy.next() for process in processes]
  for _ in range(2):
    hook = py_process.PyProcessHook()
    with tf.train.SingularMonitoredSession(hooks=[hook]) as session:
      assert session.run(results) == [1, 2, 3]
    assert [process.exit_code() for process in processes] == [0, 0, 0]


# --- Death ------------------------------------------------------------------


@pytest.mark.parametrize('during', [True, False])
@pytest.mark.parametrize('other', range(2))
def test_killed_process_is_noticed_and_restarted(during, other, pool):
  processes = [_start(Counter, 100) for _ in range(3)]
  victim = processes[2 * other]  # The first and the last started.
  nap = victim.proxy.nap(30.0, 1)
  with _session() as session:
    if during:
      call = pool.submit(session.run, nap)
      time.sleep(0.3)
      os.kill(victim.pid, signal.SIGKILL)
    else:
      os.kill(victim.pid, signal.SIGKILL)
      call = pool.submit(session.run, nap)
    error = call.exception(_SOON)
    assert isinstance(error, tf.errors.InternalError), error
    assert 'died' in error.message
    assert victim.exit_code(_SOON) == -signal.SIGKILL
    victim.restart(start=7)
    assert victim.exit_code() is None
    assert session.run([p.proxy.next() for p in processes]) == [
      8 if process is victim else 101 for process in processes
    ]


@pytest.mark.parametrize(
  ('method', 'argument', 'code'),
  [
    ('kill_itself', signal.SIGSEGV, -signal.SIGSEGV),
    ('kill_itself', signal.SIGKILL, -signal.SIGKILL),
    ('leave', 7, 7),
    ('exit', 7, 7),
    ('exit', 0, 0),
    ('exit', -1, 255),
  ],
)
def test_exit_code_tells_how_a_process_ended(method, argument, code):
  process = _start(Counter)
  with pytest.raises(tf.errors.OpError, match='died'):
    _run(getattr(process.proxy, method)(int(argument)))
  assert process.exit_code(_SOON) == code
  process.restart()
  with pytest.raises(py_process.ProcessError, match=f'exit code {code}'):
    process.call(method, int(argument))


def test_restart_replaces_arguments_by_name():
  class Kwargs(Base):
    SPECS = {'get': ArraySpec((), object)}

    def __init__(self, a, b=2, **others):
      self._text = f'{a} {b} {sorted(others.items())}'

    def get(self):
      return self._text

  process = _start(Kwargs, 1, c=3)
  process.restart(b=5, d=4)
  assert process.call('get') == b"1 5 [('c', 3), ('d', 4)]"
  process = _start(Counter)
  with pytest.raises(TypeError, match='strat'):
    process.restart(strat=1)
  assert process.call('next') == 1


def test_death_of_the_fork_server_ends_processes():
  processes = [_start(Counter) for _ in range(3)]
  folders = [os.readlink(f'/proc/{process.pid}/cwd') for process in processes]
  server = py_process._fork_server._server.pid
  os.kill(server, signal.SIGKILL)
  for process in processes:
    with pytest.raises(tf.errors.OpError, match='died'):
      _run(process.proxy.nap(30.0, 1))
    assert process.exit_code(_SOON) == -signal.SIGKILL
    _eventually(lambda pid=process.pid: not _is_alive(pid))
    process.restart(start=3)
    assert _run(process.proxy.next()) == 4
  assert py_process._fork_server._server.pid != server
  assert not any(map(os.path.exists, folders))


def test_fork_server_outlives_sigterm_and_its_processes_do_not():
  process = _start(Counter)
  os.kill(py_process._fork_server._server.pid, signal.SIGTERM)
  os.kill(process.pid, signal.SIGTERM)
  assert process.exit_code(_SOON) == -signal.SIGTERM
  process.restart(start=3)
  assert process.call('next') == 4


# --- Calls that take too long -----------------------------------------------


@pytest.fixture
def limit():
  """Sets a limit for calls, in seconds, for one test."""
  yield py_process.set_call_timeout
  py_process.set_call_timeout(None)


class Hanging(Base):
  """Hangs where it is told to, with helpers, and can't be asked to end."""

  SPECS = {'hang': (), 'nap': (), 'next': ArraySpec((), np.int32)}

  def __init__(self, folder, hangs=False):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      signal.signal(number, signal.SIG_IGN)  # Helpers inherit it.
    helper = subprocess.Popen(['sleep', '300'])
    child = os.fork()
    if child == 0:
      time.sleep(300)
      os._exit(0)
    with open(os.path.join(folder, 'pids'), 'a') as file:
      print(os.getpid(), helper.pid, child, file=file)
    if hangs:
      self.hang()

  def hang(self):
    while True:
      time.sleep(1)

  def nap(self):
    time.sleep(0.1)

  def next(self):
    return 1


def _read_pids(folder):
  return [int(pid) for pid in (folder / 'pids').read_text().split()]


@pytest.mark.parametrize(
  ('caller', 'hang'),
  [
    pytest.param('operation', 'hang', marks=needs_op),
    pytest.param('operation', 'stop', marks=needs_op),
    ('Python', 'hang'),
    ('Python', 'stop'),
  ],
)
def test_hanging_call_ends_with_its_process(
  caller, hang, limit, tmp_path, pool
):
  process = _start(Hanging, str(tmp_path))
  method = 'hang'
  if hang == 'stop':
    method = 'next'
    os.kill(process.pid, signal.SIGSTOP)
  limit(0.5)
  if caller == 'operation':
    operation = getattr(process.proxy, method)()
    call = pool.submit(_session().run, operation)
    expected = tf.errors.DeadlineExceededError
  else:
    call = pool.submit(process.call, method)
    expected = py_process.ProcessError
  error = call.exception(_PATIENCE)
  assert isinstance(error, expected), error
  assert f'took more than 0.5 seconds for {method}; it was killed' in str(error)
  assert process.exit_code(_SOON) == -signal.SIGKILL
  pids = _read_pids(tmp_path)
  assert len(pids) == 3
  _eventually(lambda: not any(map(_is_alive, pids)))
  with pytest.raises((tf.errors.OpError, py_process.ProcessError)):
    process.call('next')
  limit(None)
  process.restart()
  assert process.call('next') == 1
  assert _run(process.proxy.next()) == 1


@pytest.mark.parametrize('num_hanging', [1, 3])
def test_hanging_constructor_ends_with_its_process(
  num_hanging, limit, tmp_path, pool
):
  limit(0.5)
  processes = [
    py_process.PyProcess(Hanging, str(tmp_path), i < num_hanging)
    for i in range(3)
  ]
  error = pool.submit(py_process.start_all, processes).exception(_PATIENCE)
  assert isinstance(error, py_process.ProcessError), error
  assert 'took more than 0.5 seconds for its constructor' in str(error)
  pids = _read_pids(tmp_path)
  assert len(pids) == 9
  _eventually(lambda: not any(map(_is_alive, pids)))
  limit(None)
  processes[0].restart(hangs=False)
  assert processes[0].call('next') == 1


@needs_op
def test_calls_behind_a_hanging_one_fail_with_it(limit, tmp_path, pool):
  process, other = (_start(Hanging, str(tmp_path)) for _ in range(2))
  hang, behind = process.proxy.hang(), process.proxy.next()
  with _session() as session:
    first = pool.submit(session.run, hang)
    time.sleep(0.2)
    calls = [first, *(pool.submit(session.run, behind) for _ in range(3))]
    time.sleep(0.2)
    limit(0.2)
    for call in calls:
      error = call.exception(_PATIENCE)
      assert isinstance(error, tf.errors.DeadlineExceededError), error
      assert 'for hang' in error.message
    assert session.run(other.proxy.next()) == 1


@needs_op
def test_cancelled_call_that_hangs_ends_its_process(limit, tmp_path):
  process = _start(Hanging, str(tmp_path))
  hang = process.proxy.hang()
  with _session() as session:
    with pytest.raises(tf.errors.OpError):
      session.run(hang, options=tf.RunOptions(timeout_in_ms=50))
    limit(0.2)
    assert process.exit_code(_PATIENCE) == -signal.SIGKILL
    with pytest.raises(tf.errors.DeadlineExceededError, match='cancelled'):
      session.run(process.proxy.next())


def test_limit_is_for_each_call(limit, tmp_path):
  """Neither for all of them, nor for the time between."""
  process = _start(Hanging, str(tmp_path))
  nap = process.proxy.nap()
  limit(2.0)
  with _session() as session:
    for _ in range(15):
      session.run(nap)
      process.call('nap')
    time.sleep(2.5)
    session.run(nap)
  assert process.exit_code() is None


# --- Cancellation -----------------------------------------------------------


@needs_op
def test_timed_out_call_leaves_no_stale_answer():
  process = _start(Counter)
  seconds, answer = tf.placeholder(tf.float32), tf.placeholder(tf.int32)
  nap = process.proxy.nap(seconds, answer)
  with _session() as session:
    start = time.monotonic()
    for i in range(3):  # The second and third wait in the queue.
      with pytest.raises(
        (tf.errors.DeadlineExceededError, tf.errors.CancelledError)
      ):
        session.run(
          nap,
          {seconds: 1.5, answer: i},
          options=tf.RunOptions(timeout_in_ms=50),
        )
    assert time.monotonic() - start < 1.4  # Before the method ended.
    assert session.run(nap, {seconds: 0, answer: 8}) == 8
    assert session.run(nap, {seconds: 0, answer: 9}) == 9


@needs_op
@pytest.mark.parametrize(
  ('bell', 'message'),
  [
    ((-8, 64), 'died'),
    ((64, 8), 'died'),
    ((8, 8), 'broken message'),
    ((0, 64), 'broken message'),
    ((64, -8), 'died'),
  ],
)
def test_broken_answers_are_errors(bell, message):
  class Liar(Base):
    SPECS = {'lie': ArraySpec((), np.int32)}

    def lie(self, header_size, size):
      import gc

      (channel,) = (
        o for o in gc.get_objects() if type(o).__name__ == '_Channel'
      )
      channel._connection.send(py_process._BELL.pack(header_size, size))
      return 0

  process = _start(Liar)
  with pytest.raises(tf.errors.InternalError, match=message):
    _run(process.proxy.lie(*bell))


def test_two_threads_may_close_a_process():
  """One that restarts it, and one that ends the program."""
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    for _ in range(5):
      with tf.Graph().as_default():
        process = py_process.PyProcess(Counter)
      process.start()
      for closing in [pool.submit(process.close) for _ in range(2)]:
        closing.result(_PATIENCE)
      assert process.exit_code() == 0


def test_exit_code_is_of_the_last_process():
  """Also if another thread closes it meanwhile, and starts the next one."""
  process = _start(Counter)
  codes, stop = set(), threading.Event()

  def ask():
    while not stop.is_set():
      codes.add(process.exit_code())

  threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
  for thread in threads:
    thread.start()
  try:
    for i in range(50):
      process.restart(start=i)
      assert _is_alive(process.pid)
  finally:
    stop.set()
  for thread in threads:
    thread.join(_PATIENCE)
    assert not thread.is_alive()
  assert codes <= {None, 0}


@needs_op
@pytest.mark.parametrize('closes', ['session', 'process'])
def test_closing_wakes_callers(closes, pool):
  process = _start(Counter)
  nap = process.proxy.nap(2.0, 1)
  session = _session()
  calls = [pool.submit(session.run, nap) for _ in range(3)]
  time.sleep(0.3)
  closing = pool.submit((session if closes == 'session' else process).close)
  for call in calls:
    error = call.exception(1.5)
    assert isinstance(error, tf.errors.CancelledError), error
  closing.result(_PATIENCE)
  session.close()


@needs_op
def test_cancelled_calls_of_many_threads(pool):
  """Cancellations hit calls at all points of their lives."""
  process = _start(Counter)
  number = tf.placeholder(tf.int32)
  nap = process.proxy.nap(tf.constant(0.001), number)

  def call(i):
    options = tf.RunOptions(timeout_in_ms=1 + i % 30)
    try:
      return session.run(nap, {number: i}, options=options) == i
    except (tf.errors.DeadlineExceededError, tf.errors.CancelledError):
      return None

  with _session() as session:
    outcomes = list(pool.map(call, range(1000)))
    assert False not in outcomes
    assert session.run(nap, {number: 5}) == 5


def test_signal_handlers_run_while_the_program_does_not_call(tmp_path):
  class Handler(Base):
    SPECS = {'count': ArraySpec((), np.int32)}

    def __init__(self, path):
      self._count = 0
      self._path = path
      signal.signal(signal.SIGUSR1, self._handle)
      signal.signal(signal.SIGUSR2, self._fail)

    def _handle(self, number, frame):
      self._count += 1
      open(f'{self._path}/{self._count}', 'w').close()

    def _fail(self, number, frame):
      raise OSError('not in a call')

    def count(self):
      return self._count

  process = _start(Handler, str(tmp_path))
  for i in (1, 2):
    os.kill(process.pid, signal.SIGUSR1)
    _eventually((tmp_path / str(i)).exists)
    assert process.call('count') == i
  os.kill(process.pid, signal.SIGUSR2)
  assert process.exit_code(_SOON) == 1


def test_signal_during_an_answer_is_handled_after_it(tmp_path):
  """The handler waits for the caller, who must have the answer by then."""

  class Large(Base):
    SPECS = {'get': ArraySpec((None,), np.uint8)}

    def __init__(self, folder):
      self._folder = folder
      self._array = np.zeros(100_000_000, np.uint8)  # Is copied for some time.
      signal.signal(signal.SIGALRM, self._handle)

    def get(self, seconds):
      signal.setitimer(signal.ITIMER_REAL, seconds)
      return self._array

    def _handle(self, *_):
      answered = os.path.join(self._folder, 'answered')
      deadline = time.monotonic() + _PATIENCE / 2
      while not os.path.exists(answered) and time.monotonic() < deadline:
        time.sleep(0.01)
      name = 'after' if os.path.exists(answered) else 'before'
      open(os.path.join(self._folder, name), 'w').close()

  process = _start(Large, str(tmp_path))
  process.call('get', 0.0)
  assert process.call('get', 0.003).size == 100_000_000
  (tmp_path / 'answered').touch()
  _eventually(lambda: list(tmp_path.iterdir()) != [tmp_path / 'answered'])
  assert (tmp_path / 'after').exists()


# --- Concurrency ------------------------------------------------------------


@needs_op
@pytest.mark.parametrize('threads', [1, 2])
def test_waiting_calls_hold_no_thread(threads, pool, tmp_path):
  """All processes are in the method at a time, or none gets out."""
  num = 48

  class Barrier(Base):
    SPECS = {'meet': ArraySpec((), np.int32)}

    def __init__(self, folder, number):
      self._folder, self._number = folder, number

    def meet(self):
      with open(os.path.join(self._folder, str(self._number)), 'w'):
        pass
      deadline = time.monotonic() + 30
      while len(os.listdir(self._folder)) < num:
        if time.monotonic() > deadline:
          raise TimeoutError
        time.sleep(0.1)
      return self._number

  processes = [
    py_process.PyProcess(Barrier, str(tmp_path), i) for i in range(num)
  ]
  py_process.start_all(processes)
  meetings = [process.proxy.meet() for process in processes]
  with _session(threads) as session:
    results = pool.map(session.run, meetings, timeout=_PATIENCE)
    assert list(results) == list(range(num))


@pytest.mark.parametrize('threads', [1, 8])
def test_calls_of_one_process_are_serialised(threads, pool):
  class Alone(Base):
    SPECS = {'echo': ArraySpec((), np.int64), 'most': ArraySpec((), np.int32)}

    def __init__(self):
      self._inside = self._most = 0

    def echo(self, value):
      self._inside += 1
      self._most = max(self._most, self._inside)
      time.sleep(0.001)
      self._inside -= 1
      return value

    def most(self):
      return self._most

  process = _start(Alone)
  value = tf.placeholder(tf.int64, [])
  result = process.proxy.echo(value)
  with _session(threads) as session:
    values = list(range(300))
    results = pool.map(lambda v: session.run(result, {value: v}), values)
    assert list(results) == values
  assert process.call('most') == 1


# --- The process ------------------------------------------------------------


def test_process_is_on_its_own():
  processes = [_start(Inspector) for _ in range(3)]
  folders, fds = [], []
  for process in processes:
    text = _run(process.proxy.look()).decode()
    modules, cwd, variable, folder, session, links = text.split('|')
    assert not modules
    assert cwd == variable == folder
    assert int(session) == process.pid
    assert os.path.exists(os.path.join(folder, 'left-behind'))
    folders.append(folder)
    fds.append([x for x in links.split() if x.startswith(('socket', 'pipe'))])
  assert len(set(folders)) == 3
  # A socket to the program each, and nothing of its siblings.
  assert [len(x) for x in fds] == [1, 1, 1]
  assert len({link for x in fds for link in x}) == 3
  py_process.close_all(processes)
  assert not any(map(os.path.exists, folders))


def test_no_file_descriptors_leak():
  def count():
    return len(os.listdir('/proc/self/fd'))

  process = _start(Counter)
  server = py_process._fork_server._server.pid
  process.close()
  ours, servers = count(), len(os.listdir(f'/proc/{server}/fd'))
  for i in range(50):
    process.restart(start=i)
    if i % 10 == 0:
      assert process.call('next') == i + 1
      os.kill(process.pid, signal.SIGKILL)
  process.close()
  assert count() <= ours
  _eventually(lambda: len(os.listdir(f'/proc/{server}/fd')) <= servers)


def test_memory_can_not_be_cut_off():
  """The program, which reads it, would be killed by SIGBUS."""

  class Cutter(Base):
    SPECS = {'cut': ArraySpec((), object), 'get': ArraySpec((None,), np.uint8)}

    def cut(self):
      for fd in os.listdir('/proc/self/fd'):
        path = f'/proc/self/fd/{fd}'
        if os.path.islink(path) and 'impala-process' in os.readlink(path):
          try:
            os.ftruncate(int(fd), 0)
          except OSError as error:
            return type(error).__name__
      return 'cut'

    def get(self, size):
      return np.ones(size, np.uint8)

  process = _start(Cutter)
  assert process.call('cut') == b'PermissionError'
  assert process.call('get', 10_000_000).sum() == 10_000_000
  assert _run(process.proxy.get(30_000_000)).sum() == 30_000_000


# --- Programs ---------------------------------------------------------------

_PROGRAM = """
  import multiprocessing.shared_memory, os, signal, subprocess, sys, time
  import numpy as np
  import tensorflow.compat.v1 as tf
  import py_process

  tf.disable_eager_execution()

  class Environment:
    def __init__(self):
      self._helper = subprocess.Popen(['sleep', '300'])
      self._memory = multiprocessing.shared_memory.SharedMemory(
        create=True, size=100)

    def pids(self):
      return np.array([os.getpid(), os.getppid(), self._helper.pid])

    def memory(self):
      return self._memory.name

    def folder(self):
      return os.getcwd()

    def fail(self):
      raise ValueError('as ordered')

    def nap(self):
      time.sleep(300)

    @staticmethod
    def _tensor_specs(method_name, kwargs, constructor_kwargs):
      if method_name == 'pids':
        return py_process.ArraySpec([3], np.int64)
      return py_process.ArraySpec([], object)

  signal.signal(signal.SIGINT, signal.default_int_handler)
  processes = [py_process.PyProcess(Environment) for _ in range(3)]
  proxies = [process.proxy for process in processes]
  py_process.start_all(processes)
  naps = [proxy.nap() for proxy in proxies]
  session = tf.Session()
  for proxy in proxies:
    print('pids', *session.run(proxy.pids()))
    for name in ('memory', 'folder'):
      print(name, session.run(getattr(proxy, name)()).decode())
  print('ready', flush=True)
"""


# session.run itself can't be interrupted.
_WAIT = """
  import threading
  threading.Thread(target=session.run, args=[naps], daemon=True).start()
  time.sleep(300)
"""


def _program(tmp_path, code, **kwargs):
  path = tmp_path / 'program.py'
  path.write_text(textwrap.dedent(_PROGRAM) + textwrap.dedent(code))
  return _python(path, os.path.dirname(_MODULE), **kwargs)


def _python(path, folder, **kwargs):
  environment = {
    **os.environ,
    'PYTHONPATH': folder,
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'PYTHONUNBUFFERED': '1',
    'CUDA_VISIBLE_DEVICES': '-1',
  }
  with open(f'{path}.err', 'w') as errors:
    return subprocess.Popen(
      [sys.executable, str(path)],
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env=environment,
      **kwargs,
    )


@pytest.mark.parametrize(
  ('code', 'number', 'returncode'),
  [
    ('', None, 0),
    ('session.run(proxies[1].fail())', None, 1),
    ('session.run(naps)', signal.SIGKILL, -signal.SIGKILL),
    (_WAIT, signal.SIGINT, None),
  ],
)
def test_nothing_outlives_the_program(tmp_path, code, number, returncode):
  program = _program(tmp_path, code)
  try:
    told = collections.defaultdict(list)
    for line in program.stdout:
      name, *values = line.split()
      if name == 'ready':
        break
      told[name] += values
    pids = [int(pid) for pid in told['pids']]
    blocks = [f'/dev/shm/{name.lstrip("/")}' for name in told['memory']]
    assert len(pids) == 9, (tmp_path / 'program.py.err').read_text()
    if number is not None:
      time.sleep(0.3)
      assert all(map(_is_alive, pids))
      assert all(map(os.path.exists, blocks + told['folder']))
      program.send_signal(number)
    code = program.wait(_PATIENCE)
  finally:
    program.kill()
    program.communicate()
  assert code == returncode if returncode is not None else code != 0
  _eventually(lambda: not any(map(_is_alive, pids)))
  _eventually(lambda: not any(map(os.path.exists, blocks + told['folder'])))


def test_helper_dies_with_its_process():
  class Helped(Base):
    SPECS = {'helper': ArraySpec((), np.int64)}

    def __init__(self):
      self._helper = subprocess.Popen(['sleep', '300'])

    def helper(self):
      return self._helper.pid

  process = _start(Helped)
  helper = int(process.call('helper'))
  assert _is_alive(helper)
  os.kill(process.pid, signal.SIGKILL)
  _eventually(lambda: not _is_alive(helper))


class Mapper(Base):
  """Maps files, and makes named shared memory of its own."""

  SPECS = {'map': (), 'make': ArraySpec((), object), 'fork': ()}

  def __init__(self):
    self._kept = []

  def map(self, path, how):
    import mmap

    writes = how == b'shared and writable'
    with open(path, 'r+b' if writes else 'rb') as file:
      self._kept.append(
        mmap.mmap(
          file.fileno(),
          0,
          mmap.MAP_SHARED if b'shared' in how else mmap.MAP_PRIVATE,
          mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0),
        )
      )

  def make(self):
    import multiprocessing.shared_memory

    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=100)
    self._kept.append(memory)
    return '/dev/shm/' + memory.name

  def fork(self):
    """Starts a helper that has the same mapped, as ViZDoom's engine has."""
    if os.fork() == 0:
      time.sleep(300)
      os._exit(0)


@pytest.fixture
def shared_memory():
  """A function that makes a file in /dev/shm, in a folder or not."""
  folders = [tempfile.mkdtemp(dir='/dev/shm')]
  files = []

  def make(in_folder):
    descriptor, path = tempfile.mkstemp(
      dir=folders[0] if in_folder else '/dev/shm'
    )
    files.append(path)
    os.write(descriptor, b'precious')
    os.close(descriptor)
    return path

  yield make
  for path in files:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
  os.rmdir(folders[0])


@pytest.mark.parametrize('end', ['killed', 'closed'])
@pytest.mark.parametrize(
  ('how', 'in_folder', 'is_older'),
  [
    ('shared', False, True),
    ('shared', False, False),
    ('shared', True, False),
    ('private', False, False),
    ('private', True, False),
    ('shared and writable', True, False),
    ('shared and writable', True, True),
    ('shared and writable', False, True),
  ],
)
def test_files_of_others_in_shared_memory_are_kept(
  how, in_folder, is_older, end, shared_memory
):
  if is_older:
    foreign = shared_memory(in_folder)
  process = _start(Mapper)
  if not is_older:
    foreign = shared_memory(in_folder)
  process.call('map', foreign, how)
  own = process.call('make').decode()
  assert os.path.exists(own)
  if end == 'killed':
    process.call('fork')
    os.kill(process.pid, signal.SIGKILL)
    assert process.exit_code(_SOON) == -signal.SIGKILL
  else:
    process.close()
  assert not os.path.exists(own)
  with open(foreign) as file:
    assert file.read() == 'precious'


def test_shared_memory_that_took_a_name_is_kept(shared_memory):
  """The environment's own is gone already: the name is another file's."""
  process = _start(Mapper)
  own = process.call('make').decode()
  os.rename(shared_memory(False), own)
  process.call('fork')
  os.kill(process.pid, signal.SIGKILL)
  assert process.exit_code(_SOON) == -signal.SIGKILL
  with open(own) as file:
    assert file.read() == 'precious'
  os.unlink(own)


_SMALL = """
  import os, signal, sys
  import numpy as np
  import tensorflow.compat.v1 as tf
  import py_process

  tf.disable_eager_execution()

  class Environment:
    def add(self, a, b):
      return {'sum': a + b, 'text': 'ä\\0', 'array': np.ones([2, 0, 3])}

    def fail(self):
      raise ValueError('as ordered')

    def wrong(self):
      return np.zeros([2], np.float32)

    @staticmethod
    def _tensor_specs(method_name, kwargs, constructor_kwargs):
      if method_name == 'add':
        return {
          'sum': py_process.ArraySpec([], np.int32),
          'text': py_process.ArraySpec([], object),
          'array': py_process.ArraySpec([2, None, 3], np.float64),
        }
      return py_process.ArraySpec([3], np.float32)

  process = py_process.PyProcess(Environment)
  result = process.proxy.add(tf.constant(2), 3)
  fail, wrong = process.proxy.fail(), process.proxy.wrong()
  assert result['array'].shape.as_list() == [2, None, 3]

  def error(call):
    try:
      return session.run(call)
    except tf.errors.OpError as e:
      return str(e)

  session = tf.Session()
  assert 'start it first' in error(fail), error(fail)
  process.start()
  for _ in range(3):
    got = session.run(result)
    assert got['sum'] == 5 and got['text'] == 'ä\\0'.encode(), got
    assert got['array'].shape == (2, 0, 3)
  assert 'ValueError: as ordered' in error(fail)
  try:
    session.run(fail)
  except tf.errors.OpError as e:
    reason, traceback = py_process.failure(e)
  assert reason == 'raised in fail:\\nValueError: as ordered', reason
  assert traceback.count('File') == 1, traceback
  assert traceback.endswith('\\nValueError: as ordered'), traceback
  assert 'promise' in error(wrong), error(wrong)
  os.kill(process.pid, signal.SIGKILL)
  assert 'died' in error(fail)
  assert process.exit_code(5) == -9
  process.restart()
  assert session.run(result)['sum'] == 5
  py_process.set_call_timeout(0.5)
  os.kill(process.pid, signal.SIGSTOP)
  assert 'took more than 0.5 seconds for add' in error(result['sum'])
  assert process.exit_code(5) == -9
  py_process.set_call_timeout(None)
  process.restart()
  assert session.run(result)['sum'] == 5
  print('library', py_process.has_library())
"""


def _copy_modules(folder):
  """Copies what `py_process` is made of, but for the compiled libraries."""
  for module in (native, py_process):
    shutil.copy(module.__file__, folder)


_LIMITED = """
  import os, re, resource, sys
  import numpy as np
  import tensorflow.compat.v1 as tf
  import py_process

  tf.disable_eager_execution()

  class Environment:
    def next(self):
      return 7

    @staticmethod
    def _modules(constructor_kwargs):
      return modules

    @staticmethod
    def _tensor_specs(method_name, kwargs, constructor_kwargs):
      return py_process.ArraySpec([], np.int32)

  modules = []
  processes = [py_process.PyProcess(Environment) for _ in range(16)]

  def count():
    return len(os.listdir('/proc/self/fd'))

  def start(processes):
    try:
      py_process.start_all(processes)
    except py_process.ProcessError as e:
      return str(e)
    return 'started'
"""


def _run_limited(tmp_path, code):
  """Runs a program; returns what it printed."""
  path = tmp_path / 'program.py'
  path.write_text(textwrap.dedent(_LIMITED) + textwrap.dedent(code))
  with _python(path, os.path.dirname(_MODULE)) as program:
    try:
      output, _ = program.communicate(timeout=_PATIENCE)
    finally:
      program.kill()
  errors = (tmp_path / 'program.py.err').read_text()
  assert program.returncode == 0, errors
  assert 'Traceback' not in errors
  return output


def test_too_few_descriptors_are_told_before_anything_starts(tmp_path):
  output = _run_limited(
    tmp_path,
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
    print(start(processes))
    assert py_process._fork_server._server is None
    assert not any(process.pid for process in processes)
    """,
  )
  assert re.fullmatch(
    r'This program needs \d+ open files for 16 environment processes, but may '
    r'have 60. Raise the limit \("ulimit -n \d+"\) or start fewer '
    r'environments.\n',
    output,
  )


def test_limit_of_descriptors_is_raised(tmp_path):
  """The environments' own stays as it is."""
  output = _run_limited(
    tmp_path,
    """
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 1000))
    print(start(processes[:1]))
    print(start(processes[1:]))
    with tf.Session() as session:
      print(sum(session.run([p.proxy.next() for p in processes])))
    with open(f'/proc/{processes[0].pid}/limits') as file:
      print(re.search('Max open files +([0-9]+)', file.read())[1])
    """,
  )
  assert output.split() == ['started', 'started', '112', '60']


@pytest.mark.parametrize('is_served', [False, True])
def test_descriptors_that_run_out_leave_all_as_it_was(tmp_path, is_served):
  """Whichever is the first that can't be opened, epoll's among them."""
  output = _run_limited(
    tmp_path,
    f"""
    is_served = {is_served}
    """
    + """
    class Failing(Environment):
      def __init__(self):
        raise ValueError

    if is_served:  # What follows isn't the first to need the fork server.
      assert 'ValueError' in start([py_process.PyProcess(Failing)])
    py_process.reserve_descriptors = lambda *_: None  # Can't know of others'.
    py_process._library()
    process = processes[0]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = count()
    # Only 0 to 2 are surely open: others may have any numbers.
    for limit in range(3, 3 + before + 16):
      resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
      outcome = start([process])
      process.close()
      resource.setrlimit(resource.RLIMIT_NOFILE, limits)
      print(outcome)
      # The fork server's and epoll's stay.
      assert count() <= before + 2, (limit, os.listdir('/proc/self/fd'))
      if outcome == 'started':
        break
    assert start([process]) == 'started'
    with tf.Session() as session:
      print(session.run(process.proxy.next()))
    """,
  )
  *failures, started, seven = output.splitlines()
  assert len(failures) >= 5
  assert started == 'started'
  assert seven == '7'
  for failure in failures:
    assert re.fullmatch(
      r'An environment process could not be started: no more files can be '
      r'opened \(ulimit -n: \d+\). Raise the limit or start fewer '
      r'environments.',
      failure,
    )


def test_too_few_processes_are_told_in_one_sentence(tmp_path):
  # Imported by the fork server. There is no such limit for root.
  (tmp_path / 'limiting.py').write_text(
    textwrap.dedent("""
      import os, resource
      if os.geteuid() == 0:
        os.setresuid(65534, 65534, 65534)
      resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    """)
  )
  output = _run_limited(
    tmp_path,
    f"""
    sys.path.append({str(tmp_path)!r})
    print(start(processes[:1]))
    os.chmod(py_process._fork_server._folder, 0o777)
    before = count()
    modules.append('limiting')
    print(start(processes[1:]))
    assert count() == before, count()
    """,
  )
  assert re.fullmatch(
    r'started\nAn environment process could not be started: there are too many '
    r'processes and threads \(ulimit -u: \w+; a container may allow fewer\). '
    r'Raise the limit or start fewer environments.\n',
    output,
  )


@pytest.mark.parametrize(
  ('libraries', 'missing'),
  [
    ([], 'py_process_ops.so'),
    (['py_process_ops.so'], 'py_process_callee.so'),
    (['py_process_callee.so'], 'py_process_ops.so'),
    (['py_process_ops.so', 'py_process_callee.so'], None),
  ],
)
def test_works_with_and_without_the_libraries(tmp_path, libraries, missing):
  _copy_modules(tmp_path)
  for library in libraries:
    path = os.path.join(os.path.dirname(_MODULE), library)
    if not os.path.exists(path):
      pytest.skip('needs `make ops`')
    shutil.copy(path, tmp_path)
  path = tmp_path / 'program.py'
  path.write_text(textwrap.dedent(_SMALL))
  output, _ = _python(path, str(tmp_path)).communicate(timeout=_PATIENCE)
  errors = (tmp_path / 'program.py.err').read_text()
  assert output == f'library {"py_process_ops.so" in libraries}\n', errors
  assert errors.count('make ops') == (0 if missing is None else 1)
  assert missing is None or f'{missing} is not built' in errors


def test_broken_operation_is_an_import_error(tmp_path):
  _copy_modules(tmp_path)
  (tmp_path / 'py_process_ops.so').write_bytes(b'no library')
  path = tmp_path / 'program.py'
  path.write_text(
    textwrap.dedent("""
      import py_process

      class Environment:
        pass

      process = py_process.PyProcess(Environment)
      for _ in range(2):
        try:
          process.start()
        except ImportError as error:
          print('make clean ops' in str(error), process.pid)
    """)
  )
  output, _ = _python(path, str(tmp_path)).communicate(timeout=_PATIENCE)
  assert output == 'True None\nTrue None\n'


def test_broken_callee_is_an_import_error(tmp_path):
  _copy_modules(tmp_path)
  (tmp_path / 'py_process_callee.so').write_bytes(b'no library')
  path = tmp_path / 'program.py'
  path.write_text('import py_process')
  assert _python(path, str(tmp_path)).wait(_PATIENCE) == 1
  errors = (tmp_path / 'program.py.err').read_text()
  assert 'ImportError: py_process_callee.so does not load' in errors
  assert 'make clean ops' in errors
