"""What a person reads of a run: the picture of its losses and a page that tells it in words.

Both are made from the log and the results, so they can be made again at any time. Where a figure is missing (NaN, or
None as JSON has it) the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minitrain.config import Config
from minitrain.files import write_atomic
from minitrain.report.curve import draw
from minitrain.report.story import Story
from minitrain.run_folder import RunFolder


def write_curve(folder: RunFolder, config: Config, results: Mapping[str, Any], baseline_ppl: float) -> None:
    """Write loss_curve.png. Raises RunError if the log or the manifest is damaged, and OSError."""
    story = Story.read(folder, config, results, baseline_ppl)
    picture = draw(story.log, baseline_ppl, story.baseline_name, story.headline(), story.subtitle())
    write_atomic(folder.curve, picture)


def write_page(folder: RunFolder, config: Config, results: Mapping[str, Any], baseline_ppl: float) -> None:
    """Write README.md. Raises RunError if the log or the manifest is damaged, and OSError."""
    write_atomic(folder.readme, Story.read(folder, config, results, baseline_ppl).page())
