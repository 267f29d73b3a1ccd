"""What benchmarks/train_step.py measures: whole training steps of one recipe, by tessera and by transformers.

Both sides start from the same weights, see the same tokens, and make the same update: AdamW with the recipe's betas,
epsilon, decay (of matrices alone) and learning rate, after clipping the whole gradient to the recipe's norm.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tessera.data import Batch
from tessera.model import Transformer, hugging_face_state
from tessera.numerics import Policy, Recorder
from tessera.ops.keep import Keep
from tessera.recipe import Recipe
from tessera.training.loss import Share, training_loss
from tessera.training.optimizer import AdamW

ALL_OFF = Keep(**dict.fromkeys(Keep.__dataclass_fields__, False))
SUCCESSORS = 4  # tokens that mostly follow a token
ADAMW: dict[str, dict[str, bool]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def tokens(recipe: Recipe, step: int) -> Batch:
    """The step's batch: a Markov chain whose tokens have few likely successors, over frequencies like those of words.

    The same for every system. A model learns the frequencies within few steps, so that a loss that does not fall
    shows a step that does not train.
    """
    vocabulary, length = recipe.model.vocab_size, recipe.data.sequence_length
    frequency = 1 / np.arange(1, vocabulary + 1)
    frequency /= frequency.sum()
    successors = np.random.default_rng(0).choice(vocabulary, (vocabulary, SUCCESSORS), p=frequency)
    draws = np.random.default_rng([1, step])
    shape = (recipe.batch_size_at(step), length + 1)
    text = draws.choice(vocabulary, shape, p=frequency)
    chosen, follows = draws.integers(SUCCESSORS, size=shape), draws.random(shape) < 0.75
    for i in range(1, length + 1):
        text[:, i] = np.where(follows[:, i], successors[text[:, i - 1], chosen[:, i]], text[:, i])
    rows = torch.from_numpy(text)
    return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros(shape[0], length, dtype=torch.int32))


class TesseraStep:
    """A step as tessera's trainer makes it on one batch without micro-batches, checks for finite values included.

    "fp8-lean" keeps for backward what the recipe's [memory] says, the others everything.
    """

    adamw = "tessera"

    def __init__(self, recipe: Recipe, precision: str) -> None:
        precision, _, lean = precision.partition("-")
        policy = Policy(**recipe.numerics.model_dump() | {"precision": precision})
        keep = Keep(**recipe.memory.model_dump()) if lean else ALL_OFF
        self.recipe, self.recorder = recipe, Recorder()
        self.model = Transformer(recipe.model, policy, recorder=self.recorder, keep=keep, seed=recipe.training.seed)
        self.optimizer = AdamW(dict(self.model.named_parameters()), recipe.optimizer)

    def step(self, number: int, batch: Batch) -> float:
        """The loss before the update, in nats a token."""
        recipe, training = self.recipe, self.recipe.training
        self.recorder.clear()
        self.optimizer.zero_gradients()
        share = Share(batch.targets.numel(), len(batch.tokens), training.mtp_loss_weight.at(number), 0.0)
        loss = training_loss(self.model, batch, None, share).total
        loss.backward()
        norm = self.optimizer.gradient_norm()
        if not torch.isfinite(norm) or not torch.isfinite(loss) or self.recorder.first_nonfinite():
            raise SystemExit(f"step {number}: not finite")
        clip = recipe.optimizer.gradient_clip
        self.optimizer.step(recipe.optimizer.learning_rate.at(number), min(1.0, clip / (float(norm) + 1e-12)))
        self.optimizer.zero_gradients()
        return float(loss.detach())


class TransformersStep:
    """A step of transformers' model as its users write it: forward with labels, backward, clip_grad_norm_, AdamW.

    "bf16-autocast" keeps FP32 weights and casts operands; "bf16" has BF16 weights and moments, no FP32 masters, and
    the router's weight in FP32 as transformers loads it. Compiled: torch.compile of the whole model and the fused
    AdamW; eager: the fastest of torch's three forms of AdamW, found by trial before the first step.
    """

    def __init__(self, recipe: Recipe, precision: str, compiled: bool) -> None:
        self.recipe = recipe
        self.model = transformers_model(recipe)
        if precision == "bf16":
            for name, parameter in self.model.named_parameters():
                if not name.endswith("mlp.gate.weight"):
                    parameter.data = parameter.data.bfloat16()
        self.autocast = precision == "bf16-autocast"
        self.called = torch.compile(self.model) if compiled else self.model
        self.adamw = "fused" if compiled else self._fastest()
        self.optimizer = self._optimizer(self.adamw)

    def step(self, number: int, batch: Batch) -> float:
        """The loss before the update, in nats a token."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.learning_rate.at(number)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            targets = batch.targets  # aligned with the tokens: every position has one, as on the other side
            loss = self.called(input_ids=batch.tokens, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.gradient_clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _optimizer(self, form: str) -> torch.optim.AdamW:
        section, weights = self.recipe.optimizer, list(self.model.parameters())
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in weights if p.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (section.beta1, section.beta2)
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=section.epsilon, **ADAMW[form])

    def _fastest(self) -> str:
        """By CPU time of three updates with a learning rate of 0, which leave the weights as they are."""
        seconds = {}
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for form in ADAMW:
            optimizer = self._optimizer(form)
            optimizer.step()
            start = time.process_time()
            for _ in range(3):
                optimizer.step()
            seconds[form] = time.process_time() - start
        self.model.zero_grad(set_to_none=True)
        return min(seconds, key=seconds.__getitem__)


def transformers_model(recipe: Recipe) -> Any:
    """transformers' DeepseekV3ForCausalLM, FP32, with the weights that tessera gives a model of this recipe.

    Attention and experts are those a model has by default: SDPA, and torch's grouped matrix product.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    section = recipe.model
    fields = section.model_dump(exclude={"rope_scaling", "rope_theta", "scoring_func", "topk_method"})
    rope: dict[str, Any] = {"rope_theta": section.rope_theta, "rope_type": "default"}
    if section.rope_scaling is not None:
        rope |= section.rope_scaling.model_dump(exclude={"type"}) | {"rope_type": "yarn"}
    config = DeepseekV3Config(
        **fields,
        num_key_value_heads=section.num_attention_heads,
        rope_parameters=rope,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    model = DeepseekV3ForCausalLM(config).float().train()
    # There, gate and up are apart but in routed experts, which are stacked as here: each name is in one of the two.
    ours = Transformer(section, Policy(precision="fp32"), seed=recipe.training.seed)
    weights: dict[str, Tensor] = hugging_face_state(ours) | ours.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def build(recipe: Recipe, system: str, precision: str, compiled: bool) -> TesseraStep | TransformersStep:
    """The system of these words, ready for its first step."""
    if system == "tessera":
        return TesseraStep(recipe, precision)
    return TransformersStep(recipe, precision, compiled)
