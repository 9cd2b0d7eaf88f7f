"""The kinds of data set that `prepare` makes, one module each.

A module NAME has `recipe`, which takes the flags of its row as keywords and
returns what `preparation.prepare` needs; that of `imagenet_latents` has
`prepare` instead, since latents are made in shards.
"""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class Kind:
  """The flags of one kind of data set.

  Attributes:
    takes: names of the flags, beside --data_dir and --overwrite.
    needs: {name of a flag that must be given: what its value is}.
  """

  takes: tuple[str, ...]
  needs: Mapping[str, str] = dataclasses.field(default_factory=dict)


_IMAGES = ("source", "name", "max_bad_fraction")
KINDS = {
  "digits": Kind(("encoding",)),
  "cifar10": Kind(("source",)),
  "ffhq64": Kind((*_IMAGES, "encoding"), {"source": "FOLDER_OR_ZIP"}),
  "image_folder": Kind(
    (*_IMAGES, "encoding", "resolution", "crop"),
    {"source": "FOLDER_OR_ZIP", "resolution": "SIDE"},
  ),
  "imagenet_latents": Kind(
    (
      *(*_IMAGES, "resolution", "vae", "latent_dtype", "batch_size"),
      *("num_shards", "shard"),
    ),
    {"source": "FOLDER_OR_ZIP_OR_NAME", "vae": "FOLDER", "resolution": "SIDE"},
  ),
}


def command(
  name: str,
  data_dir: str,
  kind: str | None = None,
  resolution: int | None = None,
) -> str:
  """The command line that makes a data set.

  Args:
    name: name of the data set.
    data_dir: folder of the prepared data sets.
    kind: one of KINDS; None is the one of that name, or image_folder.
    resolution: side of the images that are wanted, where it is known.
  """
  kind = kind or (name if name in KINDS else "image_folder")
  values = dict(KINDS[kind].needs)
  if resolution is not None and "resolution" in values:
    values["resolution"] = str(resolution)
  if kind != name:
    values["name"] = name
  values["data_dir"] = data_dir
  flags = " ".join(f"--{flag}={value}" for flag, value in values.items())
  return f"python -m diffit_jax.prepare {kind} {flags}"
