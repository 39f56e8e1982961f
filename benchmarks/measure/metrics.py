"""What metrics cost a default run, without a record, and how long its page takes."""

from __future__ import annotations

from minitrain.config import Config
from minitrain.experiments.timing import Loops, loops

TURNS = 6


def one_round() -> dict[str, float]:
    """Seconds of the loop of 2000 steps, without metrics and with all of them, and of building the page.

    Every step counts as the fastest of its kind in `TURNS` turns.
    """
    found = loops(Config(), TURNS)
    if found is None:
        raise RuntimeError("expected the default run to end with finite numbers, got others")
    return {
        "off_s": Loops.seconds(found.off),
        "on_s": Loops.seconds(found.on),
        "page_s": found.page.wall_s,
        "page_processor_s": found.page.processor_s,
    }
