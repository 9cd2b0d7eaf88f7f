"""The launch scripts, with stand-ins for Slurm and the clouds."""

import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

import commands
from slow import slow

LAUNCH = commands.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ARGUMENTS = ["--config=configs/digits.py:debug", "--config.name=a b"]
# What the scripts start. A process that is started says so in $STARTED; what it
# ends with, it takes from the lines of $CODES, one by one.
PROGRAM = """#!/usr/bin/env bash
trap 'exit 75' TERM
echo "$(basename "$0") $*" >> "$STARTED"
until mkdir "$CODES.lock" 2> /dev/null; do sleep 0.01; done
code=$(head -n 1 "$CODES")
tail -n +2 "$CODES" > "$CODES.rest"
mv "$CODES.rest" "$CODES"
rmdir "$CODES.lock"
[[ $code != wait ]] || while true; do sleep 0.05; done
exit "$code"
"""
# Passes SIGTERM on, and takes its time; local_processes.sh more of it.
SLOW_KILL = """
kill() {
  builtin kill "$@" || return
  [[ $1 != -TERM ]] || case $0 in *local*) sleep 2 ;; *) sleep 0.5 ;; esac
}
"""
# Slurm's srun: its tasks run here, with the variables that Slurm gives them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  [[ $1 != --ntasks=* ]] || tasks=${1#*=}
  [[ $1 != --nodes=* ]] || nodes=${1#*=}
  shift
done
share=$((tasks / nodes))
export SLURM_NTASKS=$tasks SLURM_STEP_NUM_TASKS=$tasks SLURM_STEP_ID=0
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=$nodes
export SLURM_STEP_TASKS_PER_NODE="$share(x$nodes)"
for ((id = 0; id < tasks; id++)); do
  export SLURM_PROCID=$id SLURM_LOCALID=$((id % share))
  SLURM_NODEID=$((id / share)) "$@" &
done
result=0
for pid in $(jobs -p); do
  code=0
  wait "$pid" || code=$?
  ((code <= result)) || result=$code
done
exit "$result"
"""


@pytest.fixture
def stubs(tmp_path):
  """Environment variables that put the stand-ins into the scripts' way."""
  folder = tmp_path / "bin"
  folder.mkdir()
  for name in ("python", "scontrol", "gcloud", "kubectl", "sudo"):
    _write(folder / name, PROGRAM)
  _write(folder / "srun", SRUN)
  (tmp_path / "started").touch()
  (tmp_path / "codes").touch()
  return os.environ | {
    "PATH": f"{folder}:{os.environ['PATH']}",
    "HOME": str(tmp_path),
    "PYTHON": "python",  # whatever the tests run on
    "STARTED": str(tmp_path / "started"),
    "CODES": str(tmp_path / "codes"),
    "RETRY_SECONDS": "0",
    "POLL_SECONDS": "0",
    "DATA": "gs://bucket/data",
    "IMAGE": "registry/diffit_jax:1",
    "SLURM_JOB_ID": str(random.randrange(1 << 20)),  # makes the port
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "2",
  }


def _write(path: pathlib.Path, text: str) -> None:
  path.write_text(text)
  path.chmod(0o755)


def _run(script, *arguments, **env):
  return subprocess.run(
    ["bash", LAUNCH / script, *arguments],
    env={key: str(value) for key, value in env.items()},
    capture_output=True,
    text=True,
    timeout=300,
  )


def _give_codes(stubs, *codes):
  text = "".join(f"{code}\n" for code in codes)
  pathlib.Path(stubs["CODES"]).write_text(text)


def _started(stubs):
  return pathlib.Path(stubs["STARTED"]).read_text().splitlines()


def _dry_run(stubs, script, **env):
  """The commands that a script would start; it starts none."""
  done = _run(script, *ARGUMENTS, **stubs, DRY_RUN=1, **env)
  assert done.returncode == 0, done.stderr
  assert not _started(stubs)
  return done.stdout


def test_shellcheck_has_no_complaint():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  "path",
  sorted(path for path in LAUNCH.rglob("*") if path.is_file()),
  ids=lambda path: path.name,
)
def test_scripts_are_short_and_explained(path):
  lines = path.read_text().splitlines()
  assert len(lines) < 60
  assert max(map(len, lines)) <= 80
  assert sum(line.lstrip().startswith("#") for line in lines) >= 5


