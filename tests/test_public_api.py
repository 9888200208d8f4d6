"""What users may import, frozen."""

import elastic_sparsity


def test_public_names():
    assert sorted(elastic_sparsity.__all__) == [
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
    for name in elastic_sparsity.__all__:
        assert getattr(elastic_sparsity, name).__doc__
