"""Say whether this machine is ready to train, each line OK or what to do:

    python tools/doctor.py [--port 29500] [--rdzv HOST:PORT] [--output-dir outputs]

Run it on every node before a launch; the scripts in examples/ do. Exit status 1 if something is to
be done. Needs nothing but Python: it also works where nothing is installed yet.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # the package may not be installed

from megatron_mmr1.launch.doctor import examine  # noqa: E402


def main() -> int:
    """Print the findings and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, help="a port that a process is to listen on here")
    parser.add_argument("--rdzv", metavar="HOST:PORT", help="where the nodes are to meet")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    options = parser.parse_args()
    try:
        findings = examine(CHECKOUT, options.output_dir, options.port, options.rdzv)
    except ValueError as error:
        parser.error(str(error))
    for finding in findings:
        print(finding)
    num_to_do = sum(finding.status == "DO" for finding in findings)
    if num_to_do:
        print(f"{num_to_do} to do on {socket.gethostname()}", file=sys.stderr)
    return 1 if num_to_do else 0


if __name__ == "__main__":
    sys.exit(main())
