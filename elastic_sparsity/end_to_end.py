"""The end-to-end phase: every level's logits against the dense model's, one level a step in a balanced random order.

The dense teacher is the same module tree with every elastic linear switched to its dense original, so nothing is
loaded twice. Trains adapters and, if asked, a shared correction of the kept base values, which all levels inherit and
which costs no byte, because it is merged into the stored values. (EPTS, arXiv 2606.25285, has no such phase.)
Letters: B samples, T tokens, D width, V vocabulary, N = B * T.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_sparsity.adapters import elastic_linears, set_level_
from elastic_sparsity.arch import architecture_of
from elastic_sparsity.distill import Share, cosine
from elastic_sparsity.errors import NumericsError
from elastic_sparsity.fused import fused_kl_
from elastic_sparsity.ladder import Ladder, Level

log = logging.getLogger(__name__)

HeadFn = Callable[[Tensor], Tensor]
HEAD_ROWS = 128  # logits are made this many tokens at a time: measured 2.5x faster than whole batches on a CPU
KL_ROWS = 16  # of them, rows of float32 at a time: 3 MB at a vocabulary of 49,152


class _HeadKL(torch.autograd.Function):
    """Mean KL(teacher || student) in nats a token, straight from final hidden states, `HEAD_ROWS` tokens at a time.

    The gradient of the student's hidden states is computed in the forward pass, so that logits of the whole batch
    never exist at once. The head is frozen.
    """

    @staticmethod
    def forward(ctx: Any, student_ND: Tensor, teacher_ND: Tensor, head: HeadFn) -> Tensor:
        num_tokens = student_ND.shape[0]
        grad_ND = torch.empty_like(student_ND)
        total = torch.zeros((), dtype=torch.float64, device=student_ND.device)
        for start in range(0, num_tokens, HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            teacher = head(teacher_ND[part])
            with torch.enable_grad():
                hidden = student_ND[part].detach().requires_grad_(True)
                logits = head(hidden)
            grad_logits = torch.empty_like(logits)
            total += _logits_kl(logits.detach(), teacher, grad_logits)
            (grad_ND[part],) = torch.autograd.grad(logits, hidden, grad_logits)
        ctx.save_for_backward(grad_ND.div_(num_tokens))
        return (total / num_tokens).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_outputs[0].to(grad_ND.dtype), None, None


def _logits_kl(student_NV: Tensor, teacher_NV: Tensor, grad_NV: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over rows; the gradient of the student's logits goes to `grad_NV`.

    In float32, `KL_ROWS` rows at a time in the same three buffers on a CPU, because they then stay in its cache.
    """
    found = fused_kl_(student_NV, teacher_NV, grad_NV)
    if found is not None:
        return found
    rows = KL_ROWS if student_NV.device.type == "cpu" else max(1, student_NV.shape[0])
    buffers = torch.empty(3, rows, student_NV.shape[1], device=student_NV.device)
    total = torch.zeros((), dtype=torch.float64, device=student_NV.device)
    for student, teacher, grad in zip(*(x.split(rows) for x in (student_NV, teacher_NV, grad_NV)), strict=True):
        log_p, log_q, scratch = (buffer[: student.shape[0]] for buffer in buffers)
        torch.log_softmax(scratch.copy_(teacher), dim=-1, out=log_p)
        torch.log_softmax(scratch.copy_(student), dim=-1, out=log_q)
        probability = torch.exp(log_p, out=scratch)
        total += torch.dot(probability.flatten(), log_p.sub_(log_q).flatten()).double()
        grad.copy_(log_q.exp_().sub_(probability))
    return total


def head_kl(student_BTD: Tensor, teacher_BTD: Tensor, head: HeadFn) -> Tensor:
    """Mean KL(teacher || student) over tokens, in nats; differentiable in the student's final hidden states."""
    kl: Tensor = _HeadKL.apply(student_BTD.flatten(0, -2), teacher_BTD.flatten(0, -2), head)
    return kl


