"""`dkdm`, `python -m dkdm` and `accelerate launch -m dkdm`."""

import os
import sys

# The current directory may be a folder that somebody else filled: what dkdm imports lies elsewhere.
if sys.path[0] == os.getcwd():
    del sys.path[0]
sys.path[:] = [path for path in sys.path if path]

from dkdm.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
