"""Headless Chromium, where the system has it: renders a page, runs a script of the test in it, reports the console."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this system to render the page with")

# No sandbox because tests may run as root; the rest keeps the browser from looking for updates.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=4000",
)  # fmt: skip
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Rendered:
    """The document after its scripts ran, and what they said on the console."""

    dom: str
    console: list[str]

    def drawn(self) -> dict[str, int]:
        """Chart id -> points it says it has drawn."""
        tags = re.findall(r"<(?:div|table)[^>]*\bdata-drawn=[^>]*>", self.dom)
        found = {}
        for tag in tags:
            name, count = re.search(r'\bid="([^"]+)"', tag), re.search(r'data-drawn="(\d+)"', tag)
            if name and count:
                found[name[1]] = int(count[1])
        return found


def render(page: Path, folder: Path, *, width: int = 1200, dark: bool = False, script: str = "") -> Rendered:
    """Load the page from its file; with `script`, in a copy without the policy that would refuse it."""
    if script:
        html = POLICY.sub("", page.read_text(encoding="utf-8"), count=1)
        page = folder / "scripted.html"
        page.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    profile = folder / "profile"
    assert CHROMIUM is not None
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},1400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert result.returncode == 0, result.stderr
    return Rendered(result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line])
