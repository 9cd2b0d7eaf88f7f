"""Scoring as a whole: spaces, devices, repeats, cards, stops."""

import json

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from diffit_jax.errors import UserError
from diffit_jax.evaluation import (
  card,
  compare,
  load_inception,
  measure,
  scoring,
)
from diffit_jax.evaluation.collector import Collector
from diffit_jax.evaluation.features import spaces
from diffit_jax.evaluation.metrics import table
from diffit_jax.evaluation.sets import opening, references
from diffit_jax.evaluation.sets.samples import ImageSamples
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.stop import Stopped
import inception_fill

RNG = np.random.default_rng(0)
# 8x8 gray with two different looks, so that no metric is trivial.
REAL = RNG.integers(0, 256, (61, 8, 8, 1), np.uint8)
FAKE = (RNG.integers(0, 200, (40, 8, 8, 1)) + 20).astype(np.uint8)


def mesh_of(num: int) -> Mesh:
  return make_mesh(devices=jax.devices()[:num])


def score(
  space,
  num_devices=1,
  batch_size=16,
  fake=FAKE,
  real=REAL,
  wanted=(),
  **options,
) -> dict:
  collector = Collector(
    space,
    mesh_of(num_devices),
    batch_size=batch_size,
    should_stop=options.pop("should_stop", lambda: False),
  )
  samples = ImageSamples(opening.open_images(fake))
  compared = measure.make_measure(
    collector, references.read_reference(real), samples.shape, wanted=wanted
  )
  options.setdefault("num", samples.available)
  return scoring.evaluate(compared, samples, **options)


def frechet(x: np.ndarray, y: np.ndarray) -> float:
  """The distance by its definition, with a root of a symmetric product."""
  x, y = x.astype(np.float64), y.astype(np.float64)
  a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  values, vectors = np.linalg.eigh(a)
  root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
  cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
  shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
  return shift + np.trace(a) + np.trace(b) - 2 * cross


class TestSpaces:
  def test_pixels_are_averages(self):
    rng = np.random.default_rng(1)
    picture = rng.integers(0, 256, (2, 24, 12, 3), np.uint8)
    found = spaces.pixels_space().outputs(picture)["pool"].reshape(2, 8, 8, 3)
    np.testing.assert_allclose(
      found[1, 3, 2],
      # Column 2 of 8 covers pixels 3 and half of 4 out of 12.
      (picture[1, 9:12, 3] + 0.5 * picture[1, 9:12, 4]).mean(0) / 1.5 / 255,
      rtol=1e-5,
    )
    np.testing.assert_allclose(
      found.mean((1, 2)), picture.mean((1, 2)) / 255, rtol=1e-5
    )

  def test_digits_are_a_fitted_hidden_layer(self):
    """A linear map of the features tells held-out digits apart, raw noise not.

    The space is the same every time, or its numbers could not be compared.
    """
    from sklearn import datasets, linear_model

    space = spaces.digits_space()
    assert space.card_entry == spaces.digits_space().card_entry
    real = datasets.load_digits()
    pictures = np.round(real.images * (255 / 16)).astype(np.uint8)[..., None]
    found = space.outputs(np.repeat(pictures, 3, -1))["pool"]
    assert found.shape == (1797, 64) and found.min() == 0
    half = linear_model.RidgeClassifier().fit(found[:900], real.target[:900])
    assert half.score(found[900:], real.target[900:]) > 0.97

  def test_refusals(self):
    with pytest.raises(UserError, match="use one of inception, digits, pixels"):
      spaces.open_space("clip")
    with pytest.raises(UserError, match="--inception is missing.*pytorch-fid"):
      spaces.open_space("inception")
    large = FAKE.repeat(2, 1).repeat(2, 2)
    with pytest.raises(UserError, match="for 8x8 images of digits.*16x16"):
      score(spaces.digits_space(), fake=large, real=large)


