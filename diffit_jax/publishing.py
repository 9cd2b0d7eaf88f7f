"""What `export --push` adds to a file of weights: a model card, its score."""

from collections.abc import Mapping
import hashlib
import os
import pathlib
from typing import Any

from diffit_jax.diffusion import kinds
from diffit_jax.errors import UserError
from diffit_jax.evaluation import card as card_lib
from diffit_jax.evaluation.metrics import table
from diffit_jax.generation import description
from diffit_jax.generation.weights import Weights
from diffit_jax.interop import hub, push


def publish(
  target: push.Target,
  file: str | os.PathLike,
  weights: Weights,
  layout: str,
  score: Mapping | None,
) -> hub.Address:
  """Uploads a file with its model card; see `model_card` for the arguments."""
  card = model_card(target.address, file, weights, layout, score)
  message = f"{target.address.file}: step {weights.step}, ema {weights.ema}"
  return target.push(file, card, message)


def find_score(
  path: str | None, workdir: str | None, weights: Weights
) -> dict[str, Any] | None:
  """The score card of these very weights, or None.

  Args:
    path: a card that `evaluate` wrote.
    workdir: folder of the run, looked at if there is no path: a run that scores
      itself has a card of every step that it scored.
    weights: the weights.

  Raises:
    UserError: the card at the path is of other weights.
  """
  own = description.hash_tree(weights.params)
  if path:
    card = card_lib.read(path)
    if _scored(card) != own:
      raise UserError(
        f"--card={path} is of other weights (SHA-256 {_scored(card)}) than"
        f" those to be pushed ({own}): evaluate these, or leave it out"
      )
    return card
  folder = pathlib.Path(workdir or "") / card_lib.FOLDER
  found = card_lib.path_of_step(folder, weights.step)
  if not (workdir and found.exists()):
    return None
  card = card_lib.read(found)
  return card if _scored(card) == own else None


def _scored(card: Mapping) -> str | None:
  """SHA-256 of the weights that made a card's samples."""
  return (card["samples"].get("sampling") or {}).get("weights_sha256")


def model_card(
  address: hub.Address,
  file: str | os.PathLike,
  weights: Weights,
  layout: str,
  score: Mapping | None,
) -> str:
  """The page of a repository, in Markdown with the Hub's header.

  Args:
    address: where the file will be.
    file: the local file.
    weights: what it holds.
    layout: "native" or "official".
    score: a score card of these weights, if there is one.
  """
  config = weights.config
  with open(file, "rb") as opened:
    sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
  rows = {
    "file": f"`{address.file}`, SHA-256 `{sha256}`",
    "layout": layout,
    "config": f"`{config.name}`",
    "network": f"`{config.model.name}`",
    "data": f"`{config.data.name}`, {_classes(config)}",
    "resolution": _resolution(config),
    "average of the weights": f"`{weights.ema}`",
  }
  if weights.step:
    rows["trained for"] = f"{weights.step:,} steps"
  if weights.about:
    rows["made"] = weights.about
  lines = [
    *("---", "library_name: diffit_jax", "tags:"),
    *(f"- {tag}" for tag in ("diffusion", "image-generation", "jax", "flax")),
    *("---", push.MARK, ""),
    *(f"# {config.name}", ""),
    "DiffiT (Diffusion Vision Transformers, arXiv 2312.02139) in JAX, exported"
    " by diffit_jax.",
    *("", "| | |", "|---|---|"),
    *(f"| {name} | {value} |" for name, value in rows.items()),
    *("", "## Samples", "", *_command(address, config, layout)),
    *("", "## Scores", "", *_scores(score)),
  ]
  return "\n".join(lines) + "\n"


def _classes(config) -> str:
  num = config.model.num_classes
  return f"{num:,} classes" if num else "without classes"


def _resolution(config) -> str:
  side, latent = config.data.resolution, kinds.is_latent(config)
  return f"{side}x{side}{' latents' if latent else ''}"


def _command(address: hub.Address, config, layout: str) -> list[str]:
  words = ["python -m diffit_jax.sample", f"--checkpoint={address}"]
  if layout == "official":  # which carries no config
    words.append("--config=CONFIG")
  if kinds.is_latent(config):
    words.append("--vae=FOLDER")
  return [
    *("```", " ".join([*words, "--out=samples"]), "```"),
    *("", "This needs `pip install 'diffit_jax[hub]'`."),
  ]


def _scores(score: Mapping | None) -> list[str]:
  if score is None:
    return ["Not yet measured."]
  num = score["num_samples"]
  sampler = score["samples"]["sampling"]["sampler"]
  settings = ", ".join(f"{k}={v}" for k, v in sampler.items() if v != "")
  reference = score["protocol"].get("reference", {}).get("source", "")
  lines = [
    *("| metric | value |", "|---|---|"),
    *(
      f"| {table.title(name, num)} | {value:.6g} |"
      for name, value in score["metrics"].items()
    ),
    "",
    f"Of {num:,} samples ({settings}), compared with the reference"
    f" `{os.path.basename(str(reference))}`.",  # no folders of this machine
  ]
  return lines + [f"\nWarning: {text}" for text in score.get("warnings", ())]
