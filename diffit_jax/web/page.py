"""The page: four tabs of Gradio, with nothing of JAX.

Samples   settings, progress, the grid, downloads, the command line
Steps     one sample's path, and what a token of it reads
Compare   two settings from the same noise
Run       scores, curves and sample grids of the workdir
"""

import html

import gradio as gr

from diffit_jax.web import controls
from diffit_jax.web.compare_tab import CompareTab
from diffit_jax.web.run_tab import RunTab
from diffit_jax.web.samples_tab import SamplesTab
from diffit_jax.web.steps_tab import StepsTab
from diffit_jax.web.words import Stops

_REFRESH = 5  # seconds between two looks for new checkpoints
_KEPT = 6 * 3600  # seconds that a file to download is kept

CSS = """
.crisp img { image-rendering: pixelated; }
.pictures .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)) !important;
  padding-top: 28px;
}
.pictures.wider .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)) !important;
}
.pictures.large .grid-container {
  grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)) !important;
}
.pictures .grid-wrap {
  min-height: 0 !important; max-height: none !important; overflow: visible;
}
.pictures .thumbnail-lg {
  display: flex; flex-direction: column; height: auto; aspect-ratio: auto;
}
.pictures .thumbnail-lg img { width: 100%; height: auto; flex: none; }
.pictures .caption-label {
  position: static; max-width: 100%; width: 100%; padding: 2px 4px;
  border: none; white-space: normal; overflow: visible; font-size: 12px;
}
.pictures .gallery-container:has(.preview) { min-height: 420px; }
.map .image-container { padding-top: 30px; }
.map img { width: 100%; }
.map [data-testid="block-label"] {
  max-width: calc(100% - 64px); overflow: hidden; white-space: nowrap;
}
.status progress {
  appearance: none; width: 60%; height: 10px; border: 0;
  background: var(--border-color-primary);
}
.status progress::-webkit-progress-bar {
  background: var(--border-color-primary);
}
.status progress::-webkit-progress-value { background: var(--color-accent); }
.status progress::-moz-progress-bar { background: var(--color-accent); }
.dark {
  --color-accent: var(--primary-400); --slider-color: var(--primary-400);
}
.status .error { color: var(--error-text-color); font-weight: 600; }
@media (max-width: 480px) {
  button[role="tab"] { padding: 0 7px !important; font-size: 13px !important; }
}
.wide { overflow-x: auto; }
.wide td, .wide th { padding: 4px 12px; text-align: left; }
.wide caption { text-align: left; }
"""
# Screen readers read out what changes in the boxes of status, call a small
# picture by what it shows and not "Thumbnail 1 of 16", and reach the command
# line, which Gradio leaves without a name beside its button, and disabled.
SCRIPT = """
() => {
  const rename = () => {
    for (const box of document.querySelectorAll('.status:not([role])'))
      box.setAttribute('role', 'status');
    for (const button of document.querySelectorAll('.thumbnail-item')) {
      const text = button.querySelector('img')?.alt;
      if (text && button.getAttribute('aria-label') !== text)
        button.setAttribute('aria-label', text);
    }
    const command = document.querySelector('#command textarea');
    if (command?.disabled) {
      command.setAttribute('aria-label', 'Command line');
      command.readOnly = true;
      command.disabled = false;
    }
  };
  rename();
  new MutationObserver(rename).observe(
    document.body, { childList: true, subtree: true, attributes: true,
                     attributeFilter: ['alt', 'disabled'] });
}
"""


def theme():
  """Gradio's own with fonts of the machine, and colors that stand out more.

  No font is fetched; text has a contrast of 4.5 to 1 or more, on a light ground
  and on the dark one of browsers that ask for it.
  """
  return gr.themes.Default(
    primary_hue="blue",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
  ).set(
    color_accent="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_cancel_background_fill="#b91c1c",
    button_cancel_background_fill_hover="#991b1b",
    body_text_color_subdued="*neutral_600",
    block_info_text_color="*neutral_600",
    block_label_text_color="*neutral_700",
    block_title_text_color="*neutral_700",
  )


def build(studio, stops: Stops) -> gr.Blocks:
  """The page of a `studio.Studio`.

  Args:
    studio: what samples.
    stops: the requests to stop, one per tab of a browser.
  """
  with gr.Blocks(
    title=f"diffit_jax: {studio.title}",
    analytics_enabled=False,
    delete_cache=(600, _KEPT),
  ) as blocks:
    gr.HTML(f"<h1>{html.escape(studio.title)}</h1>")
    with gr.Tabs():
      with gr.Tab("Samples"):
        samples = SamplesTab(studio, stops)
      with gr.Tab("Steps"):
        StepsTab(studio, samples)
      with gr.Tab("Compare"):
        compare = CompareTab(studio, stops)
      with gr.Tab("Run") as tab:
        RunTab(studio, tab)
    _follow_training(studio, [samples.sampler, *compare.samplers])
    blocks.unload(_forgetter(stops))
  return blocks


def _forgetter(stops: Stops):
  """Ends the work of a browser's tab that was closed."""

  def forget(request: gr.Request):
    stops.forget(request.session_hash)

  return forget


def _follow_training(studio, samplers: list[controls.Sampler]) -> None:
  """Lists the checkpoints that a run writes while the page is open."""
  shown = gr.State(studio.steps())

  def look(known: list[int]):
    steps = studio.steps()
    if steps == known:
      return [gr.skip()] * (len(samplers) + 1)
    choices = controls.step_choices(steps)
    return [steps, *[gr.Dropdown(choices=choices) for _ in samplers]]

  outputs = [shown, *(sampler.step for sampler in samplers)]
  gr.Timer(_REFRESH).tick(look, shown, outputs, show_progress="hidden")