class TestNumbers:
  def test_every_metric_is_that_of_the_features(self):
    space = spaces.pixels_space()
    found = score(space)["metrics"]
    rows = lambda x: space.outputs(np.repeat(x, 3, -1))["pool"]
    real, fake = rows(REAL), rows(FAKE)
    np.testing.assert_allclose(
      found["frechet_pixels"], frechet(real, fake), rtol=1e-5
    )
    distances = lambda x, y: np.sqrt(
      ((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1)
    )
    inside = lambda x, y: np.mean(
      (distances(x, y) <= np.sort(distances(y, y), 1)[:, 3]).any(1)
    )
    assert found["precision_pixels"] == inside(fake, real)
    assert found["recall_pixels"] == inside(real, fake)
    kernel = lambda x, y: (x.astype(np.float64) @ y.T / 192 + 1) ** 3
    within = lambda x: (
      (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
    )
    np.testing.assert_allclose(
      found["kernel_pixels"],
      within(real) + within(fake) - 2 * kernel(real, fake).mean(),
      rtol=1e-5,
    )

  def test_a_set_is_at_no_distance_from_itself(self):
    found = score(spaces.pixels_space(), fake=REAL)["metrics"]
    assert found["frechet_pixels"] < 1e-9
    assert found["precision_pixels"] == found["recall_pixels"] == 1

  def test_devices_and_batches_change_rounding_at_most(self):
    """Also where the last batch is not full: 40 and 61 images."""
    space = spaces.digits_space()
    one = score(space, 1, 16)["metrics"]
    for num_devices, batch_size in ((8, 16), (8, 64), (2, 6), (1, 1)):
      other = score(space, num_devices, batch_size)["metrics"]
      assert one.keys() == other.keys()
      for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-6, err_msg=name)

  @pytest.mark.slow  # the digits space, above, is compared in every run
  def test_inception_on_eight_devices_equals_one(self):
    extractor = load_inception(inception_fill.fill())
    real, fake = REAL[:6], FAKE[:5]
    one, eight = (
      score(extractor, num, 8, fake, real)["metrics"] for num in (1, 8)
    )
    assert set(one) == set(table.names("inception"))
    for name, value in one.items():
      np.testing.assert_allclose(eight[name], value, rtol=1e-4, err_msg=name)
    pool, _, spatial = extractor.features(
      np.repeat(np.concatenate([real, fake]), 3, -1)
    )
    for name, rows in (("fid", pool), ("sfid", spatial)):
      np.testing.assert_allclose(
        one[name], frechet(rows[:6], rows[6:]), rtol=1e-4
      )

  def test_repeats_report_the_smallest(self):
    found = score(spaces.pixels_space(), num=20, repeats=2)
    order = np.random.RandomState(1).permutation(40)
    parts = [
      score(spaces.pixels_space(), fake=FAKE[index])["metrics"]
      for index in (order[:20], order[20:])
    ]
    assert found["repeats"] == parts
    distances = [part["frechet_pixels"] for part in parts]
    assert found["metrics"]["frechet_pixels"] == min(distances)
    assert f"run {np.argmin(distances) + 1} of 2" in card.lines(found)
    with pytest.raises(UserError, match="--num=20 3 times is more than the 40"):
      score(spaces.pixels_space(), num=20, repeats=3)


class TestStops:
  def test_a_stopped_collection_goes_on_to_the_same_bits(self, tmp_path):
    space, path = spaces.pixels_space(), tmp_path / "card[1] *.json"
    other = tmp_path / "card1 of another.json.samples0.partial"
    other.touch()  # matches the path as a pattern
    undisturbed = score(space, batch_size=8)
    for stop_after in (1, 2, 1):
      left = [stop_after]

      def should_stop(left=left):
        left[0] -= 1
        return left[0] <= 0

      collector = Collector(
        space, mesh_of(1), batch_size=8, should_stop=should_stop
      )
      samples = ImageSamples(opening.open_images(FAKE))
      with pytest.raises(Stopped):
        compared = measure.make_measure(
          collector,
          references.read_reference(REAL),
          samples.shape,
          partial=path,
        )
        scoring.evaluate(compared, samples, num=40, partial=path)
    of_reference = f"{path.name}.reference.partial"
    assert {p.name for p in tmp_path.iterdir()} == {of_reference, other.name}
    collector = Collector(space, mesh_of(1), batch_size=8)
    compared = measure.make_measure(
      collector, references.read_reference(REAL), samples.shape, partial=path
    )
    found = scoring.evaluate_to_file(compared, samples, path, num=40, repeats=1)
    assert found["metrics"] == undisturbed["metrics"]
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name}
    written = path.stat().st_mtime_ns
    scoring.evaluate_to_file(compared, samples, path, num=40, repeats=1)
    assert path.stat().st_mtime_ns == written  # read, not made again
    scoring.evaluate_to_file(compared, samples, path, num=30, repeats=1)
    assert card.read(path)["num_samples"] == 30

  def test_nothing_is_written_to_a_place_that_was_lost(self, tmp_path):
    """Neither what was gathered nor a card over that of the new holder."""
    path, lost = tmp_path / "card.json", []

    def check_claim():
      if lost:
        raise UserError("taken over")

    collector = Collector(
      spaces.pixels_space(),
      mesh_of(1),
      check_claim=check_claim,
      should_stop=lambda: lost.append(True),
    )
    samples = ImageSamples(opening.open_images(FAKE))
    found = references.read_reference(REAL)
    with pytest.raises(UserError, match="taken over"):
      measure.make_measure(collector, found, samples.shape, partial=path)
    compared = measure.make_measure(collector, found, samples.shape)
    with pytest.raises(UserError, match="taken over"):
      scoring.evaluate_to_file(compared, samples, path, num=40, repeats=1)
    assert not list(tmp_path.iterdir())


