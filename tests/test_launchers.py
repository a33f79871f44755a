"""`torchrun` and `accelerate launch` as users start them: two processes on the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dkdm.core.saving.checkpoint import checkpoints, read_tensors
from dkdm.core.saving.progress import read_metrics
from test_processes import command, resumed

pytestmark = pytest.mark.slow
STEPS = ("--max-train-steps", "24")
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
)


def start(launcher, arguments, home):
    """A launcher with the arguments of the command; home: where it finds no config of a user."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    order = [sys.executable, "-m", *launcher, "-m", "dkdm", *arguments]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(order, env=environment, cwd=home, **pipe)


def ended(launched, code=0):
    said, _ = launched.communicate(timeout=300)
    assert (launched.returncode == 0) == (code == 0), said
    return said


def processes_of(launcher):
    """The launcher's processes, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(") ")[2].split()[1]
            facts = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if int(parent) == launcher:
            found |= {int(f[5:]): int(path.name) for f in facts if f.startswith(b"RANK=")}
    return found


def weights(folder):
    return read_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")


def losses(folder):
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")]


def test_accelerate_goes_on_with_what_a_killed_torchrun_began(tmp_path):
    """Two processes each time, so that the run has every bit of one that nothing happened to."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = ended(start(ACCELERATE, command(whole, *STEPS), tmp_path))
    assert said.count("computes on CPU") == 1, said
    launched = start(TORCHRUN, command(killed, *STEPS), tmp_path)
    while not checkpoints(killed)[1:] and launched.poll() is None:
        time.sleep(0.05)
    ranks = processes_of(launched.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    ended(launched, code=1)
    assert not processes_of(launched.pid)
    assert not (killed / "README.md").exists()
    ended(start(ACCELERATE, [*resumed(killed), *STEPS], tmp_path))
    assert losses(killed) == losses(whole)
    found = weights(killed)
    assert all((found[key] == value).all() for key, value in weights(whole).items())


def test_two_machines_are_two_launchers(tmp_path):
    """Both on this machine, each with one process."""
    port = str(20000 + os.getpid() % 20000)
    several = ("--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    one, two = tmp_path / "one", tmp_path / "two"
    launched = [
        start((*ACCELERATE, *several, "--machine_rank", str(rank)), command(two), tmp_path)
        for rank in (0, 1)
    ]
    for each in launched:
        ended(each)
    ended(start(TORCHRUN, command(one), tmp_path))
    assert losses(two) == losses(one)
