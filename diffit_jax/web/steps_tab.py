"""The tab of one sample: its denoising strip, and what a token reads."""

import gradio as gr
import numpy as np

from diffit_jax.web import frames, heat, words
from diffit_jax.web.samples_tab import SamplesTab

_MEAN = "mean of the heads"
_WIDTH = 200  # of a picture, at least, in pixels


class StepsTab:
  """Its components; follows the samples that `samples` shows."""

  def __init__(self, studio, samples: SamplesTab):
    self._studio, self._samples = studio, samples
    gr.Markdown(
      "A sample of the tab Samples, as it was made. Choose it here, or click it"
      " there."
    )
    with gr.Row():
      self._index = gr.Number(
        0, label="Sample", precision=0, minimum=0, min_width=100
      )
      self._columns = gr.Slider(
        2, 18, 8, step=1, label="Pictures in the strip", min_width=260
      )
      show = gr.Button("Show steps", variant="primary", min_width=140)
    self._status = words.status_box()
    self._strip = frames.gallery(
      "Clean image as predicted (x-hat)", "strip", "crisp wider"
    )
    if studio.attentions.blocks:
      self._make_attention()
    self._listen(show)

  def _make_attention(self) -> None:
    blocks = self._studio.attentions.blocks
    gr.Markdown(
      "## Attention\nWhat one token reads from the others, at one evaluation of"
      " the network. Click a place of the picture, or write its row and column."
      " Black is 0, and yellow the most that is read."
    )
    with gr.Row():
      self._evaluation = gr.Number(
        0, label="Evaluation", precision=0, minimum=0, min_width=100
      )
      self._block = gr.Dropdown(
        blocks, value=blocks[0], label="Block", min_width=220
      )
      self._head = gr.Dropdown(
        self._heads(blocks[0]), value=_MEAN, label="Head", min_width=220
      )
    with gr.Row():
      self._row = gr.Number(
        0, label="Token's row", precision=0, minimum=0, min_width=100
      )
      self._column = gr.Number(
        0, label="Token's column", precision=0, minimum=0, min_width=100
      )
      self._show_attention = gr.Button(
        "Show attention", variant="primary", min_width=140
      )
    self._attention_status = words.status_box()
    self._size = gr.State(None)  # (height, width) of the pictures
    with gr.Row():
      self._state = frames.picture(
        "Noisy image at that evaluation", "state", _WIDTH
      )
      self._maps = [
        frames.picture(subject, name, _WIDTH)
        for name, subject in zip(("weights", "beside"), self._subjects())
      ]
      self._bias = frames.picture("Learned bias B of the head", "bias", _WIDTH)

  def _listen(self, show) -> None:
    source = [self._samples.drawn, *self._samples.inputs]
    show.click(
      words.reporting(self._status, self._show_steps),
      [self._index, self._columns, *source],
      [self._status, self._strip],
      show_progress="hidden",
      api_name="steps",
    )
    self._samples.gallery.select(
      _chosen, None, self._index, show_progress="hidden"
    )
    if not self._studio.attentions.blocks:
      return
    place = [self._row, self._column]
    inputs = [self._index, self._evaluation, self._block, self._head]
    outputs = [
      self._attention_status, self._state, *self._maps, self._bias, self._size,
    ]  # fmt: skip
    attention = words.reporting(self._attention_status, self._attention)
    self._show_attention.click(
      attention,
      [*inputs, *place, *source],
      outputs,
      show_progress="hidden",
      api_name="attention",
    )
    self._listen_to_clicks(attention, inputs, place, source, outputs)

  def _listen_to_clicks(self, attention, inputs, place, source, outputs):
    """A click on a picture, and on one of the strip."""

    def choose_evaluation(event: gr.SelectData):
      return int(event.value["caption"].split()[1].rstrip(","))

    def choose_token(block, size, event: gr.SelectData):
      across, down = event.index  # of the pixel, in the picture's own size
      side = self._studio.attentions.side(block)
      places = zip((down, across), size)
      return [min(side * x // n, side - 1) for x, n in places]

    self._strip.select(
      choose_evaluation, None, self._evaluation, show_progress="hidden"
    )
    self._block.change(
      lambda block: gr.Dropdown(self._heads(block), value=_MEAN),
      self._block,
      self._head,
      show_progress="hidden",
    )
    for picture in (self._state, *self._maps):
      picture.select(
        choose_token,
        [self._block, self._size],
        place,
        show_progress="hidden",
      ).then(
        attention,
        [*inputs, *place, *source],
        outputs,
        show_progress="hidden",
      )

  def _heads(self, block: str) -> list[str]:
    num = self._studio.attentions.num_heads(block)
    return [_MEAN, *map(str, range(num))]

  def _settings(self, drawn, values):
    """Of the samples on show; before there are any, of the controls."""
    return drawn or self._samples.settings(*values)

  def _show_steps(self, index, columns, drawn, *values):
    settings = self._settings(drawn, values)
    yield {self._status: words.said("working: the path of that sample")}
    strip = self._studio.strip(settings, int(index or 0), int(columns))
    pictures = [
      (frames.flat(image), f"evaluation {number}, noise level {level:.3g}")
      for number, level, image in zip(*strip)
    ]
    yield {
      self._status: words.said(
        f"sample {int(index or 0)}: {len(pictures)} of its evaluations"
      ),
      self._strip: gr.Gallery(pictures, selected_index=None),
    }

  def _attention(
    self, index, evaluation, block, head, row, column, drawn, *values
  ):
    settings = self._settings(drawn, values)
    yield {self._attention_status: words.said("working: attention")}
    token = int(row or 0), int(column or 0)
    found = self._studio.attention(
      settings,
      int(index or 0),
      int(evaluation or 0),
      block,
      token,
      None if head == _MEAN else int(head),
    )
    side = self._studio.attentions.side(block)
    yield {
      self._attention_status: words.said(
        f"{block}, {_head_name(head)}, evaluation {int(evaluation or 0)}:"
        f" the token in row {token[0]}, column {token[1]}"
      )
    } | self._pictures(found, token, side)

  def _pictures(self, found, token: tuple[int, int], side: int) -> dict:
    where = f"row {token[0]}, column {token[1]}"
    state = heat.mark(heat.enlarge(found.state), token, side)
    return {
      self._state: gr.Image(
        state, alt_text=f"The noisy image; a frame marks the token in {where}."
      ),
      self._bias: _bias(found.bias),
      self._size: state.shape[:2],
    } | {
      shown: _map(weights, token, side, state.shape, subject)
      for shown, weights, subject in zip(
        self._maps, found.maps, self._subjects()
      )
    }

  def _subjects(self) -> list[str]:
    """Who reads in each map: the token or, of several networks, which one."""
    titles = self._studio.attentions.titles
    return titles if len(titles) > 1 else ["Token reads"]


def _map(weights: np.ndarray, token, side: int, shape, subject: str):
  """The update of the picture of what a token reads."""
  top = np.nanmax(weights)
  place = np.unravel_index(np.nanargmax(weights), weights.shape)
  picture = heat.fit(heat.heat(weights), shape)
  return gr.Image(
    heat.mark(picture, token, side),
    label=f"{subject}: 0 to {top:.3g}",
    alt_text=f"{subject}: attention of the token in row {token[0]}, column"
    f" {token[1]}. It reads most, {top:.3g}, from row {place[0]}, column"
    f" {place[1]}; gray is outside its window.",
  )


def _bias(bias: np.ndarray | None):
  """The update of the picture of B."""
  if bias is None:
    return gr.Image(None, label="Bias B: this block has none")
  top = np.abs(bias).max()
  return gr.Image(
    heat.enlarge(heat.heat(bias, is_signed=True)),
    label=f"Bias B: blue -{top:.3g}, red {top:.3g}",
    alt_text=f"The bias by offset of row and column, from {bias.min():.3g} to"
    f" {bias.max():.3g}; the middle is the token itself.",
  )


def _chosen(event: gr.SelectData) -> int:
  """Number of the sample that was clicked."""
  return event.index


def _head_name(head: str) -> str:
  return head if head == _MEAN else f"head {head}"
