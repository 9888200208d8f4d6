"""A byte-level BPE tokenizer as GGUF metadata. llama.cpp reimplements each way of splitting text, so it must be named.

The splitters known here are told by the tokenizer's own description, so nothing is guessed; any other tokenizer is an
error. SentencePiece tokenizers (Llama 2, Gemma) need scores that a Hugging Face tokenizer does not keep.
"""

import json
from dataclasses import dataclass
from typing import Any

from elastic_sparsity.errors import UnsupportedModelError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expression of a leading Split, and llama.cpp's name of it.
_SPLITS = {_WORDS.replace("{DIGITS}", "{1,3}"): "llama-bpe", _WORDS.replace("{DIGITS}", ""): "qwen2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Attributes:
    tokens: by id; ids that the tokenizer lacks are named and marked unused.
    kinds: gguf.TokenType of each.
    merges: "left right", best first.
    splitter: llama.cpp's name of the pre-tokenizer.
    special: "bos", "eos", "unk", "pad" -> id.
    adds_bos, adds_eos: whether encoding a text puts these around it.
    """

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    splitter: str
    special: dict[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def byte_level_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """What llama.cpp needs to know of a tokenizer.

    Args:
        size: rows of the model's embedding.
    Raises: UnsupportedModelError: unless it is byte-level BPE with a splitter that llama.cpp is known to have.
    """
    import gguf  # slow import, only here

    try:
        description = json.loads(tokenizer.backend_tokenizer.to_str())
    except AttributeError:
        raise UnsupportedModelError(
            f"format gguf: {type(tokenizer).__name__} has no description (tokenizer.json); save it as a fast tokenizer."
        ) from None
    splitter = _splitter(description)
    added = {token["id"]: token for token in description["added_tokens"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise UnsupportedModelError(f"format gguf: token id {max(by_id)} is beyond the model's {size} embeddings.")
    tokens: list[str] = []
    kinds: list[int] = []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif index not in added:
            kinds.append(gguf.TokenType.NORMAL)
        else:
            kinds.append(gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    bare, encoded = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    around = [tokenizer.bos_token_id] * (encoded[0] != bare[0]), [tokenizer.eos_token_id] * (encoded[-1] != bare[-1])
    if encoded != [*around[0], *bare, *around[1]]:
        raise UnsupportedModelError(
            f"format gguf: this tokenizer encodes 'a' as {encoded}, but llama.cpp puts only bos and eos around {bare}."
        )
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        splitter=splitter,
        special={name: index for name, index in special.items() if index is not None},
        adds_bos=encoded[0] != bare[0],
        adds_eos=encoded[-1] != bare[-1],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _splitter(description: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer.

    Raises: UnsupportedModelError.
    """
    model, normalizer = description["model"], description["normalizer"] or {"type": "none"}
    before = description["pre_tokenizer"] or {"type": "none"}
    parts = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    kinds = [part["type"] for part in parts]
    found = _split_name(parts, kinds) if model["type"] == "BPE" else None
    # llama.cpp normalises nothing, and its own converter lets NFC pass: text is nearly always in that form already.
    if normalizer["type"] not in ("none", "NFC") or bool(model.get("ignore_merges")) != (found == "llama-bpe"):
        found = None
    if model["type"] == "BPE" and not model["merges"]:
        raise UnsupportedModelError(
            "format gguf: this tokenizer has no merges (every byte is a token), which llama.cpp cannot read."
        )
    if found is None:
        raise UnsupportedModelError(
            f"format gguf: this tokenizer ({model['type']}, normalizer {normalizer['type']}, pre-tokenizer "
            f"{' + '.join(kinds)}, ignore_merges {model.get('ignore_merges')}) is none whose llama.cpp name is known "
            "here: byte-level BPE as in GPT-2, SmolLM, Llama 3 or Qwen; "
            "write a plain folder with `slice` and try llama.cpp's convert_hf_to_gguf.py on it."
        )
    return found


def _split_name(parts: list[dict[str, Any]], kinds: list[str]) -> str | None:
    if kinds[-1] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    has_regex = parts[-1]["use_regex"]
    if kinds == ["ByteLevel"] and has_regex:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and has_regex and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not has_regex and parts[0]["behavior"] == "Isolated":
        return _SPLITS.get(parts[0]["pattern"].get("Regex", "")) if not parts[0]["invert"] else None
    return None


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Puts a vocabulary into a GGUFWriter."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.splitter)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
