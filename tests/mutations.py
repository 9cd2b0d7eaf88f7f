"""Small faults that the suite must see, and where it sees each of them.

The list is the measure of what may be cut from the suite: whatever becomes
faster, `make test` must still catch every line. `python tests/mutations.py`
(and `make test-slow`, through test_mutations.py) applies each to a copy of the
project and expects the named tests, all of `make test`, to fail.
"""

from collections.abc import Iterator
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PARTS = ("benchmarks", "configs", "diffit_jax", "docs", "launch", "tests")


@dataclasses.dataclass(frozen=True)
class Mutation:
  """A fault.

  Attributes:
    kind: what it is a fault of.
    file: below diffit_jax/.
    old: text that stands in the file once.
    new: what it becomes.
    tests: file below tests/ and a word for pytest's -k, some test of which
      fails then.
  """

  kind: str
  file: str
  old: str
  new: str
  tests: tuple[str, str]

  def __str__(self) -> str:
    return f"{self.kind}: {self.file}: {self.old.strip().splitlines()[0]}"


def _of(kind: str, *rows: tuple) -> Iterator[Mutation]:
  for file, old, new, *tests in rows:
    yield Mutation(kind, file, old, new, tuple(tests))


MUTATIONS = (
  *_of(
    "formula",
    (
      "diffusion/edm.py",
      "c_noise = jnp.log(sigma) / 4",
      "c_noise = jnp.log(sigma) / 2",
      *("diffusion/test_edm.py", "coefficients"),
    ),
    (
      "diffusion/adm.py",
      "c2=(1 - previous) * np.sqrt(alphas)",
      "c2=(1 - previous) * alphas",
      *("diffusion/test_adm.py", "posterior"),
    ),
    (
      "training/objective.py",
      "std = jnp.exp(0.5 * jnp.clip(log_variance",
      "std = jnp.exp(jnp.clip(log_variance",
      *("training/test_objective.py", "posterior"),
    ),
  ),
  *_of(
    "solver",
    (
      "sampling/edm_heun.py",
      "(carry.d + slope) / 2",
      "carry.d",
      *("sampling/test_edm_heun.py", "second_order"),
    ),
    (
      "sampling/dpmpp_2m.py",
      "extrapolation[1:-1] = h[1:] / (2 * h[:-1])",
      "extrapolation[1:-1] = h[:-1] / (2 * h[1:])",
      *("sampling/test_dpmpp_2m.py", "algorithm or second_order"),
    ),
    (
      "sampling/ddim.py",
      "left = 1 - s.alphas_cumprod_prev - sigma**2",
      "left = 1 - s.alphas_cumprod_prev",
      *("sampling/test_ddim.py", "eta_one"),
    ),
  ),
  *_of(
    "resume and kill",
    (
      "training/source.py",
      "start_index=first_step * config.batch_size,",
      "start_index=0,",
      *("training/test_loop.py", "two_and_two"),
    ),
    (
      "run/checkpoint.py",
      'if found["progress"]["step"] != step:',
      "if False:",
      *("run/test_checkpoint.py", "another_steps_name"),
    ),
    (
      "generation/job.py",
      "batches = itertools.groupby(waiting, lambda i: i // batch_size)",
      "batches = itertools.groupby(waiting[1:], lambda i: i // batch_size)",
      *("generation/test_generation.py", "interrupted_job"),
    ),
    (
      "data/shards.py",
      'report["file_size"] != shard.stat().st_size',
      "False",
      *("data/test_latents.py", "damaged_shard"),
    ),
  ),
  *_of(
    "sharding and hosts",
    (
      "data/pipeline.py",
      "grain.sharding.ShardOptions(shard_index, num_shards)",
      "grain.sharding.ShardOptions(0, num_shards)",
      *("data/test_pipeline.py", "share_out"),
    ),
    (
      "parallel/runtime.py",
      "    if other != texts[0]:",
      "    if False:",
      *("parallel/test_runtime.py", "another_config"),
    ),
    (
      "training/step.py",
      "return jax.tree.map(lambda x: x / num, sums)",
      "return sums",
      *("parallel/test_placement.py", "one_device"),
    ),
  ),
  *_of(
    "data order",
    (
      "data/pipeline.py",
      "mirrored = flip and is_mirrored(seed, index)",
      "mirrored = flip and is_mirrored(seed, 0)",
      *("data/test_pipeline.py", "mirroring"),
    ),
    (
      "data/pipeline.py",
      ".shuffle(seed=order_seed)",
      ".shuffle(seed=0)",
      *("data/test_pipeline.py", "seed_decides"),
    ),
    (
      "training/objective.py",
      "jax.vmap(fold)(index), 0, 1)",
      "jax.vmap(fold)(jnp.arange(len(index))), 0, 1)",
      *("training/test_objective.py", "same_draws"),
    ),
  ),
  *_of(
    "metric",
    (
      "evaluation/metrics/frechet.py",
      "distance = np.sum((mu1 - mu2) ** 2) - 2 * cross",
      "distance = np.sum((mu1 - mu2) ** 2) - cross",
      *("evaluation/metrics/test_frechet.py", "frechet_golden"),
    ),
    (
      "evaluation/metrics/kernel.py",
      "/ (len(a) * (len(a) - 1))",
      "/ len(a) ** 2",
      *("evaluation/metrics/test_kernel.py", "kernel_distance"),
    ),
    (
      "evaluation/metrics/neighbours.py",
      "return float(in_reference.mean()), float(in_samples.mean())",
      "return float(in_samples.mean()), float(in_reference.mean())",
      *("evaluation/metrics/test_neighbours.py", "golden"),
    ),
  ),
  *_of(
    "error text",
    (
      "parallel/mesh.py",
      'f" use a multiple of {mesh.size}"',
      'f" use a multiple of {mesh.size + 1}"',
      *("parallel/test_sharding.py", "batches_that_cannot"),
    ),
    (
      "ranges.py",
      'raise UserError(f"{name}={value} {fault}")',
      'raise UserError(f"{value} {fault}")',
      *("test_ranges.py", ""),
    ),
    (
      "config_files.py",
      'f"config {error.filename}, line {error.lineno}: {error.msg}"',
      'f"config {error.filename}: {error.msg}"',
      *("test_config_files.py", "one_sentence"),
    ),
  ),
  *_of(
    "checkpoint integrity",
    (
      "run/integrity.py",
      "if saved.get(name) != found[name]]",
      "if saved.get(name, found[name]) != found[name]][:0]",
      *("run/test_integrity.py", "damage_is_named"),
    ),
    (
      "run/integrity.py",
      "_murmur(bits ^ _murmur(c[0] + i)),",
      "_murmur(bits ^ _murmur(c[0])),",
      *("run/test_integrity.py", "plain_integers"),
    ),
    (
      "run/storage.py",
      "    integrity.compare(sums, read_sums)",
      "    pass",
      *("run/test_checkpoint.py", "silently"),
    ),
  ),
  *_of(
    "past fix",
    (
      "claim.py",
      "    if token != self._token:",
      "    if False:",
      *("test_claim.py", ""),
    ),
    (
      "evaluation/sets/image_set.py",
      "return order[part * size : (part + 1) * size]",
      "return np.arange(part * size, (part + 1) * size)",
      *("evaluation/sets/test_class_matching.py", ""),
    ),
    (
      "paths.py",
      "expanded = os.path.expanduser(path)",
      "expanded = path",
      *("test_config_files.py", "home"),
    ),
    (
      "interop/tensors.py",
      "return file.get_tensor(name).astype(np.float32, copy=False)",
      "return file.get_tensor(name)",
      *("interop/test_tensors.py", ""),
    ),
    (
      "diffusion/bound.py",
      "width = 2 * half * _LOGIT * (1 + _CUBIC * (3 * middle**2 + half**2))",
      "width = upper - lower",
      *("diffusion/test_adm.py", "bound_at_0 or bound_far_out"),
    ),
    (
      "run/storage.py",
      '  found = sorted(set(full) & set("*?["))',
      "  found = []",
      *("training/test_loop.py", "pattern"),
    ),
  ),
)


