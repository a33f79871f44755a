"""Programs in processes of their own, which have torch and diffusers and no dkdm.

Importing the two takes seconds. The process of the tests needs them too: when it has them and
before it has dkdm, it forks (`begin`, called by `conftest.py`), and that copy forks again for each
program. A program finds no dkdm, no module of these tests, and no code that an earlier one has
cached.
"""

import faulthandler
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
ORDERS = []  # the file to which the copy listens


def begin() -> None:
    """Fork the copy that forks for each program."""
    from diffusers import DiffusionPipeline  # noqa: F401

    assert "dkdm" not in sys.modules
    ours, theirs = socket.socketpair()
    with warnings.catch_warnings():
        # Python 3.12 and later warn of threads; the only one here waits for orders of xdist.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        theirs.close()
        return ORDERS.append(ours.makefile("rw"))
    leave_pytest(theirs.fileno())
    with theirs.makefile("rw") as orders:
        serve(orders)
    os._exit(0)


def leave_pytest(kept: int) -> None:
    """Close every file but one, and forget the tests."""
    gc.freeze()
    gc.enable()
    faulthandler.disable()
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    here = {TESTS, Path.cwd()}
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() not in here]
    sys.meta_path[:] = [one for one in sys.meta_path if "pytest" not in type(one).__module__]
    for name in ("conftest", "programs"):
        sys.modules.pop(name, None)
    os.chdir("/")


def serve(orders) -> None:
    """Fork for each order: answer with the number of the process, then with its exit code."""
    for line in orders:
        child = os.fork()
        if child == 0:
            execute(json.loads(line))
        print(child, file=orders, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=orders, flush=True)


def execute(order) -> None:
    """Run a program and end."""
    import diffusers.utils.dynamic_modules_utils as dynamic

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
    sys.argv = ["-c", *order["arguments"]]
    sys.path[:0] = [order["path"]] if order["path"] else []
    sys.modules.update(dict.fromkeys(order["absent"]))  # importing them fails
    os.environ.update(order["environment"])
    code = 1
    try:
        with tempfile.TemporaryDirectory() as modules:
            dynamic.HF_MODULES_CACHE = modules
            exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


@dataclass
class Program:
    """A program that runs; there is one at a time."""

    process: int
    folder: tempfile.TemporaryDirectory

    def wait(self) -> subprocess.CompletedProcess:
        """Its exit code, below zero for a signal, and what it printed."""
        code = int(ORDERS[0].readline())
        with self.folder as folder:
            texts = [(Path(folder) / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(self.process, code, *texts)


def start(code: str, *arguments, path=None, absent=("dkdm",), environment=()) -> Program:
    """Begin a program; modules in `path` are importable for it, those in `absent` are not."""
    folder = tempfile.TemporaryDirectory()
    order = {
        "code": code,
        "arguments": [*map(str, arguments)],
        "path": path and str(path),
        "absent": absent,
        "environment": dict(environment),
        "out": f"{folder.name}/out",
        "err": f"{folder.name}/err",
    }
    print(json.dumps(order), file=ORDERS[0], flush=True)
    return Program(int(ORDERS[0].readline()), folder)


def run(code: str, *arguments, **how) -> subprocess.CompletedProcess:
    """The exit code of a program, and what it printed."""
    return start(code, *arguments, **how).wait()


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
