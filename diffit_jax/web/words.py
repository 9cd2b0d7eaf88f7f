"""What the page says while it works: status, errors, stop requests."""

from collections.abc import Callable, Iterator
import functools
import html
import threading
import time

from absl import logging
import gradio as gr

from diffit_jax.errors import UserError
from diffit_jax.stop import Stopped

_INTERVAL = 0.15  # seconds between two messages to the browser


class Stops:
  """Requests to stop: one for each kind of work of each open page."""

  def __init__(self):
    self._events = {}

  def begin(self, session: str, kind: str) -> Callable[[], bool]:
    """A new piece of work of a page; returns whether it is to stop."""
    event = self._events[session, kind] = threading.Event()
    return event.is_set

  def set(self, session: str, kind: str) -> None:
    """Asks one kind of work of a page to stop."""
    if event := self._events.get((session, kind)):
      event.set()

  def forget(self, session: str) -> None:
    """Asks all work of a page that was closed to stop."""
    for key in [key for key in list(self._events) if key[0] == session]:
      self._events.pop(key).set()

  def set_all(self) -> None:
    """Asks all work to stop."""
    for event in list(self._events.values()):
      event.set()


def status_box():
  """The line of a tab that says what happens; screen readers read it out."""
  return gr.HTML("", elem_classes="status", min_height=28)


def said(text: str) -> str:
  """HTML of a message."""
  return f"<p>{html.escape(text)}</p>"


def failed(text: str) -> str:
  """HTML of an error, in the words of the command line."""
  return f'<p class="error" role="alert">error: {html.escape(text)}</p>'


def progress(message: str, done: int, total: int) -> str:
  """HTML of a phase of the work, with a bar of the samples that are made."""
  if message == "compiling":
    message = "compiling, once for these settings"
  bar = (
    f'<progress aria-label="Samples made" max="{total}"'
    f' value="{done}"></progress>'
  )
  count = f'<span aria-hidden="true">{done} of {total} samples</span>'
  return f"<p>{html.escape(message)}</p><p class=bar>{bar} {count}</p>"


def reporting(
  status, work: Callable[..., Iterator[dict]]
) -> Callable[..., Iterator[dict]]:
  """`work`, with what goes wrong in it told in `status`.

  Args:
    status: component that tells.
    work: event function that yields {component: value}.
  """

  @functools.wraps(work)  # Gradio reads what the arguments are
  def report(*args):
    try:
      yield from work(*args)
    except Stopped:
      yield {status: said("stopped")}
    except UserError as error:
      yield {status: failed(" ".join(str(error).split()))}
    except Exception as error:  # the terminal has the rest
      logging.exception("the page failed")
      reason = f"{type(error).__name__}: {error}"
      yield {status: failed(f"{reason[:300]} (the terminal says where)")}

  return report


def follow(status, steps, name: str = "") -> Iterator[dict | object]:
  """Updates of `status` from a `Studio.sample`, and at last its end.

  Yields:
    {status: HTML}, not too often, and the last `Progress` itself.
  """
  told, phase = 0.0, ""
  for step in steps:
    if step.samples is not None:
      yield step
      return
    now = time.monotonic()
    if step.message != phase or now - told > _INTERVAL:
      told, phase = now, step.message
      text = f"{name}: {phase}" if name and phase != "compiling" else phase
      yield {status: progress(text, step.done, step.total)}