def survives(mutation: Mutation) -> str:
  """ "" if a test fails by the fault; else what happened.

  Raises:
    ValueError: the fault's text is not in its file, or not once.
  """
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder)
    for part in PARTS:
      ignore = shutil.ignore_patterns("__pycache__")
      shutil.copytree(ROOT / part, copy / part, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md"):
      shutil.copy(ROOT / name, copy / name)
    path = copy / "diffit_jax" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
      raise ValueError(f"{mutation}: stands {text.count(mutation.old)} times")
    path.write_text(text.replace(mutation.old, mutation.new))
    file, word = mutation.tests
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q"]
    command += [f"tests/{file}", "-k", word] if word else [f"tests/{file}"]
    done = subprocess.run(
      command,
      cwd=copy,
      env={**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"},
      capture_output=True,
      text=True,
    )
    if done.returncode == 1:  # tests were run, and some failed
      return ""
    return f"{mutation} survives (pytest's {done.returncode}): " + (
      done.stdout.strip()[-500:] or done.stderr[-500:]
    )


if __name__ == "__main__":
  words = sys.argv[1:]
  chosen = [m for m in MUTATIONS if all(word in str(m) for word in words)]
  num_alive = 0
  for each in chosen:
    said = survives(each)
    num_alive += bool(said)
    print(said or f"caught: {each}", flush=True)
  print(f"{len(chosen) - num_alive} of {len(chosen)} caught")
  sys.exit(bool(num_alive))
