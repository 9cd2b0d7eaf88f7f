"""One of two processes that save and restore one checkpoint folder together.

  python two_readers.py WORKDIR PORT PROCESS_ID

Step 3 is damaged in its file, step 2 cannot be read by process 1 alone. Prints
the step that this process restored, and whether its arrays are that step's.
"""

import json
import pathlib
import sys

import jax
from test_checkpoint import abstract_on, flip, largest_file, state_at

from diffit_jax.parallel import runtime
from diffit_jax.parallel.mesh import make_mesh
from diffit_jax.run import checkpoint, integrity, storage


def on_mesh(step: int, mesh):
  """`state_at` where each process makes its own part."""
  local = make_mesh(1, 1, devices=jax.local_devices()[:1])
  place = lambda x, like: jax.make_array_from_callback(
    x.shape, like.sharding, lambda index: jax.device_get(x)[index]
  )
  return jax.tree.map(place, state_at(step, local), abstract_on(mesh))


def main(workdir: str, port: str, process_id: str) -> None:
  jax.distributed.initialize(f"localhost:{port}", 2, int(process_id))
  mesh = make_mesh(1, 2)
  checkpoints = checkpoint.Checkpoints(workdir, max_to_keep=3)
  for step in (1, 2, 3):
    checkpoints.save(step, on_mesh(step, mesh), 16)
  checkpoints.close()

  if runtime.is_process_0():
    flip(largest_file(pathlib.Path(workdir) / "checkpoints/3/params"), 0.5)
  load = storage._load_tree

  def refuse_two(path, *args):
    if "/2/" in str(path) and not runtime.is_process_0():
      raise OSError("the network folder is away")
    return load(path, *args)

  storage._load_tree = refuse_two
  storage._RETRIES = (0.1,)  # seconds
  runtime.on_process_0(lambda: None)  # the damage is done
  checkpoints = checkpoint.Checkpoints(workdir, max_to_keep=3)
  found = checkpoints.restore(abstract_on(mesh))
  steps = checkpoints.steps()
  step = int(found.step)
  expected = integrity.checksums(on_mesh(step, mesh))
  checkpoints.save(4, on_mesh(4, mesh), 16)
  checkpoints.close()
  print(json.dumps([step, integrity.checksums(found) == expected, steps]))
  jax.distributed.shutdown()


if __name__ == "__main__":
  main(*sys.argv[1:])
