"""Token windows for calibration and evaluation: from files and hub data sets (through `datasets`), or from the model.

The perplexity protocol is that of SparseGPT and Wanda: the whole text joined, tokenised once without special tokens,
cut into consecutive windows without overlap. Letters: S samples, T tokens a sample.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_sparsity.errors import DataError, NumericsError, brief
from elastic_sparsity.files import is_file
from elastic_sparsity.generating import roomy_cache, stepper

log = logging.getLogger(__name__)

SELF_BATCH = 128  # sequences sampled together, at most
SELF_CACHE = 2 * 2**30  # bytes that their keys and values may take, or as many as the weights
DRAW_BLOCK = 64  # tokens whose probabilities are summed first


def _text_rows(source: str) -> Iterable[Any]:
    return [{"text": Path(source).read_text(encoding="utf-8")}]


def _json_rows(source: str) -> Iterable[Any]:
    """One value a line, or a list of them as the whole file. (pyarrow, in `datasets`, crashes on deep nests.)"""
    text = Path(source).read_text(encoding="utf-8-sig")
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return (json.loads(line) for line in text.split("\n") if line.strip())
    return whole if isinstance(whole, list) else [whole]


def _parquet_rows(source: str) -> Iterable[Any]:
    from datasets import load_dataset  # slow import, only here

    return load_dataset("parquet", data_files=source, split="train", streaming=True)


def _hub_rows(source: str, name: str | None, split: str) -> Iterable[Any]:
    from datasets import load_dataset  # slow import, only here

    return load_dataset(source, name, split=split, streaming=True)


_READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    ".txt": _text_rows,
    ".text": _text_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def read_text(
    source: str,
    *,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    max_chars: int | None = None,
) -> str:
    """The documents of a local file or a hub data set, joined by blank lines; a .txt file is one document.

    Raises: DataError: if it is missing, empty, in another encoding, or lacks the column.
    """
    suffix = Path(source).suffix.lower()
    is_local = is_file(source)
    if not is_local and (suffix in _READERS or source.startswith((".", "/"))):
        raise DataError(f"text source {source!r}: no such file.")
    if is_local and suffix not in _READERS:
        raise DataError(f"text source {source!r}: unknown ending {suffix!r}; expected {', '.join(_READERS)}.")
    try:
        rows = _READERS[suffix](source) if is_local else _hub_rows(source, name, split)
        column = "text" if is_local and _READERS[suffix] is _text_rows else text_column
        documents, num_chars = [], 0
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or column not in row:
                has = ", ".join(sorted(row)) if isinstance(row, dict) else brief(row)
                raise DataError(f"text source {source!r}: row {number}: no column {column!r}; it has {has}.")
            if not isinstance(row[column], str):
                found = brief(row[column])
                raise DataError(f"text source {source!r}: row {number}: {column!r} is no text but {found}.")
            row[column].encode()  # JSON may hold half a character, which no tokenizer takes
            documents.append(row[column])
            num_chars += len(documents[-1])
            if max_chars is not None and num_chars > max_chars:
                break
    except DataError:
        raise
    except Exception as error:  # datasets raises many types for one cause: the text cannot be read
        first_line = (str(error).splitlines() or [""])[0]
        raise DataError(f"text source {source!r}: cannot be read: {type(error).__name__}: {first_line}") from error
    text = "\n\n".join(documents)
    if not text.strip():
        raise DataError(f"text source {source!r}: holds no text.")
    return text


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """All tokens of `text` as a flat int64 tensor, without special tokens."""
    try:
        ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    except Exception as error:  # a tokenizer whose files are odd raises many types
        raise DataError(f"tokenizer: cannot read the text: {type(error).__name__}: {error}") from error


def check_vocabulary(token_ids: Tensor, vocabulary: int) -> None:
    """Raises: DataError: if a token is beyond the model's vocabulary: the tokenizer belongs to another model."""
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        found = f"tokens {int(token_ids.min())} to {int(token_ids.max())}"
        raise DataError(f"tokenizer: gives {found}, the model's vocabulary has {vocabulary}; it is of another model.")


def windows(token_ids: Tensor, length: int, max_windows: int | None = None, first: int | None = None) -> Tensor:
    """Consecutive (S, T) windows without overlap; the tail is dropped.

    Args:
        first: a token that every window begins with, before T - 1 of the text.
    Raises: DataError: if there is not one whole window.
    """
    own = length - (first is not None)
    count = token_ids.numel() // own
    if not count:
        raise DataError(f"text: {token_ids.numel()} tokens are fewer than one window of {own}.")
    count = count if max_windows is None else min(count, max_windows)
    found_ST = token_ids[: count * own].reshape(count, own)
    return found_ST if first is None else torch.cat([found_ST.new_full((count, 1), first), found_ST], dim=1)


