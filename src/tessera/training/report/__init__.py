"""report.html: what a run or a comparison found, as one page that works offline.

In reading order: `folder` (which files there are), `history` (the events of a run as plain numbers), `curves`,
`loads`, `health`, `unstable` (what is drawn, thinned to a size a page can hold), `headline` (the verdict in words),
`contents` (everything the page says), `page` (HTML). The page itself is page.html, style.css and the .js files, drawn
with uPlot (vendor/, MIT). Nothing here needs torch: the events are the only source, so a report can be made again at
any time, also of a run that is still going on.
"""

from pathlib import Path

from tessera.store import write_atomic
from tessera.training.report.folder import load
from tessera.training.report.page import render

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Write report.html of a run folder or a comparison folder into it and return its path.

    Raises UserError if the folder is neither, if a file in it is damaged, or if the page cannot be written.
    """
    path = folder / "report.html"
    write_atomic(path, render(load(folder)))
    return path