class TestCards:
  def test_fid_50k_is_the_name_of_50_000_samples_only(self):
    assert table.title("fid", 50_000) == "FID-50K"
    for num in (49_999, 50_001, 10_000):
      assert table.title("fid", num) == "FID"
    assert table.title("frechet_digits", 50_000) == "Fréchet distance (digits)"

  def test_what_a_reader_must_know_is_said(self):
    found = score(spaces.pixels_space())
    text = card.lines(found)
    assert "40 samples are fewer than the 192 dimensions" in text
    assert "without the settings that they were made with" in text
    assert "the reference is of 61 images" in text
    assert found["protocol"]["reference"]["num"] == 61
    assert json.loads(json.dumps(found)) == found

  def test_cards_are_whole_or_not_there(self, tmp_path):
    found = score(spaces.pixels_space())
    card.write(tmp_path / "a.json", found)
    assert card.read(tmp_path / "a.json") == found
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text()[:99])
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "e.json").write_text(json.dumps(found | {"protocol": []}))
    for name in ("b", "c", "e"):
      with pytest.raises(UserError, match="is no card.*: delete it, or name"):
        card.read(tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="cannot read the card"):
      card.read(tmp_path / "d.json")

  def test_a_table_says_what_was_measured_differently(self):
    first = score(spaces.pixels_space())
    second = score(spaces.pixels_space(), num=30)
    table = compare.table({"one": first, "two": second, "again": first})
    rows = table.splitlines()
    assert rows[0].startswith("|  | Fréchet distance (pixels) |")
    value = f"{second['metrics']['frechet_pixels']:.5g}"
    assert rows[3].startswith(f"| two | {value} |")
    assert "Measured differently" in table
    assert "- num_samples: one 40, two 30, again 40" in table
    same = compare.table({"one": first, "again": first})
    assert "Measured alike" in same and "differently" not in same


class TestRefusals:
  def test_metrics_that_a_space_does_not_have(self):
    with pytest.raises(UserError, match="'fid' is not among frechet_pixels"):
      score(spaces.pixels_space(), wanted=["fid"])

  def test_another_resolution(self):
    with pytest.raises(UserError, match="are 8x10.*is of 8x8"):
      score(spaces.pixels_space(), fake=np.repeat(FAKE, 2, 2)[:, :, :10])

  def test_constant_samples(self):
    with pytest.raises(UserError, match="one colour|same|constant"):
      score(spaces.pixels_space(), fake=np.zeros_like(FAKE))

  def test_a_network_of_damaged_weights(self):
    space = spaces.digits_space()
    space.params["bias"][3] = np.nan
    with pytest.raises(UserError, match="are not finite.*digits network"):
      score(space)

  def test_classes_without_labels(self):
    collector = Collector(spaces.pixels_space(), mesh_of(1))
    with pytest.raises(UserError, match="needs a reference with labels"):
      measure.make_measure(
        collector, references.read_reference(REAL), (8, 8), per_class=True
      )

  def test_too_few(self):
    found = score(spaces.pixels_space(), num=3)
    assert "4 or more points" in found["not_computed"]["recall_pixels"]
    with pytest.raises(UserError, match="at least 2 samples"):
      score(spaces.pixels_space(), num=1)
