"""One post-training run, one elastic checkpoint, every sparsity level sliced at load time."""

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.config import Recipe, read_recipe
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.pipeline import optimize
from elastic_sparsity.slicing import ElasticModel, slice_checkpoint

__all__ = [
    "ElasticCheckpoint",
    "ElasticModel",
    "ElasticSparsityError",
    "Recipe",
    "optimize",
    "read_recipe",
    "slice_checkpoint",
]
