"""The tab that samples: settings, progress, the grid, downloads."""

import os
import pathlib
import tempfile
import time

import gradio as gr
import numpy as np

from diffit_jax.npz import write_npz
from diffit_jax.pictures import page as grid_of
from diffit_jax.pictures import write_png
from diffit_jax.web import controls, frames, words

_WORK = "sample"  # what `words.Stops` calls it


class SamplesTab:
  """Its components; `drawn` holds the settings of the samples on show."""

  def __init__(self, studio, stops: words.Stops):
    self._studio, self._stops = studio, stops
    self.drawn = gr.State(None)
    with gr.Row():
      with gr.Column(scale=2, min_width=300):
        self.draw = controls.Draw(studio)
        with gr.Row():
          run = gr.Button("Sample", variant="primary", min_width=100)
          stop = gr.Button("Stop", variant="stop", min_width=100)
        with gr.Accordion("Solver, guidance, weights", open=False):
          self.sampler = controls.Sampler(studio)
      with gr.Column(scale=3, min_width=300):
        self._status = words.status_box()
        self.gallery = frames.gallery("Samples", "samples", "crisp")
        with gr.Row():
          self._png = gr.DownloadButton(
            "Download PNG", interactive=False, min_width=120
          )
          self._npz = gr.DownloadButton(
            "Download npz", interactive=False, min_width=120
          )
        self._command = gr.Textbox(
          label="Command line that makes the same bits",
          lines=3,
          interactive=False,
          buttons=["copy"],
          elem_id="command",
        )
    self._listen(run, stop)

  def settings(self, *values):
    """`Settings` from the values of `inputs`."""
    num = len(self.draw.inputs)
    return controls.make_settings(
      self.draw.read(*values[:num]), self.sampler.read(*values[num:])
    )

  @property
  def inputs(self) -> list:
    """All controls of the setting."""
    return [*self.draw.inputs, *self.sampler.inputs]

  def _listen(self, run, stop) -> None:
    def ask_to_stop(request: gr.Request):
      self._stops.set(request.session_hash, _WORK)

    outputs = [
      self._status, self.gallery, self._png, self._npz, self._command,
      self.drawn,
    ]  # fmt: skip
    run.click(
      words.reporting(self._status, self._sample),
      self.inputs,
      outputs,
      show_progress="hidden",
      api_name="sample",
    )
    stop.click(ask_to_stop, show_progress="hidden")

  def _sample(self, request: gr.Request, *values):
    should_stop = self._stops.begin(request.session_hash, _WORK)
    yield {self._status: words.said("waiting for the device")}
    settings = self.settings(*values)
    command = self._studio.command(settings)
    begun = time.monotonic()
    for update in words.follow(
      self._status, self._studio.sample(settings, should_stop)
    ):
      if isinstance(update, dict):
        yield update
    seconds = time.monotonic() - begun
    png, npz = self._write(update.samples, update.labels)
    num = len(update.samples)
    yield {
      self._status: words.said(f"done: {num} samples in {seconds:.1f} s"),
      self.gallery: gr.Gallery(
        captioned(update.samples, update.labels, self._studio.class_names),
        selected_index=None,
      ),
      self._png: gr.DownloadButton(value=png, interactive=True),
      self._npz: gr.DownloadButton(value=npz, interactive=True),
      self._command: command,
      self.drawn: settings,
    }

  def _write(self, samples: np.ndarray, labels) -> tuple[str, str]:
    """The files to download, as `sample` writes them: (grid, npz)."""
    folder = tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])
    shape = (*samples.shape[:3], 3)
    members = {"arr_0": np.broadcast_to(samples, shape)}
    if self._studio.class_names:
      members["arr_1"] = labels.astype(np.int64)
    npz = pathlib.Path(folder, f"samples_{'x'.join(map(str, shape))}.npz")
    write_npz(npz, members)
    write_png(png := pathlib.Path(folder, "grid.png"), grid_of(samples[:100]))
    return str(png), str(npz)


def captioned(samples: np.ndarray, labels, names: list[str]) -> list[tuple]:
  """(picture, caption) of uint8 [n, h, w, c], for a gallery."""
  return [
    (frames.flat(image), f"sample {i}{_class(label, names)}")
    for i, (image, label) in enumerate(zip(samples, labels))
  ]


def _class(label: int, names: list[str]) -> str:
  if not names:
    return ""
  return f", class {names[label]}" if label < len(names) else ", no class"
