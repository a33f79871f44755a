"""The recipes of docs/clusters.md: their syntax, their options, and what they start."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import dkdm
from dkdm.config import DistillConfig
from dkdm.reading.command_line import parse

RECIPES = Path(__file__).parents[1] / "examples" / "clusters"
SLURM, SKYPILOT = RECIPES / "slurm.sbatch", RECIPES / "skypilot.yaml"
STAND_IN = """#!/bin/bash
# as srun: the command of its last argument in so many processes, each with its number
fail=0
for number in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$number SLURM_LOCALID=$number "${@:2}" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || fail=$?; done
exit $fail
"""
PYTHON = """#!/bin/bash
echo "$RANK/$WORLD_SIZE at $MASTER_ADDR:$MASTER_PORT: $*" >> "$LOG"
exit $CODE
"""


def options_in(script):
    """The config that the command in a shell script gives, with its options as they stand."""
    joined = script.replace("\\\n", " ").replace('"$RUN"', "runs/mine")
    command = re.search(r"-m dkdm distill([^\n']*)", joined)[1]
    return parse(DistillConfig, shlex.split(command))


def is_shared_evenly(config, processes):
    shards, batch = config.pool.shards, config.training.train_batch_size
    return shards % processes == 0 and batch % shards == 0


def test_the_slurm_script_is_bash_and_its_options_are_known():
    subprocess.run(["bash", "-n", SLURM], check=True)
    script = SLURM.read_text()
    config = options_in(script)
    asked = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", script))
    assert config.checkpoints.resume_from_checkpoint == "latest"
    assert is_shared_evenly(config, int(asked["nodes"]) * int(asked["ntasks-per-node"]))
    assert asked["signal"].startswith("USR1@")


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (1, False)])
def test_the_slurm_script_starts_ranks_and_is_requeued_after_a_signal(tmp_path, code, requeued):
    hosts = 'if [ "$1" = show ]; then echo first; else echo "$*" >> "$LOG"; fi'
    for name, text in {"srun": STAND_IN, "python": PYTHON, "scontrol": hosts}.items():
        (tmp_path / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    slurm = {"JOB_NODELIST": "n[1-2]", "JOB_ID": "12345", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    environment = {
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "CODE": str(code)},
    }
    done = subprocess.run(["bash", SLURM], env=environment, check=False)
    assert done.returncode == code
    lines = sorted(log.read_text().splitlines())
    started = [line for line in lines if "-m dkdm distill" in line]
    assert [line.split(":")[0] for line in started] == ["0/2 at first", "1/2 at first"]
    assert all("first:22345: " in line and "--output-dir runs/mine" in line for line in started)
    assert ("requeue 12345" in lines) is requeued


def test_the_skypilot_file_is_yaml_and_its_options_are_known(tmp_path):
    task = yaml.safe_load(SKYPILOT.read_text())
    assert {"num_nodes", "resources", "volumes", "setup", "run"} <= task.keys()
    script = tmp_path / "run.sh"
    script.write_text(task["run"])
    subprocess.run(["bash", "-n", script], check=True)
    config = options_in(task["run"])
    assert config.checkpoints.resume_from_checkpoint == "latest"
    assert str(config.run.output_dir).startswith(tuple(task["volumes"]))
    devices = int(task["resources"]["accelerators"].split(":")[1])
    assert is_shared_evenly(config, task["num_nodes"] * devices)


def test_what_ray_runs_takes_its_options(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, *given, **named):
            self.given, self.named = given, named
            made.append(self)

    names = ("FailureConfig", "RunConfig", "ScalingConfig", "TorchTrainer")
    for module in ("ray", "ray.train", "ray.train.torch"):
        stand_in = ModuleType(module)
        stand_in.__dict__.update(dict.fromkeys(names, Recorded))
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = importlib.util.spec_from_file_location("ray_train", RECIPES / "ray_train.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)

    trainer, configs = recipe.trainer(), []
    monkeypatch.setattr(dkdm, "distill", lambda config: configs.append(config))
    trainer.given[0](trainer.named["train_loop_config"])
    (config,) = configs
    assert config.checkpoints.resume_from_checkpoint == "latest"
    assert is_shared_evenly(config, trainer.named["scaling_config"].named["num_workers"])
