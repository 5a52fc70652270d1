# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Runs a Python object in a process of its own, as TensorFlow operations.

  process = py_process.PyProcess(Counter, start=3)
  three = process.proxy.next()       # A tensor: every run calls the method.
  with tf.train.SingularMonitoredSession(
      hooks=[py_process.PyProcessHook()]) as session:
    session.run(three)

The class says what its methods return through a static method
`_tensor_specs(method_name, kwargs, constructor_kwargs)`: a nest of objects
with `shape` and `dtype` (`ArraySpec`, `tf.TensorSpec`). It may also name
modules in a static method `_modules(constructor_kwargs)`, which are imported
once for all processes.

Who starts the processes: a fork server, a fresh Python of our own without
threads and without TensorFlow. It forks one process per object, so that the
processes share the memory of their modules and start in milliseconds, and it
is their parent: it learns how they end, and kills what they leave behind. When
this program dies, however suddenly, the server sees its socket closed and ends
all.

How a call travels: caller and process share a piece of memory (an unnamed file
that vanishes with its last user) and a socket. The caller writes a message to
the memory and rings: the socket carries the sizes of the message's header and
of all of it. The answer comes back in the same way. The header tells what is
where in the message, the data follow. All is padded to 8-byte words, and words
are little-endian:

  header: string, number of dtypes, dtypes, number of arrays, arrays
  string: number of bytes, bytes
  dtype:  TensorFlow's number of it
  array:  dtype, rank, dimensions, sizes of its pieces in bytes
  data:   the pieces of all arrays; a piece is a string of an array of strings,
          or all numbers of another array, row-major

The string of a request is the name of a method, the dtypes are those of the
results, the arrays are the arguments. The string of an answer is empty, or
describes an exception; it has no dtypes, its arrays are the flattened results.

`py_process_ops.cc` is the caller's end for TensorFlow, `py_process_callee.cc`
the end in the process; `_Channel` below is the same in Python, for calls from
Python, for messages unlike the ones before, and for where these aren't built.

Environment processes import this module as well, and shall not pay for
TensorFlow (seconds and hundreds of MB each): only what builds graphs imports
it.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import inspect
import itertools
import math
import mmap
import os
import pickle
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing

import cloudpickle
import numpy as np
import tree

import native

# None if it isn't built, of which `_library` warns.
_callee = native.load_module('py_process_callee')

