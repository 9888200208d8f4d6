"""GGUF files are read back by transformers, and run by llama.cpp itself; what it would compute otherwise is refused."""

import json
import subprocess
import sys

import gguf
import pytest
import torch
from conftest import merging_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from elastic_sparsity.errors import UnsupportedModelError
from elastic_sparsity.export_gguf import write_gguf
from elastic_sparsity.gguf_vocab import byte_level_vocabulary
from elastic_sparsity.tiny import byte_tokenizer, tiny_model

IDS = torch.arange(4, 44).reshape(2, 20)


GGUF_FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers' reader does not read it and takes 128
    "phi3": {},
    "gpt2": {"max_position_embeddings": 1024, "n_inner": 128},  # the same: 1024, 4 times the width
    "gpt_neox": {},
}


@pytest.mark.parametrize("family", sorted(GGUF_FAMILIES.keys() - {"gpt_neox"}))
@torch.no_grad()
def test_transformers_reads_the_gguf_back(family, tmp_path):
    model, tokenizer = tiny_model(family, vocab_size=300, **GGUF_FAMILIES[family]), merging_tokenizer()
    write_gguf(model, tokenizer, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert torch.equal(found(IDS).logits, model(IDS).logits)
    text = "the sparse fox's 123 zeros"
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"] and len(tokenizer(text)["input_ids"]) < len(text)


# A process of its own: a server that is dropped before its loop runs never ends.
LLAMA_CPP = """
import json, os, sys, urllib.request
import xllamacpp
path, kind, request = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path = path
parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = 256, 1, False, -1
parameters.n_gpu_layers, parameters.port = 0, 0
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
if kind == "tokenize":
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{server.listening_address}/tokenize", body, headers)
    result = json.load(urllib.request.urlopen(call, timeout=30))["tokens"]
else:
    for seed in range(30):  # no probabilities come with a token that is half a character, or the end
        answer = server.handle_completions({**request, "seed": seed, "cache_prompt": False})
        result = answer["choices"][0]["logprobs"]
        if result:
            break
print("RESULT" + json.dumps(result), flush=True)
os._exit(0)
"""


def llama_cpp(path, kind, request):
    """What llama.cpp itself answers."""
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp to run llama.cpp itself")
    order = json.dumps([str(path), kind, request])
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP], input=order, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "RESULT" in done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.rpartition("RESULT")[2])


def llama_cpp_log_probabilities(path, ids):
    """Log-probabilities of the token after `ids`, by id."""
    request = {"prompt": ids, "max_tokens": 1, "temperature": 1.0, "n_probs": 300, "logprobs": 300, "samplers": []}
    found = llama_cpp(path, "complete", request)
    assert found, "llama.cpp gave no probabilities in 30 tries"
    return {row["id"]: row["logprob"] for row in found["content"][0]["top_logprobs"]}


@pytest.mark.parametrize("family", GGUF_FAMILIES)
@torch.no_grad()
def test_llama_cpp_computes_the_same(family, tmp_path):
    model, tokenizer = tiny_model(family, vocab_size=300, **GGUF_FAMILIES[family]), merging_tokenizer()
    write_gguf(model, tokenizer, tmp_path)
    ids = tokenizer("the sparse fox's 123 zeros that stay")["input_ids"]
    found = llama_cpp_log_probabilities(tmp_path / "model.gguf", ids)
    expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    assert len(found) == 300 and expected.std() > 0.1
    # ggml looks up GELU in a table of half precision.
    tolerance = 1e-3 if family in ("gpt2", "gpt_neox") else 1e-5
    assert max(abs(float(expected[index]) - value) for index, value in found.items()) < tolerance


