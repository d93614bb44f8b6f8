"""What the environment says before torch is loaded, where this process is the command line.

OpenMP reads its settings as its library is loaded, which importing this package does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import PurePath

# They take seconds to minutes on machines that also do other things; where others share the cores, threads that spin
# while they wait make a step of the demo several times slower. `bench` and `doctor` show what the user has set.
WAIT_ASLEEP = ("demo", "ask", "evaluate")


def prepare(
    argv: Sequence[str] = sys.argv,
    started_as: Sequence[str] = sys.orig_argv,
    environment: MutableMapping[str, str] = os.environ,
) -> None:
    """Lets idle threads sleep in the commands that want it, unless the user has set how they wait."""
    script = PurePath(argv[0]).name if argv else ""
    is_command = script in ("gpt4v-fast", "gpt4v-fast.exe") or (script == "-m" and "gpt4v_fast.cli" in started_as)
    if is_command and len(argv) > 1 and argv[1] in WAIT_ASLEEP and "GOMP_SPINCOUNT" not in environment:
        environment.setdefault("OMP_WAIT_POLICY", "passive")
