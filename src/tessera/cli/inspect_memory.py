"""tessera inspect memory: what a run needs, and what each switch of [memory] saves."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tessera.cli.options import Json, Overrides, RecipePath, human_bytes, new_table, print_json, print_table
from tessera.recipe import MemorySection, Recipe, load_recipe

if TYPE_CHECKING:
    from tessera.accounting import Memory

BAR = 30  # characters of the longest bar
MEASURED = ("saved_bytes_ratio", "saved_bytes_ratio_to_transformers", "measured")  # None without --measure


def memory(
    recipe: RecipePath,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one micro-batch and measure what autograd keeps, too.")
    ] = False,
    json: Json = False,
) -> None:
    """Memory of a training run: weights, optimizer, and what is kept for backward; predicted without allocating.

    With --measure one forward pass is run on random tokens, and one layer with experts is measured beside the same
    layer in plain PyTorch (BF16) and in transformers.
    """
    resolved = load_recipe(recipe, overrides or ())
    from tessera import accounting

    found = accounting.memory(resolved)
    measured = _measured(resolved, found) if measure else None
    if json:
        print_json(_facts(resolved, found) | (measured or dict.fromkeys(MEASURED)))
        return
    _print_throughout(resolved, found)
    _print_saved(resolved, found)
    if measured:
        _print_measured(measured)


def switches(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Each switch of [memory]: whether it is on, and the bytes a token that turning it would change."""
    from tessera.accounting import saved_tensors

    def per_token(section: MemorySection) -> int:
        return sum(t.bytes_per_token for t in saved_tensors(recipe.model, recipe.numerics, section))

    facts = {}
    for name in MemorySection.model_fields:
        on = getattr(recipe.memory, name)
        turned = recipe.memory.model_copy(update={name: not on})
        facts[name] = {"on": on, "saves": (per_token(turned) - per_token(recipe.memory)) * (1 if on else -1)}
    return facts


def _facts(recipe: Recipe, found: "Memory") -> dict[str, Any]:
    from tessera.accounting import saved_rows

    layers = recipe.model.num_hidden_layers + recipe.model.num_nextn_predict_layers
    return {
        "recipe": recipe.name,
        "masters": found.masters,
        "gradients": found.gradients,
        "moments": found.moments,
        "operands": found.operands,
        "ema": found.ema,
        "checkpoint_copy": found.checkpoint_copy,
        "tokens": found.tokens,
        "saved_bytes_per_token": found.saved_per_token,
        "saved_bytes_fixed": found.saved_fixed,
        "saved_bytes": found.saved,
        "total": found.total,
        "kinds": found.kinds(),
        "layers": [found.layer(i) for i in range(layers)],
        "tensors": saved_rows(found.tensors),
        "switches": switches(recipe),
    }


def _measured(recipe: Recipe, found: "Memory") -> dict[str, Any]:
    from tessera.training.saved_bytes import measure_layer, measure_step

    step = measure_step(recipe)
    layer = measure_layer(recipe) if recipe.model.num_moe_layers else None
    facts: dict[str, Any] = asdict(step) | {"total": step.total, "predicted": found.saved}
    facts["layer_with_experts"] = asdict(layer) if layer else None
    ratios = (layer.ratio, layer.ratio_to_transformers) if layer else (None, None)
    return dict(zip(MEASURED, (*ratios, facts), strict=True))


def _print_throughout(recipe: Recipe, found: "Memory") -> None:
    table = new_table(f"{recipe.name}: memory of a training run", ["what", "format", "bytes"], numbers=["bytes"])
    operands = {"fp8": "fp8, with scales", "bf16": "bf16", "fp32": "the masters"}[recipe.numerics.precision]
    rows = [
        ("weights (masters)", "fp32", found.masters),
        ("gradients", "fp32", found.gradients),
        ("moments of AdamW", recipe.optimizer.moments, found.moments),
        ("linears' weights as operands", operands, found.operands),
        ("moving average (in CPU memory)", "fp32", found.ema),
        ("copy for a checkpoint (in CPU memory)", "as above", found.checkpoint_copy),
        (f"kept for backward, {found.tokens:,} tokens", "see below", found.saved),
    ]
    for what, format, size in rows:
        table.add_row(what, format if size else "none", human_bytes(size))
    table.add_section()
    table.add_row("together", "", human_bytes(found.total))
    print_table(table)


def _print_saved(recipe: Recipe, found: "Memory") -> None:
    total = found.saved_per_token
    table = new_table("Kept for backward", ["kind", "bytes a token", "share", ""], numbers=["bytes a token", "share"])
    largest = max(found.kinds().values())
    for kind, size in found.kinds().items():
        table.add_row(kind, f"{size:,}", f"{size / total:.1%}", "█" * max(1, round(BAR * size / largest)))
    table.add_section()
    once = f"and {human_bytes(found.saved_fixed)} whatever the tokens" if found.saved_fixed else ""
    table.add_row("together", f"{total:,}", "", once)
    print_table(table)

    table = new_table("By layer", ["layers", "bytes a token"], numbers=["bytes a token"])
    for name, size in _by_layer(recipe, found):
        table.add_row(name, f"{size:,}")
    print_table(table)

    headings = ["switch", "", "saves, bytes a token"]
    table = new_table("Switches of [memory], each turned by itself", headings, numbers=headings[2:])
    for name, facts in switches(recipe).items():
        table.add_row(name, "on" if facts["on"] else "off", f"{facts['saves']:,}")
    print_table(table)
    if recipe.memory.fp8_linear_inputs and recipe.memory.recompute_norms and recipe.numerics.precision == "fp8":
        print("fp8_linear_inputs: these codes are made again with the norms, so they are not kept either way\n")


def _by_layer(recipe: Recipe, found: "Memory") -> list[tuple[str, int]]:
    """Runs of equal layers as one row, MTP blocks under their own name."""
    trunk, drafts = recipe.model.num_hidden_layers, recipe.model.num_nextn_predict_layers
    dense = recipe.model.first_k_dense_replace
    runs = [("dense", 0, dense), ("experts", dense, trunk), ("MTP", trunk, trunk + drafts)]
    rows = []
    for name, start, stop in runs:
        first = start
        for i in range(start, stop):
            if i + 1 == stop or found.layer(i + 1) != found.layer(first):
                numbers = str(first) if first == i else f"{first}-{i} ({i - first + 1} layers, each)"
                rows.append((f"{numbers}, {name}", found.layer(first)))
                first = i + 1
    outside = sum(tensor.bytes_per_token for tensor in found.tensors if tensor.layer is None)
    return [*rows, ("embedding, last norm, head", outside)]


def _print_measured(facts: dict[str, Any]) -> None:
    step = facts["measured"]
    error = step["total"] / step["predicted"] - 1
    print(
        f"measured      {human_bytes(step['total'])} kept by autograd for {step['tokens']:,} tokens, "
        f"{human_bytes(step['predicted'])} predicted ({error:+.2%})"
    )
    layer = step["layer_with_experts"]
    if not layer:
        return
    print(
        f"one layer     {layer['tessera']:,.0f} bytes a token with experts; plain PyTorch in BF16 keeps "
        f"{layer['plain']:,.0f}: {facts['saved_bytes_ratio']:.3f} of it"
    )
    if layer["transformers"] is None:
        print("transformers  not measured: it is not installed")
    else:
        ratio = facts["saved_bytes_ratio_to_transformers"]
        print(f"transformers  its layer in BF16 keeps {layer['transformers']:,.0f} bytes a token: {ratio:.3f} of it")
