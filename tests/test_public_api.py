"""What users may import, frozen."""

import elastic_sparsity


def test_public_names():
    assert sorted(elastic_sparsity.__all__) == [
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
    for name in elastic_sparsity.__all__:
        assert getattr(elastic_sparsity, name).__doc__
