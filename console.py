# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a user sees of a run, and how signals end it.

In: progress, lines to print, signals. Out: a live bar on a terminal, else
lines. A console that can't be written, such as a closed pipe or a terminal that
is gone, never ends a run.
"""

import contextlib
import os
import signal
import sys
import time

import tqdm

REPORT_SECONDS = 30  # Between two reports.
_POLL_SECONDS = 0.5  # Signals are handled between two waits, so: short ones.
_SAME_SECONDS = 1  # Within these, a signal is the same one sent twice.


def prepare_output():
  """Lets everything be printed, whatever the console's encoding is.

  What it doesn't have, in the name of a folder for example, is escaped.
  """
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(errors='backslashreplace')


def print_line(line):
  """Prints a line; where nobody can read it any more, it is dropped."""
  try:
    print(line, flush=True)
  except (OSError, ValueError):  # A ValueError: the file was closed.
    _drop_output()


def _drop_output():
  """Lets standard output that can't be written lead nowhere.

  Else what is still buffered would fail again when Python ends.
  """
  with open(os.devnull, 'w') as devnull, contextlib.suppress(OSError):
    os.dup2(devnull.fileno(), 1)


class Console:
  """Shows progress: a live bar on a terminal, else a line with each report."""

  def __init__(self, total, done, unit):
    """Begins.

    Args:
      total: int, how much there is to do.
      done: int, how much of it was done before.
      unit: string, what is counted.
    """
    self._total = total
    self._unit = unit
    self._bar = tqdm.tqdm(
      total=total,
      initial=done,
      unit=f' {unit}',
      unit_scale=total > 10_000,
      dynamic_ncols=True,
      disable=not sys.stderr.isatty(),
    )
    self._last = (time.monotonic(), done)

  @property
  def is_live(self):
    """Whether there is a live bar."""
    return not self._bar.disable

  def progress(self, done, postfix=''):
    """Updates the live bar.

    Args:
      done: int, how much is done.
      postfix: string, shown behind the bar.
    """
    if not self.is_live:
      return
    try:
      self._bar.set_postfix_str(postfix, refresh=False)
      self._bar.update(done - self._bar.n)
    except OSError:  # The terminal is gone.
      self._bar.disable = True

  def report(self, done, lines):
    """Prints how far the run is, its rate, and some lines below it."""
    now = time.monotonic()
    begin, begin_done = self._last
    self._last = (now, done)
    rate = (done - begin_done) / (now - begin)
    left = '?'
    if rate:
      left = tqdm.tqdm.format_interval((self._total - done) / rate)
    self.print_line(
      f'{done / self._total:.1%} of {self._total:,} {self._unit}, '
      f'{rate:,.0f} {self._unit}/s, {left} left'
    )
    for line in lines:
      self.print_line('  ' + line)

  def print_line(self, line):
    """Prints a line, above the live bar if there is one."""
    if not self.is_live:
      print_line(line)
      return
    try:
      self._bar.write(line)
    except OSError:
      self._bar.disable = True

  def close(self):
    """Ends the live bar."""
    with contextlib.suppress(OSError):
      self._bar.close()


def watch(wait, received_signals, poll, report=lambda: None):
  """Waits until a run has ended or a signal has come.

  Args:
    wait: function of a time in seconds, that returns whether the run has ended
      by then.
    received_signals: list, see `stop_signals`.
    poll: function that is called every half second.
    report: function that is called every `REPORT_SECONDS`.
  """
  next_report = time.monotonic() + REPORT_SECONDS
  while not (received_signals or wait(_POLL_SECONDS)):
    poll()
    now = time.monotonic()
    if now >= next_report:
      # Counted from now: after the machine was suspended, one is enough.
      next_report = now + REPORT_SECONDS
      report()


@contextlib.contextmanager
def stop_signals():
  """Collects the signals that end a run; the second one ends the program.

  These are SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal is gone) unless
  that is ignored, as with nohup. Some programs, `timeout` for one, send a
  signal to the process and once more to its group: these two count as one.

  Yields:
    List of the `signal.Signals` that came.
  """
  received, times = [], []

  def receive(number, _):
    now = time.monotonic()
    if not received:
      received.append(signal.Signals(number))
      times.append(now)
    elif now > times[0] + _SAME_SECONDS:
      # Environment processes notice by themselves.
      os._exit(128 + number)

  numbers = [signal.SIGINT, signal.SIGTERM]
  if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    numbers.append(signal.SIGHUP)
  previous = [signal.signal(number, receive) for number in numbers]
  signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
  try:
    yield received
  finally:
    for number, handler in zip(numbers, previous, strict=True):
      signal.signal(number, handler)


def hold_signals():
  """Keeps signals for `stop_signals` of the program that this one becomes."""
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
