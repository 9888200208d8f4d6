"""Whether quality can be measured at the end of a run, before it begins: several whole models are in memory then."""

import logging

from elastic_sparsity.config import Recipe
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.free_memory import free_here
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.precision import computing_dtype, default_device, resolve_precision
from elastic_sparsity.quality_record import measures_quality
from elastic_sparsity.workers import Workers

log = logging.getLogger(__name__)


def check_memory(recipe: Recipe) -> None:
    """Raises: ConfigError: if quality is to be measured of a model that is never whole in memory by the recipe's word.

    The dense model is evaluated beside every level, so that after a long run this would fail.
    """
    if recipe.evaluation.source is not None and recipe.memory.weights == "stream":
        raise ConfigError(
            "memory.weights: 'stream' leaves the base model in its files, but evaluation.source needs it whole in "
            "memory; leave the evaluation out, and measure the checkpoint with `elastic-sparsity eval` on a machine "
            "that holds the model."
        )


def warn_of_memory(recipe: Recipe, workers: Workers) -> None:
    """Warns if the models that a run's quality is measured of do not fit: the dense one, a level, every baseline."""
    if not measures_quality(recipe) or not workers.is_main:
        return
    device, shapes = default_device(), read_shapes(recipe.model.id, recipe.model.dtype)
    dtype = computing_dtype(shapes.dtype, resolve_precision(recipe.precision, device), device)
    count = 2 + len(recipe.evaluation.baselines)
    limits = free_here()
    free = limits["device"] if device == "cuda" else limits["host"] // workers.local  # each has its own models
    needed = count * shapes.total * dtype.itemsize
    if needed > free:
        log.warning(
            "measuring the checkpoint, after the run, may not fit: %d whole models take %.1f GB of %.1f GB; name fewer "
            "evaluation.baselines, or measure with `elastic-sparsity eval` instead", count, needed / 1e9, free / 1e9,
        )  # fmt: skip
