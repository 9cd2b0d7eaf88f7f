"""Who the processes of a run are, and whether they agree."""

from http import server
import json
import os
import threading
import types
import zlib

import pytest

from diffit_jax.errors import UserError
from diffit_jax.parallel import cluster, runtime
from diffit_jax.parallel.cluster import Cluster, detect
from diffit_jax.stop import StopRequest
import two_processes

SLURM = {
  "SLURM_JOB_ID": "1234",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "node[007-008,012],login1",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "2",
  "SLURM_NODEID": "2",
  "SLURM_LOCALID": "0",
}
EIGHT = dict(SLURM, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7")


def devices(**environ):
  return detect(None, None, None, EIGHT | environ).device_ids


def test_without_flags_and_surroundings_a_program_is_alone():
  assert detect(None, None, None, {}) == Cluster("alone")
  batch = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}  # no srun: no job step
  assert detect(None, None, None, batch) == Cluster("alone")
  one = SLURM | {"SLURM_STEP_NUM_TASKS": "1"}
  assert detect(None, None, None, one) == Cluster("alone")


def test_flags_win_over_slurm_and_slurm_over_the_tpu():
  manual = detect("h:1", 2, 1, SLURM, has_tpu=True)
  assert manual == Cluster("manual", "h:1", 2, 1, None)
  assert detect(None, None, None, SLURM, has_tpu=True).kind == "slurm"
  assert detect(None, None, None, {}, has_tpu=True) == Cluster("tpu")
  assert detect(None, 1, None, SLURM, has_tpu=True) == Cluster("alone")


def test_a_slurm_step_is_read():
  # Port: 61440 + (1234 * 16 + 0) % 4096.
  assert detect(None, None, None, SLURM) == Cluster(
    "slurm", f"node007:{61440 + 3360}", 4, 2, None
  )
  plain = SLURM | {"SLURM_STEP_NODELIST": "a1,b2", "JAX_COORDINATOR_PORT": "9"}
  assert detect(None, None, None, plain).coordinator == "a1:9"


def test_a_slurm_task_takes_its_share_of_the_nodes_gpus():
  assert devices() is None  # one task per node takes them all
  two = dict(SLURM_STEP_TASKS_PER_NODE="1,2(x3)", SLURM_LOCALID="1")
  assert devices(**two) == (4, 5, 6, 7)
  assert devices(**two, SLURM_NODEID="0") is None
  eight = dict(SLURM_STEP_TASKS_PER_NODE="8(x4)", SLURM_LOCALID="3")
  assert devices(**eight) == (3,)
  assert devices(**eight, CUDA_VISIBLE_DEVICES="") == (3,)
  # What Slurm or the user has already dealt out is left so.
  assert devices(**eight, CUDA_VISIBLE_DEVICES="0") is None
  assert devices(**two, SLURM_GPUS_PER_TASK="2") is None
  assert devices(**two, SLURM_TRES_PER_TASK="cpu=8,gres/gpu=2") is None
  assert devices(**two, SLURM_TRES_PER_TASK="cpu=8") == (4, 5, 6, 7)
  assert devices(**two, JAX_LOCAL_DEVICE_IDS="0") is None


@pytest.mark.parametrize(
  "given, message",
  [
    (("h:1", None, None), "--num_processes and --process_id missing"),
    ((None, 2, 0), "--coordinator missing: --coordinator=HOST:PORT, --num"),
    (("h", 2, 0), "--coordinator=h: write it as HOST:PORT"),
    (("h:1", 2, 2), "--process_id=2 must be from 0 to 1, with --num_pro"),
  ],
)
def test_flags_that_do_not_go_together_are_refused(given, message):
  with pytest.raises(UserError, match=message):
    detect(*given, SLURM)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3"])
def test_a_loopback_coordinator_is_warned_about(host, caplog):
  detect(f"{host}:1", 2, 0, {})
  assert "other hosts cannot reach it" in caplog.text


