"""Which class is which: by name, by number, or refused; and which images."""

import json

import jax
import numpy as np
from PIL import Image
import pytest
from scipy import stats

from diffit_jax.data import preparation
from diffit_jax.data.builders import image_folder
from diffit_jax.errors import UserError
from diffit_jax.evaluation import card, measure, scoring
from diffit_jax.evaluation.collector import Collector
from diffit_jax.evaluation.features import spaces
from diffit_jax.evaluation.sets import (
  class_matching,
  image_set,
  opening,
  references,
)
from diffit_jax.evaluation.sets.samples import ImageSamples
from diffit_jax.parallel.mesh import make_mesh

WORDS = ("ant", "bee", "cow")
EACH = 6  # images of a class


def _classes(labels, names=None, num=None):
  return class_matching.Classes("somewhere", np.array(labels), names, num)


def _digits(num: int) -> tuple[str, ...]:
  return tuple(str(i) for i in range(num))


@pytest.mark.parametrize(
  ("samples", "reference", "pairs", "rule"),
  [
    # Words, in another order, and fewer of them than the reference has.
    (([0, 1, 1], ("cow", "bee")), ([], WORDS), {0: 2, 1: 1}, "by name"),
    # Folders that are called by numbers, some of which are missing.
    (([0, 1], ("1", "10")), ([], _digits(11)), {0: 1, 1: 10}, "by name"),
    (([0, 1], ("01", "10")), ([], _digits(11)), {0: 1, 1: 10}, "by number"),
    # An npz of all classes, a network that made some, EDM's made-up names.
    (([2, 0, 1],), ([], WORDS), {0: 0, 1: 1, 2: 2}, "by number"),
    (([2], None, 3), ([], WORDS), {2: 2}, "by number"),
    (([2], _digits(3)), ([], WORDS), {2: 2}, "by number"),
    (([1], WORDS), ([0, 1, 2],), {1: 1}, "by number"),
    # A reference whose names are its numbers says what 7 is: digits.
    (([7, 2],), ([], _digits(10)), {2: 2, 7: 7}, "by number"),
    # Numbers alone on both sides, and the same ones.
    (([4, 6],), ([4, 4, 6],), {4: 4, 6: 6}, "by number"),
    # Names from 1 on: the numbers of the npz are either all of them, or all
    # of the places in the list.
    (([1, 2, 3],), ([], ("1", "2", "3")), {1: 0, 2: 1, 3: 2}, "by number"),
    (([0, 1, 2],), ([], ("1", "2", "3")), {0: 0, 1: 1, 2: 2}, "by number"),
  ],
)
def test_classes_that_are_the_same(samples, reference, pairs, rule):
  samples, reference = _classes(*samples), _classes(*reference)
  found = class_matching.match(samples, reference)
  assert {ours: theirs for _, ours, theirs in found.pairs} == pairs
  assert found.rule == rule
  for title, _, theirs in found.pairs:
    names = reference.names or {theirs: str(theirs)}
    assert title == names[theirs]


@pytest.mark.parametrize(
  ("samples", "reference", "message"),
  [
    (([0, 1], ("bee", "dog")), ([], WORDS), "class 'dog' of somewhere"),
    (([0], ("3",)), ([], ("1", "2")), "class '3' of somewhere"),
    # Folders 1 and 2 are not classes 0 and 1.
    (([0, 1], ("1", "2")), ([], _digits(2)), "class '2' of somewhere"),
    # Two of three classes, from folders b and c or from a and b?
    (
      ([0, 1],),
      ([], WORDS),
      r"cannot tell .*alone: 0, 1\) are .*ant, bee, cow",
    ),
    (([0, 1],), ([0, 1, 2],), "cannot tell"),
    (([0, 1], None, 2), ([], WORDS), "cannot tell"),
    # Places or names? A set of before, when 10 was sorted behind 1.
    (([1, 2],), ([], ("1", "2", "3")), "cannot tell"),
    ((range(12),), ([], sorted(_digits(12))), "cannot tell"),
    (([3], None, 3), ([], WORDS), "samples of class 3 are of none"),
  ],
)
def test_classes_that_nobody_can_tell(samples, reference, message):
  with pytest.raises(UserError, match=message):
    class_matching.match(_classes(*samples), _classes(*reference))


