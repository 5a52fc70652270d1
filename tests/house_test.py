# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tests of the rooms: which file imports which, and who reads the flags."""

import ast
import os

import pytest

from helpers import ROOT

# What a file may know of: of ours, all that it imports, and what these import.
_ALLOWED = {
  'vtrace': set(),
  'dynamic_batching': {'native', 'private_apis'},
  'py_process': {'native'},
  'convolution': {'native'},
  'popart': set(),
  'native': set(),
  'private_apis': set(),
  'scores': set(),
  'errors': set(),
  'dmlab30': {'scores'},
  'atari57': {'scores'},
  'action_sets': set(),
  'environments': {
    'action_sets',
    'dmlab_choices',
    'dmlab_maps',
    'gym_kinds',
    'native',
    'py_process',
  },
  'dmlab_choices': set(),
  'dmlab_maps': {'native', 'py_process'},
  'gym_kinds': set(),
  'recurrence': {'native'},
  'agent': {'convolution', 'native', 'popart', 'private_apis', 'recurrence'},
}
_LICENSE = 'Licensed under the Apache License, Version 2.0; see LICENSE.'


def parse(path):
  with open(path) as file:
    return ast.parse(file.read())


def rooms():
  """Returns the syntax trees of the files at the top level by name."""
  return {
    name[:-3]: parse(os.path.join(ROOT, name))
    for name in os.listdir(ROOT)
    if name.endswith('.py')
  }


def imported(tree):
  """Returns the names of the modules that a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name.partition('.')[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add(node.module.partition('.')[0])
  return names


def imports():
  """Returns a dict from each of our files to the set of ours it imports."""
  trees = rooms()
  return {name: imported(tree) & set(trees) for name, tree in trees.items()}


def reachable(name, graph):
  found, todo = set(), [name]
  while todo:
    for other in graph[todo.pop()] - found:
      found.add(other)
      todo.append(other)
  return found


def test_imports_make_no_circle():
  graph = imports()
  assert 'experiment' in graph
  assert [name for name in graph if name in reachable(name, graph)] == []


def test_nothing_imports_the_program():
  graph = imports()
  assert [name for name in graph if 'experiment' in graph[name]] == []


@pytest.mark.parametrize('name', _ALLOWED)
def test_what_serves_everywhere_knows_nothing_of_training(name):
  graph = imports()
  assert reachable(name, graph) <= _ALLOWED[name]


def test_flags_are_read_by_the_program_alone():
  readers = {
    name
    for name, tree in rooms().items()
    if any(
      getattr(node, 'id', getattr(node, 'attr', None)) == 'FLAGS'
      or (isinstance(node, ast.ImportFrom) and 'flags' in str(node.module))
      for node in ast.walk(tree)
    )
  }
  assert readers == {'command_line', 'experiment'}


def test_each_file_says_what_it_is_for():
  for name, tree in rooms().items():
    assert ast.get_docstring(tree), name


def test_each_source_file_has_the_licence():
  missing = []
  for folder, folders, files in os.walk(ROOT):
    folders[:] = [
      f for f in folders if not f.startswith('.') and f not in ('logs',)
    ]
    for file in files:
      if file.endswith(('.py', '.cc', '.sh')):
        path = os.path.join(folder, file)
        with open(path, encoding='utf-8') as source:
          if _LICENSE not in source.read(300):
            missing.append(path)
  assert missing == []