@torch.no_grad()
def test_llama_cpp_scales_rotary_frequencies_as_llama_3(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    model, tokenizer = tiny_model("llama", vocab_size=300, head_dim=32, rope_parameters=rope), merging_tokenizer()
    write_gguf(model, tokenizer, tmp_path)
    ids = tokenizer("the sparse fox's 123 zeros that stay " * 5)["input_ids"]
    found = llama_cpp_log_probabilities(tmp_path / "model.gguf", ids)
    expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
    unscaled = tiny_model("llama", vocab_size=300, head_dim=32)
    unscaled.load_state_dict(model.state_dict())
    assert (torch.log_softmax(unscaled(torch.tensor([ids])).logits[0, -1], -1) - expected).abs().max() > 1e-2
    assert max(abs(float(expected[index]) - value) for index, value in found.items()) < 1e-5


def test_gguf_refuses_what_llama_cpp_would_compute_otherwise(tmp_path):
    def refuse(message, family, tokenizer=None, **changes):
        with pytest.raises(UnsupportedModelError, match=message):
            model = tiny_model(family, vocab_size=300, **changes)
            write_gguf(model, tokenizer or merging_tokenizer(), tmp_path)
        assert not list(tmp_path.iterdir())

    for family in ("gemma2", "gemma3_text", "opt"):
        refuse(
            f"model type '{family}' is not one of llama, mistral, qwen2, .*write a plain folder with `slice`", family
        )
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    refuse("rope_type 'linear' of this llama is not supported, expected default", "llama", rope_parameters=scaled)
    refuse("sliding_window 64 of this mistral is not supported, expected none, or at least 256", "mistral",
           sliding_window=64)  # fmt: skip
    refuse("hidden_act 'gelu' of this llama is not supported, expected silu", "llama", hidden_act="gelu")
    refuse("attention_bias True of this qwen3", "qwen3", attention_bias=True)
    refuse("mlp_bias True of this llama", "llama", mlp_bias=True)
    refuse("scale_attn_weights False of this gpt2", "gpt2", scale_attn_weights=False)
    refuse("scale_attn_by_inverse_layer_idx True of this gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    refuse("no merges", "llama", byte_tokenizer())
    spaces = merging_tokenizer()
    spaces.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    refuse(r"BPE, normalizer none, pre-tokenizer Metaspace, .*is none whose llama.cpp name is known", "llama", spaces)
    spaces.backend_tokenizer.pre_tokenizer = None
    refuse("BPE, normalizer none, pre-tokenizer none", "llama", spaces)


LAST = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
WORDS += r"|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_by(text):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(text), "isolated"), LAST])


SPLITTERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": split_by(WORDS % "{1,3}"),
    "qwen2": split_by(WORDS % ""),
}
TEXT = "It's 1234567 or 3.14; I'LL stay\n\n  \t zero -- zéro 🦙🦙 我想 1314天  (really)!?\r\n weights'd   "


@pytest.mark.parametrize("name", SPLITTERS)
def test_llama_cpp_splits_text_as_each_known_tokenizer(name, tmp_path):
    tokenizer = merging_tokenizer(pre_tokenizer=SPLITTERS[name], text=TEXT, ignore_merges=name == "llama-bpe")
    assert byte_level_vocabulary(tokenizer, 300).splitter == name
    write_gguf(tiny_model("llama", vocab_size=300), tokenizer, tmp_path)
    found = llama_cpp(tmp_path / "model.gguf", "tokenize", {"content": TEXT, "add_special": True})
    assert found == tokenizer(TEXT)["input_ids"]


def test_tokenizers_without_a_known_splitter_are_refused():
    prefixed = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for other in (split_by(r"\s+"), prefixed, LAST, SPLITTERS["llama-bpe"]):  # the last: without ignore_merges
        tokenizer = merging_tokenizer()
        tokenizer.backend_tokenizer.pre_tokenizer = other
        with pytest.raises(UnsupportedModelError, match="is none whose llama.cpp name is known"):
            byte_level_vocabulary(tokenizer, 300)
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedModelError, match="normalizer Lowercase"):
        byte_level_vocabulary(tokenizer, 300)
    with pytest.raises(UnsupportedModelError, match="token id 289 is beyond the model's 280 embeddings"):
        byte_level_vocabulary(merging_tokenizer(), 280)


def test_what_a_tokenizer_puts_around_a_text_is_recorded():
    tokenizer = merging_tokenizer()
    plain = byte_level_vocabulary(tokenizer, 300)
    assert (plain.adds_bos, plain.adds_eos, plain.special["eos"]) == (False, False, 0)
    assert plain.tokens[299] == "[PAD299]" and plain.kinds[299] == gguf.TokenType.UNUSED
    assert plain.kinds[0] == gguf.TokenType.CONTROL and plain.kinds[100] == gguf.TokenType.NORMAL
    around = processors.TemplateProcessing(single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    both = byte_level_vocabulary(tokenizer, 300)
    assert both.adds_bos and both.adds_eos
    around = processors.TemplateProcessing(single="<|end|> <|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    with pytest.raises(UnsupportedModelError, match=r"encodes 'a' as \[0, 0, .*only bos and eos around"):
        byte_level_vocabulary(tokenizer, 300)
