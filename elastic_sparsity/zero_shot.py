"""Zero-shot accuracy of a causal LM in memory, by lm-evaluation-harness. Must not know that a model was pruned.

The harness builds the prompts, computes the log-likelihoods (its `HFLM` over the model as it is) and the metrics; this
module hands it the model, keeps it quiet, stops it at the first answer that is no number, and adds standard errors of
means in closed form (the harness would bootstrap LAMBADA's perplexity in several processes).
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from elastic_sparsity.arch import first_token
from elastic_sparsity.errors import ConfigError, DataError, ElasticSparsityError, NumericsError, brief
from elastic_sparsity.precision import weights_in
from elastic_sparsity.report import mean_score
from elastic_sparsity.task_files import load_tasks, quiet_harness, seeded

Progress = Callable[[str, int, int], None]
METRICS = ("acc_norm", "acc")  # a task's metric: the first it defines


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One task's result.

    Attributes:
        metric: acc_norm where the task defines it, else acc, else the task's first.
        value: of that metric; accuracies are shares from 0 to 1.
        error: standard error of `value` over documents; None where it is no mean, or of one document.
        num_documents: that were scored.
        metrics: every metric of the task by name, `metric` among them.
        sha256: 16 digits over the documents that were scored and their prompts, to tell figures that are comparable.
    """

    task: str
    metric: str
    value: float
    error: float | None
    num_documents: int
    metrics: dict[str, float]
    sha256: str


@dataclass(frozen=True, slots=True)
class ZeroShot:
    """Scores of all tasks, and their mean with its standard error over documents; None unless all are accuracies."""

    scores: tuple[TaskScore, ...]
    mean: float | None
    error: float | None


def zero_shot(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "float32",
    seed: int = 0,
    on_progress: Progress = lambda stage, done, total: None,
) -> ZeroShot:
    """Scores of one model on tasks, one a task, in the order asked, and their mean.

    Args:
        model: causal LM of transformers on its device; is put into eval mode.
        folder, data: as in `load_tasks`.
        limit: only the first documents of every task; None = all.
        batch_size: sequences in one forward pass; changes results by rounding only.
        precision: of matrix products, "float32" (the model's own dtype) or "bfloat16".
        seed: of whatever is drawn (examples of tasks that are not zero-shot, sampled answers).
        on_progress: gets (task, requests done, requests in all).
    Raises: ConfigError, DataError: as `load_tasks`. NumericsError: a log-likelihood that is not finite.
    """
    check_amounts(limit, batch_size)
    options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "precision": precision, "seed": seed}
    scores = tuple(
        score_task(model, tokenizer, name, task, on_progress=on_progress, **options)
        for name, task in load_tasks(names, folder=folder, data=data, limit=limit, seed=seed).items()
    )
    if not all(score.metric.startswith("acc") for score in scores):
        return ZeroShot(scores, None, None)
    return ZeroShot(scores, *mean_score([(score.value, score.error) for score in scores]))


def _that_begins(tokenizer: Any, first: int | None) -> Any:
    """The tokenizer, made to begin text with a token if the model needs it; the harness does not see to that.

    Raises: ConfigError: if it does not.
    """
    if first is not None and tokenizer("a")["input_ids"][:1] != [first]:
        tokenizer.add_bos_token = True
        if tokenizer("a")["input_ids"][:1] != [first]:
            raise ConfigError(
                f"tokenizer: does not put its begin-of-text token {first} before text, as the model needs."
            )
    return tokenizer


def check_amounts(limit: int | None, batch_size: int) -> None:
    """Raises: ConfigError: unless both are whole numbers from 1 on (a limit may be None)."""
    for name, amount in (("task limit", limit), ("batch size", batch_size)):
        if amount is not None and (isinstance(amount, bool) or not isinstance(amount, int) or amount < 1):
            raise ConfigError(f"{name}: {brief(amount)}; expected a whole number from 1 on.")


