"""Trains a small OPT from scratch on a text file: a real model of the papers' second family where no hub is in reach.

Architecture as OPT-125M's (pre-norm, ReLU, learned positions, biases, tied embeddings), only smaller; a byte-level BPE
tokenizer of the same text; transformers' `Trainer` with AdamW and a cosine schedule. The result is a plain Hugging Face
folder. It is cached: a finished folder of the same settings and text is left as it is, an interrupted training goes on
from Trainer's last checkpoint, other settings are refused by name.

    python benchmarks/train_small_opt.py small-opt --text abc-news.txt

Time at the defaults: 32 minutes on one core of a Zen 3. The last 2 % of the text are held out. Never
give it the text that perplexity is measured on.
"""

import argparse
import datetime
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from cells import commit, device, exit_on_error, log
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from elastic_sparsity.data import read_text, tokenize, windows
from elastic_sparsity.errors import ConfigError, DataError, OutputError
from elastic_sparsity.evaluate import evaluate
from elastic_sparsity.files import atomic_folder, check_output_folder, is_file, write_json
from elastic_sparsity.precision import autocast_factory
from elastic_sparsity.preparing import versions

RECORD_NAME = "small_opt.json"  # in the finished folder, and in the scratch folder of an interrupted training
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # as OPT numbers them: pad 1, begin and end of text both </s>, 2
HELD_OUT = 0.02  # of the text, its end
MAX_PARAMETERS = 15_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the result depends on, besides the text. Sizes in units, `learning_rate` at its peak."""

    vocabulary: int = 4096
    context: int = 256
    hidden: int = 128
    layers: int = 6
    heads: int = 2
    steps: int = 4000
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 100
    seed: int = 0


class Samples(Dataset[dict[str, Tensor]]):
    """Windows of the training tokens: epoch after epoch, each cut at another offset and in another order."""

    def __init__(self, tokens: Tensor, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        wanted, context = settings.steps * settings.batch_size, settings.context
        starts: list[int] = []
        while len(starts) < wanted:
            offset = int(torch.randint(context, (), generator=generator))
            count = (tokens.numel() - offset) // context
            starts += [offset + context * int(x) for x in torch.randperm(count, generator=generator)]
        self.tokens, self.starts, self.context = tokens, starts[:wanted], context

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[self.starts[index] : self.starts[index] + self.context]
        return {"input_ids": window, "labels": window}


class Progress(TrainerCallback):
    """A line with loss and time left whenever Trainer logs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        done = state.global_step - self.first
        if logs is None or "loss" not in logs or not done:
            return
        left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        left_text = datetime.timedelta(seconds=round(left))
        log(f"step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}, {left_text} left")


def train_small_opt(
    text_path: str, output: Path, settings: Settings, *, log_every: int = 20, save_every: int = 100
) -> Path:
    """Trains, or finds the finished folder; prints held-out perplexity. Returns: `output`.

    Raises: DataError: text missing or too short. ConfigError: the folder, or an interrupted training beside it, is of
        other settings or another text; a model that is too large. OutputError: `output` holds something else.
    """
    text = read_text(text_path)
    wanted = {"settings": asdict(settings), "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    if is_file(output / RECORD_NAME):
        found = _matching_record(output, wanted)
        log(f"{output}: finished already, held-out perplexity {found['held_out']['perplexity']:.2f}; nothing to do")
        return output
    check_output_folder(output)
    scratch = output.parent / f".{output.name}.training"
    begun = is_file(scratch / RECORD_NAME)
    if begun:
        _matching_record(scratch, wanted)
    train_text, held_out_text = text[: _split(text)], text[_split(text) :]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(scratch) if begun else _train_tokenizer(train_text, settings)
    tokens, held_out = (tokenize(tokenizer, part) for part in (train_text, held_out_text))
    held_out_ST = windows(held_out, settings.context)
    if tokens.numel() < 2 * settings.context:
        raise DataError(f"{text_path}: {tokens.numel()} tokens to train on are fewer than two windows.")
    model = make_model(settings)
    log(f"{model.num_parameters():,} parameters, {tokens.numel():,} tokens; {settings.steps} steps of "
        f"{settings.batch_size} x {settings.context}")  # fmt: skip
    if not begun:
        scratch.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(scratch)
        write_json(scratch / RECORD_NAME, wanted)
    started = time.monotonic()
    trainer = _trainer(model, Samples(tokens, settings), scratch, settings, log_every, save_every)
    last = get_last_checkpoint(str(scratch))
    if last is not None:
        log(f"goes on from {Path(last).name}")
    trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started  # of the last part, if it was interrupted
    quality = _held_out(model.eval(), tokens, held_out_ST, settings)
    record = wanted | {
        "text": Path(text_path).name,
        "held_out": quality,
        "parameters": model.num_parameters(),
        "tokens": tokens.numel(),
        "tokens_trained": settings.steps * settings.batch_size * settings.context,
        "seconds": round(seconds),
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "commit": commit(),
        "versions": versions(),
    }
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / RECORD_NAME, record)
    shutil.rmtree(scratch)
    log(f"{output}: held-out perplexity {quality['perplexity']:.2f}, of the unigrams {quality['unigram']:.2f} "
        f"({quality['protocol']})")  # fmt: skip
    return output