_COLLECTION = 'py_process_processes'
_WORD = struct.Struct('<q')
_BELL = struct.Struct('<2q')  # What the socket carries for each message.
_CLOSE_SECONDS = 5.0  # What close() leaves a process before it is killed.
# What this program opens for each process, and for all else it will do.
_DESCRIPTORS = 6
_SPARE_DESCRIPTORS = 16
_KILL_SECONDS = 5.0  # What a killed process has to vanish.
_SHARED_MEMORY = '/dev/shm'  # Where shm_open keeps what has a name.

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# tensorflow/core/framework/types.proto, needed where TensorFlow isn't.
_DTYPES = {
  np.dtype(name): number
  for name, number in {
    'float32': 1,
    'float64': 2,
    'int32': 3,
    'uint8': 4,
    'int16': 5,
    'int8': 6,
    'object': 7,  # Strings.
    'complex64': 8,
    'int64': 9,
    'bool': 10,
    'uint16': 17,
    'complex128': 18,
    'float16': 19,
    'uint32': 22,
    'uint64': 23,
  }.items()
}
_STRINGS = np.dtype(object)
_DTYPES_BY_NUMBER = {number: dtype for dtype, number in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class ArraySpec:
  """Shape (a sequence of ints) and NumPy dtype of an array; object: strings."""

  shape: tuple
  dtype: type


class ProcessError(RuntimeError):
  """The object in the process raised, or the process could not be reached.

  `process` is the `PyProcess` that could not be started, if it was one.
  """

  process = None


# --- Failures ---------------------------------------------------------------

# An exception travels as text, since errors of TensorFlow carry nothing else:
# its message, the next line, its traceback. TensorFlow adds text of its own.
_TRACEBACK = '\n\nIn the environment process:\n'
_END = "(End of the environment's traceback.)"

# What the errors of calls say if the environment is to blame. The operation has
# the same texts.
_FAILURES = [
  re.compile(
    r'An environment process (?P<reason>raised in [\w ]+:\n.*?)'
    rf'(?:{_TRACEBACK}(?P<traceback>.*?))?\s*(?:\Z|{re.escape(_END)})',
    re.DOTALL,
  ),
  re.compile(
    r'An environment process (?P<reason>took more than [^;\n]*); it was killed'
  ),
  re.compile(r'The environment process (?P<reason>died)'),
  re.compile(r'The process of \w+ (?P<reason>died)'),
  re.compile(r'The environment process (?P<reason>sent a broken message)'),
  re.compile(r'(?P<reason>Result \d+ of \w+ is [^\n]* promise [^\n]*)'),
]


class Failure(typing.NamedTuple):
  """Why a call of an environment process failed."""

  reason: str  # 'raised in step:\nValueError: its whole message', 'died', ...
  traceback: str  # The environment's own; empty if it has not raised.


def failure(error):
  """Returns the `Failure` that an error tells of.

  Args:
    error: `tf.errors.OpError` or `ProcessError`.

  Returns:
    The `Failure`; None if no environment is to blame.
  """
  text = getattr(error, 'message', None) or str(error)
  matches = [match for p in _FAILURES if (match := p.search(text))]
  if not matches:
    return None
  # One that raised may have said anything in its message.
  found = min(matches, key=lambda match: match.start()).groupdict()
  return Failure(found['reason'].strip(), found.get('traceback') or '')


def _describe_exception(error):
  """Returns an exception's message and traceback, without our own frames."""
  message = ''.join(traceback.format_exception_only(error)).strip()
  trace = error.__traceback__
  while trace and trace.tb_frame.f_code.co_filename == _THIS_FILE:
    trace = trace.tb_next
  if trace is None:  # It was raised here: a result can't be sent, for example.
    return message
  lines = traceback.format_exception(error.with_traceback(trace))
  return message + _TRACEBACK + ''.join(lines).rstrip()


_THIS_FILE = _describe_exception.__code__.co_filename


def _raised(method, description):
  return f'An environment process raised in {method}:\n{description}'


# --- Messages ---------------------------------------------------------------


class _Layout(typing.NamedTuple):
  """What is where in a message."""

  bell: bytes
  header: bytes
  string: str
  dtypes: tuple  # TensorFlow's numbers.
  arrays: tuple  # For each: its dtype, its shape, slices of its pieces.
  size: int


# Cached, since messages mostly differ in nothing but their data.
@functools.lru_cache(maxsize=32)
def _lay_out(string, dtypes, arrays):
  """Lays out a message.

  Args:
    string: str.
    dtypes: tuple of TensorFlow's numbers.
    arrays: tuple with, for each array, its dtype, its shape, and a tuple of the
      sizes of its pieces.

  Returns:
    The `_Layout`.

  Raises:
    TypeError: TensorFlow has no such dtype.
  """
  encoded = string.encode(errors='backslashreplace')
  words = [len(dtypes), *dtypes, len(arrays)]
  for dtype, shape, sizes in arrays:
    if dtype not in _DTYPES:
      raise TypeError(f'Arrays of dtype {dtype} can not be sent.')
    words += [_DTYPES[dtype], len(shape), *shape, *sizes]
  header = _word(len(encoded)) + encoded + bytes(_padding(len(encoded)))
  header += struct.pack(f'<{len(words)}q', *words)
  end = len(header)
  placed = []
  for dtype, shape, sizes in arrays:
    slices = []
    for size in sizes:
      slices.append(slice(end, end + size))
      end += size + _padding(size)
    placed.append((dtype, shape, slices))
  bell = _BELL.pack(len(header), end)
  return _Layout(bell, header, string, dtypes, tuple(placed), end)


@functools.lru_cache(maxsize=32)
def _parse(header):
  """Returns the `_Layout` of the message with a header.

  Raises:
    ValueError, LookupError, StopIteration: it isn't one.
  """
  (size,) = _WORD.unpack_from(header)
  begin, end = _WORD.size, _WORD.size + size
  string = header[begin:end].decode()
  words = (word for (word,) in _WORD.iter_unpack(header[end + _padding(end) :]))

  def take(count):
    return tuple(itertools.islice(words, count))

  dtypes = take(next(words))
  arrays = []
  for _ in range(next(words)):
    dtype = _DTYPES_BY_NUMBER[next(words)]
    shape = take(next(words))
    num_pieces = math.prod(shape) if dtype is _STRINGS else 1
    sizes = take(num_pieces)
    if len(sizes) != num_pieces or min(sizes, default=0) < 0:
      raise ValueError('A broken message: sizes of pieces are missing.')
    if dtype is not _STRINGS and sizes[0] != dtype.itemsize * math.prod(shape):
      raise ValueError('A broken message: an array is not of its shape.')
    arrays.append((dtype, shape, sizes))
  return _lay_out(string, dtypes, tuple(arrays))


def _padding(size):
  return -size % 8


def _word(value):
  return _WORD.pack(value)


class _Channel:
  """One end of the line between a program and one of its processes."""

  def __init__(self, connection, memory_fd):
    self._connection = connection
    self._connection.settimeout(None)  # Environments may set a default.
    self._memory_fd = memory_fd
    self._memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size)

  def filenos(self):
    """Returns the file descriptors of the socket and of the memory."""
    return self._connection.fileno(), self._memory_fd

  def send(self, string, dtypes=(), arrays=()):
    """Sends a str, TensorFlow's numbers, and arrays; returns the `_Layout`."""
    described, pieces = [], []
    for array in arrays:
      if array.dtype.kind in 'OSU':
        strings = [_encode(string) for string in array.flat]
        described.append((_STRINGS, array.shape, tuple(map(len, strings))))
        pieces += strings
      else:
        described.append((array.dtype, array.shape, (array.nbytes,)))
        pieces.append(np.asarray(array, order='C'))
    layout = _lay_out(string, dtypes, tuple(described))
    self._reserve(layout.size)
    self._memory[: len(layout.header)] = layout.header
    slices = [place for *_, slices in layout.arrays for place in slices]
    for place, piece in zip(slices, pieces, strict=True):
      self._memory[place] = piece
    self._connection.send(layout.bell)
    return layout

  def receive(self):
    """Returns (string, dtypes, arrays); raises EOFError at the other's end."""
    bell = self.wait()
    if not bell:
      raise EOFError
    return self.read(bell)

  def wait(self):
    """Returns the bell of the next message; it is empty at the other's end."""
    return self._connection.recv(_BELL.size)

  def read(self, bell):
    """Returns (string, dtypes, arrays) of the message that a bell announces."""
    layout = self.read_layout(bell)
    arrays = [self._read_array(*array) for array in layout.arrays]
    return layout.string, layout.dtypes, arrays

  def read_layout(self, bell):
    """Returns the `_Layout` of the message that a bell announces.

    Raises:
      ValueError, LookupError, StopIteration: the message is broken.
    """
    header_size, size = _BELL.unpack(bell)
    if not 0 <= header_size <= size:
      raise ValueError('A broken message: its header is larger than all of it.')
    self._reserve(size)
    header = self._memory[:header_size]
    layout = _parse(header)
    # All that is copied by it is then inside of the message.
    if layout.bell != bell or layout.header != header:
      raise ValueError('A broken message: sizes and contents differ.')
    return layout

  def answer(self, result, dtypes):
    """Sends the result of a method.

    Args:
      result: nest of arrays, numbers and strings; None is the empty nest.
      dtypes: tuple of the promised dtypes of its leaves, TensorFlow's numbers.

    Returns:
      The `_Layout` of the answer; None if the dtypes are not the promised ones.
    """
    leaves = [] if result is None else tree.flatten(result)
    if len(leaves) != len(dtypes):
      raise TypeError(
        f'The method returned {len(leaves)} values, its _tensor_specs promise '
        f'{len(dtypes)}.'
      )
    layout = self.send('', arrays=map(_to_array, leaves, dtypes))
    sent = tuple(_DTYPES[dtype] for dtype, *_ in layout.arrays)
    return layout if sent == dtypes else None

  def send_error(self, error):
    """Sends a description of an exception instead of an answer."""
    self.send(_describe_exception(error))

  def hang_up(self):
    with contextlib.suppress(OSError):
      self._connection.shutdown(socket.SHUT_RDWR)

  def close(self):
    self._connection.close()
    self._memory.close()
    os.close(self._memory_fd)

  def _read_array(self, dtype, shape, slices):
    if dtype is _STRINGS:
      array = np.empty(shape, dtype)
      for index, place in zip(np.ndindex(*shape), slices, strict=True):
        array[index] = self._memory[place]
    else:
      array = np.ndarray(shape, dtype, self._memory, slices[0].start).copy()
    return array if shape else array[()]

  def _reserve(self, size):
    if size <= len(self._memory):
      return
    file_size = os.fstat(self._memory_fd).st_size
    if file_size < size:
      file_size = 2 * size
      os.ftruncate(self._memory_fd, file_size)
    self._memory.close()
    self._memory = mmap.mmap(self._memory_fd, file_size)


