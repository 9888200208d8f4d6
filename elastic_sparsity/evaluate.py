"""Perplexity, and KL to a reference model, of any causal LM. Must not know that a model was pruned.

Streams over windows, one window at a time, logits in slices: memory does not grow with the text.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic_sparsity.arch import head_function
from elastic_sparsity.errors import ConfigError, NumericsError, ShapeError

Logits = Callable[[Tensor], Tensor]
ROWS = 256  # logits of this many positions exist at once


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity over all predicted tokens; mean KL(reference || model) in nats a token, None without reference."""

    perplexity: float
    kl: float | None
    num_tokens: int


class KeptHidden:
    """A reference's final hidden states by window: the first time it runs, then they are as they were, bit for bit.

    Args:
        model: the reference; always called under the same autocast, and never changed.
        max_bytes: of all that is kept, on the model's device; windows beyond run every time.
    """

    def __init__(self, model: Any, max_bytes: int = 2**30) -> None:
        self.model = model
        self.free_bytes = max_bytes
        self._kept: dict[bytes, Tensor] = {}

    def __call__(self, window_T: Tensor) -> Tensor:
        key = window_T.cpu().numpy().tobytes()
        if key in self._kept:
            return self._kept[key]
        hidden = _final_hidden(self.model, window_T)
        if hidden.nbytes <= self.free_bytes:
            self.free_bytes -= hidden.nbytes
            self._kept[key] = hidden.clone()  # of the last token nothing, which a view would hold too
        return hidden


@torch.no_grad()
def evaluate(
    models: Mapping[str, Any],
    windows_ST: Tensor,
    *,
    reference: Any | None = None,
    reference_hidden: Callable[[Tensor], Tensor] | None = None,
    autocast: Callable[[], Any],
    on_window: Callable[[int, int], None] = lambda done, total: None,
    share: range | None = None,
    given: int = 1,
    sum_: Callable[[list[Tensor]], None] = lambda tensors: None,
) -> dict[str, Quality]:
    """Quality of every model on the same windows; the reference runs once a window for all of them.

    Args:
        models: name to causal LM.
        windows_ST: token windows; each predicts its tokens from `given` + 1 to T.
        reference: the model that KL is measured against; None = no KL.
        reference_hidden: its final hidden states (T - 1, D) of a window, e.g. `KeptHidden`; None = run it.
        autocast: context factory for matrix-product precision.
        share: which windows this worker takes; None = all.
        given: tokens of a window that nobody has to predict.
        sum_: adds up tensors over all workers, in place.
    Raises: NumericsError: if a model's loss is not finite. ShapeError: if a vocabulary differs from the reference's.
        ConfigError: if hidden states come without the reference, whose head they need.
    """
    if reference_hidden is not None and reference is None:
        raise ConfigError("evaluate: reference_hidden without reference: no head makes logits of it; give both.")
    nll = dict.fromkeys(models, 0.0)
    kl = dict.fromkeys(models, 0.0)
    with autocast():
        heads = {name: head_function(model) for name, model in models.items()}
        reference_head = None if reference is None else head_function(reference)
        hidden_of = reference_hidden or partial(_final_hidden, reference)
        mine = range(windows_ST.shape[0]) if share is None else share
        for number, window_T in enumerate(windows_ST[list(mine)]):
            teacher, asked_T = None if reference is None else hidden_of(window_T)[given - 1 :], window_T[given - 1 :]
            for name, model in models.items():
                hidden = _final_hidden(model, window_T)[given - 1 :]
                window_nll, window_kl = _window_sums(heads[name], hidden, reference_head, teacher, asked_T)
                nll[name] += window_nll
                kl[name] += window_kl
            on_window(number + 1, len(mine))
    sums = torch.tensor([[nll[name], kl[name]] for name in models], dtype=torch.float64)
    sum_([sums])
    nll, kl = dict(zip(models, sums[:, 0].tolist(), strict=True)), dict(zip(models, sums[:, 1].tolist(), strict=True))
    tokens = windows_ST.shape[0] * (windows_ST.shape[1] - given)
    bad = [name for name in models if not math.isfinite(nll[name])]
    if bad:
        raise NumericsError(f"evaluation: the loss of {', '.join(bad)} is not finite.")
    if not all(map(math.isfinite, kl.values())):
        raise NumericsError("evaluation: the reference model's logits are not finite.")
    return {
        name: Quality(_exp(nll[name] / tokens), None if reference is None else kl[name] / tokens, tokens)
        for name in models
    }


def _exp(mean_nll: float) -> float:
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def _final_hidden(model: Any, window_T: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(window_T[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]
    return hidden


def _window_sums(
    head: Logits, hidden: Tensor, reference_head: Logits | None, reference_hidden: Tensor | None, window_T: Tensor
) -> tuple[float, float]:
    """(sum of negative log-likelihoods, sum of KLs) over one window's predicted tokens."""
    targets = window_T[1:].to(hidden.device)
    nll = kl = 0.0
    for start in range(0, hidden.shape[0], ROWS):
        part = slice(start, start + ROWS)
        logits = head(hidden[part]).float()
        log_sum = logits.logsumexp(dim=-1)
        nll += float((log_sum - logits.gather(1, targets[part, None])[:, 0]).double().sum())
        if reference_head is not None and reference_hidden is not None:
            log_q = reference_head(reference_hidden[part]).float().log_softmax(dim=-1).to(logits.device)
            if log_q.shape != logits.shape:
                raise ShapeError(f"evaluation: vocabulary {logits.shape[1]} against the reference's {log_q.shape[1]}.")
            difference = log_q - logits.sub_(log_sum[:, None])
            kl += float(torch.dot(log_q.exp_().flatten(), difference.flatten()))
    return nll, kl
