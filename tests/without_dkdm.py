"""Programs in processes that have torch and diffusers, and no dkdm.

Importing the two takes seconds, so one process does it and forks for each program. A program finds
no dkdm, no module of these tests, and no code that an earlier one has cached.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dkdm.core.denoiser import Batch

SERVER = r"""
import json, os, sys, tempfile, traceback
sys.modules["dkdm"] = None  # importing it fails
import torch
import diffusers.utils.dynamic_modules_utils as dynamic
from diffusers import DiffusionPipeline

def program(order):
    sys.argv = ["-c", *order["arguments"]]
    sys.path[:] = [order["path"] or "", *sys.path[1:]]
    for number, file in ((1, order["out"]), (2, order["err"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    with tempfile.TemporaryDirectory() as modules:
        dynamic.HF_MODULES_CACHE = modules
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            program(json.loads(line))
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen:
    """The process that forks; one for all tests of a worker."""
    env = {**os.environ, "PYTHONPATH": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SERVER], env=env, cwd="/", **pipes)
    atexit.register(process.kill)
    return process


def run(code: str, *arguments, path=None) -> subprocess.CompletedProcess:
    """What the program printed, and its exit code; `path` is importable for it."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        order = {"code": code, "arguments": [*map(str, arguments)], "path": path and str(path)}
        server().stdin.write(json.dumps(order | {"out": str(out), "err": str(err)}) + "\n")
        server().stdin.flush()
        exit_code = int(server().stdout.readline())
        texts = [file.read_text() if file.exists() else "" for file in (out, err)]
    return subprocess.CompletedProcess(arguments, exit_code, *texts)


SAMPLED = """
import sys
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
classes = pipeline.config.num_classes
labels = {"class_labels": [0, 2]} if classes else {"batch_size": 2}
guidance = 2.0 if classes else 1.0
images = pipeline(**labels, num_inference_steps=3, guidance_scale=guidance, output_type="np").images
assert images.shape == (2, 8, 8, 1), images.shape
try:
    DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("loaded code without being asked to")
print("sampled")
"""


def some_batch(model, count=3):
    random = torch.Generator().manual_seed(3)
    cond = model.conditioning.draw(count, random)
    t = torch.randint(model.process.num_levels, (count,), generator=random)
    return Batch(torch.randn(count, *model.sample_shape, generator=random), t, cond, t)
