"""Everything the page says: `page` is what the template writes out, `data` is what the script draws."""

import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from math import isfinite, nan
from typing import Any

import numpy as np

from tessera.training.report import health, loads, unstable, wording
from tessera.training.report.curves import Axis, axis, compact, differences, series
from tessera.training.report.folder import REFERENCE, Arm, Source
from tessera.training.report.headline import headline
from tessera.training.report.history import number
from tessera.training.report.memory import memory_bars
from tessera.training.report.wording import MISSING, arm_label, duration, fixed, grouped, listed, percent, short
from tessera.training.verdict import CURVE_BAR, windows

_OUTCOMES = {"failed": "failed", "not caught": "failed", "failed, as it must": "passed"}  # colours of the tags
LATE = 50  # steps whose mean stands for an arm's loss at the end


def data(source: Source) -> dict[str, Any]:
    """Curves, loads and health of all arms, ready for JSON: finite numbers, None where there is none."""
    shared = axis([arm.history for arm in source.arms])
    trained = [arm for arm in source.arms if not arm.is_control]
    measured = max(1, sum(_has_health(arm) for arm in trained))
    return {
        "steps": [int(step) for step in shared.places],
        "grouped": shared.steps_a_point,
        "arms": [_arm_data(arm, shared, measured, len(trained)) for arm in source.arms],
        "differences": _differences(source, shared),
        "bigram": compact([_bigram(source)])[0],
        "trunk": _trunk_layers(source),
    }


def _trunk_layers(source: Source) -> int | None:
    """Layers before the MTP blocks, which continue their numbers; None where the recipe does not say."""
    try:
        layers = tomllib.loads(source.recipe)["model"]["num_hidden_layers"]
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return None
    return layers if isinstance(layers, int) else None