def test_dry_runs_on_machines_print_the_processes(stubs):
  train = ["python", "-m", "diffit_jax.main", *ARGUMENTS]
  assert shlex.split(_dry_run(stubs, "single_host.sh")) == train
  lines = _dry_run(stubs, "local_processes.sh", PORT=1234).splitlines()
  address = ["--coordinator=127.0.0.1:1234", "--num_processes=2"]
  assert [shlex.split(line) for line in lines] == [
    [*train, *address, f"--process_id={i}"] for i in range(2)
  ]


@pytest.mark.parametrize(
  "per, step",
  [
    ("node", "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64"),
    ("gpu", "--nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=32"),
  ],
)
def test_dry_run_of_slurm_prints_the_step(stubs, per, step):
  words = shlex.split(_dry_run(stubs, "slurm.sbatch", PER=per))
  assert words[:5] == ["srun", *step.split()]
  assert words[-5:] == ["python", "-m", "diffit_jax.main", *ARGUMENTS]
  assert "--gpus-per-task=1" not in words


def test_dry_run_of_a_tpu_slice_prints_its_life(stubs):
  lines = _dry_run(stubs, "tpu_pod.sh").split("gcloud compute tpus ")[1:]
  create, ssh, delete = [shlex.split(line) for line in lines]
  assert create == [
    *("queued-resources", "create", "diffit", "--zone=us-west4-a"),
    *("--node-id=diffit", "--spot", "--accelerator-type=v5litepod-16"),
    "--runtime-version=v2-alpha-tpuv5-lite",
  ]
  assert ssh[1] == "ssh" and {"--node=all", "--worker=all"} <= set(ssh)
  remote = shlex.split(ssh[-1].removeprefix("--command="))
  assert remote[-3:] == ["diffit_jax/launch/tpu_host.sh", *ARGUMENTS]
  assert remote[-4] == "DATA=gs://bucket/data"
  assert delete[1:] == [
    *("delete", "diffit", "--zone=us-west4-a", "--force", "--quiet")
  ]
  *_, unlock, train = _dry_run(stubs, "tpu_host.sh").splitlines()
  assert shlex.split(unlock)[-1] == "/tmp/libtpu_lockfile"
  assert shlex.split(train) == ["launch/single_host.sh", *ARGUMENTS]


def _hosts(jobset):
  (job,) = jobset["spec"]["replicatedJobs"]
  return job["template"]["spec"]


