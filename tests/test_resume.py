"""A run that is killed and resumed ends bit by bit where the uninterrupted one ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dkdm.core import checkpoint
from dkdm.errors import DkdmError

STEPS = 14
TESTS = Path(__file__).parent


def command(folder, *more):
    return [
        *(sys.executable, "-m", "dkdm", "distill", "--output-dir", str(folder)),
        *("--teacher", "factories:teacher", "--student", "factories:student"),
        *("--max-train-steps", str(STEPS), "--train-batch-size", "10", "--pool-size", "24"),
        *("--stride", "random:6", "--fill-steps", "2", "--checkpointing-steps", "3"),
        *("--logging-steps", "1", "--evaluation-samples", "0", "--validation-steps", "0"),
        *("--checkpoints-total-limit", "9", "--lr-scheduler", "cosine", "--lr-warmup-steps", "4"),
        *("--condition-dropout", "0.2", "--gradient-accumulation-steps", "2", *more),
    ]


def start(folder, *more):
    env = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(folder, *more), env=env, stderr=subprocess.PIPE, text=True)


def finish(folder, *more):
    process = start(folder, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Killed without warning after step 7, when checkpoint-6 is the last."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = start(folder)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 7:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / f"checkpoint-{STEPS}").exists(), "the run ended before it was killed"
    return folder


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["step"], entry["loss"]) for entry in map(json.loads, lines)]


def test_resumed_run_equals_the_uninterrupted_one(whole, killed):
    finish(killed, "--resume-from-checkpoint", "latest")
    last = f"checkpoint-{STEPS}"
    resumed = json.loads((killed / last / "manifest.json").read_text())
    expected = json.loads((whole / last / "manifest.json").read_text())
    assert {"optimizer.safetensors", "source.safetensors", "state.json"} <= resumed.keys()
    assert resumed == expected  # SHA-256 of weights, EMA, optimizer, pool, random and step state
    assert losses(killed) == losses(whole)


def test_same_seed_same_losses(whole, tmp_path):
    finish(tmp_path / "again")
    assert losses(tmp_path / "again") == losses(whole)


def test_checkpoint_loads_in_diffusers_by_itself(whole):
    from diffusers import UNet2DModel

    network = UNet2DModel.from_pretrained(whole / f"checkpoint-{STEPS}", subfolder="unet")
    assert network.config.num_class_embeds == 4


def test_damaged_checkpoint_is_refused(whole, tmp_path):
    import shutil

    copy = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-3", copy)
    checkpoint.verify_folder(copy)
    path = copy / "source.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DkdmError, match=r"source\.safetensors is damaged"):
        checkpoint.verify_folder(copy)
    path.unlink()
    with pytest.raises(DkdmError, match=r"source\.safetensors is missing"):
        checkpoint.verify_folder(copy)


def test_rotation_keeps_the_newest(tmp_path):
    for step in (0, 5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    checkpoint.rotate(tmp_path, 2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-100",
    ]
