"""Which processes a run has, and which of them this one is.

Read from the flags, or else from what Slurm tells the tasks of a job step; TPU
slices are left to JAX, which asks the TPU's own surroundings.
"""

from collections.abc import Mapping
import dataclasses
import importlib.util
import os
import pathlib
import re
import urllib.request

from absl import logging

from diffit_jax.errors import UserError

_DEVICES = pathlib.Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"  # vendor ID
_NO_CHIPS = ("0x01", "0x02")  # classes of storage and network devices


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run, as one of them sees it.

  Attributes:
    kind: "alone", "manual", "slurm" or "tpu".
    coordinator: host:port of process 0; None where JAX finds it (TPU).
    num_processes: number of the run's processes; None where JAX finds it.
    process_id: number of this process; None where JAX finds it.
    device_ids: the node's GPUs that are this process's; None is all it sees.
  """

  kind: str = "alone"
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  device_ids: tuple[int, ...] | None = None

  def __str__(self) -> str:
    if self.coordinator is None:
      return f"the {self.kind} cluster"
    return (
      f"process {self.process_id} of {self.num_processes} at the coordinator"
      f" {self.coordinator}"
    )


def detect(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  environ: Mapping[str, str],
  has_tpu: bool = False,
) -> Cluster:
  """What the flags, or else the surroundings, say.

  Args:
    coordinator: host:port of process 0.
    num_processes: number of the run's processes; 1 is a run alone, whatever
      the surroundings.
    process_id: number of this process.
    environ: the environment variables.
    has_tpu: whether this machine has TPU chips.

  Raises:
    UserError: flags that are missing or do not go together.
  """
  if num_processes == 1:
    return Cluster()
  given = dict(
    coordinator=coordinator, num_processes=num_processes, process_id=process_id
  )
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if not missing:
    _check(coordinator, num_processes, process_id)
    return Cluster("manual", **given)
  if len(missing) < len(given):
    raise UserError(
      f"{' and '.join(missing)} missing: --coordinator=HOST:PORT,"
      " --num_processes=N and --process_id=I go together"
    )
  tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
  if "SLURM_STEP_NODELIST" in environ and int(tasks) > 1:
    return Cluster(
      "slurm",
      _slurm_coordinator(environ),
      int(tasks),
      int(environ["SLURM_PROCID"]),
      _slurm_devices(environ),
    )
  return Cluster("tpu") if has_tpu else Cluster()


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
  if not re.fullmatch(r".+:\d+", coordinator):
    raise UserError(f"--coordinator={coordinator}: write it as HOST:PORT")
  if not 0 <= process_id < num_processes:
    raise UserError(
      f"--process_id={process_id} must be from 0 to {num_processes - 1}, with"
      f" --num_processes={num_processes}"
    )
  if re.match(r"localhost:|127\.|\[::1\]", coordinator):
    logging.warning(
      "--coordinator=%s is this machine's own address: other hosts cannot"
      " reach it",
      coordinator,
    )


def _slurm_coordinator(environ: Mapping[str, str]) -> str:
  """The job step's first node, and a port of its own."""
  # "node[001-003,007],login1" -> "node001"
  nodes = re.sub(r"\[(\w+)[^\]]*\]", r"\1", environ["SLURM_STEP_NODELIST"])
  job, step = environ["SLURM_JOB_ID"], environ.get("SLURM_STEP_ID", "0")
  port = 61440 + (int(job) * 16 + int(step)) % 4096
  port = environ.get("JAX_COORDINATOR_PORT", str(port))
  return f"{nodes.split(',')[0]}:{port}"


def _slurm_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
  """The GPUs of this task: an equal share of those that it can see."""
  is_bound = (
    "JAX_LOCAL_DEVICE_IDS" in environ  # JAX reads it
    or "SLURM_GPUS_PER_TASK" in environ
    or "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
  )
  num_tasks = _slurm_tasks_here(environ)
  if num_tasks == 1 or is_bound:
    return None
  local = int(environ.get("SLURM_LOCALID", "0"))
  visible = environ.get("CUDA_VISIBLE_DEVICES", "")
  if not visible:
    return (local,)
  num = len(visible.split(","))
  if num < num_tasks:
    return None  # each task sees none but its own
  share = num // num_tasks
  return tuple(range(local * share, (local + 1) * share))


def _slurm_tasks_here(environ: Mapping[str, str]) -> int:
  """Tasks of the job step on this node, from "2(x3),1" and the node's place."""
  text = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
  counts = []
  for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
    counts += [int(count)] * int(repeat or 1)
  return counts[min(int(environ.get("SLURM_NODEID", "0")), len(counts) - 1)]


def has_tpu(
  environ: Mapping[str, str] = os.environ, devices: pathlib.Path = _DEVICES
) -> bool:
  """Whether JAX will find TPU chips here, without waking them.

  Args:
    environ: the environment variables.
    devices: a folder for each PCI device of this machine.
  """
  platforms = environ.get("JAX_PLATFORMS", "")
  wanted = not platforms or "tpu" in platforms.split(",")
  if not wanted or not any(map(_is_chip, devices.glob("*"))):
    return False
  return "TPU_LIBRARY_PATH" in environ or bool(
    importlib.util.find_spec("libtpu")
  )


def _is_chip(device: pathlib.Path) -> bool:
  """Whether it is Google's, and none of its disks and network cards."""
  read = lambda name: (device / name).read_text().strip()
  try:
    return read("vendor") == _GOOGLE and read("class")[:4] not in _NO_CHIPS
  except OSError:
    return False


def num_tpu_hosts(environ: Mapping[str, str]) -> int:
  """Hosts that JAX would join; 1 where the surroundings do not say.

  Args:
    environ: the environment variables; GKE sets the hosts' names, and on a TPU
      VM Google's metadata server tells them.
  """
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES"
  )
  if not hosts and "TPU_SKIP_MDS_QUERY" not in environ:
    hosts = _metadata(environ, "worker-network-endpoints")
  num_slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  return num_slices * len((hosts or "").split(","))


def _metadata(environ: Mapping[str, str], name: str) -> str:
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{name}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except OSError:  # not Google's cloud
    return ""
