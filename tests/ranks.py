"""Runs of several processes: copies of one program, each a rank, as a launcher starts them."""

import json

import programs

LAUNCHER = """
import contextlib, json, os, signal, socket, sys, traceback

import torch
import dkdm.runs.distill
from dkdm.cli import main


def as_rank(rank, world, before, arguments, output):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    code = 1
    for number in (1, 2):
        os.dup2(output, number)
    try:
        exec(before, {"rank": rank, "__name__": "before"})
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def launch(world, before, arguments):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world))
    ranks, first = [], 0
    with open("said", "w+") as said:
        for rank in range(world):
            child = os.fork()
            if child == 0:
                as_rank(rank, world, before, arguments, said.fileno())
            ranks.append(child)
        while ranks:
            child, status = os.wait()
            ranks.remove(child)
            code = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        said.seek(0)
        return first, said.read()


os.chdir(sys.argv[1])
print(json.dumps([launch(*order) for order in json.loads(sys.argv[2])]))
"""


def launch(folder, *orders):
    """Carry out orders (world, code that each rank runs first, arguments of the command).

    Returns the first exit code of each that is not 0, and all that its ranks printed.
    """
    done = programs.run(LAUNCHER, folder, json.dumps(orders), path=programs.TESTS, absent=())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
