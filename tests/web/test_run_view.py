"""What the page reads of a run's folder, and what it does not."""

import json
import types

import numpy as np
from PIL import Image
import pytest

from diffit_jax.training.log import Writer
from diffit_jax.web import heat, run_view

pytestmark = pytest.mark.web


@pytest.fixture
def run(tmp_path):
  """A run with two curves and a grid, as the trainer writes them."""
  folder = tmp_path / "run"
  writer = Writer(folder, {})
  for step, loss in ((10, 3.0), (20, 2.0)):
    writer.scalars(step, {"grad_norm": step / 10, "loss": loss})
  images = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1)
  writer.images(20, "samples_edm", images)
  writer.close()
  return folder


def card(value: float) -> str:
  return json.dumps(
    {
      "metrics": {"fid": value, "fid_standard_error": 0.5},
      "not_computed": {},
      "protocol": {},
      "samples": {},
      "num_samples": 50_000,
      "warnings": ["<b>few</b>"],
    }
  )


def test_curves_come_with_the_loss_first_and_the_later_file_counts(run):
  again = Writer(run, {})  # went on from step 10
  again.scalars(20, {"loss": 1.5})
  again.close()
  found = run_view.read_curves(run)
  assert list(found) == ["loss", "grad_norm"]
  assert found["loss"] == [(10, 3.0), (20, 1.5)]
  text = run_view.curve_text("loss", found["loss"])
  assert text == "loss: 3 at step 10, 1.5 at step 20"
  picture = run_view.curve_picture("loss", found["loss"])
  assert picture.dtype == np.uint8 and picture.shape == (300, 480, 3)


def test_an_event_file_that_is_cut_keeps_what_came_before(run):
  file = next((run / "tensorboard").iterdir())
  file.write_bytes(file.read_bytes()[:-20])  # in the grid, which comes last
  assert run_view.read_curves(run)["loss"][0] == (10, 3.0)


def test_long_curves_are_thinned_and_end_at_their_end():
  points = [(step, float(step)) for step in range(1, 5002)]
  assert run_view.thinned(points)[-1] == points[-1]
  assert len(run_view.thinned(points)) <= 1000


def test_grids_are_those_of_the_trainer_in_order_of_step(run):
  grids = run_view.read_grids(run)
  assert [(grid.step, grid.average) for grid in grids] == [(20, "edm")]
  written = np.asarray(Image.open(run / "samples/samples_edm_00000020.png"))
  np.testing.assert_array_equal(grids[0].image[..., 0], written)


def test_a_look_changes_with_every_file_that_is_shown(run):
  before = run_view.look(run)
  assert run_view.look(run) == before and len(before) == 2
  (run / "config.json").write_text("{}")
  assert run_view.look(run) == before  # shown nowhere
  for folder, name in (
    ("evaluation", "a.json"), ("demo", "card.json"),
    ("samples", "samples_edm_00000030.png"),
    ("tensorboard", "events.out.tfevents.2"),
  ):  # fmt: skip
    (run / folder).mkdir(exist_ok=True)
    (run / folder / name).write_text("")
    now = run_view.look(run)
    assert len(now) == len(before) + 1
    (run / folder / name).write_text("more")
    before = run_view.look(run)
    assert before != now


def test_an_unchanged_run_sends_its_pictures_once(run):
  import gradio as gr  # not there where these tests are not run

  from diffit_jax.web import run_tab

  with gr.Blocks(), gr.Tab("Run") as tab:
    view = run_tab.RunTab(types.SimpleNamespace(workdir=run), tab)

  def read(shown):
    """(ids of the galleries that are sent, files that the page then shows)."""
    sent = {}
    for update in view.read(shown):
      for component, value in update.items():
        sent[component.elem_id or type(component)] = value
    return sent.keys() & {"curves", "grids"}, sent[gr.State]

  sent, shown = read(None)
  assert sent == {"curves", "grids"}
  assert read(shown) == (set(), shown)
  (run / "samples/samples_edm_00000030.png").write_bytes(b"")
  sent, after = read(shown)
  assert sent == {"curves", "grids"} and after != shown


def test_nothing_outside_of_the_workdir_is_read(run, tmp_path):
  secret = tmp_path / "secret.png"
  Image.new("L", (8, 8)).save(secret)
  samples = run / "samples"
  (samples / "samples_edm_00000030.png").symlink_to(secret)
  (samples / "holiday.png").write_bytes(secret.read_bytes())
  (samples / "samples_edm_00000040.png").mkdir()
  (run / "evaluation").symlink_to(tmp_path)
  (tmp_path / "card.json").write_text(card(1.0))
  assert [grid.step for grid in run_view.read_grids(run)] == [20]
  assert run_view.read_cards(run) == {}


def test_damaged_files_hide_no_others(run):
  (run / "samples/samples_edm_00000030.png").write_bytes(b"\x89PNG no")
  assert [grid.step for grid in run_view.read_grids(run)] == [20]
  (run / "evaluation").mkdir()
  (run / "evaluation/a.json").write_text(card(2.25))
  (run / "evaluation/b.json").write_text("{")
  found = run_view.read_cards(run)
  assert found["evaluation/a.json"]["metrics"]["fid"] == 2.25
  assert "damaged" in found["evaluation/b.json"]
  page = run_view.cards_html(found)
  assert "<td>2.25 ± 0.5</td>" in page and "FID-50K" in page
  assert "<b>" not in page and "&lt;b&gt;few" in page


def test_an_empty_folder_shows_nothing(tmp_path):
  assert run_view.read_curves(tmp_path) == {}
  assert run_view.read_grids(tmp_path) == []
  assert "No scores yet" in run_view.cards_html(run_view.read_cards(tmp_path))


def test_heat_maps_show_zero_the_limit_and_nothing():
  values = np.array([[0.0, 1.0, np.nan]])
  black, yellow, gray = heat.heat(values)[0].astype(int)
  assert black.sum() < 20 and yellow[:2].min() > 200
  np.testing.assert_array_equal(gray, 200)
  blue, white, red = heat.heat(np.array([-2.0, 0, 2]), is_signed=True)
  assert blue[2] > blue[0] and red[0] > red[2] and white.min() > 240
  assert heat.heat(np.zeros((2, 2))).shape == (2, 2, 3)


def test_a_mark_frames_the_token_and_leaves_the_rest():
  image = np.zeros((40, 40, 1), np.uint8)
  marked = heat.mark(image, (1, 2), 4)
  framed = np.argwhere(marked.any(-1))
  np.testing.assert_array_equal(framed.min(0), [10, 20])
  np.testing.assert_array_equal(framed.max(0), [19, 29])
  assert not marked[11:19, 21:29].any()


def test_the_difference_is_the_mean_over_channels():
  a = np.zeros((1, 1, 1, 3), np.uint8)
  b = np.array([[[[3, 0, 6]]]], np.uint8)
  assert heat.difference(a, b) == heat.difference(b, a) == 3.0
