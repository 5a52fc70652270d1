# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Memory of this machine: how much is free, and whether processes fit in."""

import contextlib
import os
import re

_GB = 1e9
_CGROUP = '/sys/fs/cgroup'  # Of a container, version 2.


def free_bytes(root='/'):
  """Returns how many bytes processes may still take; None if nobody knows.

  Args:
    root: path of the folder with `proc` and `sys`.
  """
  found = [_free_of_machine(root), _free_of_container(root)]
  return min((value for value in found if value is not None), default=None)


def _free_of_machine(root):
  match = re.search(
    r'^MemAvailable: +(\d+) kB', _read(root, '/proc/meminfo'), re.MULTILINE
  )
  return int(match[1]) * 1024 if match else None


def _free_of_container(root):
  limit, used, statistics = (
    _read(root, f'{_CGROUP}/memory.{name}')
    for name in ('max', 'current', 'stat')
  )
  if not limit.strip().isdigit() or not used.strip().isdigit():
    return None  # There is no limit: "max", or no such file.
  # What the kernel gives back as soon as it is needed.
  cache = re.search(r'^inactive_file (\d+)', statistics, re.MULTILINE)
  free = int(limit) - int(used) + (int(cache[1]) if cache else 0)
  return max(0, free)


def _read(root, path):
  with contextlib.suppress(OSError):
    with open(os.path.join(root, path.lstrip('/'))) as file:
      return file.read()
  return ''


def describe_shortage(count, megabytes, what, free):
  """Returns a sentence if processes don't fit into the memory, else None.

  Args:
    count: int, how many processes.
    megabytes: float, what each takes.
    what: string, what they are.
    free: int, see `free_bytes`.
  """
  needed = count * megabytes * 1e6
  if free is None or needed <= free:
    return None
  return (
    f'{count} {what} take about {needed / _GB:.1f} GB, but {free / _GB:.1f} GB '
    'of memory are free: the system may kill some of them.'
  )
