"""The frames of pictures on the page, empty at first."""

import gradio as gr
import numpy as np

_BUTTONS = ["download", "fullscreen"]


def gallery(label: str, name: str, classes: str = "") -> gr.Gallery:
  """A row of small pictures that open large.

  Args:
    label: its title.
    name: its id on the page.
    classes: of its looks, see `page.CSS`.
  """
  return gr.Gallery(
    label=label,
    format="png",
    interactive=False,
    object_fit="contain",
    buttons=_BUTTONS,
    elem_id=name,
    elem_classes=f"pictures {classes}",
    height="auto",
  )


def picture(label: str, name: str, min_width: int) -> gr.Image:
  """One picture whose pixels are seen; arguments as of `gallery`."""
  return gr.Image(
    label=label,
    format="png",
    interactive=False,
    buttons=_BUTTONS,
    alt_text=f"{label}: nothing is shown yet.",
    elem_id=name,
    elem_classes="crisp map",
    min_width=min_width,
  )


def flat(image: np.ndarray) -> np.ndarray:
  """[h, w, 1] -> [h, w], the form that Pillow takes; colors stay."""
  return image[..., 0] if image.shape[-1] == 1 else image
