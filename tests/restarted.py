"""One of two processes that torchrun starts twice: leaves a key where all meet, and says whether an
earlier start's was there, in the store as we use it and in torchrun's own.

Usage: restarted.py FOLDER
"""

import os
import sys
from pathlib import Path

from megatron_mmr1.launch.rendezvous import meet

if __name__ == "__main__":
    meeting = meet()
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    ours, torchs = meeting.store, meeting.store.underlying_store
    found = [store.check([f"left/{meeting.rank}"]) for store in (ours, torchs)]
    Path(sys.argv[1], f"start_{start}_rank_{meeting.rank}").write_text(str(found))
    for store in (ours, torchs):
        store.set(f"left/{meeting.rank}", "")
    ours.wait(["left/0", "left/1"])
    sys.exit(1 if start == "0" and meeting.rank == 1 else 0)