def _to_array(leaf, number):
  """Returns a leaf as an array of the promised dtype.

  Python's numbers have no dtype of their own and take the promised one if that
  loses nothing; arrays are sent as they are, so that a wrong dtype is reported
  and not hidden.
  """
  if isinstance(leaf, (bool, int, float)):
    dtype = _DTYPES_BY_NUMBER.get(number)
    if isinstance(leaf, bool):
      kinds = 'biufc'
    elif isinstance(leaf, int):
      kinds = 'iufc'
    else:
      kinds = 'fc'
    fits = dtype is not None and dtype.kind in kinds
    return np.asarray(leaf, dtype if fits else None)
  if isinstance(leaf, (str, bytes)):
    # Of dtype object, since NumPy's strings lose trailing zero bytes.
    array = np.empty((), dtype=object)
    array[()] = leaf
    return array
  return np.asarray(leaf)


def _encode(string):
  if isinstance(string, str):
    try:
      # Bytes that were no UTF-8 when they were decoded are themselves again.
      return string.encode(errors='surrogateescape')
    except UnicodeEncodeError:
      return string.encode(errors='replace')
  if not isinstance(string, bytes):
    raise TypeError(f'A {type(string).__name__} can not be sent.')
  return string


# --- In an environment's process --------------------------------------------


def _work(channel, payload, older):
  """Answers calls until the program hangs up.

  Args:
    channel: `_Channel` to the program.
    payload: the pickled (class, args, kwargs) of the object.
    older: inodes that were in /dev/shm before this process started.

  Returns:
    The exit code of the process.
  """
  try:
    cls, args, kwargs = pickle.loads(payload)
    target = cls(*args, **kwargs)
  except Exception as error:  # Whatever the class raises is the caller's.
    channel.send_error(error)
    return 1
  answer_calls = getattr(_callee, 'answer_calls', _answer_calls)
  with contextlib.suppress(ConnectionError):  # The program is gone.
    channel.send('')
    answer_calls(channel, target)
  if hasattr(target, 'close'):
    target.close()
  # While the object still has it mapped.
  _free_shared_memory(os.getpid(), older)
  return 0


def _answer_calls(channel, target):
  """Has an object answer calls until the program hangs up.

  Args:
    channel: `_Channel` to the program.
    target: the object.

  Raises:
    ConnectionError: the program is gone.
  """
  while bell := channel.wait():
    try:
      method, dtypes, arguments = channel.read(bell)
      channel.answer(getattr(target, method)(*arguments), dtypes)
    except Exception as error:  # As above, and what can't be read or sent.
      channel.send_error(error)


# --- The fork server --------------------------------------------------------


@dataclasses.dataclass
class _Child:
  """What the fork server knows of a process."""

  # Write end of a pipe: first the pid, or an error number, negative, if there
  # is none; then the exit code.
  status: int
  folder: str  # Working directory and place for temporary files.
  older: frozenset  # Inodes that were in /dev/shm before it started.