def _arm_data(arm: Arm, shared: Axis, measured: int, trained: int) -> dict[str, Any]:
    history = arm.history
    acceptance = [event.get("mtp_acceptance") or [] for event in history.validations.values()]
    depths = max(map(len, acceptance), default=0)
    return {
        "name": arm.name,
        "label": arm_label(arm.name),
        "control": arm.is_control,
        "series": series(history, shared),
        "unstable": unstable.marks(arm),
        "validation": {
            "steps": list(history.validations),
            "loss": compact(history.validation("loss")),
            "bits_per_byte": compact(history.validation("bits_per_byte")),
            "ema_bits_per_byte": compact(history.validation("ema_bits_per_byte")),
            "mtp_acceptance": [
                compact([number(row[depth]) if depth < len(row) else nan for row in acceptance])
                for depth in range(depths)
            ],
        },
        # A control is the twin again but for its last bits: its loads and health would say nothing new.
        "loads": None if arm.is_control else loads.heat_map(history, loads.MAX_CELLS // trained),
        "health": None if arm.is_control else health.table(history, health.MAX_NUMBERS // measured),
    }


def _differences(source: Source, shared: Axis) -> dict[str, Any] | None:
    histories = {arm.name: arm.history for arm in source.arms}
    controls = [arm.name for arm in source.arms if arm.is_control]
    planned = (number((history.start or {}).get("steps")) for history in histories.values())
    steps = int(max((count for count in planned if isfinite(count)), default=shared.points))
    judged_from = min((window.start for window in windows(steps)), default=steps - steps // 2)
    found = differences(histories, REFERENCE, controls, shared, judged_from)
    if found is None:
        return None
    return found | {"bar": CURVE_BAR, "judged_from": judged_from}


def page(source: Source) -> dict[str, Any]:
    """The values of page.html."""
    histories = [arm.history for arm in source.arms]
    return {
        "name": source.name,
        "is_comparison": source.is_comparison,
        "headline": headline(source),
        "begun": _date(min((h.first_time for h in histories if isfinite(h.first_time)), default=nan)),
        "points": _points(source),
        "learning": _learning(source),
        "arms": [_arm_row(source, arm) for arm in source.arms],
        "facts": list(_facts(source)),
        "notes": list(dict.fromkeys([*_notes(source), *(note for history in histories for note in history.notes)])),
        "memory": memory_bars(source.recipe),
        "unstable": unstable.table(source),
        "ablations": _ablations(source),
        "sample": _sample(source),
        "recipe": source.recipe,
        "has": {
            "steps": any(history.steps for history in histories),
            "twin": any(arm.name == REFERENCE for arm in source.arms) and len(source.arms) > 1,
            "validations": any(history.validations for history in histories),
            "loads": any(arm.history.loads for arm in source.arms if not arm.is_control),
            "health": any(_has_health(arm) for arm in source.arms if not arm.is_control),
            "acceptance": any(
                event.get("mtp_acceptance") for history in histories for event in history.validations.values()
            ),
            "controls": sum(arm.is_control for arm in source.arms),
        },
    }


def _has_health(arm: Arm) -> bool:
    return any(record.names for record in arm.history.health.values())


def _points(source: Source) -> list[dict[str, str]]:
    """The rows of "where it was measured": the same-weights loss error at each point of training."""
    return [
        {"step": grouped(number(point.get("step")))}
        | {
            name: percent(number(point.get(name)))
            for name in ("loss_error", "loss_error_replayed", "bf16_loss_error", "rerouted_tokens")
        }
        for point in source.comparison.get("points") or []
    ]


def _bits(source: Source, arm: Arm) -> float:
    said = number((source.comparison.get("bits_per_byte") or {}).get(arm.name))
    return said if isfinite(said) else arm.history.final_validation("bits_per_byte")


def _bigram(source: Source) -> float:
    said = number(source.comparison.get("bigram_bits_per_byte"))
    if isfinite(said):
        return said
    return next((bits for arm in source.arms for bits in arm.history.baselines.values() if isfinite(bits)), nan)


def _learning(source: Source) -> dict[str, Any] | None:
    """Bits per byte beside the bigram's: a sentence and bars; None before the first validation."""
    scored = [(arm, _bits(source, arm)) for arm in source.arms if not arm.is_control]
    scored = [(arm, bits) for arm, bits in scored if isfinite(bits)]
    if not scored:
        return None
    bigram = _bigram(source)
    arm, bits = scored[0]
    subject = f"The {arm_label(arm.name)} model" if source.is_comparison else "The model"
    sentence = f"{subject} needs {fixed(bits, 3)} bits for a byte of held-out text"
    if not isfinite(bigram):
        sentence += "."
    elif bits < bigram:
        sentence += (
            f", {percent((bigram - bits) / bigram)} fewer than a Witten-Bell bigram that counted the very tokens it "
            f"was trained on ({fixed(bigram, 3)}). It learned more than which token follows which."
        )
    else:
        sentence += (
            f", no fewer than a Witten-Bell bigram that counted the very tokens it was trained on "
            f"({fixed(bigram, 3)}). It has not learned more than which token follows which."
        )
    rows = [(arm_label(arm.name), bits, arm.name) for arm, bits in scored]
    averages = [(arm, arm.history.final_validation("ema_bits_per_byte")) for arm, _ in scored]
    rows += [(f"{arm_label(arm.name)}, averaged weights", bits, arm.name) for arm, bits in averages if isfinite(bits)]
    if isfinite(bigram):
        rows.append(("Witten-Bell bigram", bigram, "bigram"))
    largest = max(value for _, value, _ in rows)
    bars = [
        {"label": label, "value": fixed(value, 3), "width": round(100 * value / largest, 2), "name": name}
        for label, value, name in rows
    ]
    return {"sentence": sentence, "bars": bars}


def _arm_row(source: Source, arm: Arm) -> dict[str, str]:
    history, found = arm.history, source.comparison
    late = history.column("lm_loss")[-LATE:] if history.steps else np.array([nan])
    late = late[np.isfinite(late)]
    speed = number((found.get("tokens_per_s") or {}).get(arm.name))
    if not isfinite(speed):
        speed = number((history.end or {}).get("tokens_per_s"))
    done = history.steps_done
    planned = number((history.start or {}).get("steps"))
    return {
        "name": arm.name,
        "label": arm_label(arm.name),
        "precision": str((history.start or {}).get("precision", MISSING)),
        "state": "diverged" if arm.name in (found.get("diverged") or {}) else arm.state,
        "steps": grouped(done) + (f" of {grouped(planned)}" if isfinite(planned) and planned > done else ""),
        "tokens": short(history.final("tokens")),
        "loss": fixed(float(late.mean()) if len(late) else nan, 4),
        "bits": fixed(_bits(source, arm), 3),
        "speed": grouped(speed if isfinite(speed) else history.final("tokens_per_s")),
        "time": duration(history.seconds),
    }


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    """What ran, where: (term, value), only what is known."""
    start = next((arm.history.start for arm in source.arms if arm.history.start), None) or {}
    total, active = number(start.get("parameters")), number(start.get("active_parameters"))
    if isfinite(total):
        yield "Parameters", short(total) + (f", {short(active)} active for a token" if isfinite(active) else "")
    if isfinite(number(start.get("tokens_per_step"))):
        yield "Tokens a step", grouped(number(start.get("tokens_per_step")))
    tokens = max((h.final("tokens") for h in (arm.history for arm in source.arms) if h.steps), default=nan)
    if isfinite(tokens):
        yield "Tokens seen", short(tokens)
    heldout = next((e for arm in source.arms for e in reversed(arm.history.validations.values())), {})
    if isfinite(number(heldout.get("tokens"))):
        size = f", {short(number(heldout.get('bytes')))} bytes" if isfinite(number(heldout.get("bytes"))) else ""
        yield "Held-out text", f"{short(number(heldout.get('tokens')))} tokens{size}"
    if start.get("device"):
        threads = number(start.get("threads"))
        plural = "" if threads == 1 else "s"
        yield "Machine", str(start["device"]) + (f", {grouped(threads)} thread{plural}" if isfinite(threads) else "")
    peak = number(start.get("peak_flops"))
    if isfinite(peak):
        yield "Peak that utilisation refers to", f"{grouped(peak / 1e9)} GFLOP/s"
    whole = number(source.comparison.get("seconds"))
    if isfinite(whole):
        yield "Time, all arms and measurements", duration(whole)
    resumed = [(arm, arm.history.resumed_at) for arm in source.arms if arm.history.resumed_at]
    if resumed:
        which = [
            (f"{arm_label(arm.name)} " if source.is_comparison else "") + f"at step {listed(list(map(grouped, steps)))}"
            for arm, steps in resumed
        ]
        yield "Resumed", listed(which)


def _ablations(source: Source) -> list[dict[str, str]]:
    found = source.comparison.get("ablations") or {}
    return [
        {
            "name": arm_label(str(name)),
            "loss_error": percent(number(row.get("loss_error"))),
            "gradient_error": percent(number(row.get("gradient_error"))),
            "gradient_bias": percent(number(row.get("gradient_bias"))),
            "verdict": str(row.get("verdict") or MISSING),
            "outcome": _OUTCOMES.get(str(row.get("verdict")), "other"),
            "note": str(row.get("note") or ""),
        }
        for name, row in found.items()
    ]


def _notes(source: Source) -> list[str]:
    return [str(note) for note in source.comparison.get("notes") or []]


def _sample(source: Source) -> dict[str, str] | None:
    """The text a model wrote: the comparison's, else the first arm's that has one."""
    found = source.comparison.get("sample") or next(
        (arm.history.sample for arm in source.arms if arm.history.sample), None
    )
    if not found or not (found.get("text") or found.get("prompt")):
        return None
    prompt, text = str(found.get("prompt") or ""), str(found.get("text") or "")
    temperature = number(found.get("temperature"))
    return {
        "prompt": prompt,
        "text": text.removeprefix(prompt),
        "temperature": wording.significant(temperature) if isfinite(temperature) else "",
    }


def _date(time: float) -> str:
    if not isfinite(time):
        return ""
    return datetime.fromtimestamp(time, UTC).strftime("%-d %B %Y, %H:%M UTC")
