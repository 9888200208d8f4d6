"""Two processes do the run of one: same samples, equal masks, losses and values within rounding."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import in_processes, tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

from elastic_sparsity.distill import Share, draw_samples, own_samples
from elastic_sparsity.errors import ConfigError
from elastic_sparsity.preparing import check_shares
from elastic_sparsity.tensor_file import TensorFile
from elastic_sparsity.tiny import byte_tokenizer, tiny_model
from elastic_sparsity.workers import Workers

RUN = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, "tests")
from conftest import tiny_recipe
from elastic_sparsity import optimize
from elastic_sparsity.errors import ElasticSparsityError
from elastic_sparsity.measure import measure
from elastic_sparsity.workers import Workers

torch.set_num_threads(1)
recipe = tiny_recipe(**json.loads(sys.argv[2]))
try:
    checkpoint = optimize(recipe, sys.argv[1])
except ElasticSparsityError as error:
    sys.exit(f"refused: {error}")
measure(recipe, checkpoint)
Workers().close()
threads = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
if any("gloo" in name for name in threads):
    sys.exit(f"the closed group still has threads, which can abort the process as it exits: {threads}")
"""


SHARD = """
import torch
from elastic_sparsity.adapters import ElasticLinear
from elastic_sparsity.arch import decoder_blocks
from elastic_sparsity.ladder import Ladder
from elastic_sparsity.sharding import shard_block_, whole_tensors
from elastic_sparsity.tiny import tiny_model

torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
block = decoder_blocks(tiny_model("gpt2"))[0]
given = block.mlp.c_fc.weight.detach().T
block.mlp.c_fc = ElasticLinear(
    block.mlp.c_fc, Ladder(sparsities=(0.5,)), [1], inheritance="shared", pattern_masks=[], train_base=False,
    drop_level_OI=torch.zeros(given.shape, dtype=torch.uint8), teacher_dtype=torch.float32,
    generator=torch.Generator(),
)
shard_block_(block, 1, "cpu")
assert torch.equal(dict(whole_tensors(block))["mlp.c_fc.weight"], given)
torch.distributed.destroy_process_group()
"""


def run(folder, sections, processes, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    return in_processes(processes, script, folder, json.dumps(sections))


def errors(done):
    """What the workers and their launcher said last."""
    return done.stderr[-6000:]


@pytest.mark.parametrize(
    "sections",
    [
        {"block": {"steps": 4, "samples": 6, "base_lr": 1e-3}, "end_to_end": {"trainable": "base", "steps": 6}},
        {"mixer": {"mode": "learned"}, "scores": {"method": "obs"}, "memory": {"activations": "disk"}},
        {"end_to_end": {"trainable": "base", "steps": 6, "shard": True, "gradient_checkpointing": True}},
    ],
    ids=["base values, own streams", "obs scores, learned mix, activations on disk", "sharded"],
)
def test_two_processes_equal_one(sections, tmp_path):
    for processes in (1, 2):
        done = run(tmp_path / str(processes), sections, processes, tmp_path)
        assert not done.returncode, errors(done)
    one, two = (json.loads((tmp_path / n / "elastic_config.json").read_text()) for n in ("1", "2"))
    for block, other in zip(one["training"]["block_losses"], two["training"]["block_losses"], strict=True):
        assert other == pytest.approx(block, rel=1e-4)
    assert two["training"]["end_to_end_kl"] == pytest.approx(one["training"]["end_to_end_kl"], rel=1e-3)
    for row, other in zip(one["quality"]["rows"], two["quality"]["rows"], strict=True):
        assert other["perplexity"] == pytest.approx(row["perplexity"], rel=1e-4)
    for path in (tmp_path / "1").glob("*.safetensors"):
        first, second = TensorFile(path), TensorFile(tmp_path / "2" / path.name)
        for name in first.specs:
            a, b = first.read(name), second.read(name)
            if a.dtype == torch.uint8:
                assert torch.equal(a, b), name  # masks
            else:
                torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "2" / "run.json").read_text())["workers"] == 2


def test_a_frozen_conv1d_can_be_shared_out():
    """Its weight is the transposed view of what GPT-2 stores; with a trained base it would be a copy."""
    done = subprocess.run([sys.executable, "-c", SHARD], capture_output=True, text=True, check=False, timeout=120)
    assert not done.returncode, errors(done)