def score_task(
    model: Any,
    tokenizer: Any,
    name: str,
    task: Any,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "float32",
    seed: int = 0,
    on_progress: Progress = lambda stage, done, total: None,
) -> TaskScore:
    """A model's score on one task of `load_tasks`; arguments and errors as in `zero_shot`."""
    from lm_eval import evaluate  # slow imports, only here
    from lm_eval.models.huggingface import HFLM

    check_amounts(limit, batch_size)
    tokenizer = _that_begins(copy.deepcopy(tokenizer), first_token(model.config, tokenizer))
    mixed = precision == "bfloat16"
    try:
        linears = _linears_to_cast(model) if mixed else []
        with quiet_harness(), seeded(seed):
            harness_model = HFLM(
                pretrained=model,
                tokenizer=tokenizer,  # a copy, as the harness sets its padding token
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
                mixed_precision_dtype="bfloat16" if mixed else None,
            )
            harness_model.set_cache_hook(_Answers(name, task, on_progress))
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed)
            first = None if limit is None else min(limit, len(task.eval_docs))
            with weights_in(linears, "bfloat16"):  # after the harness has tied the model's weights
                found = evaluate(harness_model, {"tasks": {name: task}}, limit=first, bootstrap_iters=0,
                                 log_samples=True)  # fmt: skip
    except ElasticSparsityError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise DataError(
            f"task {name!r}: lm-eval stopped with {type(error).__name__}: {reason}; look whether a document is empty "
            "or too long for the model, and whether the tokenizer is the model's."
        ) from error
    return _score(name, found["results"][name], found["samples"][name])


def _linears_to_cast(model: nn.Module) -> list[nn.Module]:
    """Linears of float32 weights: those of a quantised model are linears too, of packed integers."""
    return [x for x in model.modules() if isinstance(x, nn.Linear) and x.weight.dtype == torch.float32]


class _Answers:
    """Sits where the harness would cache its answers: counts them, and refuses those that are no numbers."""

    def __init__(self, name: str, task: Any, on_progress: Progress) -> None:
        self.name, self.task, self.on_progress, self.done = name, task, on_progress, 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        value = answer[0] if isinstance(answer, tuple) else answer
        if kind.startswith("loglikelihood") and not math.isfinite(value):
            raise NumericsError(
                f"task {self.name!r}: the model's log-likelihood of {brief(request[-1])} is {value}; its weights or "
                "precision give logits that are not finite."
            )
        self.done += 1
        self.on_progress(self.name, self.done, max(self.done, len(self.task.instances)))


def _score(name: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskScore:
    """From the harness's results ("acc,none": 0.5, ...) and what it logged of every document."""
    first = samples[0]["filter"]  # tasks may read an answer in several ways; their first counts
    keys = [key.removesuffix(f",{first}") for key in results if key.endswith(f",{first}") and "_stderr," not in key]
    metrics = {key: float(results[f"{key},{first}"]) for key in keys}
    if not metrics:
        raise ConfigError(f"task {name!r}: defines no metric.")
    metric = next((x for x in METRICS if x in metrics), keys[0])
    scored = [sample for sample in samples if sample["filter"] == first]
    error = _standard_error([sample.get(metric) for sample in scored], metrics[metric])
    digest = hashlib.sha256("".join(sample["doc_hash"] + sample["prompt_hash"] for sample in scored).encode())
    return TaskScore(name, metric, metrics[metric], error, len(scored), metrics, digest.hexdigest()[:16])


def _standard_error(values: Sequence[Any], mean: float) -> float | None:
    """Sample standard deviation over the square root of the number; None unless `mean` is the mean of `values`."""
    if len(values) < 2 or not all(isinstance(x, bool | int | float) for x in values):
        return None
    numbers = np.asarray(values, dtype=np.float64)
    if not math.isclose(numbers.mean(), mean, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return float(numbers.std(ddof=1) / math.sqrt(len(values)))
