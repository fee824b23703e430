"""How much memory the run holds, in MiB: the process, and what torch has allocated on a GPU."""

import os
import sys
from pathlib import Path
from typing import Any

_MIB = 1 << 20
_STATM = Path("/proc/self/statm")


class Memory:
    """Reads what the system tells at once: 2 µs on Linux, so that every report can have it.

    Args:
        device: of the run, as torch writes it.

    `read()` gives `process` (resident memory; where only the largest so far is known, as on macOS, `process_peak`;
    nothing on Windows) and on a CUDA device `cuda_allocated` and `cuda_peak`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._page = os.sysconf("SC_PAGE_SIZE") / _MIB if _STATM.exists() else 0.0
        # Kept open: opening it costs more than reading it.
        self._statm: Any = _STATM.open("rb", buffering=0) if self._page else None
        self._cuda = device if device.startswith("cuda") else None

    def read(self) -> dict[str, float]:
        found = {}
        if self._statm is not None:
            found["process"] = int(os.pread(self._statm.fileno(), 128, 0).split()[1]) * self._page
        elif sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            found["process_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB
        if self._cuda is not None:
            import torch

            told = torch.cuda.memory_stats(self._cuda)
            found["cuda_allocated"] = told.get("allocated_bytes.all.current", 0) / _MIB
            found["cuda_peak"] = told.get("allocated_bytes.all.peak", 0) / _MIB
        return found

    def close(self) -> None:
        if self._statm is not None:
            self._statm.close()
