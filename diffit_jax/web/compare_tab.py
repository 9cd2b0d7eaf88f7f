"""The tab of two settings from the same noise, and their difference."""

import gradio as gr
import numpy as np

from diffit_jax.errors import UserError
from diffit_jax.pictures import page as grid_of
from diffit_jax.web import controls, frames, heat, words

_WORK = "compare"  # what `words.Stops` calls it


class CompareTab:
  """Its components: one draw, two samplers, three pictures."""

  def __init__(self, studio, stops: words.Stops):
    self._studio, self._stops = studio, stops
    gr.Markdown(
      "Two settings, A and B, from the same noise and the same classes."
    )
    self._draw = controls.Draw(studio)
    with gr.Row():
      with gr.Column(min_width=300):
        with gr.Accordion("Setting A", open=True):
          self._a = controls.Sampler(studio, "A")
      with gr.Column(min_width=300):
        with gr.Accordion("Setting B", open=True):
          self._b = controls.Sampler(studio, "B")
    with gr.Row():
      run = gr.Button("Compare", variant="primary", min_width=100)
      stop = gr.Button("Stop comparing", variant="stop", min_width=100)
    self._status = words.status_box()
    with gr.Row():
      self._pictures = [
        frames.picture(label, name, 260)
        for label, name in (
          ("A", "compare_a"),
          ("B", "compare_b"),
          ("|A - B|", "difference"),
        )  # fmt: skip
      ]
    self.samplers = (self._a, self._b)
    self._listen(run, stop)

  def _listen(self, run, stop) -> None:
    def ask_to_stop(request: gr.Request):
      self._stops.set(request.session_hash, _WORK)

    run.click(
      words.reporting(self._status, self._compare),
      [*self._draw.inputs, *self._a.inputs, *self._b.inputs],
      [self._status, *self._pictures],
      show_progress="hidden",
      api_name="compare",
    )
    stop.click(ask_to_stop, show_progress="hidden")

  def _settings(self, values) -> list:
    """The two `Settings`."""
    num, each = len(self._draw.inputs), len(self._a.inputs)
    draw = self._draw.read(*values[:num])
    first, second = values[num : num + each], values[num + each :]
    return [
      controls.make_settings(draw, sampler.read(*part))
      for sampler, part in zip(self.samplers, (first, second))
    ]

  def _compare(self, request: gr.Request, *values):
    should_stop = self._stops.begin(request.session_hash, _WORK)
    yield {self._status: words.said("waiting for the device")}
    made = []
    for name, settings in zip("AB", self._settings(values)):
      for update in words.follow(
        self._status, self._studio.sample(settings, should_stop), name
      ):
        if isinstance(update, dict):
          yield update
      made.append(update.samples)
    yield self._result(*made)

  def _result(self, a: np.ndarray, b: np.ndarray) -> dict:
    if a.shape != b.shape:
      raise UserError(f"A makes samples of {a.shape[1:]}, B of {b.shape[1:]}")
    gaps = heat.difference(a, b)
    same = int((gaps == 0).all((1, 2)).sum())
    text = (
      f"mean of |A - B|: {gaps.mean():.3f} of 255; largest {gaps.max():.0f};"
      f" {same} of {len(a)} samples have the same bits"
    )
    large = lambda picture: frames.flat(heat.enlarge(grid_of(picture), 480))
    update = lambda picture, label, alt: gr.Image(
      large(picture), label=label, alt_text=alt
    )
    top = f"|A - B|: black 0, yellow {gaps.max():.0f} of 255"
    return dict(
      zip(
        self._pictures,
        (
          update(a, "A", f"{len(a)} samples of setting A."),
          update(b, "B", f"{len(b)} samples of setting B."),
          update(heat.heat(gaps), top, f"Heat map of the difference; {text}."),
        ),
      )
    ) | {self._status: words.said(text)}