@dataclass(frozen=True, kw_only=True, slots=True)
class EndToEndSettings:
    """Numbers of the end-to-end phase; see the recipe's `end_to_end` section."""

    steps: int
    batch_size: int
    adapter_lr: float
    base_lr: float
    warmup: float
    clip_norm: float
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshots:
    """How the phase is kept, to go on after a crash.

    Attributes:
        load: tensors and note of the last snapshot; None = from the beginning. Called once, and nothing of it is kept.
        save: keeps a snapshot.
        seconds: between two, at least.
        share: of the phase's time that they may take; one that takes long is followed by a longer time without.
    """

    load: Callable[[], tuple[dict[str, Tensor], dict[str, Any]] | None]
    save: Callable[[dict[str, Tensor], dict[str, Any]], None]
    seconds: float = 300.0
    share: float = 0.02


def balanced_order(levels: Sequence[Level], steps: int, generator: torch.Generator) -> list[Level]:
    """`steps` levels, each as often as any other (up to one), shuffled within every round."""
    order: list[Level] = []
    while len(order) < steps:
        order += [levels[int(i)] for i in torch.randperm(len(levels), generator=generator)]
    return order[:steps]


def train_end_to_end_(
    model: nn.Module,
    head: HeadFn,
    ladder: Ladder,
    token_ids_ST: Tensor,
    settings: EndToEndSettings,
    generator: torch.Generator,
    autocast: Callable[[], torch.autocast],
    on_step: Callable[[int, int], None],
    share: Share,
    snapshots: Snapshots | None = None,
) -> dict[str, float]:
    """Trains all elastic linears of a model together.

    Args:
        model: causal LM whose decoder blocks hold elastic linears; everything else is frozen.
        head: final hidden states to logits.
        token_ids_ST: calibration samples, used in order and again from the start when they run out.
        on_step: called with (steps done, steps) after each step.
        share: this worker's part of every batch.
    Returns: mean KL to the dense model (nats a token) of every level name over the last quarter of its steps.
    Raises: NumericsError: if a loss is not finite.
    """
    optimizer, levels = _optimizer(model, settings), {level.name: level for level in ladder.levels}
    history: dict[str, list[float]] = {name: [] for name in levels}
    order, first = [level.name for level in balanced_order(ladder.levels, settings.steps, generator)], 0
    if snapshots is not None and (last := snapshots.load()) is not None:
        first, history = _go_on_(model, optimizer, *last)
        del last

    def loss_of(name: str, ids_BT: Tensor) -> Tensor:
        return _step_loss(model, head, ids_BT, levels[name], autocast, settings.gradient_checkpointing)

    saved, cost = time.monotonic(), 0.0
    for done, name, value in steps_(
        optimizer, order, loss_of, token_ids_ST, settings, share, first=first,
        phase="end-to-end phase", rates="end_to_end.adapter_lr or end_to_end.base_lr",
    ):  # fmt: skip
        history[name].append(value)
        on_step(done, settings.steps)
        if done % max(1, settings.steps // 10) == 0:
            recent = " ".join(f"{name}={_mean(values[-16:]):.4g}" for name, values in history.items() if values)
            log.info("end to end %d/%d  KL to dense %s", done, settings.steps, recent)
        begun = time.monotonic()
        if snapshots is not None and begun - saved >= max(snapshots.seconds, cost / snapshots.share):
            snapshots.save(_snapshot(model, optimizer), {"step": done, "history": history})
            saved = time.monotonic()
            cost = saved - begun
    set_level_(model, None)
    return {name: last_quarter(values) for name, values in history.items() if values}


def steps_(
    optimizer: torch.optim.Optimizer,
    order: Sequence[str],
    loss_of: Callable[[str, Tensor], Tensor],
    token_ids_ST: Tensor,
    settings: EndToEndSettings,
    share: Share,
    *,
    phase: str,
    rates: str,
    first: int = 0,
) -> Iterator[tuple[int, str, float]]:
    """Trains step by step; the groups' rates rise, and fall to zero along a cosine.

    Args:
        order: what every step trains, by name.
        loss_of: its loss on (B, T) token ids.
        token_ids_ST: calibration samples, used in order and again from the start when they run out.
        first: steps that are done.
        phase, rates: for messages: what trains, and the settings that hold its learning rates.
    Yields: after each step: steps done, the name, and the loss before the step.
    Raises: NumericsError: if a loss is not finite.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    top_rates = [group["lr"] for group in optimizer.param_groups]
    for step, level in enumerate(order[first:], first):
        for group, rate in zip(optimizer.param_groups, top_rates, strict=True):
            group["lr"] = rate * cosine(step, len(order), settings.warmup)
        chosen = (step * settings.batch_size + torch.tensor(share.places)) % token_ids_ST.shape[0]
        loss = loss_of(level, token_ids_ST[chosen])
        loss.backward()
        share.mean_gradients_(parameters)
        (value,) = share.mean([float(loss.detach())])
        if not math.isfinite(value):
            raise NumericsError(
                f"{phase}: loss of level {level} is {value} at step {step}; lower {rates}, or set "
                "precision = 'float32'."
            )
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step + 1, level, value


def last_quarter(values: Sequence[float]) -> float:
    """Mean of the last quarter of a phase's losses."""
    return _mean(values[-max(1, len(values) // 4) :])


def _optimizer(model: nn.Module, settings: EndToEndSettings) -> torch.optim.Optimizer:
    linears = [linear for _, linear in elastic_linears(model)]
    for linear in linears:
        linear.weight.requires_grad_(bool(settings.base_lr))
    adapters = [p for e in linears for p in (e.lora_A, e.lora_B)]
    groups: list[dict[str, Any]] = [{"params": adapters, "lr": settings.adapter_lr}]
    if settings.base_lr:
        groups.append({"params": [e.weight for e in linears], "lr": settings.base_lr})
    return torch.optim.Adam(groups, fused=True)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{name}.{part}": p for name, e in elastic_linears(model) for part, p in e.named_parameters()
            if p.requires_grad and part != "bias"}  # fmt: skip


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimiser's state, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model).items():
        tensors[name] = parameter.detach()
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


@torch.no_grad()
def _go_on_(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], note: dict[str, Any]
) -> tuple[int, dict[str, list[float]]]:
    """Puts a snapshot back, and empties `tensors` on the way. Returns: steps done, losses so far."""
    for name, parameter in _trained(model).items():
        parameter.copy_(tensors.pop(name))
        keys = [key for key in tensors if key.startswith(f"{name}|")]
        state = {key.rpartition("|")[2]: tensors.pop(key) for key in keys}
        if state:  # Adam's step counter stays on the CPU unless it is fused on a GPU
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
    return note["step"], note["history"]


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """While it is open, decoder blocks keep no activations for the backward pass, which runs them again."""
    blocks = model.get_submodule(architecture_of(model.config.model_type).blocks) if wanted else ()
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


def _step_loss(
    model: nn.Module,
    head: HeadFn,
    ids_BT: Tensor,
    level: Level,
    autocast: Callable[[], torch.autocast],
    gradient_checkpointing: bool = False,
) -> Tensor:
    return kl_to_dense(model, head, ids_BT, level, autocast, partial(set_level_, model), gradient_checkpointing)


def kl_to_dense(
    model: nn.Module,
    head: HeadFn,
    ids_BT: Tensor,
    level: Level,
    autocast: Callable[[], torch.autocast],
    switch_: Callable[[Level | None], None],
    gradient_checkpointing: bool = False,
) -> Tensor:
    """Mean KL of a level to the dense model, which is the same model switched to its dense weights.

    Args:
        ids_BT: token ids.
        switch_: sets all linears to a level; None = dense. The model is left at `level`.
    """
    body: nn.Module = model.base_model  # type: ignore[assignment]
    with autocast():
        switch_(None)
        with torch.no_grad():
            teacher = body(ids_BT, use_cache=False).last_hidden_state
        switch_(level)
        with checkpointed(model, gradient_checkpointing):
            student = body(ids_BT, use_cache=False).last_hidden_state
        return head_kl(student, teacher, head)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
