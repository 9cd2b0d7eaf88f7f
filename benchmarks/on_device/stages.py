"""The stages: what each measures, and the most seconds that it may take.

Only the standard library: the process of a stage may run in a Python that has
PyTorch and nothing of this project.
"""

import dataclasses

CALL_SECONDS = (330, 205)  # device time is lent in calls of a few minutes


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage.

  Attributes:
    name: of the stage.
    entry: "module:function"; the function takes a `rows.Record`, and the module
      has a `card()`.
    cap: seconds after which its process is ended.
    call: which of the calls of CALL_SECONDS it belongs to, from 0.
    what: it measures.
    needs_torch: whether it runs in the Python that has PyTorch.
  """

  name: str
  entry: str
  cap: int
  call: int
  what: str
  needs_torch: bool = False


def _stage(name: str, entry: str, *rest, **fields) -> Stage:
  return Stage(name, f"benchmarks.on_device.{entry}", *rest, **fields)


# In the order of their worth: what comes last is lost first. Machine and
# ceilings are short, and everything is divided by them.
STAGES = {
  stage.name: stage
  for stage in (
    _stage("machine", "ceilings:machine", 15, 0, "The machine and versions."),
    _stage(
      "ceilings",
      "ceilings:ceilings",
      30,
      0,
      "Products of matrices at each precision, and copies: the most that this"
      " card gives.",
    ),
    _stage(
      "train256",
      "train:imagenet256",
      125,
      0,
      "The train step of imagenet256 by batch, remat and attention.",
    ),
    _stage(
      "torch",
      "torch_side:measure",
      70,
      0,
      "The same network in PyTorch: bfloat16 autocast, eager and compiled.",
      needs_torch=True,
    ),
    _stage(
      "goldens",
      "goldens:measure",
      45,
      0,
      "Errors of output, loss and gradients at each precision, relative to"
      " float64 on the CPU.",
    ),
    _stage(
      "attention",
      "attention:measure",
      45,
      0,
      "Whether cuDNN's attention may be trusted, and its time beside XLA's.",
    ),
    _stage(
      "sampling",
      "sampling:measure",
      75,
      1,
      "Guided samples of imagenet256's network, by solver.",
    ),
    _stage(
      "train512",
      "train:imagenet512",
      60,
      1,
      "The train step of imagenet512 by batch, remat and attention.",
    ),
    _stage(
      "cifar10",
      "train:cifar10",
      70,
      1,
      "The train step of cifar10 at three precisions.",
    ),
    _stage(
      "ffhq64",
      "train:ffhq64",
      150,
      1,
      "The train step of ffhq64 at three precisions.",
    ),
    _stage("vae", "frozen:vae", 40, 1, "Decoding latents with the SD VAE."),
    _stage(
      "inception",
      "frozen:inception_features",
      30,
      1,
      "Features of the FID Inception.",
    ),
    _stage(
      "digits",
      "digits:measure",
      150,
      1,
      "Training on the digits from data to score, killed once; checkpoints of"
      " this device on the CPU, and the other way round.",
    ),
  )
}


def of_call(call: int) -> list[str]:
  """Names of the stages of one of the calls."""
  return [stage.name for stage in STAGES.values() if stage.call == call]
