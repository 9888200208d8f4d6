"""Tunes a smaller model end to end: its logits towards the dense model's.

Tyr-the-Pruner (arXiv 2503.09657) stops at the refit. What stays is stored whole for this level alone, so that training
all of its linears costs no byte; norms and embeddings are shared with the other levels and stay.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import head_function, linears_of
from elastic_sparsity.attention import training_attention
from elastic_sparsity.distill import Share
from elastic_sparsity.end_to_end import EndToEndSettings, checkpointed, head_kl, last_quarter, steps_
from elastic_sparsity.fused_layers import fused_layers

log = logging.getLogger(__name__)


def tune_(
    small: Any,
    teacher: Any,
    token_ids_ST: Tensor,
    settings: EndToEndSettings,
    *,
    autocast: Callable[[], Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
    title: str = "the smaller model",
) -> float:
    """Trains weights and biases of all linears by the mean KL from the teacher's distribution to its own.

    Args:
        small: causal LM in float32, in eval mode, without gradients; left so.
        teacher: the dense model, in eval mode, without gradients; the two heads are the same.
        token_ids_ST: calibration samples, used in order and again from the start when they run out.
        settings: `base_lr` is the learning rate.
        title: of what is tuned, for messages and log.
    Returns: mean KL (nats a token) over the last quarter of the steps.
    Raises: NumericsError: if a loss is not finite.
    """
    linears = list(linears_of(small).values())
    trained = [p for linear in linears for p in (linear.weight, linear.bias) if isinstance(p, Tensor)]
    history: list[float] = []
    ids_ST = token_ids_ST.to(small.device)
    with training_attention(small), training_attention(teacher), fused_layers(small), fused_layers(teacher):
        with autocast():
            head = head_function(small)

        def loss_of(_: str, ids_BT: Tensor) -> Tensor:
            with autocast():
                with torch.no_grad():
                    wanted = teacher.base_model(ids_BT, use_cache=False).last_hidden_state
                with checkpointed(small, settings.gradient_checkpointing):
                    found = small.base_model(ids_BT, use_cache=False).last_hidden_state
                return head_kl(found, wanted, head)

        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.Adam(trained, lr=settings.base_lr, fused=True)
        share = Share(places=range(settings.batch_size), num_samples=ids_ST.shape[0])
        order = [title] * settings.steps
        for done, _, value in steps_(
            optimizer, order, loss_of, ids_ST, settings, share, phase="tuning", rates="structured.lr (--lr)"
        ):
            history.append(value)
            on_step(done, settings.steps)
            if done % max(1, settings.steps // 10) == 0:
                log.info("%s, tuned %d/%d: KL to dense %.4g", title, done, settings.steps, last_quarter(history[-64:]))
    for parameter in trained:
        parameter.requires_grad_(False)
        parameter.grad = None
    return last_quarter(history)
