"""Settings that hold for every test: offline, few threads, a fixed random state."""

import os
import tempfile

UNDER_XDIST = "PYTEST_XDIST_WORKER" in os.environ
DATA_HOME = tempfile.TemporaryDirectory(prefix="dkdm-tests-")
THREADS = 1  # as the processes have that tests fork, whose results must be the same to the bit

# Read by the libraries when they are imported, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=str(THREADS),
    DKDM_DATA_HOME=DATA_HOME.name,
    DKDM_CACHE=f"{DATA_HOME.name}/cache",
)
# How wide and how colourful the terminal is, and how large models may be, a user may have set.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "DKDM_MAX_GIB"):
    os.environ.pop(name, None)

import gc
import random
import sys
import zlib

import pytest

import programs


def pytest_configure(config):
    """Prepare a process that runs tests; the one that deals them out imports no torch."""
    if UNDER_XDIST or not config.getoption("numprocesses", None):
        gc.disable()  # until all is imported

        import hypothesis
        import torch

        torch.set_num_threads(THREADS)
        programs.begin()
        hypothesis.settings.register_profile(
            "dkdm", deadline=None, derandomize=True, database=None, print_blob=True
        )
        hypothesis.settings.load_profile("dkdm")


def pytest_collection_finish():
    """What is imported stays: no garbage is looked for in it, a third of a second each time.

    Nor is it looked for every 700 objects: a test makes thousands, and the search was a twentieth
    of the time.

    Nothing is compiled to files from here on: Python takes one `pipeline.py` for another that is as
    long and was written in the same second.
    """
    sys.dont_write_bytecode = True
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def seed_from_name(name: str) -> None:
    """Seed the global generators from a name: two names do not give the same noise.

    `torch.manual_seed` formats the whole stack for each kind of accelerator that is not in use:
    milliseconds, several times a test.
    """
    import numpy as np
    import torch

    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """Make a fixture independent of the test that happens to ask for it first."""
    param = getattr(request, "param", "")
    seed_from_name(f"{fixturedef.baseid}::{fixturedef.argname}[{param}]")


@pytest.fixture(scope="session", autouse=True)
def shortened():
    """What most tests and fixtures leave out of a run, by the marker of those that do not.

    Untrained teachers teach in most; looking for their cure would take seconds in each. One small
    batch shows the speed, three levels the gap: they would be most of a tiny run.
    """
    from dkdm.evaluation import comparison, cost
    from dkdm.runs import cost as of_runs
    from dkdm.runs import distill

    timed = cost.evaluations_in_turns

    def once(work, _):
        work(2)
        return 0.01

    short = {
        "teacher_check": [(distill, "teacher_warning", lambda *_: None)],
        "measures": [
            (cost, "evaluations_in_turns", lambda models, *_: timed(models, 2, 0.0)),
            (of_runs, "_seconds", once),
            (comparison, "GAP_LEVELS", 3),
        ],
    }
    whole = {
        marker: [(place, name, getattr(place, name)) for place, name, _ in parts]
        for marker, parts in short.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)  # no power is cut, and disks take their time
        for part in (part for parts in short.values() for part in parts):
            patch.setattr(*part)
        yield whole


@pytest.fixture(autouse=True)
def marked_as_whole(request, shortened):
    """Leave nothing out of a test that is marked so."""
    with pytest.MonkeyPatch.context() as patch:
        for marker, parts in shortened.items():
            for part in parts if request.node.get_closest_marker(marker) else ():
                patch.setattr(*part)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed_from_name(item.nodeid)


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory):
    """The run of `test_resume.command`, which nothing disturbed; its folder stays as it is."""
    from test_resume import finish

    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder)
    return folder