def test_alone_nothing_is_asked_of_others(tmp_path):
  with runtime.distributed(Cluster()):
    for call in (runtime.on_all_processes, runtime.on_process_0):
      assert call(lambda: 3) == 3
    runtime.check_shared(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert runtime.preemption_notice() is None
  with pytest.raises(UserError, match="^no$"):
    runtime.on_all_processes(fail_with("no"))


def fail_with(text):
  def call():
    raise UserError(text)

  return call


def test_the_others_do_not_come():
  """One sentence, in place of the abort that JAX makes of it."""
  coordinator = f"localhost:{two_processes.free_port()}"
  code = (
    "from diffit_jax import cli\n"
    "from diffit_jax.parallel import runtime\n"
    f"cluster = runtime.Cluster('manual', {coordinator!r}, 2, 0)\n"
    "def main():\n"
    "  with runtime.distributed(cluster, timeout=1):\n"
    "    pass\n"
    "cli.run(main)\n"
  )
  ((returncode, _, err),) = two_processes.run_all([["-c", code]])
  assert returncode == 1
  assert (
    err.strip()
    .splitlines()[-1]
    .startswith(
      f"error: process 0 of 2 at the coordinator {coordinator} did not find the"
      " others within --start_timeout=1 seconds"
    )
  ), err


AGREEMENT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from diffit_jax import cli
from diffit_jax.errors import UserError
from diffit_jax.parallel import mesh, runtime, sharding

coordinator, process, shared, own = sys.argv[1:]
sys.argv = sys.argv[:1]

def main():
  def fail(who, text):
    if int(process) in who:
      raise UserError(text)
    return process

  def refusal(call):
    try:
      call()
    except UserError as error:
      return str(error)

  cluster = runtime.Cluster("manual", coordinator, 2, int(process))
  with runtime.distributed(cluster, timeout=120):
    split = sharding.batch_sharding(mesh.make_mesh())
    runtime.check_shared(shared)
    print(json.dumps([
      runtime.on_all_processes(lambda: process),
      runtime.on_process_0(lambda: {"from": process}),
      refusal(lambda: runtime.on_all_processes(lambda: fail([1], "no disk"))),
      refusal(lambda: runtime.on_all_processes(lambda: fail([0, 1], "both"))),
      refusal(lambda: runtime.on_process_0(lambda: fail([0], "first"))),
      float(jax.jit(jnp.sum)(sharding.place(np.arange(8.0), split))),
    ]))
    runtime._SHARED_FOLDER_TIMEOUT = 0.5
    runtime.check_shared(own)

cli.run(main)
"""


def test_two_processes_agree(tmp_path):
  coordinator = f"localhost:{two_processes.free_port()}"
  done = two_processes.run_all(
    [
      [
        *("-c", AGREEMENT, coordinator, str(i)),
        *(str(tmp_path / "shared"), str(tmp_path / f"own{i}")),
      ]
      for i in range(2)
    ]
  )
  for i, (returncode, out, err) in enumerate(done):
    assert json.loads(out.splitlines()[-1]) == [  # Gloo speaks before
      str(i), {"from": "0"}, "process 1: no disk", "both", "first", 28.0,
    ], err  # fmt: skip
    assert returncode == 1
    assert f"process {i} of 2: 4 local devices, 8 global devices" in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: process 1: ") and "is not shared" in line
  assert not list(tmp_path.glob("*/.shared*"))


def pci_device(folder, vendor, kind):
  folder.mkdir(parents=True)
  (folder / "vendor").write_text(f"{vendor}\n")
  (folder / "class").write_text(f"{kind}\n")


def test_chips_are_googles_devices_that_are_no_disks_and_no_networks(tmp_path):
  environ = {"TPU_LIBRARY_PATH": "libtpu.so"}
  found = lambda **more: cluster.has_tpu(environ | more, tmp_path)
  pci_device(tmp_path / "0", "0x1ae0", "0x020000")  # gVNIC
  pci_device(tmp_path / "1", "0x1ae0", "0x010802")  # a local disk
  pci_device(tmp_path / "2", "0x10de", "0x030200")  # an NVIDIA GPU
  (tmp_path / "3").mkdir()  # unreadable
  assert not found()
  pci_device(tmp_path / "4", "0x1ae0", "0xff0000")
  assert found() and found(JAX_PLATFORMS="tpu,cpu")
  assert not found(JAX_PLATFORMS="cpu")
  assert not cluster.has_tpu(environ)  # here


@pytest.fixture
def metadata_server():
  """Address of a server that knows a slice of four hosts, as Google's does."""

  class Handler(server.BaseHTTPRequestHandler):
    def do_GET(self):
      known = self.path.endswith("/attributes/worker-network-endpoints")
      is_asked_well = self.headers["Metadata-Flavor"] == "Google"
      self.send_response(200 if known and is_asked_well else 404)
      self.end_headers()
      self.wfile.write(b"x:0:10.0.0.1,x:1:10.0.0.2,x:2:10.0.0.3,x:3:10.0.0.4")

    def log_message(self, *_):
      pass

  with server.HTTPServer(("localhost", 0), Handler) as http:
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"localhost:{http.server_port}"
    http.shutdown()


def test_the_hosts_of_a_slice(metadata_server):
  hosts = lambda **environ: cluster.num_tpu_hosts(environ)
  assert hosts(TPU_WORKER_HOSTNAMES="localhost") == 1
  assert hosts(TPU_WORKER_HOSTNAMES="a,b", MEGASCALE_NUM_SLICES="3") == 6
  assert hosts(TPU_PROCESS_ADDRESSES="a:1,b:1,c:1") == 3
  assert hosts(GCE_METADATA_IP=metadata_server) == 4
  assert hosts(GCE_METADATA_IP=metadata_server, TPU_SKIP_MDS_QUERY="1") == 1
  assert hosts(GCE_METADATA_IP=f"localhost:{two_processes.free_port()}") == 1


@pytest.fixture()
def jax_config(monkeypatch):
  """Stands for JAX's, with no compilation cache."""
  config = types.SimpleNamespace(jax_compilation_cache_dir=None)
  config.update = lambda name, value: setattr(config, name, value)
  monkeypatch.setattr(
    runtime,
    "jax",
    types.SimpleNamespace(config=config, process_index=lambda: 0),
  )
  return config


def test_the_compilation_cache_of_the_user_wins(jax_config, tmp_path):
  runtime.use_compilation_cache(f"{tmp_path}/cache")
  assert jax_config.jax_compilation_cache_dir == f"{tmp_path}/cache"
  jax_config.jax_compilation_cache_dir = "/elsewhere"
  runtime.use_compilation_cache(f"{tmp_path}/cache")
  assert jax_config.jax_compilation_cache_dir == "/elsewhere"


@pytest.mark.parametrize("size", [None, 0, 10, -1])
def test_a_torn_entry_of_the_compilation_cache_goes(size, jax_config, tmp_path):
  whole = zlib.compress(bytes(range(256)) * 9)
  folder = tmp_path / "of run[1]"  # no pattern
  folder.mkdir()
  (folder / "a-cache").write_bytes(whole)
  (folder / "b-cache").write_bytes(whole[:size])
  os.utime(folder / "a-cache", (1, 1))
  runtime.use_compilation_cache(str(folder))
  kept = ["a-cache"] if size is not None else ["a-cache", "b-cache"]
  assert sorted(p.name for p in folder.iterdir()) == kept


class Protocol:
  """JAX's agreement, as its sources say it: all stop one step after the last.

  Attributes:
    counters: the step that each process told last; 0 before the first.
  """

  def __init__(self, num=2):
    self.counters, self.sync = [0] * num, None

  def signal(self):
    if self.sync is None:
      self.sync = max(self.counters) + 1

  def ask(self, process):
    def reached(step):
      self.counters[process] = step
      return step == self.sync

    return reached


@pytest.mark.parametrize("start", [0, 1, 2, 1000])
@pytest.mark.parametrize("when", range(12))
def test_no_signal_is_lost_and_all_stop_at_one_step(start, when):
  """A signal before, between and after the first calls of two processes."""
  protocol = Protocol()
  stops = [StopRequest(protocol.ask(i)) for i in range(2)]
  steps = [start, start]
  calls = 0

  def tick():
    nonlocal calls
    if calls == when:
      protocol.signal()
    calls += 1

  tick()
  for stop in stops:
    stop.begin(start)
    tick()
  while not all(stop.requested for stop in stops) and max(steps) < start + 20:
    for process, stop in enumerate(stops):
      if not stop.requested:
        steps[process] += 1
        stop.at_step(steps[process])
      tick()
  assert steps[0] == steps[1] < start + 20


def test_processes_with_another_config_are_refused(monkeypatch):
  monkeypatch.setattr(runtime.jax, "process_count", lambda: 3)
  texts = ["a", "a", "b"]
  monkeypatch.setattr(runtime, "_gather_text", lambda text: texts)
  with pytest.raises(UserError, match="process 2 has another config than"):
    runtime.check_same("config", "a")
  texts[2] = "a"
  runtime.check_same("config", "a")
