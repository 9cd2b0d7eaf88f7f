"""evaluate as a user types it: from images to cards, and mistakes."""

import json
import os
import signal
import time

import numpy as np
from PIL import Image
import pytest

import commands
from diffit_jax import claim
from diffit_jax.evaluation import card
from readme_run import NUM
from slow import slow
import two_processes as driver

RNG = np.random.default_rng(0)


def read(path) -> dict:
  return card.read(path)


@pytest.fixture(scope="module")
def place(readme, tmp_path_factory):
  """A folder to write to, with what the README's commands made."""
  folder = tmp_path_factory.mktemp("evaluate")
  for name in ("data", "samples", "inception.safetensors", "ffhq64.npz"):
    (folder / name).symlink_to(readme / name)
  return folder


@pytest.fixture(scope="module")
def options(place):
  return (
    f"--inception={place}/inception.safetensors --batch_size={NUM}"
    f" --data_dir={place}/data"
  )


@pytest.fixture(scope="module")
def statistics(place):
  """A file of statistics of the prepared set."""
  return place / "ffhq64.npz"


@pytest.fixture(scope="module")
def digits(digits_run):
  return digits_run


@pytest.fixture(scope="module")
def scored(readme):
  """The README's card, of samples that were never written."""
  outputs = json.loads((readme / "outputs.json").read_text())
  (out,) = (text for text in outputs.values() if "FID: " in text)
  return read(readme / "card.json"), out


def test_the_reference_is_told(readme):
  outputs = json.loads((readme / "outputs.json").read_text())
  assert "reference: ffhq64.npz (12 images)\n" in outputs.values()


def test_all_metrics(scored):
  found, out = scored
  assert set(found["metrics"]) == {
    *("fid", "sfid", "inception_score", "precision", "recall", "kid")
  }
  assert np.isfinite(list(found["metrics"].values())).all()
  assert f"FID: {found['metrics']['fid']:.6g}\n" in out
  assert "FID-50K" not in out
  assert "6 samples are fewer than the 2048 dimensions" in out


def test_the_card_holds_all_that_decides_the_number(scored):
  found, _ = scored
  protocol, sampling = found["protocol"], found["samples"]["sampling"]
  assert protocol["features"]["resize"] == "tf1"
  assert len(protocol["features"]["sha256"]) == 64
  assert len(protocol["reference"]["sha256"]) == 64
  assert protocol["reference"]["num"] == 12
  assert sampling["sampler"]["solver"] == "edm_heun"
  assert sampling["sampler"]["steps"] == 3
  assert sampling["sampler"]["guidance_scale"] == 1
  assert (sampling["seed"], sampling["ema"], sampling["step"]) == (0, "edm", 2)
  assert sampling["dtype"] == "float32"
  assert sampling["matmul_precision"] == "highest"
  assert sampling["vae"] is None
  assert len(sampling["weights_sha256"]) == 64
  about = sampling["about"]
  assert about["uint8_rule"] == "edm" and len(about["config_sha256"]) == 64
  assert {"jax", "numpy", "python", "diffit_jax"} <= set(found["software"])


def test_statistics_are_in_adms_layout(statistics):
  """As another program reads them, without our reader."""
  with np.load(statistics, allow_pickle=False) as file:
    assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(file.files)
    assert file["sigma"].shape == (2048, 2048)
    assert file["mu_s"].shape == (2023,)
    assert file["arr_0"].shape == (12, 64, 64, 3)
    assert file["arr_0"].dtype == np.uint8 and file["mu"].dtype == np.float64


@pytest.mark.slow
def test_samples_that_were_written_score_the_same(
  place, options, statistics, scored
):
  commands.succeed(
    f"evaluate --samples={place}/samples --reference={statistics}"
    f" --metrics=fid,inception_score --out={place}/written.json {options}"
  )
  written, (found, _) = read(place / "written.json"), scored
  assert set(written["metrics"]) == {"fid", "inception_score"}
  for name, value in written["metrics"].items():
    np.testing.assert_allclose(value, found["metrics"][name], rtol=1e-6)
  assert (
    card.deciding(written["samples"])["sampling"]
    == (card.deciding(found["samples"])["sampling"])
  )
  card.write(place / "card.json", found)
  table = commands.succeed(
    f"evaluate --compare {place}/card.json {place}/written.json"
  )
  assert table.startswith("|  | FID | sFID |") and "Measured alike" in table


