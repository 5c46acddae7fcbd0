"""launch/ for clusters: what is issued to Slurm and gcloud, which scripts play here, and GKE's job as it is written."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import runs
import yaml

LAUNCH = runs.REPOSITORY / "launch"
ODD = ("--config.data.crop=(64,64)", "--config.name=two words", "--config.note=it's $HOME")  # hard to quote


# Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """slurm(srun=BASH) starts slurm.sh as a batch job would be; the commands that it issues are lines of `seen`."""
    seen = tmp_path / "seen"

    def start(*flags, srun="exit 0", **environment):
        bins = tmp_path / "bin"
        record = f'(IFS="|"; echo "${{0##*/}}|$*|") >> {seen}'
        runs.script(bins, "srun", f'echo "${{JAX_LOCAL_DEVICE_IDS:-}}" > {tmp_path / "devices"}\n{record}\n{srun}')
        runs.script(bins, "scontrol", record)
        runs.script(bins, "scancel", f"{record}\nkill -TERM $(cat {tmp_path / 'task'})")
        path = f"{bins}:{os.environ['PATH']}"
        return subprocess.Popen(
            [LAUNCH / "slurm.sh", *flags],
            env={**os.environ, "PATH": path, "PYTHON": "python", "SLURM_JOB_ID": "42", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.seen = seen
    start.folder = tmp_path
    return start


def test_slurm_starts_the_command_and_returns_its_status(slurm):
    assert slurm(*ODD, srun="exit 3").wait(10) == 3
    expected = ["srun", "--kill-on-bad-exit=1", "python", "-m", "ktda_jax.main", *ODD, "--coordinator=auto"]
    expected.append("--stopped_status=75")
    assert slurm.seen.read_text() == "|".join(expected) + "|\n"
    assert (slurm.folder / "devices").read_text() == "\n"
    assert slurm(SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="4").wait(10) == 0
    assert (slurm.folder / "devices").read_text() == "0,1,2,3\n"


def test_slurm_waits_for_the_checkpoint_and_requeues(slurm):
    task = slurm.folder / "task"
    launcher = slurm(srun=f"trap 'sleep 1; echo saved; exit 75' TERM; echo $$ > {task}; while :; do sleep 0.1; done")
    runs.wait_for(lambda: runs.read(task).endswith("\n"), launcher)
    launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=10)
    assert launcher.returncode == 75 and out.startswith("saved\nslurm.sh: stopped by SIGTERM")
    commands = slurm.seen.read_text().splitlines()
    assert commands[1:] == ["scancel|--signal=TERM|42|", "scontrol|requeue|42|"]
    header = (LAUNCH / "slurm.sh").read_text()
    assert "\n#SBATCH --requeue\n" in header and "\n#SBATCH --signal=B:TERM@" in header


def test_tasks_that_map_go_on_when_one_fails(slurm):
    assert slurm("predict", *ODD).wait(10) == 0 and slurm("extract", *ODD).wait(10) == 0
    more = [*ODD, "--coordinator=auto", "--stopped_status=75", ""]
    predict = ["srun", "--kill-on-bad-exit=0", "--wait=0", "python", "-m", "ktda_jax.predict", *more]
    extract = ["srun", "--kill-on-bad-exit=1", "python", "-m", "ktda_jax.extract", *more]
    assert slurm.seen.read_text().splitlines() == ["|".join(predict), "|".join(extract)]
    launcher = slurm("report")
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 2 and "'report' is no verb for several processes" in err and err.count("\n") == 1


def test_slurm_outside_a_job(slurm):
    launcher = slurm(SLURM_JOB_ID="")
    assert launcher.wait(10) == 2 and "submit it: sbatch launch/slurm.sh" in launcher.stderr.read()


# TPU slices -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pod(tmp_path):
    """pod(verb, *flags, train=BASH, states=...) runs tpu_pod.sh against a gcloud that keeps one slice in a file.

    `train` is what the training does, on one host; `states` are the slice's next states after its creation.
    A command for the hosts is run here by bash, as sshd would run it, with a home of its own and a false python.
    """
    home = tmp_path / "home"
    (home / "ktda_jax").mkdir(parents=True)

    def start(verb, *flags, train="exit 0", **environment):
        runs.script(home / "ktda_venv/bin", "python", f'printf "%s\\n" "$@" > ~/flags\nstate={tmp_path}/state\n{train}')
        runs.script(
            tmp_path / "bin",
            "gcloud",
            f"""cd {tmp_path}
