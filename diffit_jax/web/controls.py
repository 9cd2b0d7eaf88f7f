"""The controls of a setting, and what they say as `terms.Settings`.

A field that is left as the config has it is no part of the setting, so that
the command line that makes the same samples stays short.
"""

from collections.abc import Sequence
import functools
import math

import gradio as gr

from diffit_jax.errors import UserError
from diffit_jax.web.terms import Settings

NEWEST = "newest"
FIRST = "the run's first"
_SCHEDULES = ("constant", "power_cosine")


class Draw:
  """What is drawn: classes, seed, number."""

  def __init__(self, studio, num: int = 16):
    names = studio.class_names
    choices = [(name, str(i)) for i, name in enumerate(names)]
    self._classes = gr.Dropdown(
      [*choices, ("no class", str(len(names)))],
      multiselect=True,
      label="Classes",
      info="Dealt out in turn; none chosen: at random.",
      visible=bool(names),
    )
    with gr.Row():
      self._seed = gr.Number(0, label="Seed", precision=0, min_width=90)
      self._num = gr.Number(num, label="Samples", precision=0, min_width=90)
    self.inputs = [self._classes, self._seed, self._num]

  @staticmethod
  def read(classes: list[str] | None, seed, num) -> dict:
    """Fields of `Settings` from the values of `inputs`."""
    return {
      "labels": ",".join(classes) if classes else "random",
      "seed": _whole("seed", seed, 0, 2**32 - 1),
      "num": _whole("num", num, 1),
    }


class Sampler:
  """How it is drawn: weights, solver, guidance."""

  def __init__(self, studio, name: str = ""):
    """Makes the controls; `name` distinguishes two of these on one tab."""
    self._defaults = studio.defaults
    self._fields = {}
    label = lambda text: f"{text} ({name})" if name else text
    with gr.Row():
      self._add(
        "solver",
        gr.Dropdown(
          studio.solvers,
          value=self._initial("solver"),
          label=label("Solver"),
          min_width=150,
        ),
      )
      self._number("steps", label("Steps"), precision=0)
    with gr.Row():
      self.average = gr.Dropdown(
        [FIRST, *studio.averages],
        value=FIRST,
        allow_custom_value=True,
        label=label("Average of the weights"),
        info="Also a width such as 0.08.",
        min_width=150,
      )
      self.step = gr.Dropdown(
        step_choices(studio.steps()),
        value=NEWEST,
        label=label("Checkpoint"),
        info="Step of the training.",
        min_width=150,
      )
    with gr.Row(visible=bool(studio.class_names)):
      self._number("guidance_scale", label("Guidance scale"), info="1 is off.")
      self._add(
        "guidance_schedule",
        gr.Dropdown(
          list(_SCHEDULES),
          value=self._initial("guidance_schedule"),
          label=label("Guidance schedule"),
          min_width=150,
        ),
      )
    with gr.Row(visible=bool(studio.class_names)):
      self._text(
        "guidance_interval", label("Guidance interval"), "Levels low,high."
      )
      self._text("guidance_power", label("Power"), "Of power_cosine.")
    self._text("solver_options", label("Solver options"), "Such as S_churn=40.")
    if studio.has_guide:
      self._text("guide_scale", label("Autoguidance scale"), "1 is off.")
    self.inputs = [self.average, self.step, *self._fields.values()]

  def read(self, average, step, *values) -> dict:
    """Fields of `Settings` from the values of `inputs`."""
    changed = {
      name: _READERS.get(name, lambda value: value)(value)
      for name, value in zip(self._fields, values)
      if value not in (None, "") and value != self._initial(name)
    }
    return {
      "ema": None if average in (None, "", FIRST) else average.strip(),
      "step": None if step in (None, NEWEST) else int(step),
      "sampler": tuple(changed.items()),
    }

  def _initial(self, name: str):
    """What the control of a field shows at first."""
    value = self._defaults.get(name)
    if name == "guidance_schedule":
      return value or _SCHEDULES[0]
    if name not in _TEXTS or value is None:
      return value
    is_row = isinstance(value, Sequence) and not isinstance(value, str)
    return ",".join(map(str, value)) if is_row else str(value)

  def _add(self, name: str, component) -> None:
    self._fields[name] = component

  def _number(self, name: str, label: str, **kwargs) -> None:
    value = self._initial(name)
    self._add(name, gr.Number(value, label=label, min_width=150, **kwargs))

  def _text(self, name: str, label: str, info: str) -> None:
    """A field that may be empty, which Gradio's numbers may not."""
    value = self._initial(name) or ""
    self._add(name, gr.Textbox(value, label=label, info=info, min_width=150))


def step_choices(steps: list[int]) -> list[str]:
  """What a dropdown of checkpoints lists, the newest first."""
  return [NEWEST, *map(str, sorted(steps, reverse=True))]


def make_settings(draw: dict, sampler: dict) -> Settings:
  """`Settings` of what both kinds of controls read."""
  return Settings(**draw, **sampler)


def _whole(name: str, value, low: int, high: float = math.inf) -> int:
  """A whole number in a range; Gradio gives None for an empty field."""
  if value is None or not low <= value <= high:
    bound = f"at least {low}" if high == math.inf else f"{low} to {high}"
    raise UserError(f"--{name}={value}: write a whole number, {bound}")
  return int(value)


def _interval(text: str) -> tuple[float, ...]:
  try:
    return tuple(float(end) for end in text.split(","))
  except ValueError as error:
    raise UserError(
      f"--guidance_interval={text}: write two noise levels as 100,600"
    ) from error


def _float(name: str, text: str) -> float:
  try:
    return float(text)
  except ValueError as error:
    raise UserError(f"--{name}={text}: write a number") from error


_READERS = {
  "guidance_interval": _interval,
  "guidance_power": functools.partial(_float, "guidance_power"),
  "guide_scale": functools.partial(_float, "guide_scale"),
}
_TEXTS = {"solver_options", *_READERS}
