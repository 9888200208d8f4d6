"""Times one decoder block with random weights of a model's shapes: scores, one training step, one forward pass."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastic_sparsity.activations import DEVICE
from elastic_sparsity.arch import architecture_of
from elastic_sparsity.attention import training_attention
from elastic_sparsity.block_phase import Job, attach_elastic_
from elastic_sparsity.blocks import BlockRunner
from elastic_sparsity.calibrate import block_statistics
from elastic_sparsity.config import Recipe
from elastic_sparsity.distill import BlockSettings, Share, train_block_
from elastic_sparsity.fused_layers import fused_layers
from elastic_sparsity.mixer import FeatureMixer
from elastic_sparsity.models import BaseModel
from elastic_sparsity.precision import default_device
from elastic_sparsity.run_folder import RunFolder
from elastic_sparsity.work_plan import Timing
from elastic_sparsity.workers import Workers

TOKENS = 2048  # at most, of a batch


def probe(recipe: Recipe, config: Any, trainable: str, precision: str, dtype: torch.dtype) -> Timing:
    """Runs a block as the block phase does, on few tokens and on the default device.

    Args:
        config: transformers' config of the whole model; it is changed.
        trainable, precision: as in `Choices`.
        dtype: of the weights.
    """
    length = min(recipe.calibration.length, TOKENS)
    batch = max(1, min(recipe.block.batch_size, TOKENS // length))
    model = _one_block(config, dtype)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
    blocks = model.get_submodule(architecture_of(config.model_type).blocks)
    runner = BlockRunner(model.base_model, blocks, tokens, batch)
    with tempfile.TemporaryDirectory() as folder, training_attention(model), fused_layers(model):
        job = Job(
            recipe=recipe, base=BaseModel(model, None, {}), token_ids_ST=tokens, trainable=trainable,
            precision=precision, activations=DEVICE, workers=Workers(), folder=RunFolder(Path(folder), writes=False),
            generator=torch.Generator().manual_seed(recipe.seed), progress=lambda stage, done, total: None,
        )  # fmt: skip
        return _timed(job, runner, batch)


def _one_block(config: Any, dtype: torch.dtype) -> Any:
    """A model of one block and hardly any vocabulary, at random."""
    from transformers import AutoModelForCausalLM  # slow import, only here

    config.num_hidden_layers, config.vocab_size = 1, 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, 0)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False).to(default_device())


def _timed(job: Job, runner: BlockRunner, batch: int) -> Timing:
    recipe, block = job.recipe, job.blocks[0]
    ladder, call = recipe.build_ladder(), runner.call(0)
    model, shape_ST = job.base.model, job.token_ids_ST.shape
    hidden: Any = torch.randn(*shape_ST, model.config.hidden_size, dtype=model.dtype, device=model.device)
    with job.autocast():
        runner.map(call, hidden)
        target, forward = _seconds(lambda: runner.map(call, hidden))
    linears = {path: block.get_submodule(path) for path in job.linears}
    gram = recipe.scores.method == "obs"
    statistics = block_statistics(runner, call, linears, [hidden], gram=gram, autocast=job.autocast, where="probe")
    elastic, masks = _seconds(lambda: attach_elastic_(job, block, linears, statistics, "block"))
    mixer = FeatureMixer(recipe.mixer.mode, recipe.mixer_weights())
    settings = {"mixer_lr": recipe.mixer.lr, **recipe.block.model_dump(exclude={"samples"})}
    settings |= {"steps": 1, "batch_size": batch}
    share = Share(places=range(batch), num_samples=batch)

    def step() -> None:
        train_block_(
            call, elastic, ladder, [hidden] * ladder.num_groups, hidden, target, mixer, BlockSettings(**settings),
            job.generator, "probe", job.autocast, share,
        )  # fmt: skip

    step()  # the first one also finds kernels
    seconds = 0.0
    if recipe.block.steps:
        _, seconds = _seconds(step)
    tokens = job.token_ids_ST.numel()
    scale = recipe.block.batch_size * recipe.calibration.length / tokens
    return Timing(tokens=tokens, forward=forward, step=seconds, masks=masks, scale=scale)


def _seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - start
