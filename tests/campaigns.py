"""What `make test-long` has found, kept in CAMPAIGNS.md: each long test replaces its own section there."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from minitrain.environment import hardware, versions

PAGE = Path(__file__).with_name("CAMPAIGNS.md")
HEAD = """# What the long tests found

Written by `make test-long`: do not edit, run it again. CI runs samples of the same campaigns with fixed seeds.
"""


class Campaign:
    """A long test; ``tell`` it how it ended."""

    def __init__(self, title: str) -> None:
        self.title, self._started = title, time.monotonic()

    def tell(self, header: Sequence[str], *rows: Sequence[object]) -> None:
        """Put a table, with date, machine and duration, in the place of what the page says of this campaign."""
        cpu, cores, took = hardware()["cpu"], hardware()["cores"], time.monotonic() - self._started
        version, python = versions()["minitrain"], versions()["python"]
        table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))
        mine = (
            f"## {self.title}\n\n{datetime.now(UTC):%Y-%m-%d}, minitrain {version}, {cpu} ({cores} cores), "
            f"Python {python}, {took:.0f} s.\n\n{table}\n"
        )
        page = PAGE.read_text() if PAGE.exists() else HEAD
        others = [s for s in re.split(r"(?m)^(?=## )", page)[1:] if not s.startswith(f"## {self.title}\n")]
        PAGE.write_text("\n".join([HEAD, *sorted(f"{s.strip()}\n" for s in (*others, mine))]))
