"""The steps that were not finite, or spikes: marks on the loss curve, and a table with links to their evidence.

A link is made of the step's number alone, and only where the event names the file that lies there by rule: an event's
own text never becomes an address.
"""

from typing import Any
from urllib.parse import quote

from tessera.training.report.folder import Arm, Source
from tessera.training.report.history import Event, number
from tessera.training.report.wording import MISSING, arm_label, grouped, significant

MAX_ROWS = 50  # of the table
MAX_MARKS = 500  # of one curve


def marks(arm: Arm) -> list[int]:
    """The steps to be marked on an arm's curve; of very many the latest."""
    return list(arm.history.unstable)[-MAX_MARKS:]


def table(source: Source) -> dict[str, Any] | None:
    """{rows, left_out}: the latest steps of each arm, in the order of arms; None where all steps were calm."""
    found = [(arm, step, event) for arm in source.arms for step, event in arm.history.unstable.items()]
    if not found:
        return None
    share = max(1, MAX_ROWS // sum(bool(arm.history.unstable) for arm in source.arms))
    rows = [
        _row(source, arm, step, event)
        for arm in source.arms
        for step, event in list(arm.history.unstable.items())[-share:]
    ]
    return {"rows": rows, "left_out": len(found) - len(rows)}


def _row(source: Source, arm: Arm, step: int, event: Event) -> dict[str, str]:
    file = f"evidence/step-{step}.json"
    folder = f"arms/{quote(arm.name, safe='')}/" if source.is_comparison else ""
    return {
        "arm": arm_label(arm.name),
        "step": grouped(step),
        "reason": str(event.get("reason") or MISSING),
        "decision": str(event.get("decision") or MISSING),
        "rule": str(event.get("rule") or ""),
        "rate": significant(number(event.get("rate_scale")), 3, 12),
        "link": folder + file if event.get("evidence") == file else "",
        "evidence": file if event.get("evidence") == file else str(event.get("evidence_error") or MISSING),
    }
