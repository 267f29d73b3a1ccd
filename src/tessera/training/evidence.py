"""What is kept of a step that was not finite or a spike: <run>/evidence/step-N.json.

    finding, reason            what it was, in a word and in words: what leapt, or where NaN or infinity was first seen
    rule, decision             the recipe's rule for it, and what was done
    loss, gradient_norm        the figures that are judged, and the mean, deviation and limit they were held against
    losses, learning_rate      the terms of the loss; the rate that the update had, or would have had
    batch                      where it lies in the data; its worst sequences with their loss, tokens and text
    parameters                 the norm of each parameter's gradient, the largest first
    tensors                    what FP8 did to each, where this step measured it; NaN and infinity met in them

A run may train for weeks and spike often, so a file is bounded whatever the model and the batch: of each list the
worst are kept, and `left_out` says how many are not. A number that is not finite is written as "nan", "inf" or
"-inf", because JSON has no form for it and here it is the evidence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch import nn

from tessera.data import Batch, Tokenizer
from tessera.model import Transformer
from tessera.numerics import Recorder
from tessera.ops.chunked_loss import IGNORED, chunked_loss
from tessera.store import RunFolder, write_json
from tessera.training.loss import Losses, Share
from tessera.training.stability import Finding

SCHEMA = 1
FOLDER = "evidence"
MAX_SEQUENCES = 1024  # with their losses
MAX_TOKENS = 16_384  # ids, of the worst sequences
MAX_TEXTS, MAX_CHARACTERS = 16, 400
MAX_NAMES = 1024  # of parameters, and of tensors


@dataclass(frozen=True)
class UnstableStep:
    """A step between its backward pass and its update, as the trainer sees it."""

    step: int
    position: int  # of the batch in the data
    batch: Batch
    parts: list[Batch]  # its micro-batches, where the model is
    masked: bool  # attention stays within a document
    share: Share
    losses: list[Losses]  # of the micro-batches
    learning_rate: float
    where: str | None  # NaN or infinity was first seen there


def keep_evidence(
    run: RunFolder, finding: Finding, seen: UnstableStep, model: Transformer, recorder: Recorder, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the file; returns {evidence: its path within the run's folder}, or None and why, as `evidence_error`.

    Neither the model nor its gradients nor what `recorder` holds are changed. Nothing depends on the evidence, so that
    a full disk, or memory too small for one more forward pass, neither ends a run nor hides why it ends.
    """
    path = run.path / FOLDER / f"step-{seen.step}.json"
    try:
        facts = finding.facts(seen.where) | _circumstances(seen, model, recorder, tokenizer)
        write_json(path, _said({"schema": SCHEMA, "step": seen.step} | facts))
    except Exception as error:
        return {"evidence": None, "evidence_error": f"{type(error).__name__}: {error}"}
    return {"evidence": str(path.relative_to(run.path))}


def _circumstances(seen: UnstableStep, model: Transformer, recorder: Recorder, tokenizer: Tokenizer) -> dict[str, Any]:
    with recorder.undisturbed():
        each = sequence_losses(model, seen)
    return {
        "learning_rate": seen.learning_rate,
        "losses": {
            "total": float(sum(one.total.detach() for one in seen.losses)),
            "lm": float(sum(one.lm for one in seen.losses)),
            "mtp": torch.stack([one.mtp for one in seen.losses]).sum(dim=0).tolist(),
            "mtp_weight": seen.share.mtp_weight,
            "balance": float(sum(one.balance for one in seen.losses)),
            "balance_weight": seen.share.balance_weight,
        },
        "batch": describe_batch(seen.batch, each, seen.position, tokenizer),
        "parameters": gradient_norms(model),
        "tensors": health(recorder),
    }


def gradient_norms(model: nn.Module) -> dict[str, Any]:
    """{gradient_norms: parameter -> norm of its gradient, the largest first; left_out}. NaN counts as the largest."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack(torch._foreach_norm(list(gradients.values()))).tolist() if gradients else []
    found = sorted(zip(gradients, norms, strict=True), key=lambda pair: -_badness(pair[1]))
    return {"gradient_norms": dict(found[:MAX_NAMES]), "left_out": max(0, len(found) - MAX_NAMES)}


def health(recorder: Recorder) -> dict[str, Any]:
    """{health: tensor -> statistics, the largest error first, None where the step was not measured; nonfinite: tensor
    -> NaN and infinity met, in the order met; left_out}."""
    met = list(_met(recorder).items())
    tensors = sorted(recorder.tensors.items(), key=lambda pair: -_badness(pair[1]["relative_rms"] or 0.0))
    return {
        "health": dict(tensors[:MAX_NAMES]) if recorder.measuring else None,
        "nonfinite": dict(met[:MAX_NAMES]),
        "left_out": max(0, len(tensors) - MAX_NAMES, len(met) - MAX_NAMES),
    }


def _met(recorder: Recorder) -> dict[str, int]:
    counts = {name: int(count) for name, count in recorder.nonfinite.items()}
    return {name: count for name, count in counts.items() if count}


def describe_batch(batch: Batch, losses: list[float], position: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The batch that stands at `position` of the data: its sequences, the one of the largest loss first.

    `losses` is that of each sequence. The first few have their token and document ids, and the beginning of their
    text.
    """
    order = sorted(range(len(losses)), key=lambda row: (-_badness(losses[row]), row))
    sequences, room = [], MAX_TOKENS
    for place, row in enumerate(order[:MAX_SEQUENCES]):
        tokens = batch.tokens[row, :room].tolist()
        room -= len(tokens)
        found: dict[str, Any] = {"position": position + row, "loss": losses[row]}
        if tokens:
            found |= {"tokens": tokens, "document_ids": batch.document_ids[row, : len(tokens)].tolist()}
        if tokens and place < MAX_TEXTS:
            found["text"] = tokenizer.decode(tokens[:MAX_CHARACTERS])[:MAX_CHARACTERS]
        sequences.append(found)
    return {
        "position": position,
        "size": len(losses),
        "sequence_length": batch.tokens.shape[1],
        "sequences": sequences,
        "left_out": max(0, len(order) - MAX_SEQUENCES),
        "tokens_left_out": batch.tokens.numel() - (MAX_TOKENS - room),
    }


@torch.no_grad()
def sequence_losses(model: Transformer, seen: UnstableStep) -> list[float]:
    """The mean next-token loss of each sequence of the batch, by a forward pass over the micro-batches."""
    losses = []
    for part in seen.parts:
        output = model(part.tokens, document_ids=part.document_ids if seen.masked else None)
        for hidden, targets in zip(output.hidden, part.targets, strict=True):
            positions = max(int((targets != IGNORED).sum()), 1)
            losses.append(float(chunked_loss(hidden, model.lm_head.weight, targets)) / positions)
    return losses


def _badness(value: float) -> float:
    return inf if isnan(value) else value


def _said(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {name: _said(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(item) for item in value]
    return value
