"""`python -m dkdm` and `accelerate launch -m dkdm`."""

import sys

from dkdm.cli import main

sys.exit(main())
