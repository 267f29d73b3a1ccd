"""The speed of tessera's matrix products and quantisers, beside torch's BF16 mm, FP32 mm and FP8 path.

    python benchmarks/gemm.py [--threads N] [--rounds N] [--shapes small] [--isa NAME] [--json] [--out FILE]

Shapes are M tokens x N outputs x K inputs of a linear layer. `ratio_to_bf16_mm` is the time of a row over that of
torch's BF16 mm of the same kind (a loop of mm for grouped) right before and after it, the median over rounds; 1.15 is
the bar for FP8 fprop with its quantisation, at M, N and K of 128 and more. Times are CPU time (of the thread, with
--threads 1) and wall time, medians and quartiles over rounds, with an allocator that keeps freed memory.
`relative_error` is the norm of the error of the FP32 result against FP64 sums of the same quantised operands, the bar
2e-6 for contractions of at most 4,096. `fraction_of_copy` is the speed of a quantiser in bytes over that of a copy;
`call_ms` is the time of the same call on a single element.

Exit code 1: an error is above its bar.
"""

import argparse
import gc
import json
import os
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported; waiting is no work

from gemm_quantisers import SIZES, quantiser_rows
from gemm_systems import Arithmetic, Product, products
from kernel_options import add_options, apply_options
from machine import machine
from paired import Clock, keep_memory, measure

from tessera import native

ERROR_BAR, ERROR_BAR_CONTRACTION = 2e-6, 4096  # docs/numerics.md, "Accumulation"
Row = dict[str, Any]
Shape = tuple[int, int, int]

SHAPES: dict[str, dict[str, Shape]] = {
    "small": {
        "hidden 256, to 512": (2048, 512, 256),
        "hidden 256, to 256": (2048, 256, 256),
        "an expert's down": (512, 256, 128),
        "an expert's gate and up": (512, 256, 256),
        "dense gate and up": (2048, 1408, 256),
        "dense down": (2048, 256, 704),
    },
    "deepseek-v3": {
        "q_a": (512, 1536, 7168),
        "q_b": (512, 24576, 1536),
        "kv_a": (512, 576, 7168),
        "kv_b": (512, 32768, 512),
        "o": (512, 7168, 16384),
        "expert gate and up": (512, 4096, 7168),
        "expert down": (512, 7168, 2048),
    },
}
LARGEST_GROUPED = 2**25  # weights of one group; 16 of the larger ones, which no expert has, would not fit a laptop


def measure_shape(name: str, shape: Shape, options: argparse.Namespace) -> list[Row]:
    """The rows of one shape."""
    m, n, k = shape
    clock = Clock(options.threads)
    grouped = n * k <= LARGEST_GROUPED and (name.startswith("expert") or name not in SHAPES["deepseek-v3"])
    found = products(m, n, k, grouped, Arithmetic(options.isa), clock)
    measure([product.timed for product in found if product.timed], options.rounds, clock)
    return [_row(name, shape, product, options) for product in found]


def _row(name: str, shape: Shape, product: Product, options: argparse.Namespace) -> Row:
    m, n, k = shape
    row: Row = {key: getattr(product, key) for key in ("kind", "system", "precision", "scales", "includes")}
    row |= {"shape": name, "m": m, "n": n, "k": k, "threads": options.threads}
    row |= {"isa": (options.isa or best_isa()) if product.system == "tessera" else ""}
    row |= {"relative_error": product.relative_error, "supported": product.timed is not None, "note": product.note}
    if product.timed:
        figures = product.timed.figures()
        for prefix in ("", "wall_"):
            figures[f"{prefix}ratio_to_bf16_mm"] = figures.pop(f"{prefix}ratio")
        row |= figures | {"gflops_per_cpu_s": 2e-6 * m * n * k / figures["median_ms"]}
    return row


def best_isa() -> str:
    """The instruction set that is used where none is named; "torch" where there is no compiled code."""
    return native.instruction_sets()[0] if native.available() else "torch"


def wrong(rows: list[Row]) -> list[str]:
    """The rows whose error is above its bar, in words."""
    found = []
    for row in rows:
        contraction = {"dgrad": row["n"], "wgrad": row["m"]}.get(row["kind"], row["k"])
        error = row["relative_error"]
        if error is not None and contraction <= ERROR_BAR_CONTRACTION and not error <= ERROR_BAR:
            found.append(f"{_title(row)}: relative error {error:.2e}, the bar is {ERROR_BAR:.0e}")
    return found