def _serve(control_fd, folder):
  """Forks processes on request until the socket `control_fd` is closed.

  Args:
    control_fd: file descriptor of the socket.
    folder: where each process gets a folder; removed in the end.
  """
  control = socket.socket(fileno=control_fd)
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  # It may have more processes than the program was allowed at its start.
  resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
  # What its processes leave behind becomes its own child, and is reaped.
  _prctl(_PR_SET_CHILD_SUBREAPER, 1)
  children = {}
  wakeup, wakeup_write = os.pipe()
  os.set_blocking(wakeup_write, False)
  # Slurm sends it to all processes of a program, which may still need this one.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
  while True:
    ready, _, _ = select.select([control, wakeup], [], [])
    if wakeup in ready:
      os.read(wakeup, 4096)
      _reap(children)
    if control in ready:
      # Closed on exec: what a process starts shall not keep its channel open.
      message, fds, _, _ = socket.recv_fds(
        control, 64, 3, socket.MSG_CMSG_CLOEXEC
      )
      if not message:
        break
      command, pid = struct.unpack('<cq', message)
      if command == b'k':
        if pid in children:
          _kill(pid, children[pid])
      elif len(fds) < 3:  # There were no descriptors for the others.
        _refuse(fds, errno.EMFILE)
      else:
        own_fds = [control_fd, wakeup, wakeup_write]
        _fork(children, folder, own_fds, limits, *fds)
  for pid, child in children.items():
    _kill(pid, child)
  for pid in list(children):
    _bury(children, pid, os.waitpid(pid, 0)[1])
  shutil.rmtree(folder, ignore_errors=True)


def _refuse(fds, error):
  """Tells the program why no process was forked; closes its descriptors."""
  if fds:
    _report(fds[0], -error)
  for fd in fds:
    os.close(fd)


def _fork(
  children, parent_folder, own_fds, limits, status, connection, memory_fd
):
  """Forks one process; the last three arguments are its program's."""
  payload = os.pread(memory_fd, os.fstat(memory_fd).st_size, 0)
  modules, payload = pickle.loads(payload)
  for module in modules:
    # One that is missing is reported by the object, which imports it again.
    with contextlib.suppress(Exception, SystemExit):
      __import__(module)
  server = os.getpid()
  older = _shared_memory_inodes()
  try:
    folder = tempfile.mkdtemp(dir=parent_folder)
    try:
      pid = os.fork()
    except OSError:
      os.rmdir(folder)
      raise
  except OSError as error:
    _refuse([status, connection, memory_fd], error.errno)
    return
  if pid == 0:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    # Inherited ends of other pipes would hide the deaths of their owners.
    for fd in own_fds + [status] + [c.status for c in children.values()]:
      os.close(fd)
    _run_child(server, connection, memory_fd, payload, folder, older)
  os.close(connection)
  os.close(memory_fd)
  children[pid] = _Child(status, folder, older)
  _report(status, pid)


def _run_child(server, connection, memory_fd, payload, folder, older):
  """Turns a fork of the server into an environment's process; never returns."""
  code = 1
  try:
    die_with(server)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
      signal.signal(number, signal.SIG_DFL)
    # A session and process group of its own: a Ctrl-C in the terminal doesn't
    # reach it, and the helpers it starts can be found when it dies.
    os.setsid()
    os.chdir(folder)
    os.environ['TMPDIR'] = tempfile.tempdir = folder
    connection = socket.socket(fileno=connection)
    code = _work(_Channel(connection, memory_fd), payload, older)
  except SystemExit as error:
    code = _exit_code(error)
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error):
  """Returns the exit code that Python gives for a SystemExit."""
  if error.code is None:
    return 0
  if isinstance(error.code, int):
    return error.code & 0xFF
  print(error.code, file=sys.stderr)
  return 1


def die_with(parent):
  """Has the kernel kill this process when its parent ends."""
  _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:  # It ended before the call above.
    os._exit(1)


def _prctl(option, value):
  ctypes.CDLL(None).prctl(option, value)


def _reap(children):
  while True:
    try:
      pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return
    if pid == 0:
      return
    if pid in children:
      _kill_group(pid, children[pid])
      _bury(children, pid, status)


def _bury(children, pid, status):
  """Reports the end of a process and removes its folder."""
  child = children.pop(pid)
  shutil.rmtree(child.folder, ignore_errors=True)
  _report(child.status, os.waitstatus_to_exitcode(status))
  os.close(child.status)


def _report(status, value):
  with contextlib.suppress(BrokenPipeError):
    os.write(status, _word(value))


def _kill(pid, child):
  """Kills a process that was not yet reaped, and its group."""
  _kill_group(pid, child)
  os.kill(pid, signal.SIGKILL)  # If it has not yet got to its `setsid`.


def _kill_group(group, child):
  """Kills what is left of a process group.

  Environments may run helpers of their own which survive them: ViZDoom's engine
  does, and holds named shared memory that nobody would unlink.
  """
  _free_shared_memory(group, child.older)
  with contextlib.suppress(ProcessLookupError):
    os.killpg(group, signal.SIGKILL)


def _free_shared_memory(group, older):
  """Unlinks the named shared memory that a process group made and left.

  Files of others in that folder must stay. What the group made for itself is
  new since its start, has no folder, belongs to this user, and is mapped shared
  and writable by this group and by nobody else.

  Args:
    group: the id of the group.
    older: inodes that were in /dev/shm before the group started.
  """
  members, others = [], []
  for pid in map(int, filter(str.isdigit, os.listdir('/proc'))):
    with contextlib.suppress(OSError):
      (members if os.getpgid(pid) == group else others).append(pid)
  files = set().union(*(_mapped_shared_memory(m, 'rw-s') for m in members))
  if files:
    files = files.difference(*map(_mapped_shared_memory, others))
  for path, inode in files:
    with contextlib.suppress(OSError):
      status = os.lstat(path)
      if (
        os.path.dirname(path) == _SHARED_MEMORY
        and stat.S_ISREG(status.st_mode)
        and status.st_ino == inode  # Else the name is another file's by now.
        and status.st_uid == os.geteuid()
        and inode not in older
      ):
        os.unlink(path)


