# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of what is known of the memory."""

import os

import pytest

import memory

_MEMINFO = 'MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:   5000 kB\n'


def free(folder, meminfo=_MEMINFO, **cgroup):
  """Returns the free bytes of a machine with these files."""
  (folder / 'proc').mkdir()
  (folder / 'proc' / 'meminfo').write_text(meminfo)
  (folder / 'sys' / 'fs' / 'cgroup').mkdir(parents=True)
  for name, content in cgroup.items():
    (folder / 'sys' / 'fs' / 'cgroup' / f'memory.{name}').write_text(content)
  return memory.free_bytes(str(folder))


def test_a_machine_has_what_it_tells(tmp_path):
  assert free(tmp_path) == 5000 * 1024


@pytest.mark.parametrize(
  ('cgroup', 'expected'),
  [
    ({'max': 'max\n', 'current': '10\n'}, 5000 * 1024),
    ({'max': '3000\n', 'current': '1000\n'}, 2000),
    (
      {
        'max': '3000\n',
        'current': '1000\n',
        'stat': 'anon 50\ninactive_file 600\nactive_file 7\n',
      },
      2600,
    ),
    ({'max': '3000\n', 'current': '4000\n'}, 0),
    ({'max': '9000000\n', 'current': '1000\n'}, 5000 * 1024),
  ],
)
def test_a_container_may_have_less(tmp_path, cgroup, expected):
  assert free(tmp_path, **cgroup) == expected


def test_nobody_knows(tmp_path):
  assert free(tmp_path, meminfo='') is None
  assert memory.describe_shortage(48, 200, 'environments', None) is None


def test_this_machine_has_some():
  total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  assert 0 < memory.free_bytes() < total


def test_shortage_is_described():
  assert memory.describe_shortage(48, 200, 'environments', 10**10) is None
  assert memory.describe_shortage(48, 200, 'environments', 4_100_000_000) == (
    '48 environments take about 9.6 GB, but 4.1 GB of memory are free: the '
    'system may kill some of them.'
  )