def sample_windows(token_ids: Tensor, samples: int, length: int, seed: int, first: int | None = None) -> Tensor:
    """`samples` windows in seeded random order.

    Raises: DataError: if the text holds fewer.
    """
    available = token_ids.numel() // (length - (first is not None))
    if available < samples:
        raise DataError(
            f"calibration: {token_ids.numel()} tokens give {available} samples of {length} tokens, but the recipe "
            f"asks for {samples}; give more text, or lower calibration.samples or calibration.length."
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return windows(token_ids, length, first=first)[order]


def token_hash(token_ids: Tensor) -> str:
    """sha256 of the token ids, for the checkpoint's record."""
    return hashlib.sha256(token_ids.cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def sample_from_model(
    model: Any,
    samples: int,
    length: int,
    *,
    temperature: float,
    seed: int,
    on_batch: Callable[[int, int], None],
    first: int | None = None,
) -> Tensor:
    """Text the model writes itself: each sample starts at a random token and is sampled freely, nothing cut off.

    The start follows data-free quantisation (arXiv 2305.17888), which found random first tokens to give more varied
    text than the begin-of-text token; the end-of-text token is excluded so that every sample has its full length.

    Args:
        first: a token that stands before the random one.
    Returns: (S, T) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    special = {config.bos_token_id, config.pad_token_id, *_as_list(config.eos_token_id)} - {None}
    banned = torch.tensor(sorted(special), dtype=torch.int64)
    parts = []
    weights = sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters())
    together = rows_together(weights, _cache_bytes(model, length))
    for start in range(0, samples, together):
        size = min(together, samples - start)
        ids = torch.empty(size, length, dtype=torch.int64)
        random = torch.randint(model.config.vocab_size, (size,), generator=generator)
        ids[:, 0] = random if first is None else first
        step, cache, latest = stepper(model), roomy_cache(model, length), ids[:, :1].to(model.device)
        for position in range(1, length):
            logits = step(latest, cache).float().cpu().div_(temperature)  # the generator lives on the CPU
            if position == 1 and first is not None:
                ids[:, 1] = random
                latest = random[:, None].to(model.device)
                continue
            if not torch.isfinite(logits.sum(dtype=torch.float64)):  # as cheap as it gets; finite ones cannot overflow
                raise NumericsError("self-calibration: the model's logits are not finite; its weights overflow.")
            logits[:, banned] = float("-inf")
            chosen = draw(logits, generator)
            ids[:, position] = chosen[:, 0]
            latest = chosen.to(model.device)
        parts.append(ids)
        on_batch(start + size, samples)
    return torch.cat(parts)


def rows_together(weights: int, sequence: int) -> int:
    """How many sequences are sampled together: by the model's sizes alone, so that all machines draw the same.

    Args:
        weights: bytes of the model's.
        sequence: bytes of a sequence's keys and values.
    """
    return max(1, min(SELF_BATCH, max(SELF_CACHE, weights) // sequence))


def _cache_bytes(model: Any, length: int) -> int:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize)


def draw(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1) a token a row, from the softmax of the logits, by inversion: one random number a row.

    `torch.multinomial` draws one for every token of the vocabulary, on a CPU one after the other: measured with 64 rows
    of 49,152 logits 80 ms, this 19. The sums run over blocks of tokens first and then over the block that was hit.
    """
    probs_BV = logits_BV.softmax(dim=-1)
    probs_BNb = nn.functional.pad(probs_BV, (0, -probs_BV.shape[1] % DRAW_BLOCK)).unflatten(1, (-1, DRAW_BLOCK))
    blocks_BN = probs_BNb.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    at_B1 = torch.rand((len(probs_BV), 1), dtype=torch.float64, generator=generator) * blocks_BN[:, -1:]
    block_B1 = _index_at(blocks_BN, at_B1)
    before_B1 = nn.functional.pad(blocks_BN, (1, 0)).gather(1, block_B1)
    inside_Bb = probs_BNb[torch.arange(len(probs_BV)), block_B1[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    return block_B1 * DRAW_BLOCK + _index_at(inside_Bb, at_B1 - before_B1)


def _index_at(sums_BN: Tensor, at_B1: Tensor) -> Tensor:
    """(B, 1) the first place whose running sum is above `at`; never one that adds nothing, whatever was rounded."""
    total_B1 = sums_BN[:, -1:]
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))  # a product or difference may round up to it
    return torch.searchsorted(sums_BN, torch.minimum(at_B1, below_B1).clamp_min(0), right=True)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