def test_the_jobset_starts_every_host_and_restarts_all_of_them():
  text = (LAUNCH / "gke_jobset.yaml").read_text()
  jobset = yaml.safe_load(text)
  assert jobset["kind"] == "JobSet"
  assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 3
  assert policy["rules"] == [
    {
      "action": "RestartJobSetAndIgnoreMaxRestarts",
      "onJobFailureReasons": ["PodFailurePolicy"],
    }
  ]
  hosts = _hosts(jobset)
  assert hosts["completionMode"] == "Indexed" and hosts["backoffLimit"] == 0
  saved, disrupted = hosts["podFailurePolicy"]["rules"]
  assert saved["action"] == disrupted["action"] == "FailJob"
  assert saved["onExitCodes"]["values"] == [75]
  assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
  pod = hosts["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  (container,) = pod["containers"]
  assert container["name"] == saved["onExitCodes"]["containerName"]
  assert container["command"] == ["python", "-m", "diffit_jax.main"]
  # 4 hosts of 4 chips are the 4 x 4 chips of the topology.
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert hosts["completions"] == hosts["parallelism"] == 4
  assert hosts["completions"] * chips == 16
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  assert "--config.mesh.num_devices=16" in container["args"]


def test_dry_run_of_gke_prints_the_filled_in_jobset(stubs):
  out = _dry_run(stubs, "gke.sh", HOSTS=8, TOPOLOGY="4x8", NAME="mine")
  jobset = yaml.safe_load(out)
  assert jobset["metadata"]["name"] == "mine"
  hosts = _hosts(jobset)
  assert hosts["completions"] == hosts["parallelism"] == 8
  pod = hosts["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
  assert pod["containers"][0]["image"] == "registry/diffit_jax:1"
  assert pod["containers"][0]["args"] == ARGUMENTS


def test_gke_without_arguments_says_so(stubs):
  done = _run("gke.sh", **stubs, DRY_RUN=1)
  assert done.returncode != 0 and "needs the arguments" in done.stderr


@pytest.mark.parametrize(
  "codes, starts, result",
  [
    ([0], 1, 0),
    ([75, 75, 0], 3, 0),  # saved: again
    ([1, 137, 0], 3, 0),  # crashes: again
    ([1, 1, 1, 0], 3, 1),  # but not for ever
    ([1, 1, 75, 1, 1, 0], 6, 0),  # a save begins a new row of crashes
  ],
)
def test_a_machine_starts_again_until_done(stubs, codes, starts, result):
  _give_codes(stubs, *codes)
  done = _run("single_host.sh", "--config=x", **stubs, MAX_CRASHES=2)
  assert done.returncode == result, done.stderr
  assert _started(stubs) == ["python -m diffit_jax.main --config=x"] * starts


@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("script, num", [slow("single", 1), ("local", 2)])
def test_sigterm_goes_on_to_the_program_and_ends_the_script(
  stubs, tmp_path, script, num, is_slow
):
  if is_slow:  # the program has ended before the script looks after it
    _write(tmp_path / "slow.sh", SLOW_KILL)
    stubs |= {"BASH_ENV": str(tmp_path / "slow.sh")}
  _give_codes(stubs, "wait", "wait")
  name = {"single": "single_host.sh", "local": "local_processes.sh"}[script]
  process = subprocess.Popen(["bash", LAUNCH / name], env=stubs)
  deadline = time.monotonic() + 60
  while len(_started(stubs)) < num and time.monotonic() < deadline:
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 75
  assert len(_started(stubs)) == num


def test_slurm_queues_a_saved_run_again(stubs):
  _give_codes(stubs, 75, 75, 0)  # two tasks, then scontrol
  done = _run("slurm.sbatch", "--config=x", **stubs)
  assert done.returncode == 0, done.stderr
  job = stubs["SLURM_JOB_ID"]
  assert _started(stubs)[2:] == [f"scontrol requeue {job}"]


def test_slurm_starts_a_crashed_step_again_but_not_for_ever(stubs):
  _give_codes(stubs, 1, 0, 0, 0)
  done = _run("slurm.sbatch", **stubs)
  assert done.returncode == 0 and len(_started(stubs)) == 4
  _give_codes(stubs, *[3] * 8)
  done = _run("slurm.sbatch", **stubs)
  assert done.returncode == 3 and len(_started(stubs)) == 4 + 2 * 4
  assert "crash 4 of this job" in done.stderr


NOT_FOUND = "ERROR: (gcloud.describe) NOT_FOUND: no such resource"


def _answer(stubs, *answers):
  """gcloud: each call gives the next (text, exit code); errors on stderr."""
  lines = [f"{index}) echo '{text}' >&{1 + (code != 0)}; exit {code} ;;"
           for index, (text, code) in enumerate(answers)]  # fmt: skip
  _write(
    pathlib.Path(stubs["PATH"].split(":")[0], "gcloud"),
    "#!/usr/bin/env bash\n"
    'number=$(grep -c . "$STARTED")\n'
    'echo "$4" >> "$STARTED"\n'
    f"case $number in {' '.join(lines)} esac\n",
  )


def test_a_preempted_slice_is_asked_for_again(stubs):
  _answer(
    stubs,
    (NOT_FOUND, 1),  # describe
    ("", 0),  # create
    ("PROVISIONING", 0),
    ("ERROR: (gcloud) UNAVAILABLE", 1),  # describe: not to be made again
    ("ACTIVE", 0),
    ("", 255),  # ssh: the connection is lost
    ("SUSPENDED", 0),
    ("", 0),  # delete
    (NOT_FOUND, 1),
    ("", 0),  # create
    ("ACTIVE", 0),
    ("", 0),  # ssh: done
    ("", 0),  # delete
  )
  done = _run("tpu_pod.sh", "--config=x", **stubs)
  assert done.returncode == 0, done.stderr
  states = [verb for verb in _started(stubs) if verb != "describe"]
  assert states == ["create", "ssh", "delete", "create", "ssh", "delete"]
  assert "UNAVAILABLE" in done.stderr and "NOT_FOUND" not in done.stderr


def test_an_hour_on_the_slice_begins_a_new_row_of_crashes(stubs, tmp_path):
  path = tmp_path / "bash_env.sh"  # a poll takes an hour, a connection as well
  hour = "SECONDS=$((SECONDS + 3600))"
  path.write_text(f'gcloud() {{ {hour}; command gcloud "$@"; }}')
  _answer(stubs, *[("ACTIVE", 0), ("", 1)] * 4, ("ACTIVE", 0), ("", 0), ("", 0))
  done = _run("tpu_pod.sh", **stubs, BASH_ENV=path)
  assert done.returncode == 0, done.stderr
  assert _started(stubs)[-3:] == ["describe", "ssh", "delete"]


def test_a_slice_on_which_the_program_fails_is_given_up(stubs):
  _answer(stubs, *[("ACTIVE", 0), ("", 1)] * 4)
  done = _run("tpu_pod.sh", "--config=x", **stubs)
  assert done.returncode == 1
  assert _started(stubs) == ["describe", "ssh"] * 4


# Runs of two real processes, each with two devices.


@pytest.fixture
def real(stubs, tmp_path, data_dir):
  """Environment and arguments with which the scripts train for real."""
  devices = "--xla_force_host_platform_device_count=2"
  environment = stubs | {
    "PYTHON": sys.executable,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{commands.FAST_COMPILE} {devices}",
    "PYTHONPATH": str(commands.ROOT),
    "MAX_CRASHES": "0",
  }
  arguments = [
    f"--config={commands.ROOT}/configs/digits.py:debug",
    f"--workdir={tmp_path}/run",
    f"--data_dir={data_dir}",
    "--config.mesh.num_devices=4",
    "--config.total_steps=2",
    "--config.sample_every_steps=0",
    "--start_timeout=120",
  ]
  return environment, arguments


def _assert_trained(done, tmp_path):
  assert done.returncode == 0, done.stderr[-3000:]
  assert "process 0 of 2: 2 local devices, 4 global" in done.stderr
  for word in ("Traceback", "error", "Fatal"):
    assert word not in done.stderr, done.stderr
  checkpoints = tmp_path / "run" / "checkpoints"
  assert [path.name for path in checkpoints.iterdir()] == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize("per, nodes", [("node", 2), ("gpu", 1)])
def test_slurm_trains_with_real_processes(real, tmp_path, per, nodes):
  environment, arguments = real
  environment |= {"PER": per, "SLURM_NNODES": str(nodes)}
  _assert_trained(_run("slurm.sbatch", *arguments, **environment), tmp_path)


@pytest.mark.slow
def test_machines_train_with_real_processes(real, tmp_path):
  environment, arguments = real
  done = _run("local_processes.sh", *arguments, **environment)
  _assert_trained(done, tmp_path)