def _pictures(seed: int) -> dict[str, np.ndarray]:
  """Classes of images that differ in their colours."""
  rng = np.random.default_rng(seed)
  noise = rng.integers(0, 60, (3, EACH, 8, 8, 3)).astype(np.uint8)
  for i in range(3):
    noise[i, ..., i] += 180
  return dict(zip(WORDS, noise))


def _write(folder, pictures):
  for name, group in pictures.items():
    (folder / name).mkdir(parents=True)
    for i, image in enumerate(group):
      Image.fromarray(image).save(folder / name / f"{i}.png")
  return folder


def _measure(where, data_dir=None, **options):
  mesh = make_mesh(devices=jax.devices()[:1])
  return measure.make_measure(
    Collector(spaces.pixels_space(), mesh),
    references.read_reference(where, data_dir),
    (8, 8),
    wanted=["frechet_pixels"],
    **options,
  )


def _frechet(x: np.ndarray, y: np.ndarray) -> float:
  """Of the pixels themselves, which 8x8 averages of 8x8 images are."""
  x, y = (a.reshape(len(a), -1) / 255 for a in (x, y))
  a, b = (z - z.mean(0) for z in (x, y))
  # tr (S_1 S_2)^(1/2) is the sum of singular values of A B^T / sqrt(n m).
  cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
  cross /= np.sqrt((len(x) - 1) * (len(y) - 1))
  trace = sum((z**2).sum() / (len(z) - 1) for z in (a, b))
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + trace - 2 * cross


def test_each_class_is_compared_with_the_class_of_its_name(tmp_path):
  """Samples of the last two classes alone, against all three."""
  real, fake = _pictures(0), _pictures(1)
  wanted = {name: _frechet(real[name], fake[name]) for name in WORDS}
  folder = _write(tmp_path / "real", real)
  recipe = image_folder.recipe(str(folder), name="animals", resolution=8)
  preparation.prepare(**recipe, data_dir=str(tmp_path))
  part = _write(tmp_path / "part", {name: fake[name] for name in WORDS[1:]})
  for where in (folder, "animals"):
    compared = _measure(where, str(tmp_path), per_class=True)
    samples = ImageSamples(opening.open_images(part))
    found = scoring.evaluate(compared, samples, num=2 * EACH)
    assert found["protocol"]["classes"] == "by name"
    assert set(found["per_class"]) == {"bee", "cow"}
    for name, value in found["per_class"].items():
      np.testing.assert_allclose(value, wanted[name], rtol=1e-4)

  # What `sample` writes says how many classes there are, and of which data.
  run = tmp_path / "run"
  run.mkdir()
  pixels = np.concatenate([fake["bee"], fake["cow"]])
  np.savez(run / "samples.npz", pixels, np.repeat([1, 2], EACH))
  with pytest.raises(UserError, match="cannot tell which classes"):
    samples = ImageSamples(opening.open_images(run / "samples.npz"))
    scoring.evaluate(compared, samples, num=2 * EACH)
  for about, rule in (
    ({"num_classes": 3}, "by number"),
    ({"num_classes": 3, "data": "animals"}, "by name"),
  ):
    (run / "sampling.json").write_text(json.dumps({"about": about}))
    samples = opening.open_images(run / "samples.npz", str(tmp_path))
    found = scoring.evaluate(compared, ImageSamples(samples), num=2 * EACH)
    assert found["protocol"]["classes"] == rule
    np.testing.assert_allclose(found["per_class"]["cow"], wanted["cow"], 1e-4)

  # A card of before matched by place, and is not taken for the same.
  path = tmp_path / "card.json"
  del found["protocol"]["classes"]
  card.write(path, found | {"per_class": {"1": 64.2}})
  samples = ImageSamples(samples)
  options = {"num": 2 * EACH, "repeats": 1}
  found = scoring.evaluate_to_file(compared, samples, path, **options)
  assert set(found["per_class"]) == {"bee", "cow"}