def _held_out(model: OPTForCausalLM, tokens: Tensor, windows_ST: Tensor, settings: Settings) -> dict[str, Any]:
    found = evaluate({"model": model}, windows_ST, autocast=autocast_factory("float32", "cpu"))["model"]
    return {
        "perplexity": found.perplexity,
        "unigram": unigram_perplexity(tokens, windows_ST, settings.vocabulary),
        "protocol": f"{windows_ST.shape[0]} windows of {settings.context} tokens, no overlap: the last 2 % of the text",
    }


def make_model(settings: Settings) -> OPTForCausalLM:
    """A random OPT. Raises: ConfigError: if it has more than `MAX_PARAMETERS`, or sizes that do not fit together."""
    if settings.hidden % settings.heads:
        raise ConfigError(f"--hidden: {settings.hidden} is no multiple of --heads, {settings.heads}.")
    set_seed(settings.seed)
    config = OPTConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        word_embed_proj_dim=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        ffn_dim=4 * settings.hidden,
        max_position_embeddings=settings.context,
        do_layer_norm_before=True,
        dropout=0.0,  # a few epochs only
        bos_token_id=2,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    if model.num_parameters() > MAX_PARAMETERS:
        count = f"{model.num_parameters():,}"
        raise ConfigError(f"model: {count} parameters are more than {MAX_PARAMETERS:,}; make it smaller.")
    return model


def unigram_perplexity(tokens: Tensor, held_out_ST: Tensor, vocabulary: int) -> float:
    """Perplexity of the training tokens' frequencies (plus one each) on the held-out windows' predicted tokens."""
    counts = torch.bincount(tokens, minlength=vocabulary).double() + 1
    return float((counts.sum() / counts)[held_out_ST[:, 1:]].log().mean().exp())


def _split(text: str) -> int:
    return round((1 - HELD_OUT) * len(text))


def _train_tokenizer(text: str, settings: Settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=settings.context,
    )


def _trainer(
    model: OPTForCausalLM, samples: Samples, scratch: Path, settings: Settings, log_every: int, save_every: int
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        logging_steps=log_every,
        save_steps=save_every,
        save_total_limit=1,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, callbacks=[Progress()])
    trainer.remove_callback(PrinterCallback)  # it would print every log once more
    return trainer


def _matching_record(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The folder's record. Raises: ConfigError: unless it is of the wanted settings and text, naming what differs."""
    path = folder / RECORD_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        old = found["settings"] | {"text": found["text_sha256"][:12]}
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: cannot be read: {error}; move the folder away.") from error
    new = wanted["settings"] | {"text": wanted["text_sha256"][:12]}
    differences = [f"{name} {old.get(name)}, not {value}" for name, value in new.items() if old.get(name) != value]
    if differences:
        raise ConfigError(f"{folder}: is of {'; '.join(differences)}; name another output or remove it.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", required=True)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args())
    output, text = given.pop("output"), given.pop("text")
    train_small_opt(text, output, Settings(**given))


if __name__ == "__main__":
    exit_on_error(main)
