# Licensed under the Apache License, Version 2.0; see LICENSE.
"""DeepMind Lab's compiled maps: kept, in a folder that processes share.

Many levels make a map of their own for each episode and compile it, which takes
up to 40 s. With the compiled map at hand, an episode begins within half a
second.
"""

import contextlib
import hashlib
import logging
import os
import uuid

_MAP = '.map'  # A compiled map, with its digest behind.
_TEMPORARY = '.tmp'  # What is being written, or was when its process died.
_OURS = (_MAP, _TEMPORARY)  # All that may be removed.
_DIGEST_BYTES = hashlib.sha256().digest_size

# What removals leave of the cache's bound. A process looks at the folder again
# once it has written 1/64 of what was free: so up to 64 processes together stay
# within the bound, and none lists thousands of files for each map.
_LEFT_FULL = 0.9
_SHARE = 64


class LocalLevelCache:
  """Keeps compiled maps in a folder; many processes may use it at once.

  DeepMind Lab calls `fetch` and `write`. A map that was damaged on the disk
  counts as missing. What was not used for the longest time is removed first.
  """

  def __init__(self, cache_dir, max_bytes=None):
    """Uses a folder, which is made with the first map.

    Args:
      cache_dir: path of the folder.
      max_bytes: int, of all maps in it; None for no bound.
    """
    self._cache_dir = cache_dir
    self._max_bytes = max_bytes
    self._bytes_until_look = 0

  def fetch(self, key, pk3_path):
    """Copies the map `key` to the file `pk3_path`; returns whether it could."""
    path = self._path(key)
    try:
      with open(path, 'rb') as file:
        content = file.read()
      compiled, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
      if hashlib.sha256(compiled).digest() != digest:
        logging.getLogger(__name__).warning(
          'The map %s is damaged: it is compiled anew.', path
        )
        os.unlink(path)
        return False
      with open(pk3_path, 'wb') as file:
        file.write(compiled)
    except OSError:
      return False
    # Its time says when it was used last. It may be another user's.
    with contextlib.suppress(OSError):
      os.utime(path)
    return True

  def write(self, key, pk3_path):
    """Stores the file `pk3_path` as the map `key`."""
    path = self._path(key)
    if os.path.exists(path):
      return
    # Another process may read or write the same key: it must see all or nothing
    # of the file, and a full disk must not end the training.
    temporary = f'{path}.{uuid.uuid4().hex}{_TEMPORARY}'
    try:
      os.makedirs(self._cache_dir, exist_ok=True)
      with open(pk3_path, 'rb') as file:
        compiled = file.read()
      with open(temporary, 'wb') as file:
        file.write(compiled + hashlib.sha256(compiled).digest())
      os.replace(temporary, path)
      self._bytes_until_look -= len(compiled) + _DIGEST_BYTES
      if self._max_bytes is not None and self._bytes_until_look <= 0:
        self._make_room()
    except OSError as error:
      logging.getLogger(__name__).warning('Map not cached: %s', error)
      with contextlib.suppress(OSError):
        os.unlink(temporary)

  def _path(self, key):
    return os.path.join(self._cache_dir, key + _MAP)

  def _make_room(self):
    """Removes what was not used for the longest time, if there is too much.

    Processes that do so at the same time remove the same files.
    """
    files = self._files()
    total = sum(size for _, size, _ in files)
    if total > self._max_bytes:
      for _, size, path in sorted(files):
        if total <= _LEFT_FULL * self._max_bytes:
          break
        with contextlib.suppress(FileNotFoundError):
          os.unlink(path)
        total -= size
    self._bytes_until_look = (self._max_bytes - total) / _SHARE

  def _files(self):
    """Returns (time, bytes, path) of each of the cache's files."""
    files = []
    with os.scandir(self._cache_dir) as entries:
      for entry in entries:
        if entry.name.endswith(_OURS):
          with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.path))
    return files
