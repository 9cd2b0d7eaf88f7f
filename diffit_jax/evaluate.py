"""Scores images: FID, sFID, inception score, precision, recall, KID.

  # images that are there: an npz, a folder, a zip or a prepared data set
  python -m diffit_jax.evaluate --samples=samples --reference=ffhq64.npz \
      --inception=inception.safetensors --out=card.json

  # samples that are made, scored and deleted (--keep_samples=DIR keeps them)
  python -m diffit_jax.evaluate --workdir=runs/ffhq64 --num=50000 \
      --reference=ffhq64.npz --inception=inception.safetensors --out=card.json

  # statistics of a prepared data set, in ADM's layout
  python -m diffit_jax.evaluate --build_reference=ffhq64 \
      --inception=inception.safetensors --out=ffhq64.npz

  # a metric over a sampler field, with a plot; several cards as one table
  python -m diffit_jax.evaluate --workdir=runs/digits --features=digits \
      --reference=digits --sweep=guidance_scale=1,1.5,2 --num=500 --out=sweep
  python -m diffit_jax.evaluate --compare a.json b.json

Every number is written to a card (JSON) with all that decides it. A reference
is a file of statistics (ADM's or EDM's npz), or anything with images. Without
Inception's weights --features=pixels and --features=digits measure in other
spaces, under other names. An interrupted run continues where it stopped.
"""

import dataclasses
import pathlib

from absl import flags

from diffit_jax import cli, paths, sampling_flags
from diffit_jax.errors import UserError
from diffit_jax.evaluation import features
from diffit_jax.evaluation.metrics import table

_SAMPLES = cli.define_path(
  "samples", "Images to score: .npz, folder, zip, or name of a data set."
)
_WEIGHTS = sampling_flags.define_weights_flags()
_REFERENCE = cli.define_path(
  "reference",
  "What samples are compared with: statistics (.npz), or images.",
)
_SPLIT = flags.DEFINE_string("split", "train", "Part of a data set.")
_DATA_DIR = cli.define_path(
  "data_dir", "Folder of the prepared data sets; default $TFDS_DATA_DIR."
)
_OUT = cli.define_path(
  "out", "The card; with --build_reference an npz; with --sweep a folder."
)
_FEATURES = flags.DEFINE_enum(
  "features",
  "inception",
  features.SPACES,
  "Feature space. Only inception gives FID and the others of that name.",
)
_INCEPTION = cli.define_inception_flag()
_RESIZE = flags.DEFINE_enum(
  "resize",
  "tf1",
  features.RESIZE_RULES,
  "Rule by which images become 299x299: that of ADM's and EDM's evaluators, or"
  " pytorch-fid's.",
)
_METRICS = flags.DEFINE_list(
  "metrics",
  [],
  "Default: all there are. With --features=inception:"
  f" {', '.join(table.names('inception'))}; with pixels, and likewise digits:"
  f" {', '.join(table.names('pixels'))}.",
)
_PER_CLASS = flags.DEFINE_bool(
  "per_class", False, "Also compare each class with the same class."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 1, "Runs of --num other samples; the best is reported.", 1
)
_KEEP = cli.define_path(
  "keep_samples", "Folder that keeps the samples, as sample writes them."
)
_BUILD = cli.define_path(
  "build_reference", "Write statistics of these images to --out."
)
_SWEEP = flags.DEFINE_string(
  "sweep",
  None,
  "FIELD=VALUE,VALUE: guidance_scale, guidance_power, guide_scale or steps.",
)
_COMPARE = flags.DEFINE_list("compare", None, "Cards to print as one table.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 64, "Images per call, over all devices.", 1
)
_SAMPLING = sampling_flags.define_sampling_flags(
  num=None,
  num_help="Images to score; default all of --samples, else 50,000.",
)
_RUNTIME = cli.define_runtime_flags()
_NUM_MADE = 50_000


def main(*files: str) -> int:
  if _COMPARE.value is not None:
    return _compare([*_COMPARE.value, *files])
  if files:
    raise UserError(
      f"unexpected argument {files[0]!r}: options are written --name=value"
    )
  cli.require_one_of(out=_OUT.value)
  cli.require_local(_OUT.value)
  if _BUILD.value is None:
    _check_flags()
  elif _FEATURES.value != "inception":
    raise UserError(
      "--build_reference writes Inception's statistics: with --features="
      f"{_FEATURES.value} give the images themselves as --reference"
    )
  from diffit_jax.parallel import runtime
  from diffit_jax.stop import StopRequest

  with _RUNTIME.distributed():
    with StopRequest(runtime.preemption_notice()) as stop:
      stop.begin(0)
      return _build_reference(stop) if _BUILD.value else _evaluate(stop)


def _check_flags() -> None:
  cli.require_one_of(samples=_SAMPLES.value, **_WEIGHTS.sources)
  cli.require_one_of(reference=_REFERENCE.value)
  if _SAMPLES.value:
    network = [*_SAMPLING.of_networks(), _WEIGHTS.config, _WEIGHTS.step]
    for flag in (_SWEEP, _KEEP, *network):
      if flag.value is not None:
        raise UserError(
          f"--{flag.name} is for samples that are made: it goes with --workdir"
          " or --checkpoint"
        )
  if _KEEP.value:
    cli.require_local(_KEEP.value)
    cli.require_one_process()


def _compare(files: list[str]) -> int:
  from diffit_jax.evaluation import card, compare

  cards = {}
  for path in map(paths.expand, files):
    name = pathlib.Path(path).stem
    cards[path if name in cards else name] = card.read(path)
  print(compare.table(cards))
  return 0