def test_a_sharded_model_is_never_whole(tmp_path):
    """Blocks go from disk to shards; the values are those of one process that has the whole model."""
    tiny_model("gpt2").save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("The fox that jumps over a lazy dog keeps its zeros. " * 40)
    sections = {
        "model": {"id": str(tmp_path / "m")},
        "calibration": {"source": str(tmp_path / "t.txt")},
        "evaluation": {"source": str(tmp_path / "t.txt"), "window": 16},
        "end_to_end": {"trainable": "base", "steps": 6},
    }
    assert not run(tmp_path / "1", sections, 1, tmp_path).returncode
    sections |= {"end_to_end": {**sections["end_to_end"], "shard": True}, "memory": {"weights": "stream"}}
    done = run(tmp_path / "2", sections, 2, tmp_path)
    assert not done.returncode, errors(done)
    for path in (tmp_path / "1").glob("*.safetensors"):
        first, second = TensorFile(path), TensorFile(tmp_path / "2" / path.name)
        for name in first.specs:
            torch.testing.assert_close(second.read(name), first.read(name), rtol=1e-3, atol=1e-4)


def test_a_batch_that_cannot_be_shared(tmp_path):
    done = run(tmp_path / "c", {"block": {"batch_size": 3}}, 2, tmp_path)
    assert done.returncode
    assert "block.batch_size: 3 samples cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "c").exists()


def test_shares_are_checked_before_any_work():
    two = Workers()
    two.count = 2
    fine = {"block": {"batch_size": 2, "samples": 4}, "end_to_end": {"batch_size": 2, "trainable": "base"}}
    check_shares(tiny_recipe(**fine), two, "base")
    for sections, message in (
        ({"end_to_end": {"batch_size": 1}}, "end_to_end.batch_size: 1 samples cannot be shared by 2"),
        ({"block": {"batch_size": 4, "samples": 2}}, "block.samples: 2 are fewer than a batch of 4"),
        ({"block": {"batch_size": 3}}, "block.batch_size: 3 samples"),
        ({"induction": {"batch_size": 3, "steps": 1, "held_out": 1}}, "induction.batch_size: 3 samples"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_shares(tiny_recipe(**{**fine, **sections}), two, "base")
    check_shares(
        tiny_recipe(**fine, induction={"batch_size": 3, "steps": 1, "held_out": 1, "reading": "gains"}), two, "off"
    )


def test_a_worker_of_its_own():
    alone = Workers()
    assert (alone.rank, alone.count, alone.is_main) == (0, 1, True)
    assert alone.local == 1 and alone.of_main("mine") == "mine"
    assert alone.places(5, "x") == range(5)
    tensors = [torch.ones(2)]
    alone.sum_(tensors)
    assert tensors[0].tolist() == [1, 1]
    assert alone.mean([1.0, 3.0]) == [1.0, 3.0]
    alone.count = 2
    with pytest.raises(ConfigError, match=r"^x: 5 samples cannot be shared by 2 processes"):
        alone.places(5, "x")


@given(share=st.integers(1, 3), workers=st.integers(1, 4), num_samples=st.integers(1, 40), seed=st.integers(0, 99))
def test_workers_draw_what_one_draws(share, workers, num_samples, seed):
    """The samples of a step, the generator afterwards, and who owns what do not depend on the number of workers."""
    batch = share * workers
    if num_samples < batch:
        workers = 1
        share = batch

    def draw(places):
        generator = torch.Generator().manual_seed(seed)
        mine = own_samples(num_samples, places, batch) if num_samples >= batch else list(range(num_samples))
        drawn = draw_samples(Share(places=places, num_samples=num_samples), batch, generator)
        return [mine[i] for i in drawn.tolist()], mine, generator.get_state()

    whole, _, state = draw(range(batch))
    parts = [draw(range(rank * share, (rank + 1) * share)) for rank in range(workers)]
    assert [sample for part, _, _ in parts for sample in part] == whole
    assert all(torch.equal(part_state, state) for _, _, part_state in parts)
    if num_samples >= batch:
        assert sorted(sample for _, mine, _ in parts for sample in mine) == list(range(num_samples))
