"""The tab of the run: its scores, curves and sample grids, as they are now."""

import html

import gradio as gr

from diffit_jax.web import frames, run_view, words


class RunTab:
  """Its components; `refresh` is read anew at every visit of the tab."""

  def __init__(self, studio, tab: gr.Tab):
    self._workdir = studio.workdir
    if self._workdir is None:
      gr.Markdown("A checkpoint file alone has no run to show: use --workdir.")
      return
    gr.HTML(f"<p>Run in {html.escape(str(self._workdir))}</p>")
    with gr.Row():
      refresh = gr.Button("Read again", scale=0, min_width=140)
      self._status = words.status_box()
    gr.Markdown("## Scores")
    self._cards = gr.HTML("")
    gr.Markdown("## Training curves")
    self._curves = frames.gallery("Curves", "curves", "large")
    gr.Markdown("## Samples over time")
    self._grids = frames.gallery("Sample grids", "grids", "large")
    self._shown = gr.State(None)  # files of which this page shows what they say
    read = words.reporting(self._status, self.read)
    for event in (tab.select, refresh.click):
      event(
        read,
        self._shown,
        [
          self._status, self._cards, self._curves, self._grids, self._shown,
        ],
        show_progress="hidden",
      )  # fmt: skip

  def read(self, shown: dict | None):
    """Updates of the components, from the files that the page showed last."""
    yield {self._status: words.said("reading the run")}
    files = run_view.look(self._workdir)
    curves = run_view.read_curves(self._workdir)
    grids = run_view.read_grids(self._workdir)
    if files != shown:
      yield self._pictures(curves, grids)
    yield {
      self._status: words.said(
        f"{len(curves)} curves, {len(grids)} sample grids"
      ),
      self._shown: files,
    }

  def _pictures(self, curves, grids) -> dict:
    return {
      self._cards: run_view.cards_html(run_view.read_cards(self._workdir)),
      self._curves: [
        (run_view.curve_picture(*each), run_view.curve_text(*each))
        for each in curves.items()
      ],
      self._grids: [
        (grid.image, f"step {grid.step}, average {grid.average}")
        for grid in grids
      ],
    }