def _space():
  from diffit_jax.evaluation.features import spaces

  return spaces.open_space(_FEATURES.value, _INCEPTION.value, _RESIZE.value)


def _collector(space, stop, held):
  """The feature space, on all devices, for what is claimed by `held`."""
  from diffit_jax.evaluation.collector import Collector, asking
  from diffit_jax.parallel.mesh import make_mesh

  return Collector(
    space,
    make_mesh(),
    batch_size=_BATCH_SIZE.value,
    should_stop=asking(stop),
    check_claim=held.check,
  )


def _claimed(out: pathlib.Path, is_folder: bool = False):
  """The context in which no other process writes to --out."""
  from diffit_jax import claim
  from diffit_jax.parallel import runtime

  path = out / ".sweep" if is_folder else out
  path = path.with_name(f"{path.name}.claim")
  return claim.exclusive(path, "--out", out, runtime.on_process_0)


def _build_reference(stop) -> int:
  from diffit_jax.evaluation import measure
  from diffit_jax.evaluation.sets import opening, reference_file

  out = pathlib.Path(_OUT.value)
  reference_file.require_npz(out)
  found = opening.open_images(_BUILD.value, _DATA_DIR.value, _SPLIT.value)
  space = _space()
  with _claimed(out) as held:
    measure.build_reference(_collector(space, stop, held), found, out)
  print(f"reference: {_OUT.value} ({found.num:,} images)")
  return 0


def _evaluate(stop) -> int:
  from diffit_jax.evaluation import sweep
  from diffit_jax.evaluation.sets import references

  table.choose(_METRICS.value, _FEATURES.value)  # a mistake would show late
  name, values = sweep.parse(_SWEEP.value)
  out = pathlib.Path(_OUT.value)
  if not name and out.is_dir():
    raise UserError(f"--out={out} is a folder: a card is a file, as card.json")
  space = _space()
  found = references.read_reference(
    _REFERENCE.value, _DATA_DIR.value, _SPLIT.value
  )
  _make_folder(out if name else out.parent)
  with _claimed(out, is_folder=bool(name)) as held:
    collector = _collector(space, stop, held)
    _make_cards(collector, found, name, values, out)
  return 0


def _make_folder(folder: pathlib.Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make the folder {folder}: {error}") from error


def _make_cards(collector, found, name, values, out: pathlib.Path) -> None:
  """The card at `out`, or in it one for each value of the swept field."""
  from diffit_jax.evaluation import card, scoring, sweep
  from diffit_jax.evaluation import measure as measure_lib
  from diffit_jax.evaluation.collector import remove_partial
  from diffit_jax.parallel import runtime

  make = _images() if _SAMPLES.value else _network(collector.mesh, name)
  partial = out / "reference" if name else out
  measure = None
  cards = {}
  for value in values:
    samples = make(value)
    num = _num(samples.available)
    # Before the reference is read.
    scoring.check_num(samples, num, _REPEATS.value)
    if measure is None:
      measure = measure_lib.make_measure(
        collector,
        found,
        samples.shape,
        wanted=_METRICS.value,
        per_class=_PER_CLASS.value,
        partial=partial,
      )
    cards[value] = scoring.evaluate_to_file(
      measure,
      samples,
      sweep.card_path(out, name, value),
      num=num,
      repeats=_REPEATS.value,
    )
    print(card.lines(cards[value]), flush=True)
  runtime.on_process_0(collector.check_claim)
  if name:
    print(f"plot: {sweep.write(name, cards, out)}")
  remove_partial(partial)


def _num(available: int | None) -> int:
  """Samples of one run."""
  made = available is None
  return _SAMPLING.num.value or (
    _NUM_MADE if made else available // _REPEATS.value
  )


def _images():
  """The function from no value to the images of --samples."""
  from diffit_jax.evaluation.sets import opening
  from diffit_jax.evaluation.sets.samples import ImageSamples

  found = opening.open_images(_SAMPLES.value, _DATA_DIR.value, _SPLIT.value)
  return lambda _: ImageSamples(found)


def _network(mesh, field: str | None):
  """The function from a value of the swept field to a network's samples."""
  from diffit_jax.evaluation.sets import opening, sampled
  from diffit_jax.evaluation.sets.network_samples import NetworkSamples
  from diffit_jax.evaluation.sets.samples import ImageSamples
  from diffit_jax.generation import job
  from diffit_jax.generation.generator import make_generator, make_model

  loaded, codec = _SAMPLING.open(_WEIGHTS, mesh, field)
  seed, labels = _SAMPLING.seed.value, _SAMPLING.labels.value
  class_names = None
  if _PER_CLASS.value:
    class_names = sampled.names_of_training(
      loaded.config.data.name,
      loaded.config.model.num_classes,
      _DATA_DIR.value,
    )

  def make(value: float | None):
    config = loaded.config.copy_and_resolve_references()
    folder = _KEEP.value
    if field:
      config.sampler[field] = value
      folder = folder and f"{folder}/{field}={value:g}"
    changed = dataclasses.replace(loaded, config=config)
    model = make_model(config)
    samples = NetworkSamples(
      changed,
      model,
      make_generator(model, config, mesh, codec, loaded.guide),
      seed=seed,
      labels=labels,
      codec=codec,
      class_names=class_names,
    )
    if not folder:
      return samples
    job.sample_to_folder(
      changed,
      mesh,
      folder,
      num=_num(None) * _REPEATS.value,
      seed=seed,
      labels=labels,
      batch_size=_BATCH_SIZE.value,
      codec=codec,
    )
    return ImageSamples(opening.open_images(folder, _DATA_DIR.value))

  return make


if __name__ == "__main__":
  cli.run(main, many=True)
