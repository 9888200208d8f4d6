"""Running block by block equals the whole model, for every family and batch size; hooks report shared inputs once."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks
from elastic_sparsity.blocks import BlockRunner, first_tensor, input_hooks
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.errors import ShapeError
from elastic_sparsity.tiny import TINY_FAMILIES, tiny_model

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
SHARED_INPUTS = {
    "llama": [QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "opt": [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
}


def token_ids(samples: int = 5, length: int = 20) -> Tensor:
    """Longer than the sliding windows of the Gemma families."""
    return torch.randint(1, 260, (samples, length), generator=torch.Generator().manual_seed(0))


def run_blocks(runner: BlockRunner) -> Tensor:
    hidden = runner.first_hidden()
    for index in range(len(runner.blocks)):
        hidden = runner.map(runner.call(index), hidden)
    return hidden


def whole_model(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Outputs of all blocks of one ordinary forward, i.e. before the final norm."""
    outputs: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output: outputs.append(first_tensor(output)))
        for block in decoder_blocks(model)
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_block_by_block_equals_the_whole_model(family):
    """Five samples in batches of two: the last batch is a smaller one."""
    model, ids = tiny_model(family), token_ids()
    runner = BlockRunner(model, list(decoder_blocks(model)), ids, batch_size=2)
    expected = whole_model(model, ids)
    hidden = runner.first_hidden()
    assert hidden.shape == (5, 20, 32)
    for index, output in enumerate(expected):
        hidden = runner.map(runner.call(index), hidden)
        torch.testing.assert_close(hidden, output, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=0.01)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_any_batch_size_gives_the_same(batch_size):
    model, ids = tiny_model("gemma2"), token_ids()
    runner = BlockRunner(model, list(decoder_blocks(model)), ids, batch_size)
    sizes = [part.stop - part.start for part in runner.batches()]
    assert sizes == {1: [1] * 5, 3: [3, 2], 5: [5], 8: [5]}[batch_size]
    torch.testing.assert_close(run_blocks(runner), whole_model(model, ids)[-1], rtol=1e-5, atol=1e-5)


def test_calls_are_differentiable_and_leave_no_hooks():
    model, ids = tiny_model("llama"), token_ids(2, 8)
    blocks = list(decoder_blocks(model))
    runner = BlockRunner(model, blocks, ids, 2)
    hidden = runner.first_hidden().requires_grad_()
    runner.call(1)(hidden).sum().backward()
    assert hidden.grad.abs().max() > 0
    assert blocks[1].mlp.up_proj.weight.grad.abs().max() > 0
    assert not any(block._forward_pre_hooks for block in blocks)


class AddBlock(nn.Module):
    """hidden * scale + shift; how it gets its arguments differs from model to model."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, hidden_states: Tensor, scale: Tensor, *, unheard_of: list[float], **rest: object) -> tuple:
        assert not rest
        return hidden_states * scale + unheard_of[0] * self.shift, "something else"


class AddModel(nn.Module):
    """Embeds a token as itself; calls its blocks with hidden states by position or by name."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.blocks = nn.ModuleList([AddBlock(1.0), AddBlock(10.0)])

    def forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        hidden = ids[..., None].float()
        for index, block in enumerate(self.blocks):
            scale, extra = torch.tensor(2.0), [index + 1.0]
            if self.by_name:
                hidden = block(hidden_states=hidden, scale=scale, unheard_of=extra)[0]
            else:
                hidden = block(hidden, scale, unheard_of=extra)[0]
        return hidden


@pytest.mark.parametrize("by_name", [False, True])
def test_arguments_nobody_has_heard_of_by_hand(by_name):
    """Tokens 1, 2, 3: block 0 gives 2 t + 1, block 1 gives 2 (2 t + 1) + 2 * 10."""
    model = AddModel(by_name)
    runner = BlockRunner(model, list(model.blocks), torch.tensor([[1, 2, 3]]), 1)
    hidden = runner.first_hidden()
    assert hidden.flatten().tolist() == [1.0, 2.0, 3.0]
    first = runner.map(runner.call(0), hidden)
    assert first.flatten().tolist() == [3.0, 5.0, 7.0]
    assert runner.map(runner.call(1), first).flatten().tolist() == [26.0, 30.0, 34.0]


def test_map_keeps_the_dtype_of_its_input():
    model = AddModel(by_name=False)
    runner = BlockRunner(model, list(model.blocks), torch.tensor([[1, 2], [3, 4], [5, 6]]), 2)
    hidden = runner.first_hidden().bfloat16()
    output = runner.map(lambda part: part.float() + 0.5, hidden)
    assert output.dtype == torch.bfloat16
    assert output.flatten().tolist() == [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]


@pytest.mark.parametrize("family", sorted(SHARED_INPUTS))
def test_linears_that_share_an_input_are_reported_together(family):
    model, ids = tiny_model(family), token_ids(3, 8)
    block = decoder_blocks(model)[0]
    linears = {path: block.get_submodule(path) for path in architecture_of(family).linears}
    runner = BlockRunner(model, list(decoder_blocks(model)), ids, 2)
    hidden, reports = runner.first_hidden(), []
    runner.map(runner.call(0), hidden)  # a first run also records the call's arguments
    with input_hooks(linears, lambda names, x: reports.append((names, x.numel() // x.shape[-1]))):
        runner.map(runner.call(0), hidden)
    assert reports == [(names, tokens) for tokens in (16, 8) for names in SHARED_INPUTS[family]]
    assert not any(linear._forward_pre_hooks for linear in linears.values())


def test_input_hooks_by_hand():
    linears = {name: nn.Identity() for name in "abc"}
    x, y, reports = torch.ones(1), torch.ones(1), []
    with input_hooks(linears, lambda names, value: reports.append((names, value))):
        linears["a"](x)
        linears["b"](x)  # the same tensor
        linears["c"](y)  # an equal one
        linears["c"](y)  # the same one again is a new batch
    assert [names for names, _ in reports] == [("a", "b"), ("c",), ("c",)]
    assert [value is x for _, value in reports] == [True, False, False]


def test_statistics_count_every_token_once():
    """Also on the first use of a runner, when it records its calls' arguments by running the whole model."""
    model, ids = tiny_model("llama"), token_ids(5, 8)
    linears = {path: decoder_blocks(model)[0].get_submodule(path) for path in QKV}
    runner = BlockRunner(model, list(decoder_blocks(model)), ids, 2)
    hidden = runner.first_hidden()

    def count() -> int:
        found = block_statistics(
            runner, runner.call(0), linears, [hidden], gram=False, autocast=nullcontext, where="block 0"
        )
        return found[QKV[0]].num_tokens

    first, second = count(), count()
    assert second == ids.numel()
    assert first == ids.numel()


@pytest.mark.parametrize("ids", [torch.arange(4), torch.zeros(0, 4, dtype=torch.int64)])
def test_samples_of_a_wrong_shape(ids):
    message = rf"calibration samples: expected \(samples, tokens\), found \({', ?'.join(map(str, ids.shape))},?\)\."
    with pytest.raises(ShapeError, match=message):
        BlockRunner(AddModel(False), [], ids, 1)


def test_a_model_that_runs_other_blocks():
    model = AddModel(by_name=False)
    runner = BlockRunner(model, [*model.blocks, AddBlock(0.0)], torch.tensor([[1, 2]]), 1)
    with pytest.raises(ShapeError, match=r"^model ran 2 blocks, expected 3, each once and in order\.$"):
        runner.call(0)(torch.ones(1, 2, 1))
