"""One post-training run, one elastic checkpoint, every sparsity level sliced at load time."""

from elastic_sparsity.adding import add_structured
from elastic_sparsity.checkpoint import ElasticCheckpoint
from elastic_sparsity.choosing import Choice, choose_level
from elastic_sparsity.config import Recipe, read_recipe
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.exports import Export, export_level
from elastic_sparsity.inspection import LevelInfo, levels
from elastic_sparsity.overlay import restore_overlay, write_overlay
from elastic_sparsity.packed_files import load_packed
from elastic_sparsity.peft_export import export_peft, reapply_masks_
from elastic_sparsity.pipeline import optimize
from elastic_sparsity.planning import Plan, plan
from elastic_sparsity.pruning import load_pruned, prune
from elastic_sparsity.reporting import write_report
from elastic_sparsity.slicing import ElasticModel, save_sliced, set_level
from elastic_sparsity.transfer import copy_level, upgrade
from elastic_sparsity.verify import verify

__all__ = [
    "Choice",
    "ElasticCheckpoint",
    "ElasticModel",
    "ElasticSparsityError",
    "Export",
    "LevelInfo",
    "Plan",
    "Recipe",
    "add_structured",
    "choose_level",
    "copy_level",
    "export_level",
    "export_peft",
    "levels",
    "load_packed",
    "load_pruned",
    "optimize",
    "plan",
    "prune",
    "read_recipe",
    "reapply_masks_",
    "restore_overlay",
    "save_sliced",
    "set_level",
    "upgrade",
    "verify",
    "write_overlay",
    "write_report",
]
