"""The dashboard of a run: seven panels over its steps, each with a question and a sentence that reads the data.

`write_dashboard` makes one HTML file that opens from disk and asks the network for nothing; `terminal.summary` says the
same in a terminal. Both are made from the files of the run, so they can be made again at any time; what is missing is
said.

`gather` reads a run, `readings` and `checks` say what it shows, `panels` chooses the lines, `specs` has Altair draw
them, `header` and `page` put it all together with `page.html`, `page.css` and the scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minitrain.dashboard.gather import RunData
from minitrain.files import write_atomic
from minitrain.run_folder import RunFolder


def write_dashboard(folder: RunFolder, other: RunFolder | None = None, out: Path | None = None) -> Path:
    """Write the page of a run, or of two laid over each other, and return where: dashboard.html in the first's folder.

    Raises MinitrainError where no run stands or its manifest or log is damaged, and OSError.
    """
    runs = [RunData.read(each) for each in (folder, other) if each is not None]
    return write_page(runs, out or default_path(folder, other))


def write_page(runs: Sequence[RunData], path: Path) -> Path:
    """The same, of runs that have been read. Raises OSError."""
    from minitrain.dashboard.page import page

    write_atomic(path, page(runs))
    return path


def default_path(folder: RunFolder, other: RunFolder | None = None) -> Path:
    """Where the page of a run stands, or that of a run and another."""
    return folder.path / f"dashboard-{other.path.resolve().name}.html" if other else folder.dashboard
