# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Keeps other hosts away from a port that TensorFlow listens on.

In: the number of a port of this process. Out: nothing; the kernel drops what
other hosts send to it.
"""

import contextlib
import ctypes
import errno
import os
import socket
import stat
import struct

# A socket filter (bpf(4), kernel's Documentation/networking/filter.txt) that
# lets in what is sent to 127.0.0.0/8 or ::1: rows of operation, jumps if true
# and if false, and operand.
_IP_HEADER = 2**32 - 2**20
_LOAD_BYTE, _LOAD_WORD, _AND, _IF_EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 6
_TO_THIS_HOST = (
  (_LOAD_BYTE, 0, 0, _IP_HEADER),
  (_AND, 0, 0, 0xF0),
  (_IF_EQUAL, 0, 2, 0x40),  # IPv4, else to the sixth row.
  (_LOAD_BYTE, 0, 0, _IP_HEADER + 16),
  (_IF_EQUAL, 8, 9, 127),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 24),
  (_IF_EQUAL, 0, 7, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 28),
  (_IF_EQUAL, 0, 5, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 32),
  (_IF_EQUAL, 0, 3, 0),
  (_LOAD_WORD, 0, 0, _IP_HEADER + 36),
  (_IF_EQUAL, 0, 1, 1),
  (_RETURN, 0, 0, 2**32 - 1),  # All of the packet.
  (_RETURN, 0, 0, 0),  # Nothing of it.
)
_SO_ATTACH_FILTER = 26


def shut_out_other_hosts(port):
  """Has the kernel drop what other hosts send to a port of this process.

  TensorFlow listens on all interfaces and offers no choice.
  """
  rows = b''.join(struct.pack('HBBI', *row) for row in _TO_THIS_HOST)
  rows = ctypes.create_string_buffer(rows)
  program = struct.pack('HP', len(_TO_THIS_HOST), ctypes.addressof(rows))
  for fd in map(int, os.listdir('/proc/self/fd')):
    # Some are no sockets; the one that listed the folder is closed.
    with contextlib.suppress(OSError), _socket_of(fd) as listener:
      if (
        listener.family in (socket.AF_INET, socket.AF_INET6)
        and listener.getsockname()[1] == port
      ):
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _socket_of(fd):
  """Returns a new `socket.socket` for the socket of a file descriptor."""
  if not stat.S_ISSOCK(os.fstat(fd).st_mode):
    raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
  return socket.socket(fileno=os.dup(fd))
