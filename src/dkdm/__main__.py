"""`dkdm`, `python -m dkdm` and `accelerate launch -m dkdm`."""

import os
import sys

# The current directory may be a folder that somebody else filled: what dkdm imports lies elsewhere.
sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]

from dkdm.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
