"""A base model never whole in memory: blocks come from safetensors files when they run, and go again.

The modules exist without memory (accelerate's meta device); all that is no decoder block (embeddings, last norm,
head) is loaded and stays. Reads with calls, not by mapping, so that freed blocks leave this process's memory.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.arch import architecture_of, decoder_blocks
from elastic_sparsity.errors import CheckpointError, ConfigError, NumericsError, UnsupportedModelError
from elastic_sparsity.sized import causal_lm
from elastic_sparsity.tensor_file import TensorFile, TensorSpec

FLOATS = ("F32", "BF16", "F16")
STORED_NAMES = {"lm_head.weight": "embed_out.weight"}  # GPT-NeoX: transformers renames it as it loads


class ShardedFolder(Mapping[str, Tensor]):
    """Tensors of a Hugging Face folder by name, each read when asked for.

    The index is expected to name files of the folder only (`models` checks it).

    Raises: ConfigError: no safetensors weights, a missing shard, or a name in none of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            else:
                files = ["model.safetensors"]
            opened = [TensorFile(folder / file) for file in files]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"model.id: {str(folder)!r} cannot be read block by block: {error} Expected model.safetensors, or "
                "shards with an index; download the model again."
            ) from error
        self.files: dict[str, TensorFile] = {name: file for file in opened for name in file.specs}

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.files[name].read(name)
        except CheckpointError as error:
            raise ConfigError(f"model.id: {error}") from error

    def spec(self, name: str) -> TensorSpec:
        return self.files[name].specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class WeightStream:
    """Fills a skeleton's modules with weights of a folder, and empties them again.

    Args:
        model: causal LM on the meta device, buffers real.
        dtype: what weights are cast to as they are read.
        device: where they go.
    Raises: ConfigError: if the folder has not every parameter, in its shape. UnsupportedModelError: no plain floats.
    """

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.source = ShardedFolder(folder)
        self.prefix = f"{architecture_of(model.config.model_type).blocks}."
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once
        body = f"{model.base_model_prefix}."
        self.stored: dict[str, str] = {}
        for name, shape in self.shapes.items():
            candidates = (name, name.removeprefix(body), STORED_NAMES.get(name, name))  # 2nd: a file of the body alone
            stored = next((candidate for candidate in candidates if candidate in self.source), name)
            dtype_name, found = self.source.spec(stored) if stored in self.source else ("F32", "nothing")
            if dtype_name not in FLOATS:
                raise UnsupportedModelError(
                    f"model.id: {str(folder)!r}: {name}: stored as {dtype_name}; expected {', '.join(FLOATS)}."
                )
            if found != shape:
                raise ConfigError(
                    f"model.id: {str(folder)!r}: {name}: expected {shape}, found {found}. Reading block by block needs "
                    "the names that transformers saves: load and save the model with transformers once, or set "
                    "memory.weights = 'resident'."
                )
            self.stored[name] = stored
        tied = set(dict(model.named_parameters(remove_duplicate=False))) - set(self.shapes)
        self.unused = set(self.source) - set(self.stored.values()) - {x for x in tied if self._is_copy(x)}

    def _is_copy(self, name: str) -> bool:
        """Whether the files hold a tied parameter twice, with one value."""
        tied_to = {id(p): n for n, p in self.model.named_parameters()}[id(self.model.get_parameter(name))]
        return name in self.source and torch.equal(self.source[name], self.source[self.stored[tied_to]])

    def read(self, name: str) -> Tensor:
        """One parameter of the model, cast, on the CPU."""
        return self.source[self.stored[name]].to(self.dtype)

    def checked_hash(self) -> str:
        """As `models.weights_hash` of the whole model; every weight is read once.

        Raises: NumericsError: if a weight is NaN or infinite.
        """
        digest = hashlib.sha256()
        for name in sorted(self.stored):
            weight = self.read(name)
            if not torch.isfinite(weight).all():
                raise NumericsError(f"base model: {name} holds NaN or infinity; download or convert the model again.")
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.contiguous().view(torch.uint8).numpy().data)
            del weight  # before the next one is read
        return digest.hexdigest()

    def load_rest_(self) -> None:
        """Loads all that is no decoder block."""
        names = [name for name in self.stored if not name.startswith(self.prefix)]
        self._load_(self.model, {name: name for name in names})
        self.model.tie_weights()
        for name, buffer in self.model.named_buffers():
            owner, _, last = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[last] = buffer.to(self.device)

    def load_block_(self, index: int, block: nn.Module) -> None:
        """Gives a block without memory its weights."""
        start = f"{self.prefix}{index}."
        self._load_(block, {name: f"{start}{name}" for name, _ in block.named_parameters()})

    def _load_(self, module: nn.Module, names: Mapping[str, str]) -> None:
        for local, name in names.items():
            owner, _, last = local.rpartition(".")
            weight = self.read(name).to(self.device)
            setattr(module.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, in its place in the model; what is done to it is gone afterwards."""
        blocks = self.model.get_submodule(self.prefix.removesuffix("."))
        empty = blocks[index]
        blocks[index] = copy.deepcopy(empty)
        try:
            self.load_block_(index, blocks[index])
            yield blocks[index]
        finally:
            blocks[index] = empty

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it is open the whole model can run: each block is loaded when it is called, and emptied after."""

        def load(block: nn.Module, *_: Any) -> None:
            if next(block.parameters()).is_meta:
                self.load_block_(number[id(block)], block)
                loaded.add(id(block))

        def empty(block: nn.Module, *_: Any) -> None:
            if id(block) in loaded:
                loaded.remove(id(block))
                block.to("meta")

        blocks = decoder_blocks(self.model)
        number = {id(block): index for index, block in enumerate(blocks)}
        loaded: set[int] = set()
        handles = [block.register_forward_pre_hook(load, prepend=True) for block in blocks]
        handles += [block.register_forward_hook(empty) for block in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def empty_model(config: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    """The causal LM of a checked config in eval mode, without memory for weights.

    Raises: ConfigError: if it does not make one.
    """
    from accelerate import init_empty_weights  # slow imports, only here
    from transformers import GenerationConfig

    try:
        with init_empty_weights():
            model = causal_lm(config, dtype or config.dtype or torch.float32)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types for one cause
        raise ConfigError(f"model.id: {str(folder)!r}: no causal LM: {type(error).__name__}: {error}") from error
    return model.eval().requires_grad_(False)
