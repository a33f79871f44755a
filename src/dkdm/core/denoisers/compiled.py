"""Networks compiled by torch.compile: fewer and larger kernels, after minutes of compiling."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dkdm.core.denoisers.calls import Network
from dkdm.core.denoisers.graphs import Replay, Replayed
from dkdm.reading.files import cache_dir

CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(eq=False)
class Compiled(Replayed):
    """A call of a network that is compiled for shapes that come again, on any device.

    What is compiled is kept in the cache folder, for the next run. Equal to `call` to rounding.
    """

    backend: str = "inductor"

    def _applies(self, network: Network, x: Tensor) -> bool:
        del x
        return self._is_plain(network)

    def _captured(
        self, network: Any, x: Tensor, time_fed: Tensor, cond: Mapping[str, Tensor]
    ) -> Replay | None:
        os.environ.setdefault(CACHE, str(cache_dir("compiled")))
        name, started = type(network).__name__, time.monotonic()
        devices = [x.device] if x.device.type == "cuda" else []
        try:
            compiled: Any = torch.compile(network, dynamic=False, backend=self.backend)
            with torch.random.fork_rng(devices=devices):
                self.call(compiled, x, time_fed, cond)
        except Exception as error:
            self.refused = True
            print(f"note: {name} is not compiled: {error}", file=sys.stderr)
            return None
        seconds = time.monotonic() - started
        print(f"note: compiling {name} for {len(x)} samples took {seconds:.0f} s", file=sys.stderr)

        def replay(x: Tensor, time_fed: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            return self.call(compiled, x, time_fed, cond)

        return replay
