# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Videos of episodes as the agent sees them.

In: frames and lines of text. Out: an MP4 file.
"""

import contextlib
import os

import av
import cv2
import numpy as np

_WIDTH = 336  # Frames that are narrower are enlarged to at least this.
_LINE_HEIGHT = 18  # In pixels, of a line of text.
_WHITE = (255, 255, 255)


@contextlib.contextmanager
def record(path, frames_per_second):
  """Writes an MP4 file (H.264), whole or not at all.

  Args:
    path: of the file.
    frames_per_second: int.

  Yields:
    A function that adds a picture: of uint8 [height, width, 1 or 3] and a list
    of lines to write below it.
  """
  temporary = path + '.tmp'
  try:
    with av.open(temporary, 'w', format='mp4') as container:
      stream = container.add_stream('libx264', rate=frames_per_second)
      stream.pix_fmt = 'yuv420p'  # The one format that all players support.

      def add(frame, lines):
        picture = draw(frame, lines)
        stream.height, stream.width = picture.shape[:2]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))

      yield add
      container.mux(stream.encode())
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(temporary)


def draw(frame, lines):
  """Returns an enlarged frame with text below it.

  Args:
    frame: uint8 [height, width, 1 or 3].
    lines: list of strings.

  Returns:
    uint8 [height, width, 3], both even, as the encoder needs.
  """
  height, width, _ = frame.shape
  scale = -(-_WIDTH // width)
  # Not smoothed: people see the same pixels as the agent.
  picture = cv2.resize(
    np.ascontiguousarray(np.broadcast_to(frame, (height, width, 3))),
    (scale * width, scale * height),
    interpolation=cv2.INTER_NEAREST,
  )
  band = _LINE_HEIGHT * len(lines) + _LINE_HEIGHT // 2
  picture = np.pad(
    picture,
    [(0, band + (scale * height + band) % 2), (0, scale * width % 2)]
    + [(0, 0)],
  )
  for i, line in enumerate(lines, start=1):
    origin = (6, scale * height + i * _LINE_HEIGHT - 2)
    cv2.putText(
      picture,
      line,
      origin,
      cv2.FONT_HERSHEY_SIMPLEX,
      0.45,
      _WHITE,
      1,
      cv2.LINE_AA,
    )
  return picture