def _mapped_shared_memory(pid, permissions=''):
  """Returns paths and inodes of what a process has mapped of /dev/shm."""
  files = set()
  with contextlib.suppress(OSError), open(f'/proc/{pid}/maps') as maps:
    for line in maps:
      _, mode, _, _, inode, *path = line.rstrip('\n').split(maxsplit=5)
      if path and path[0].startswith(_SHARED_MEMORY) and permissions in mode:
        files.add((path[0], int(inode)))
  return files


def _shared_memory_inodes():
  """Returns the inodes of all that is in /dev/shm now."""
  try:
    with os.scandir(_SHARED_MEMORY) as entries:
      return frozenset(entry.inode() for entry in entries)
  except OSError:  # There is none, or nobody may look into it.
    return frozenset()


# --- In the program ---------------------------------------------------------


class _ForkServer:
  """The program's side of the fork server, which starts on first use."""

  def __init__(self):
    self._lock = threading.Lock()
    self._server = None
    self._control = None
    self._folder = None

  def spawn(self, modules, payload):
    """Starts a process for a pickled (class, args, kwargs).

    Returns:
      The `_Channel` to it, the read end of its status pipe, and its pid.

    Raises:
      OSError: the system has no more of something.
      ProcessError: it could not be forked.
    """
    with contextlib.ExitStack() as stack:
      memory_fd = _create_memory(pickle.dumps((modules, payload)))
      stack.callback(os.close, memory_fd)
      ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
      stack.enter_context(ours)
      with theirs:
        status, status_write = os.pipe()
        stack.callback(os.close, status)
        try:
          self._request([status_write, theirs.fileno(), memory_fd])
        finally:
          os.close(status_write)
      if not _is_readable(status, _call_timeout):
        # The server imports the modules of the environment, which may hang.
        self._server.kill()
        raise ProcessError(
          f'An environment process took more than {_call_timeout:g} seconds to '
          f'import {", ".join(modules)}; it was killed.'
        )
      word = os.read(status, 8)
      if not word:
        raise self._failure()
      (pid,) = _WORD.unpack(word)
      if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
      channel = _Channel(ours, memory_fd)
      stack.pop_all()
    return channel, status, pid

  def _request(self, fds):
    with self._lock:
      self._ensure_running()
      # The server may be gone: then `spawn` reads no answer.
      with contextlib.suppress(ConnectionError):
        socket.send_fds(self._control, [struct.pack('<cq', b's', 0)], fds)

  def _failure(self):
    """Returns why the server, instead of an answer, closed its end."""
    with self._lock:
      if not _is_readable(self._control.fileno(), timeout=0):
        return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return ProcessError('The fork server failed; see what it printed.')

  def kill(self, pid):
    # Through the server, who knows whether the pid is still that process.
    with self._lock, contextlib.suppress(OSError):
      self._control.send(struct.pack('<cq', b'k', pid))

  def close(self):
    with self._lock:
      if self._server is not None:
        self._end()

  def _ensure_running(self):
    if self._server is not None:
      # It never writes: its end is readable when it is gone.
      if not _is_readable(self._control.fileno(), timeout=0):
        return
      self._end()
    folder = tempfile.mkdtemp(prefix='impala-')
    try:
      self._launch(folder)
    except OSError:
      os.rmdir(folder)
      raise

  def _launch(self, folder):
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Also where the program was started: users' modules may be there, however
    # it was called. Absolute, since each process has a folder of its own.
    path = [native.FOLDER, *sys.path, os.getcwd()]
    path = [os.path.abspath(folder) for folder in path]
    code = (
      f'import sys; sys.path[:] = {path!r}; '
      'import py_process; '
      f'py_process._serve({theirs.fileno()}, {folder!r})'
    )
    with theirs, contextlib.ExitStack() as stack:
      stack.enter_context(control)
      self._server = subprocess.Popen(
        [sys.executable, '-c', code],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        env={
          # Many processes share the cores: none needs a pool of threads.
          'OMP_NUM_THREADS': '1',
          'OPENBLAS_NUM_THREADS': '1',
          'PYGAME_HIDE_SUPPORT_PROMPT': '1',
          **os.environ,
          # The accelerator belongs to the learner.
          'CUDA_VISIBLE_DEVICES': '-1',
        },
      )
      stack.pop_all()
    self._control, self._folder = control, folder

  def _end(self):
    self._control.close()
    self._server.wait()
    self._server = None
    # If it was killed, it left its own.
    shutil.rmtree(self._folder, ignore_errors=True)


