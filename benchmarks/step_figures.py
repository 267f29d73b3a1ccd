"""From the rounds of benchmarks/train_step.py to figures, verdicts and tables.

A row is one system's facts; `rounds` of it are its timed steps, each with cpu and wall in seconds, loss and tokens.
Rows are compared round by round: what disturbed the machine in a round disturbed both.
"""

import statistics
from typing import Any

UNEQUAL = {  # conditions that differ between the sides, for the reader
    "tessera": "moments as optimizer.moments says (BF16 by default) where transformers' are in its weights' dtype; a "
    "check for finite values in every step; the sums of the balance loss and the tokens of each expert are "
    "counted though their weight is 0; BF16 and FP8 carry the residual stream in BF16",
    "transformers": "bf16-autocast carries the residual stream in FP32 from the embedding on; bf16 has BF16 weights "
    "and moments, no FP32 masters",
}
SAME_LOSS = {"fp32": 1e-4}  # of the first step, relative; other precisions round differently:
ROUNDED = 5e-3
Row = dict[str, Any]


def summarise(row: Row) -> Row:
    """The row with figures in place of its rounds."""
    rounds, figures = row["rounds"], {}
    for clock in ("cpu", "wall"):
        low, middle, high = _quartiles([1e3 * one[clock] for one in rounds])
        figures |= {f"median_{clock}_ms": middle, f"{clock}_ms_quartiles": [low, high]}
    tokens = rounds[-1]["tokens"]
    figures |= {"tokens_per_s": 1e3 * tokens / figures["median_wall_ms"]}
    figures |= {"tokens_per_cpu_s": 1e3 * tokens / figures["median_cpu_ms"], "last_loss": rounds[-1]["loss"]}
    return {key: value for key, value in row.items() if key != "rounds"} | figures


def against(row: Row, other: Row) -> dict[str, Any]:
    """How many times as fast as `other` the row is, and its share of the other's peak memory."""
    found: dict[str, Any] = {"name": other["name"], "peak": row["peak_mib"] / other["peak_mib"]}
    for clock in ("cpu", "wall"):
        pairs = zip(row["rounds"], other["rounds"], strict=True)
        found[clock] = statistics.median(theirs[clock] / own[clock] for own, theirs in pairs)
    return found


def compare(rows: list[Row]) -> None:
    """Give each row of tessera its ratios to the best mode of transformers, the best eager one, and its own BF16.

    The best is that with the smallest median: of CPU time on one thread, of wall time on more.
    """
    clock = "cpu" if rows[0]["threads"] == 1 else "wall"
    theirs = [row for row in rows if row["system"] == "transformers"]

    def best(found: list[Row]) -> Row | None:
        return min(found, key=lambda row: statistics.median(one[clock] for one in row["rounds"]), default=None)

    others = {"against_best": best(theirs), "against_eager": best([row for row in theirs if not row["compiled"]])}
    others["against_own_bf16"] = next((row for row in rows if row["name"] == "tessera-bf16"), None)
    for row in rows:
        if row["system"] == "tessera":
            row |= {key: against(row, other) for key, other in others.items() if other is not None}


def inequalities(rows: list[Row]) -> list[str]:
    """What makes the comparison void: other parameters, another first loss, a loss that does not fall."""
    found = []
    exact = next((row for row in rows if row["precision"] == "fp32"), rows[0])
    for row in rows:
        if row["parameters"] != exact["parameters"]:
            found.append(f"{row['name']}: {row['parameters']} parameters, {exact['name']} has {exact['parameters']}")
        away = abs(row["first_loss"] / exact["first_loss"] - 1)
        if not away <= SAME_LOSS.get(row["precision"], ROUNDED):
            losses = f"{row['first_loss']}, {exact['name']}'s {exact['first_loss']}"
            found.append(f"{row['name']}: the first loss is {losses}")
        if not row["rounds"][-1]["loss"] < row["first_loss"]:
            found.append(f"{row['name']}: the loss went from {row['first_loss']} to {row['rounds'][-1]['loss']}")
    return found


def show(rows: list[Row], facts: dict[str, str]) -> None:
    """The tables."""
    print("; ".join(f"{key}: {value}" for key, value in facts.items()))
    for side, text in UNEQUAL.items():
        print(f"not equal: {side}: {text}")
    times = f"{'CPU ms':>7} {'quartiles':>13} {'wall ms':>8} {'tok/CPU s':>9} {'tok/s':>7}"
    print(f"\n   {'system':<36} {times} {'peak MiB':>8} {'resident':>8} {'torch':>6}  {'loss':<14} AdamW")
    for row in rows:
        low, high = row["cpu_ms_quartiles"]
        print(
            f"{row['threads']:>2} {row['name']:<36} {row['median_cpu_ms']:7.0f} {low:6.0f}-{high:<6.0f} "
            f"{row['median_wall_ms']:8.0f} {row['tokens_per_cpu_s']:9.0f} {row['tokens_per_s']:7.0f} "
            f"{row['peak_mib']:8.0f} {row['resident_mib']:8.0f} {row['baseline_mib']:6.0f}  "
            f"{row['first_loss']:.3f} -> {row['last_loss']:.3f} {row['adamw']}"
            + (f", compiled {row['recompiled']} times while timed" if row["recompiled"] else "")
        )
    for key, title in (("against_best", "transformers' best mode"), ("against_eager", "its best eager mode")):
        _show_ratios(rows, key, f"times as fast as {title}")
    _show_ratios(rows, "against_own_bf16", "times as fast as its own BF16")
    for row in rows:
        if "profile" in row:
            print(f"\n{row['name']}, {row['threads']} threads: {row['profiled_ms']:.0f} ms in one profiled step")
            for name, milliseconds, calls in row["profile"]:
                print(f"{milliseconds:9.1f} ms {milliseconds / row['profiled_ms']:6.1%} {calls:6} calls  {name}")


def _show_ratios(rows: list[Row], key: str, title: str) -> None:
    found = [(row, row[key]) for row in rows if key in row and row["name"] != row[key]["name"]]
    if not found:
        return
    print(f"\n{title:<52} {'by CPU':>7} {'by wall':>8} {'peak memory':>12}")
    for row, ratio in found:
        which = f"{row['threads']:>2} {row['name'].removeprefix('tessera-')} to {ratio['name']}"
        print(f"{which:<52} {ratio['cpu']:6.2f}x {ratio['wall']:7.2f}x {ratio['peak']:11.2f}x")


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
