"""Scores during training: their numbers, stops, and the best checkpoint."""

import contextlib
import functools
import json
from unittest import mock

import jax
import numpy as np
import pytest

import commands
from configs import digits, digits_latent, imagenet256
from diffit_jax.errors import UserError
from diffit_jax.evaluation import card, in_loop
from diffit_jax.evaluation.sets.network_samples import sample_shape
from diffit_jax.run import checkpoint
from diffit_jax.stop import Stopped
from diffit_jax.training import loop
from slow import slow


def small(**fields):
  config = digits.get_config("debug")
  config.update(
    dict(sample_every_steps=0, evaluate_every_steps=2, keep_checkpoints=1)
  )
  config.evaluation.num = 40
  config.update(fields)
  return config


def train(config, workdir, data_dir, num_devices=1) -> None:
  make_evaluator = functools.partial(
    in_loop.RunScorer, directory=workdir, inception=None, data_dir=data_dir
  )
  devices = jax.devices()[:num_devices]
  loop.train(
    config, workdir, data_dir, devices=devices, make_evaluator=make_evaluator
  )


def cards(workdir) -> dict[int, dict]:
  return {
    int(path.stem.removeprefix("step_")): card.read(path)
    for path in sorted((workdir / "evaluation").glob("*.json"))
  }


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train(small(total_steps=5), workdir, data_dir)
  return workdir


def test_scores_come_at_their_steps_and_at_the_end(run):
  found = cards(run)
  assert list(found) == [2, 4, 5]
  about = found[4]["samples"]["sampling"]
  assert (about["step"], about["ema"]) == (4, "edm")
  assert found[4]["protocol"]["reference"]["source"] == "digits"
  assert found[4]["num_samples"] == 40


def test_the_score_is_that_of_the_command(run, data_dir, tmp_path):
  out = commands.succeed(
    f"evaluate --workdir={run} --num=40 --seed={in_loop._SEED}"
    f" --reference=digits --data_dir={data_dir} --out={tmp_path}/c.json"
    " --features=digits --metrics=frechet_digits"
  )
  ours, other = cards(run)[5], card.read(tmp_path / "c.json")
  name = "frechet_digits"
  assert f"{other['metrics'][name]:.6g}" in out
  np.testing.assert_allclose(
    ours["metrics"][name], other["metrics"][name], rtol=1e-4
  )
  mine, theirs = (
    x["samples"]["sampling"]["weights_sha256"] for x in (ours, other)
  )
  assert mine == theirs


@pytest.mark.slow
def test_sharded_weights_score_as_whole_ones(run, data_dir, tmp_path):
  config = small(total_steps=2)
  config.mesh.fsdp = 2
  train(config, tmp_path, data_dir, num_devices=2)
  name = "frechet_digits"
  np.testing.assert_allclose(
    cards(tmp_path)[2]["metrics"][name],
    cards(run)[2]["metrics"][name],
    rtol=1e-3,  # of other weights by their last bits, and of rounded images
  )


@contextlib.contextmanager
def stopping_at(step: int):
  """SIGTERM comes while the step is scored."""
  real, came = in_loop.RunScorer._score, []

  def score(self, loaded):
    if loaded.step != step:
      return real(self, loaded)
    came.append(step)
    raise Stopped

  def at_step(self, _):
    self.requested = bool(came)

  with (
    mock.patch.object(in_loop.RunScorer, "_score", score),
    mock.patch.object(loop.StopRequest, "at_step", at_step),
  ):
    yield


@pytest.mark.parametrize("steps", [slow((2, 5)), (5,)])
def test_a_stopped_score_is_made_up_for(steps, run, data_dir, tmp_path):
  """SIGTERM while a step is scored: it is saved, and scored by the next start.

  The same at the last step, where nothing is left to train.
  """
  for step in steps:
    with stopping_at(step):
      with pytest.raises(Stopped):
        train(small(total_steps=5), tmp_path, data_dir)
    assert checkpoint.list_steps(tmp_path)[-1] == step
    assert step not in cards(tmp_path)
  train(small(total_steps=5), tmp_path, data_dir)
  expected = {k: x["metrics"] for k, x in cards(run).items()}
  assert {k: x["metrics"] for k, x in cards(tmp_path).items()} == expected
  train(small(total_steps=5), tmp_path, data_dir)  # nothing is left


@pytest.mark.slow
def test_the_best_by_distance_stays(data_dir, tmp_path):
  """Distances are told; a second start knows those of the first."""
  told = {1: 9.0, 2: 3.0, 3: 5.0, 4: 4.0, 5: 3.5}

  def score(self, loaded):
    found = {"frechet_digits": told[loaded.step]}
    self.folder.mkdir(exist_ok=True)
    text = dict.fromkeys(card._PARTS, {}) | {"metrics": found}
    text["num_samples"] = self._num
    self._card_path(loaded.step).write_text(json.dumps(text))
    return {"metrics": found}

  with mock.patch.object(in_loop.RunScorer, "_score", score):
    for total in (3, 5):
      config = small(
        total_steps=total,
        save_every_steps=1,
        evaluate_every_steps=1,
        keep_best_by="frechet_digits",
      )
      train(config, tmp_path, data_dir)
      assert checkpoint.list_steps(tmp_path) == [2, total]


@pytest.mark.parametrize(
  "metrics, num, expected",
  [
    (
      {"frechet_digits": 3.0, "more": 1.0},
      20,
      {"frechet_digits": 3.0, "more": 1.0},
    ),
    ({"frechet_digits": 3.0}, 19, {}),
    ({"frechet_pixels": 3.0}, 20, {}),
  ],
)
def test_a_card_of_another_measure_is_no_score(
  metrics, num, expected, tmp_path
):
  """A card of an earlier start, before config.evaluation was changed."""
  scorer = in_loop.RunScorer.__new__(in_loop.RunScorer)
  scorer.folder = tmp_path
  scorer._num, scorer._metrics = 20, ("frechet_digits",)
  found = dict.fromkeys(card._PARTS, {}) | {"metrics": metrics}
  card.write(scorer._card_path(3), found | {"num_samples": num})
  assert scorer.find(3) == expected
  assert scorer.find(4) == {}


def test_mistakes_show_before_training(data_dir, tmp_path):
  def refused(match, make=small, **changes):
    config = make()
    config.evaluation.update(changes)
    with pytest.raises(UserError, match=match):
      train(config, tmp_path, data_dir)
    assert not checkpoint.list_steps(tmp_path)

  refused("--inception is missing", features="inception", metrics=("fid",))
  refused("'fid' is not among frechet_digits", metrics=("fid",))
  refused("no_such_set", reference="no_such_set")
  refused("keep_best_by='fid': use one of", lambda: small(keep_best_by="fid"))


@pytest.mark.slow
def test_latents_are_decoded_or_refused(data_dir, tmp_path):
  config = digits_latent.get_config("debug")
  config.update(
    dict(total_steps=1, evaluate_every_steps=4, sample_every_steps=0)
  )
  config.evaluation.update(
    dict(features="digits", metrics=("frechet_digits",), num=20)
  )
  train(config, tmp_path, data_dir)
  assert list(cards(tmp_path)) == [config.total_steps]
  with pytest.raises(UserError, match="--vae is missing"):
    sample_shape(imagenet256.get_config())