def _title(row: Row) -> str:
    product = f"{row['kind']} {row['system']} {row['precision']}"
    return f"{row['m']} x {row['n']} x {row['k']} {product} {row['scales']} {row['includes']}".rstrip()


def show(rows: list[Row]) -> None:
    """The table of one shape."""
    title = f"{rows[0]['shape']}: {rows[0]['m']} x {rows[0]['n']} x {rows[0]['k']}"
    print(f"\n{title:<48} {'CPU ms':>8} {'quartiles':>17} {'wall ms':>8} {'GFLOP/s':>7} ", end="")
    print(f"{'to BF16 mm':>10} {'quartiles':>11} {'error':>8}")
    for row in rows:
        named = f"{row['kind']:<7} {row['system']:<7} {row['precision']} {row['scales']:<12} {row['includes']}"
        if not row["supported"]:
            print(f"{named:<48} {row['note']}")
            continue
        (low, high), (least, most) = row["quartiles"], row["ratio_quartiles"]
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        print(
            f"{named:<48} {row['median_ms']:8.5g} {low:8.4g}-{high:<8.4g} {row['median_wall_ms']:8.5g} "
            f"{row['gflops_per_cpu_s']:7.4g} {row['ratio_to_bf16_mm']:9.4g}x {least:5.3g}-{most:<5.3g} "
            f"{error:>8}  {row['note']}".rstrip(),
            flush=True,
        )


def show_quantisers(rows: list[Row]) -> None:
    """The table of quantisers."""
    if rows:
        print(f"\n{'quantiser':<32} {'where':<7} {'elements':>10} {'CPU ms':>8} {'G elem/s':>8} {'GB/s':>6} ", end="")
        print(f"{'copy GB/s':>9} {'of a copy':>9} {'a call ms':>9}")
    for row in rows:
        print(
            f"{row['quantiser'] + ' from ' + row['from']:<32} {row['where']:<7} {row['rows'] * row['columns']:10,} "
            f"{row['median_ms']:8.3f} {row['elements_per_s'] / 1e9:8.2f} {row['gb_per_s']:6.1f} "
            f"{row['copy_gb_per_s']:9.1f} {row['fraction_of_copy']:9.0%} {row['call_ms']:9.4f}"
        )


def chosen_shapes(word: str) -> dict[str, Shape]:
    """The shapes named small, deepseek-v3 or all, or the one written MxNxK; SystemExit for anything else."""
    if word == "all":
        return {name: shape for shapes in SHAPES.values() for name, shape in shapes.items()}
    if word in SHAPES:
        return SHAPES[word]
    numbers = word.split("x")
    if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
        raise SystemExit(f"--shapes {word}: neither small, deepseek-v3 nor all, nor MxNxK")
    m, n, k = map(int, numbers)
    return {"as asked": (m, n, k)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_options(parser)
    parser.add_argument("--shapes", default="small", help="small, deepseek-v3, all, or one as MxNxK")
    parser.add_argument("--quantisers", choices=("all", *SIZES, "none"), default="all", help="at which sizes")
    options = parser.parse_args()
    shapes = chosen_shapes(options.shapes)
    apply_options(options)
    facts = machine(["torch"]) | {"memory": "kept by the allocator" if keep_memory() else "given back"}
    if not options.json:
        print("; ".join(f"{key}: {value}" for key, value in facts.items()))
        print(f"{options.threads} threads, {options.rounds} rounds, instruction set {options.isa or best_isa()}")
    rows: list[Row] = []
    for name, shape in shapes.items():
        measured = measure_shape(name, shape, options)
        rows += measured
        gc.collect()
        if not options.json:
            show(measured)
    quantisers: list[Row] = []
    for place in SIZES if options.quantisers == "all" else [options.quantisers]:
        if place in SIZES:
            quantisers += quantiser_rows(place, options.rounds, options.threads, Arithmetic(options.isa))
    text = json.dumps({"rows": rows, "quantisers": quantisers, "machine": facts}, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        show_quantisers(quantisers)
    if found := wrong(rows):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
