"""`dkdm`, `python -m dkdm` and `accelerate launch -m dkdm`."""

import os
import sys

# The current directory may be a folder that somebody else filled: what dkdm imports lies elsewhere.
sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]


def yield_cores() -> None:
    """Let threads that wait for others (libgomp's) give up their core soon, unless the user chose.

    They look for work without a pause otherwise. Beside one busy process on two cores, the thread
    that they wait for then gets its core so late that a step takes many times as long. libgomp
    reads this when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


yield_cores()

from dkdm import cli  # noqa: E402


def main() -> int:
    """Run one command; returns its exit code, or 141 if nobody reads what it prints, as in
    `dkdm distill --help | head -1`."""
    try:
        try:
            return cli.main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        return 141


if __name__ == "__main__":
    sys.exit(main())