def _create_memory(content):
  """Returns the descriptor of an unnamed file that others may only extend.

  Who reads memory that another has cut off is killed by SIGBUS.
  """
  fd = os.memfd_create('impala-process', os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
  try:
    os.write(fd, content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
  except OSError:
    os.close(fd)
    raise
  return fd


def _is_readable(fd, timeout):
  """Returns whether a descriptor can be read within a time; None: for ever."""
  poll = select.poll()  # `select.select` takes no descriptors above 1,023.
  poll.register(fd, select.POLLIN)
  return bool(poll.poll(None if timeout is None else timeout * 1000))


_fork_server = _ForkServer()
_numbers = itertools.count(1)
_open = {}  # The started processes by number.
_call_timeout = None  # In seconds.


def set_call_timeout(seconds):
  """Limits how long a call of a method, or a constructor, may take.

  A process that takes longer, or that somebody stopped, is killed with its
  helpers, and the call fails like one of a process that died.

  Args:
    seconds: the limit for all processes; None, as at first, for no limit.
  """
  global _call_timeout
  _call_timeout = seconds
  if seconds is not None:
    _start_watch()


@functools.cache
def _start_watch():
  threading.Thread(target=_watch, name='py_process_watch', daemon=True).start()


def _watch():
  """Kills processes that take too long for calls of the compiled operation."""
  durations = {}  # Of the calls under way, by their numbers.
  while True:
    limit = _call_timeout
    interval = 1.0 if limit is None else min(1.0, limit / 10)
    time.sleep(interval)
    last_durations, durations = durations, {}
    for process in list(_open.values()):
      pid, call = process.pid, process._call_under_way()
      if not call:
        continue
      # Not by the clock: while this program is stopped, no call gets older.
      durations[call] = last_durations.get(call, -interval) + interval
      if limit is not None and durations[call] >= limit:
        process._time_out(pid, call, limit)


class PyProcess:
  """An object of a class, in a process of its own."""

  def __init__(self, cls, *args, **kwargs):
    """Describes the object; `start` or `PyProcessHook` starts its process.

    Args:
      cls: the class; may be defined anywhere, it travels by cloudpickle.
      *args: positional arguments of its constructor.
      **kwargs: keyword arguments of its constructor.
    """
    import tensorflow.compat.v1 as tf

    self._cls = cls
    self._arguments = inspect.signature(cls).bind(*args, **kwargs)
    self._number = next(_numbers)
    self._lock = threading.Lock()  # Of the channel.
    self._status_lock = threading.Lock()  # Taken after the other.
    self._channel = None
    self._status = None
    self._pid = None
    self._exit_code = None
    tf.add_to_collection(_COLLECTION, self)

  @property
  def proxy(self):
    """The object's methods, taking and returning tensors."""
    return choose([self], 0)

  @property
  def pid(self):
    """Id of the process or, after its end, of the last one; at first None."""
    return self._pid

  def start(self):
    """Starts the process and waits until the object is made.

    Raises:
      ProcessError: the constructor raised, or the process died in it.
    """
    start_all([self])

  def restart(self, **kwargs):
    """Ends the process if it still runs, and starts it anew.

    Args:
      **kwargs: replace these arguments of the constructor.

    Raises:
      ProcessError: as `start`.
      TypeError: the constructor has no such argument.
    """
    signature, arguments = self._arguments.signature, self._arguments.arguments
    replacing = signature.bind_partial(**kwargs).arguments
    for name, value in replacing.items():
      if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
        value = {**arguments.get(name, {}), **value}
      arguments[name] = value
    self.close()
    self.start()

  def call(self, method, *args):
    """Calls a method from Python; not while a session calls the process.

    Args:
      method: name of the method.
      *args: arrays, numbers or strings.

    Returns:
      The nest that `_tensor_specs` describes, of NumPy values.

    Raises:
      ProcessError: the method raised, or the process died.
    """
    import tensorflow.compat.v1 as tf

    specs, arguments = _result_specs(
      self._cls, self._arguments, method, args, {}
    )
    flat = tree.flatten(specs)
    results = self._request(
      method,
      [tf.as_dtype(spec.dtype) for spec in flat],
      [tf.TensorShape(spec.shape) for spec in flat],
      arguments,
    )
    return tree.unflatten_as(specs, results)

  def exit_code(self, timeout=0.0):
    """Returns how the process ended, None while it runs.

    Args:
      timeout: seconds to wait for its end.

    Returns:
      The exit code; -N if signal N killed it.
    """
    with self._status_lock:  # Another thread may close the descriptor.
      if (
        self._exit_code is None
        and self._status is not None
        and _is_readable(self._status, timeout)
      ):
        # No report at all: the fork server died, and took its children along.
        word = os.read(self._status, 8) or _word(-signal.SIGKILL)
        (self._exit_code,) = _WORD.unpack(word)
      return self._exit_code

  def close(self):
    """Ends the process; calls under way fail with Cancelled."""
    close_all([self])

  def _launch(self):
    constructor_kwargs = _by_name(self._arguments)
    modules = getattr(self._cls, '_modules', lambda kwargs: ())
    payload = cloudpickle.dumps(
      (self._cls, self._arguments.args, self._arguments.kwargs)
    )
    channel, status, pid = _fork_server.spawn(
      list(modules(constructor_kwargs)), payload
    )
    with self._status_lock:
      self._exit_code = None
      self._channel, self._status, self._pid = channel, status, pid
    _open[self._number] = self

  def _await(self):
    """Waits until the object is made."""
    error, _, _ = self._receive('its constructor')
    if error:
      raise ProcessError(_raised('its constructor', error))
    if _library() is not None:
      _library().open_channel(self._number, self._channel)

  def _request(self, method, dtypes, shapes, arguments):
    """Calls a method; its results must be of these dtypes and shapes."""
    numbers = tuple(dtype.as_datatype_enum for dtype in dtypes)
    arguments = [np.asarray(argument) for argument in arguments]
    with self._lock:
      if self._channel is None:
        raise ProcessError('The process is not running; start it first.')
      try:
        self._channel.send(method, numbers, arguments)
      except ConnectionError:
        raise self._death() from None
      error, _, results = self._receive(method)
    if error:
      raise ProcessError(_raised(method, error))
    for i, result in enumerate(results):
      # A scalar string is `bytes`, and has neither.
      dtype, shape = getattr(result, 'dtype', object), np.shape(result)
      if dtype != dtypes[i].as_numpy_dtype or not shapes[i].is_compatible_with(
        shape
      ):
        raise ProcessError(
          f'Result {i} of {method} is {dtype}{list(shape)}, its _tensor_specs '
          f'promise {dtypes[i].name}{shapes[i]}.'
        )
    return results

  def _receive(self, method):
    """Receives the answer to a call of a method."""
    limit = _call_timeout
    if not _is_readable(self._channel.filenos()[0], limit):
      self._channel.hang_up()  # An answer that still comes is nobody's.
      self._kill()
      raise ProcessError(
        f'An environment process took more than {limit:g} seconds for '
        f'{method}; it was killed.'
      )
    try:
      return self._channel.receive()
    except (EOFError, ConnectionError):
      raise self._death() from None

  def _death(self):
    return ProcessError(
      f'The process of {self._cls.__name__} died with exit code '
      f'{self.exit_code(timeout=1.0)}.'
    )

  def _kill(self):
    _fork_server.kill(self._pid)
    self.exit_code(_KILL_SECONDS)

  def _call_under_way(self):
    """Returns the number of the operation's unanswered call; 0 if none."""
    library = _library()
    return 0 if library is None else library.call_under_way(self._number)

  def _time_out(self, pid, call, seconds):
    """Kills the process with this pid if a call is still under way."""
    if _library().time_out(self._number, call, seconds):
      _fork_server.kill(pid)

  def _hang_up(self):
    if _library() is not None:
      _library().close_channel(self._number)
    channel = self._channel
    if channel is not None:
      channel.hang_up()

  def _release(self):
    with self._lock, self._status_lock:
      # Two threads may close a process at once: one that restarts it, and one
      # that ends the program.
      if self._channel is None:
        return
      self._channel.close()
      os.close(self._status)
      self._channel = self._status = None
      del _open[self._number]


def start_all(processes):
  """Starts processes concurrently and waits until their objects are made.

  Raises:
    ProcessError: a constructor raised, a process died, or the system's limits
      don't allow as many; none is left running.
  """
  _library()  # Raises before anything starts.
  is_first = any(process.pid is None for process in processes)
  reserve_descriptors(len(processes), _SPARE_DESCRIPTORS if is_first else 0)
  try:
    for process in processes:
      process._launch()
    for process in processes:
      try:
        process._await()
      except ProcessError as error:
        error.process = process  # For who wants to tell which one it was.
        raise
  except (OSError, MemoryError) as error:
    close_all(processes)
    shortage = _describe_shortage(error)
    if shortage is None:
      raise
    raise ProcessError(
      f'An environment process could not be started: {shortage}'
    ) from None
  except BaseException:
    close_all(processes)
    raise


def reserve_descriptors(num_processes, num_others=_SPARE_DESCRIPTORS):
  """Has the system let this program open what more processes will need.

  Args:
    num_processes: how many processes will be started.
    num_others: how many other files the program will open.

  Raises:
    ProcessError: the system does not allow as many.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  num_open = len(os.listdir('/proc/self/fd'))
  needed = num_open + num_processes * _DESCRIPTORS + num_others
  if needed <= soft or soft == resource.RLIM_INFINITY:
    return
  if needed > hard and hard != resource.RLIM_INFINITY:
    raise ProcessError(
      f'This program needs {needed} open files for {num_processes} environment '
      f'processes, but may have {hard}. Raise the limit ("ulimit -n {needed}") '
      'or start fewer environments.'
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _describe_shortage(error):
  """Returns what the system has no more of, in a sentence; None if nothing."""

  def limit(number):
    value = resource.getrlimit(number)[0]
    return 'none' if value == resource.RLIM_INFINITY else value

  number = errno.ENOMEM if isinstance(error, MemoryError) else error.errno
  if number == errno.EMFILE:
    return (
      f'no more files can be opened (ulimit -n: {limit(resource.RLIMIT_NOFILE)}'
      '). Raise the limit or start fewer environments.'
    )
  if number == errno.ENFILE:
    return (
      'all programs together can open no more files (/proc/sys/fs/file-max). '
      'Raise the limit or start fewer environments.'
    )
  if number == errno.EAGAIN:
    return (
      'there are too many processes and threads (ulimit -u: '
      f'{limit(resource.RLIMIT_NPROC)}; a container may allow fewer). Raise '
      'the limit or start fewer environments.'
    )
  if number == errno.ENOMEM:
    return (
      f'there is no more memory (limit in bytes: {limit(resource.RLIMIT_AS)}). '
      'Start fewer environments.'
    )
  if number == errno.ENOSPC:
    return (
      f'there is no space left in {tempfile.gettempdir()}. Free some, or set '
      'TMPDIR to another folder.'
    )
  return None


def close_all(processes):
  """Ends processes: politely, and after some seconds by force."""
  processes = [p for p in processes if p._channel is not None]
  for process in processes:
    process._hang_up()
  deadline = time.monotonic() + _CLOSE_SECONDS
  for process in processes:
    if process.exit_code(max(0, deadline - time.monotonic())) is None:
      process._kill()
    process._release()


@atexit.register
def _close_everything():
  close_all(list(_open.values()))
  _fork_server.close()


def _by_name(bound):
  """Returns the arguments of an `inspect.BoundArguments` by their names."""
  named = dict(bound.arguments)
  for parameter in bound.signature.parameters.values():
    if parameter.kind is parameter.VAR_KEYWORD:
      named.update(named.pop(parameter.name, {}))
  return named


# --- In the graph -----------------------------------------------------------


def choose(processes, index):
  """Returns a proxy of the process that `index` selects when the graph runs.

  So one graph serves any number of processes.

  Args:
    processes: sequence of `PyProcess`, all of one class and with the same specs
      of results.
    index: int or integer scalar tensor.

  Returns:
    An object with the methods of the class, which take and return tensors.
  """
  import tensorflow.compat.v1 as tf

  numbers = tf.constant([process._number for process in processes], tf.int64)
  return _Proxy(processes[0]._cls, processes[0]._arguments, numbers[index])


class _Proxy:
  """Turns calls of methods into operations."""

  def __init__(self, cls, constructor_arguments, number):
    self._cls = cls
    self._constructor_arguments = constructor_arguments
    self._number = number

  def __getattr__(self, method):
    if method.startswith('_') or not hasattr(self._cls, method):
      raise AttributeError(f'{self._cls.__name__} has no method {method!r}.')
    return functools.partial(self._build_call, method)

  def _build_call(self, method, *args, **kwargs):
    """Builds one call: a nest of tensors, or the operation if there is none."""
    import tensorflow.compat.v1 as tf

    specs, arguments = _result_specs(
      self._cls, self._constructor_arguments, method, args, kwargs
    )
    flat = tree.flatten(specs)
    build = _build_call_in_python if _library() is None else _library().call
    results = build(
      self._number,
      method,
      [tf.convert_to_tensor(argument) for argument in arguments],
      [tf.as_dtype(spec.dtype) for spec in flat],
      [tf.TensorShape(spec.shape) for spec in flat],
    )
    return tree.unflatten_as(specs, results) if flat else results


def _result_specs(cls, constructor_arguments, method, args, kwargs):
  """Asks a class what a method returns.

  Returns:
    The nest of specs, and the call's arguments in the method's order.
  """
  bound = inspect.signature(getattr(cls, method)).bind(None, *args, **kwargs)
  if bound.kwargs:
    raise TypeError(
      f'{method} must be called without keyword-only arguments, and with all '
      f'arguments before {next(iter(bound.kwargs))!r}.'
    )
  named = _by_name(bound)
  named.pop(next(iter(bound.signature.parameters)))  # self
  specs = cls._tensor_specs(method, named, _by_name(constructor_arguments))
  return () if specs is None else specs, bound.args[1:]


def _build_call_in_python(number, method, arguments, dtypes, shapes):
  """As `_Library.call`, but holds a TensorFlow thread while it waits."""
  import tensorflow.compat.v1 as tf

  def run(number, *arguments):
    process = _open.get(int(number))
    if process is None:
      raise ProcessError(
        f'Environment process {number} is not running; start it first.'
      )
    try:
      return process._request(method, dtypes, shapes, arguments)
    except ProcessError as error:
      # TensorFlow adds the traceback of this function.
      raise ProcessError(f'{error}\n{_END}') from None

  results = tf.numpy_function(run, [number, *arguments], dtypes)
  if not dtypes:
    return results
  for result, shape in zip(results, shapes, strict=True):
    result.set_shape(shape)
  return results


class _Library:
  """The compiled caller's end."""

  def __init__(self, library):
    self._ops = library.ops
    self._open = library.function(
      'ImpalaOpenChannel', None, ctypes.c_int64, ctypes.c_int, ctypes.c_int
    )
    self._close = library.function('ImpalaCloseChannel', None, ctypes.c_int64)
    self.call_under_way = library.function(
      'ImpalaCallUnderWay', ctypes.c_int64, ctypes.c_int64
    )
    self.time_out = library.function(
      'ImpalaTimeOut',
      ctypes.c_bool,
      ctypes.c_int64,
      ctypes.c_int64,
      ctypes.c_double,
    )

  def call(self, number, method, arguments, dtypes, shapes):
    return self._ops.py_process_call(
      number, arguments, method=method, Tout=dtypes, output_shapes=shapes
    )

  def open_channel(self, number, channel):
    error = self._open(number, *channel.filenos())
    if error:
      raise OSError(error, os.strerror(error))

  def close_channel(self, number):
    self._close(number)


@functools.cache
def _library():
  """Loads the compiled operation; None, after one warning, if it isn't built.

  Raises:
    ImportError: it is there, but doesn't load.
  """
  library = native.load_library(
    'py_process_ops',
    'environments run, but each call takes longer and holds a TensorFlow '
    'thread',
  )
  if library is None:
    return None
  if _callee is None:
    native.warn_not_built(
      'py_process_callee', 'environments run, but each call takes longer'
    )
  return _Library(library)


def has_library():
  """Returns whether calls wait without holding a TensorFlow thread each."""
  return _library() is not None


def PyProcessHook():
  """Returns a `SessionRunHook` which starts the processes of the graph.

  They start, concurrently, before the session does, and end with it.
  """
  # A function, since the base class needs TensorFlow.
  import tensorflow.compat.v1 as tf

  class Hook(tf.train.SessionRunHook):
    def begin(self):
      self._processes = tf.get_collection(_COLLECTION)
      start_all([p for p in self._processes if p._channel is None])

    def end(self, session):
      close_all(self._processes)

  return Hook()
