"""When, where and with what something was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

from measure.environments import ROOT
from minitrain._ext.signatures import NUMERICS_VERSION
from minitrain.environment import git_state, hardware, versions


def about(isas: list[str], cores: list[int]) -> dict[str, Any]:
    machine = hardware()
    git = git_state(ROOT)
    known = versions()
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "commit": f"{(git['sha'] or 'unknown')[:10]}{' with changes' if git['dirty'] else ''}",
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {round((machine['ram_bytes'] or 0) / 1e9)} GB",
        "system": f"{platform.system()} on {platform.machine()}",
        "cores": cores,
        "isas": isas,
        "load_before": round(os.getloadavg()[0], 1),
        "minitrain": f"{known['minitrain']} (numerics {NUMERICS_VERSION})",
        "python": known["python"],
        "numpy": known["numpy"],
        "compiler": compiler,
    }