def _within_hypergeometric_bounds(labels: np.ndarray, index: np.ndarray):
  assert len(np.unique(index)) == len(index)
  counts = np.bincount(labels)
  found = np.bincount(labels[index], minlength=len(counts))
  # One in a million on either side, of 3,000 counts that are looked at.
  low, high = (
    stats.hypergeom.ppf(p, len(labels), counts, len(index))
    for p in (1e-6, 1 - 1e-6)
  )
  assert (low <= found).all() and (found <= high).all()


@pytest.mark.parametrize(
  "labels",
  [np.repeat(np.arange(10), 120), np.arange(1200) % 10],
  ids=["class by class", "in turn"],
)
def test_a_subset_has_every_class(labels):
  total = len(labels)
  for size in (2, 10, 60, 120, 200, 600, 1199, 1200):
    parts = [
      image_set.choose_subset(total, size, part)
      for part in range(min(total // size, 20))
    ]
    for index in parts:
      _within_hypergeometric_bounds(labels, index)
    assert len(np.unique(np.concatenate(parts))) == len(parts) * size
  np.testing.assert_array_equal(parts[0], np.arange(total))  # all, in order


def test_some_of_the_images_are_a_fixed_mixture(tmp_path):
  """8 of 18 images that lie class by class, twice; all of them are in order."""
  real, fake = _pictures(0), _pictures(1)
  all_real, all_fake = (np.concatenate([*x.values()]) for x in (real, fake))
  compared = _measure(all_real)
  samples = ImageSamples(opening.open_images(_write(tmp_path / "fake", fake)))
  path = tmp_path / "card.json"
  options = {"num": 8, "repeats": 2}
  found = scoring.evaluate_to_file(compared, samples, path, **options)
  order = np.random.RandomState(1).permutation(18)
  for chosen, each in zip((order[:8], order[8:16]), found["repeats"]):
    value = _frechet(all_real, all_fake[chosen])
    np.testing.assert_allclose(each["frechet_pixels"], value, rtol=1e-4)
    assert value < _frechet(all_real, all_fake[:8]) / 5
  assert found["samples"]["subset"].startswith("8 of 18 without replacement")
  assert "RandomState(1).permutation(18)[8 * r" in found["samples"]["subset"]
  # A card of the first 8, as they were once taken, is another measurement.
  before = json.loads(json.dumps(found))
  del before["samples"]["subset"]
  card.write(path, before | {"metrics": {"frechet_pixels": 43.3}})
  again = scoring.evaluate_to_file(compared, samples, path, **options)
  assert again == found | {"date": card.read(path)["date"]}
  whole = scoring.evaluate(compared, samples, num=18)
  value = _frechet(all_real, all_fake)
  np.testing.assert_allclose(whole["metrics"]["frechet_pixels"], value, 1e-4)
  assert "subset" not in whole["samples"]


def test_samples_that_sample_made_are_taken_from_the_first(tmp_path):
  """As a network's own, to which they are equal."""
  np.savez(tmp_path / "x.npz", np.concatenate([*_pictures(0).values()]))
  (tmp_path / "sampling.json").write_text('{"seed": 0}')
  samples = ImageSamples(opening.open_images(tmp_path / "x.npz"))
  batch = samples.batches(1, 5, make_mesh(devices=jax.devices()[:1])).get(0, 5)
  np.testing.assert_array_equal(
    batch, np.concatenate([*_pictures(0).values()])[5:10]
  )
  assert samples.subset_rule(5) is None


def test_the_card_warns_of_splits_with_few_classes(tmp_path, monkeypatch):
  monkeypatch.setattr(scoring, "SPLIT_SIZE", 6)
  pixels = np.concatenate([*_pictures(0).values()])
  for labels, num, is_warned in (
    (np.repeat(np.arange(3), EACH), 18, True),
    (np.repeat(np.arange(3), EACH), 12, False),  # a mixture
    (np.arange(18) % 3, 18, False),
    (np.zeros(18, int), 18, False),
  ):
    np.savez(tmp_path / "x.npz", pixels, labels)
    samples = ImageSamples(opening.open_images(tmp_path / "x.npz"))
    wanted = ("inception_score",)
    found = scoring.warn_of_order(wanted, samples, num)
    assert bool(found) == is_warned
    assert not scoring.warn_of_order(("fid",), samples, num)
