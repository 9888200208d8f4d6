"""One post-training run, one elastic checkpoint, every sparsity level sliced at load time."""

from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.config import Recipe, read_recipe
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.pipeline import optimize
from elastic_sparsity.slicing import ElasticModel, LevelInfo, levels, save_sliced, set_level

__all__ = [
    "ElasticCheckpoint",
    "ElasticModel",
    "ElasticSparsityError",
    "LevelInfo",
    "Recipe",
    "levels",
    "optimize",
    "read_recipe",
    "save_sliced",
    "set_level",
]