printf '%q ' "$@" | sed -E "s/[$]?'?--command=.*//" >> seen; echo >> seen
case "$*" in
  *"queued-resources list"*) cat state 2>/dev/null || true ;;
  *"queued-resources create"*) echo ${{CREATED:-ACTIVE}} > state ;;
  *"queued-resources delete"*) rm state ;;
  *"tpu-vm scp"*) [[ -s $5 ]] ;;
  *--command=*)
    command=${{!#}}; command=${{command#--command=}}
    case $command in
      *"-m ktda_jax."*) HOME={home} exec bash -c "$command" ;;
      *".ktda.pid"*) echo stop >> seen; HOME={home} exec bash -c "$command" ;;
      *uv*) echo install >> seen ;;
      *) echo "setup $command" >> seen ;;
    esac ;;
  *) echo "unknown: $*" >&2; exit 2 ;;
esac""",
        )
        settings = {"NAME": "pod", "ZONE": "z", "TYPE": "v5litepod-16", "RUNTIME": "rt", "BUCKET": "gs://b/runs"}
        settings |= {"POLL": "0", **environment}
        return subprocess.Popen(
            [LAUNCH / "tpu_pod.sh", verb, *flags],
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.issued = lambda: (tmp_path / "seen").read_text().splitlines()
    start.folder, start.home = tmp_path, home
    return start


def brief(lines: list[str]) -> list[str]:
    """What was issued, a word or two for each."""
    words = "create", "delete", "list", "scp", "install", "setup", "stop"
    return [next((w for w in words if w in line.split()), "ssh") for line in lines]


def test_a_slice_is_created_and_trains_with_the_flags_as_given(pod):
    setup = "sudo mount 10.0.0.2:/runs /runs"
    launcher = pod("run", *ODD, train="echo training", SPOT="1", SETUP=setup, PROJECT="p")
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and "training\n" in out and "finished. pod still costs" in err
    expected = ["-m", "ktda_jax.main", *ODD, "--workdir=gs://b/runs/pod", "--coordinator=auto", "--stopped_status=75"]
    assert (pod.home / "flags").read_text().splitlines() == expected
    issued = pod.issued()
    assert brief(issued) == ["list", "create", "list", "scp", "ssh", "install", "ssh", "setup", "ssh"]
    options = "--node-id=pod --accelerator-type=v5litepod-16 --runtime-version=rt --spot"
    assert issued[1].strip() == f"compute tpus queued-resources create pod --zone=z --project=p {options}"
    assert issued[-1].split() == "compute tpus tpu-vm ssh pod --zone=z --project=p --worker=all".split()
    assert issued[-2] == f"setup {setup}"
    assert pod("run", "--workdir=/mnt/x").wait(30) == 0
    assert brief(pod.issued()[len(issued) :])[:2] == ["list", "scp"]  # taken as it is
    assert (pod.home / "flags").read_text().count("--workdir") == 1


def test_hosts_that_map_know_which_they_are(pod):
    """From the metadata server, as GKE tells in the environment."""
    attributes = {"agent-worker-number": "3", "worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2"}
    cases = "\n".join(f"  */instance/attributes/{name}) echo {value} ;;" for name, value in attributes.items())
    runs.script(pod.folder / "bin", "curl", f'case "$*" in\n{cases}\nesac')
    train = 'echo "$2 of $TPU_WORKER_ID in $TPU_WORKER_HOSTNAMES"'
    launcher = pod("run", "predict", *ODD, train=train)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and "ktda_jax.predict of 3 in 10.0.0.1,10.0.0.2\n" in out
    expected = ["-m", "ktda_jax.predict", *ODD, "--coordinator=auto", "--stopped_status=75"]
    assert (pod.home / "flags").read_text().splitlines() == expected
    launcher = pod("run", "report")
    _, err = launcher.communicate(timeout=10)
    assert launcher.returncode == 2 and "'report' is no verb for several hosts; use main, predict or extract" in err


def test_a_preempted_slice_is_made_anew_and_trains_again(pod):
    train = "if [[ -e $state.2 ]]; then echo resuming; else touch $state.2; echo SUSPENDED > $state; exit 255; fi"
    launcher = pod("run", "--config=x", train=train, RETRIES="0")
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and out.endswith("resuming\n") and "pod was preempted; it is made anew" in err
    new, once = ["list", "create", "list"], ["scp", "ssh", "install", "ssh"]
    assert brief(pod.issued()) == [*new, *once, "list", "list", "delete", *new, *once]


@pytest.mark.parametrize(
    "train, status, line",
    [
        ("exit 134", 2, "failed with status 134 on a slice that is still there, after 1 restarts"),
        ("echo 'error: config.x is bad' >&2; exit 1", 2, "refused, see above"),
        (
            "echo 'error: cannot write it' >&2; exit 1",
            2,
            "failed with status 1 on a slice that is still there, after 1",
        ),
        ("exit 75", 75, "the training was stopped by a signal; the same command goes on"),
        ("echo 'error: stopped by a signal' >&2; exit 75", 75, "the training was stopped by a signal; the same"),
    ],
)
def test_a_training_that_fails_on_a_slice_that_is_still_there(pod, train, status, line):
    launcher = pod("run", "--config=x", train=train, RETRIES="1")
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == status and line in err
    assert brief(pod.issued()).count("scp") == (2 if "134" in train or "cannot" in train else 1)


def test_a_request_that_failed_is_not_repeated(pod):
    launcher = pod("run", "--config=x", CREATED="FAILED")
    assert launcher.wait(30) == 2 and "the request for pod failed" in launcher.stderr.read()


# The stop recognises the training by its command line, so the false one calls itself that.
TRAINING = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.1; done"


@pytest.mark.parametrize("by_subcommand", [False, True])
def test_a_running_training_is_stopped_on_the_hosts(pod, by_subcommand):
    launcher = pod("run", "--config=x", train=TRAINING)
    assert launcher.stdout.readline() == "ready\n"
    if by_subcommand:
        assert pod("stop", train=TRAINING).wait(30) == 0
    else:
        launcher.send_signal(signal.SIGTERM)
    out, _ = launcher.communicate(timeout=30)
    assert "saved\n" in out and launcher.returncode == (75 if by_subcommand else 130)
    assert not (pod.home / ".ktda.pid").exists() and "stop" in pod.issued()


def test_delete_and_what_tpu_pod_refuses(pod):
    (pod.folder / "state").write_text("ACTIVE\n")
    assert pod("delete").wait(10) == 0
    assert pod.issued() == ["compute tpus queued-resources delete pod --zone=z --force --quiet "]
    for verb, environment, line in [
        ("train", {}, "'train' is not a subcommand; use run, stop or delete"),
        ("run", {"TYPE": ""}, "TYPE is not set"),
        ("run", {"BUCKET": ""}, "no workdir; set BUCKET=gs://BUCKET, or give --workdir=gs://BUCKET/FOLDER"),
        ("delete", {"NAME": ""}, "NAME is not set"),
    ]:
        launcher = pod(verb, **environment)
        _, err = launcher.communicate(timeout=10)
        assert launcher.returncode == 2 and line in err and err.count("\n") == 1


# GKE --------------------------------------------------------------------------------------------------------------


def test_the_jobset_is_consistent_and_its_flags_are_known():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = np.prod([int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")])
    assert job["parallelism"] == job["completions"] == chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    assert "volumes" not in pod and pod["serviceAccountName"]  # all is in a bucket
    assert container["command"] == ["python", "-m", "ktda_jax.main"]
    # As main parses them, in a process of its own since flags are global; a folder that all hosts see.
    code = "import sys; from absl.flags import FLAGS; from ktda_jax import cli, main; main.parse(sys.argv)"
    code += "; print(FLAGS.coordinator, cli.config().data.crop)"
    parsed = subprocess.run(
        [sys.executable, "-c", code, *container["args"]], cwd=runs.REPOSITORY, capture_output=True, text=True
    )
    assert parsed.stdout == "auto (256, 256)\n", parsed.stderr
    given = dict(a.split("=", 1) for a in container["args"])
    assert given["--workdir"].startswith("gs://") and given["--config.data.root"].startswith("gs://")


def test_the_job_that_maps_is_consistent_and_its_flags_are_known():
    job = yaml.safe_load((LAUNCH / "predict.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job") and job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["backoffLimitPerIndex"] > 0 and job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "ktda_jax.predict"]
    args = [argument.replace("$(JOB_COMPLETION_INDEX)", "3") for argument in container["args"]]
    assert args != container["args"]
    code = "import runpy, sys; from absl import app; app.run = lambda *a, **k: None\n"
    code += "runpy.run_module('ktda_jax.predict', run_name='__main__'); from ktda_jax import cli\n"
    code += "print(cli.given('process_id'), cli.given('num_processes'), cli.given('skip_existing'))"
    parsed = subprocess.run([sys.executable, "-c", code, *args], cwd=runs.REPOSITORY, capture_output=True, text=True)
    hosts = job["spec"]["completions"]
    assert parsed.stdout == f"3 {hosts} True\n" and job["spec"]["parallelism"] == hosts, parsed.stderr
    places = [a.partition("=")[2] for a in args if a.startswith(("--in", "--out", "--check"))]
    assert len(places) == 3 and all(place.startswith("gs://BUCKET/") for place in places)
    assert container["image"] in (LAUNCH / "jobset.yaml").read_text()
