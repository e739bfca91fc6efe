"""One launch of the check: `torchrun ... -m megatron_mmr1.parity.worker JOB.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Run the job on this rank."""
    from megatron_mmr1 import device

    device.prepare_process()
    from megatron_mmr1.parity.compare import run

    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