@pytest.mark.slow
def test_one_job_on_two_processes_equals_one(place, digits, data_dir):
  """Eight devices in all, both times; the samples come from the network."""
  common = (
    f"evaluate --workdir={digits} --features=digits --reference=digits --num=37"
    f" --data_dir={data_dir} --repeats=2 --batch_size=16"
  )
  where = f"--num_processes=2 --coordinator=localhost:{driver.free_port()}"
  pair = f"-m diffit_jax.{common} --out={place}/pair.json {where}".split()
  done = driver.run_all([[*pair, f"--process_id={i}"] for i in range(2)])
  assert [code for code, *_ in done] == [0, 0], done
  commands.succeed(f"{common} --out={place}/one.json")
  pair, one = read(place / "pair.json"), read(place / "one.json")
  for ours, theirs in zip(pair["repeats"], one["repeats"], strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
      np.testing.assert_allclose(theirs[name], value, rtol=1e-4)
  assert one["protocol"]["reported"].startswith("run ")


@pytest.mark.slow
def test_sigterm_keeps_what_was_gathered(place, digits, data_dir):
  """The digits' debug network is quick, a million samples of it are not."""
  path = place / "stopped.json"
  command = (
    f"evaluate --workdir={digits} --features=digits --reference=digits"
    f" --data_dir={data_dir} --num=1000000 --metrics=frechet_digits"
    f" --out={path}"
  )
  process = commands.start(command)
  deadline = time.monotonic() + 120
  while not list(place.glob("stopped.json.reference.partial")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  time.sleep(2)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75, err[-2000:]
  (partial,) = place.glob("stopped.json.samples0.partial")
  with np.load(partial, allow_pickle=False) as file:
    num = int(file["num"])
  assert 0 < num < 1_000_000
  process = commands.start(command)
  going_on = f"going on from {partial}, {num} images"
  while going_on not in process.errors() and process.poll() is None:
    time.sleep(0.1)
  process.kill()
  _, err = process.communicate()
  assert going_on in err, err


def test_a_sweep_makes_a_card_a_row_and_a_point_of_each_value(
  place, digits, data_dir
):
  out = commands.succeed(
    f"evaluate --workdir={digits} --features=digits --reference=digits"
    f" --data_dir={data_dir} --num=20 --sweep=steps=2,4 --out={place}/sweep"
  )
  made = {path.name for path in (place / "sweep").iterdir()}
  assert made == {"steps=2.json", "steps=4.json", "table.md", "plot.png"}
  steps = [
    read(place / f"sweep/steps={n}.json")["samples"]["sampling"]["sampler"]
    for n in (2, 4)
  ]
  assert [sampler["steps"] for sampler in steps] == [2, 4]
  plot = Image.open(place / "sweep/plot.png")
  assert plot.width > 800 and np.asarray(plot.convert("L")).std() > 10
  assert (place / "sweep/table.md").read_text().startswith("|  | Fréchet")
  assert out.endswith(f"plot: {place}/sweep/plot.png\n")


@pytest.mark.slow
def test_kept_samples_are_those_of_sample(place, digits, data_dir):
  commands.succeed(
    f"evaluate --workdir={digits} --features=digits --reference=digits"
    f" --data_dir={data_dir} --num=5 --keep_samples={place}/kept --seed=3"
    f" --out={place}/kept.json"
  )
  commands.succeed(
    f"sample --workdir={digits} --num=5 --seed=3 --out={place}/again"
  )
  kept, again = (
    (place / name / "samples_5x8x8x3.npz").read_bytes()
    for name in ("kept", "again")
  )
  assert kept == again


# What is wrong with a command, and words of the sentence that says so.
MISTAKES = (
  ("{samples} --reference=ffhq64 --out={place}/x.json", "--inception"),
  slow(
    "{samples} {of_digits} --out={place}/x.json",
    "are 64x64 (height x width), the reference digits is of 8x8",
  ),
  slow(
    "--samples={place}/floats.npz --reference={place}/ffhq64.npz"
    " --out={place}/x.json {options}",
    "float64",
  ),
  (
    "{samples} --reference={place}/ffhq64.npz --out={place}/x.json"
    " --inception={place}/half.safetensors",
    "partial download",
  ),
  (
    "{samples} --reference={place}/ffhq64.npz --out={place}/x.json {options}"
    " --resize=pytorch_fid",
    "were made with another extractor",
  ),
  (
    "{samples} --reference={place}/labelled --per_class --out={place}/x.json"
    " --features=pixels",
    "--per_class needs labels",
  ),
  (
    "--workdir={digits} {of_digits} --sweep=seed=1,2 --out={place}/y",
    "with a field of guidance_scale",
  ),
  ("--compare {place}/floats.npz", "floats.npz"),
  (
    "{samples} --reference={place}/ffhq64.npz --out={place} {options}",
    "is a folder",
  ),
  ("--out={place}/x.json", "--samples"),
  ("{samples} --out={place}/x.json", "--reference"),
  ("{samples} --reference=ffhq64", "--out"),
  (
    "{samples} --reference={place}/no.npz --out={place}/x.json"
    " --features=pixels",
    "no.npz",
  ),
  (
    "{samples} --reference={place}/ffhq64.npz --out={place}/x.json"
    " --inception={place}/w.pth",
    "is a pickle and is never loaded",
  ),
  (
    "{samples} --reference=ffhq64 --per_class --out={place}/x.json {options}"
    " --features=pixels",
    "--per_class needs a reference with labels",
  ),
  (
    "{samples} --reference={place}/samples --num=7 --out={place}/x.json"
    " --features=pixels",
    "--num=7 is more than the 6 images",
  ),
  (
    "{samples} --reference={place}/ffhq64.npz --metrics=fud"
    " --out={place}/x.json {options}",
    "'fud' is not among fid",
  ),
  ("{samples} {of_digits} --sweep=steps=1 --out={place}/y", "goes with"),
  ("{samples} {of_digits} --guide=x --out={place}/y", "--guide is for"),
  ("--build_reference=ffhq64 --out={place}/x.json {options}", ".npz"),
  ("stray", "unexpected argument 'stray'"),
)


@pytest.fixture(scope="module")
def wrong(place):
  """The folder, with what is no input."""
  np.savez(place / "floats.npz", arr_0=RNG.normal(size=(9, 32, 32, 3)))
  half = (place / "inception.safetensors").read_bytes()[:1_000_000]
  (place / "half.safetensors").write_bytes(half)
  (place / "w.pth").write_bytes(b"PK\x03\x04")
  for name in ("a/0", "a/1", "b/0", "b/1"):
    path = place / "labelled" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
  return place


@pytest.mark.parametrize("arguments, message", MISTAKES)
def test_mistakes_end_in_one_line(
  arguments, message, wrong, digits, options, data_dir
):
  of_digits = f"--features=digits --reference=digits --data_dir={data_dir}"
  arguments = arguments.format(
    samples=f"--samples={wrong}/samples", of_digits=of_digits, place=wrong,
    options=options, digits=digits,
  )  # fmt: skip
  line = commands.last_error(f"evaluate {arguments}")
  assert message in line, (arguments, line)
  assert not (wrong / "x.json").exists() and not (wrong / "y").exists()
  assert not list(wrong.glob("[xy]*.claim"))


def test_two_evaluations_do_not_write_one_card(place):
  card_file = place / "busy.json"
  command = (
    f"evaluate --samples={place}/samples --reference={place}/samples"
    f" --features=pixels --out={card_file}"
  )
  with claim.exclusive(f"{card_file}.claim", "--out", card_file):
    line = commands.last_error(command)
  assert f"--out={card_file} is in use by process {os.getpid()} on" in line
  assert not list(place.glob("busy*"))


@pytest.mark.slow
def test_fid_during_training_is_against_its_own_set(place):
  commands.succeed(
    f"main --config=configs/ffhq64.py:debug --workdir={place}/scored"
    f" --data_dir={place}/data --inception={place}/inception.safetensors"
    " --config.model.channel_mult=(1,) --config.evaluate_every_steps=4"
    " --config.evaluation.num=4 --config.keep_best_by=fid"
  )
  found = read(place / "scored/evaluation/step_00000004.json")
  assert found["metrics"].keys() == {"fid"}
  assert found["protocol"]["reference"]["source"] == "ffhq64"
