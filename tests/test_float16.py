"""Base models stored in float16, as OPT and Pythia are: every stage takes them beside products in bfloat16."""

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import ElasticCheckpoint, ElasticModel, measure, optimize
from elastic_sparsity.allocating import Allocating, allocate
from elastic_sparsity.descent import DescentSettings
from elastic_sparsity.inducing import induce
from elastic_sparsity.model_shapes import read_shapes
from elastic_sparsity.models import load_base
from elastic_sparsity.plan_sizes import Choices, Sizes
from elastic_sparsity.precision import computing_dtype
from elastic_sparsity.search import SearchSettings
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

FAMILIES = ("opt", "gpt2", "gpt_neox", "llama")


def half_model(folder, family):
    model = tiny_model(family).half()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["resident", "stream"])
def test_a_run_and_what_it_measures(family, weights, tmp_path):
    base, text = half_model(tmp_path / "base", family), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    sections = {"model": {"id": base}, "calibration": {"source": str(text)}, "memory": {"weights": weights}}
    if weights == "stream":
        sections["end_to_end"] = {"trainable": "off"}
    recipe = tiny_recipe(**sections, precision="bfloat16")
    optimize(recipe, tmp_path / "c")
    checkpoint = ElasticCheckpoint(tmp_path / "c")
    assert checkpoint.dtype == torch.float16
    if weights == "resident":
        evaluated = tiny_recipe(
            **sections, evaluation={"source": str(text), "window": 32, "max_windows": 1}, precision="bfloat16"
        )
        assert all(row["perplexity"] > 1 for row in measure.measure(evaluated, checkpoint))
    found, protocol = measure.evaluate_path(
        str(tmp_path / "c"), text, reference=base, window=32, max_windows=1, precision="bfloat16"
    )
    assert protocol["precision"] == "bfloat16" and all(row["kl"] >= 0 for row in found)
    assert ElasticModel.from_pretrained(tmp_path / "c", 0.5).dtype == torch.float16


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_before_and_beside_a_run(family, tmp_path):
    base = {"id": half_model(tmp_path / "base", family)}
    stage = {"steps": 2, "batch_size": 2, "samples": 4, "held_out": 4, "folds": ["values"]}
    wanted = tiny_recipe(model=base, induction=stage, calibration={"samples": 12}, precision="bfloat16")
    induce(wanted, tmp_path / "induced")
    assert load_base(str(tmp_path / "induced")).model.dtype == torch.float16
    recipe = tiny_recipe(
        model=base,
        calibration={"samples": 8},
        precision="bfloat16",
        structured={"fractions": [0.2], "steps": 2},
        induction=stage,
    )
    asked = Allocating(
        method="descent", held_out=4, descent=DescentSettings(steps=2), search=SearchSettings(generations=2)
    )
    allocate(tiny_recipe(model=base, calibration={"samples": 8}, precision="bfloat16"), asked, tmp_path / "plan.json")
    optimize(recipe, tmp_path / "c")
    assert ElasticModel.from_pretrained(tmp_path / "c", "structured-0.2").dtype == torch.float16


def test_the_plan_counts_float32_on_a_cpu(tmp_path):
    shapes = read_shapes(half_model(tmp_path / "base", "opt"))
    assert (shapes.dtype, shapes.stored) == (torch.float16, 2)
    for gpu, precision, itemsize in ((False, "bfloat16", 4), (True, "bfloat16", 2), (True, "float32", 4)):
        choices = Choices(weights="resident", activations="memory", trainable="base", precision=precision, gpu=gpu)
        assert Sizes(shapes=shapes, recipe=tiny_recipe(), choices=choices).weight == itemsize
    assert computing_dtype(torch.bfloat16, "bfloat16", "cpu") == torch.bfloat16
    assert computing_dtype(torch.bfloat16, "float32", "cuda") == torch.float32
