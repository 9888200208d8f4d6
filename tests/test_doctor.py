"""Doctor on machines that are not here, and on this one."""

import json
import types

import pytest
import torch
from machines import gpu, kernels, machine

from elastic_sparsity import ElasticModel, doctor, native
from elastic_sparsity.device_report import machine_table
from elastic_sparsity.doctor import (
    FEATURES,
    as_json,
    bfloat16_on_cpu,
    existing_ways,
    known_features,
    parse_cpuinfo,
    read_facts,
    verdicts,
)
from elastic_sparsity.errors import ConfigError

OLD_CPU = machine(features=frozenset(), **kernels("portable", avx512="no AVX-512", avx2="no AVX2", portable=None))
SERVER = machine(features=frozenset({"avx2", "avx512_bf16"}), **kernels("avx512", avx512=None, avx2=None))
ARM = machine(architecture="aarch64", features=frozenset({"neon", "bf16"}), **kernels("neon", neon=None))
MAC = machine(architecture="arm64", features=None, kernel_threads=False, **kernels("neon", neon=None))
NO_COMPILER = machine(**kernels("torch", avx2="no C compiler when it was installed"))
OLD_GPU = machine(
    gpus=(gpu(architecture="sm_75", multiplies_bfloat16=False, semi_structured_problem="sm_75; needs sm_80 or newer"),)
)
NEW_GPU = machine(gpus=(gpu(),))
OUTDATED = machine(gpus=(gpu(),), **kernels(None, avx2="of another build; reinstall"))

# machine, way, device, levels -> here, part of the reason
TABLE = [
    (OLD_CPU, "dense-float32", "cpu", "all", True, "every CPU"),
    (OLD_CPU, "dense-bfloat16", "cpu", "all", False, "emulated ones are slower"),
    (
        OLD_CPU,
        "packed-bfloat16",
        "cpu",
        "unstructured",
        True,
        "portable kernel: saves memory, costs time (avx512: no AVX-512; avx2: no AVX2)",
    ),
    (OLD_CPU, "packed-bfloat16", "cpu", "N:M", True, "emulated bfloat16, which packed-float32 avoids"),
    (OLD_CPU, "packed-float32", "cpu", "N:M", True, "portable kernel"),
    (OLD_CPU, "semi_structured-bfloat16", "cuda", "2:4", False, "torch sees no GPU"),
    (SERVER, "dense-bfloat16", "cpu", "all", True, "the CPU multiplies it"),
    (SERVER, "packed-bfloat16", "cpu", "unstructured", True, "avx512 kernel"),
    (ARM, "dense-bfloat16", "cpu", "all", True, "the CPU multiplies it"),
    (ARM, "packed-float32", "cpu", "unstructured", True, "neon kernel"),
    (MAC, "dense-bfloat16", "cpu", "all", None, "does not tell"),
    (MAC, "packed-float32", "cpu", "unstructured", True, "neon kernel, on one thread"),
    (NO_COMPILER, "packed-float32", "cpu", "N:M", True, "saves memory, costs time (avx2: no C compiler"),
    (OLD_GPU, "semi_structured-float16", "cuda", "2:4", False, "(sm_75): sm_75; needs sm_80 or newer"),
    (OLD_GPU, "dense-bfloat16", "cuda", "all", False, "no bfloat16 products"),
    (OLD_GPU, "dense-float16", "cuda", "all", True, "zeros are multiplied"),
    (NEW_GPU, "semi_structured-bfloat16", "cuda", "2:4", True, "sparse tensor cores"),
    (NEW_GPU, "packed-bfloat16", "cuda", "all", False, "no GPU kernel"),
    (OUTDATED, "dense-float32", "cpu", "all", False, "no level can be unpacked: of another build; reinstall"),
    (OUTDATED, "dense-float16", "cuda", "all", False, "no level can be unpacked: of another build; reinstall"),
    (OUTDATED, "packed-bfloat16", "cuda", "all", False, "no GPU kernel"),
]


@pytest.mark.parametrize(("facts", "way", "device", "levels", "works", "reason"), TABLE)
def test_what_a_machine_can_do(facts, way, device, levels, works, reason):
    rows = [row for row in verdicts(facts) if (row.way.name, row.device, row.levels) == (way, device, levels)]
    assert len(rows) == 1
    assert rows[0].works is works
    assert reason in rows[0].reason


def test_bench_gets_only_what_certainly_exists():
    def names(facts, device):
        return [way.name for way in existing_ways(verdicts(facts), device)]

    assert names(OLD_CPU, "cpu") == ["dense-float32", "packed-bfloat16", "packed-float32"]
    assert names(MAC, "cpu") == ["dense-float32", "packed-bfloat16", "packed-float32"], "what is unknown is not timed"
    assert names(OLD_GPU, "cuda") == ["dense-float16"]
    assert names(MAC, "cuda") == []
    assert names(OUTDATED, "cpu") == names(OUTDATED, "cuda") == []


def test_the_runtimes_are_asked(monkeypatch):
    facts = read_facts()
    assert (facts.instruction_paths, facts.active_path) == (native.instruction_paths(), native.active_path())
    monkeypatch.setenv(native.VARIABLE, "torch")
    assert read_facts().active_path == "torch"

    monkeypatch.setattr("elastic_sparsity.doctor.semi_structured_problem", lambda device: f"{device} is too old")
    found = types.SimpleNamespace(name="T4", major=7, minor=5, total_memory=16, gcnArchName="gfx90a")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: found)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    expected = gpu(
        name="T4", architecture="sm_75", memory_bytes=16, multiplies_bfloat16=False,
        semi_structured_problem="cuda:0 is too old",
    )  # fmt: skip
    assert read_facts().gpus == (expected,)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert read_facts().gpus[0].architecture == "gfx90a"


X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_vbmi2 avx512_bf16\n"
PHONE = (
    "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd46\n\n"
    "processor\t: 7\nFeatures\t: fp asimd bf16 sve2\nCPU part\t: 0xd48\n"
)


def test_linux_tells_model_and_flags():
    model, flags = parse_cpuinfo(X86)
    assert model == "AMD EPYC"
    assert known_features(flags) == {"avx2", "avx512f", "avx512_vbmi2", "avx512_bf16"}
    model, flags = parse_cpuinfo(PHONE)
    assert model == "Arm, CPU part 0xd46, 0xd48"
    assert flags == {"fp", "asimd", "bf16"}, "only what every core has"
    assert known_features(flags) == {"neon", "bf16"}
    assert parse_cpuinfo("") == (None, frozenset())


def test_a_system_that_tells_nothing_is_unknown(monkeypatch, tmp_path):
    def no_file(*_args, **_options):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", no_file)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    facts = read_facts()
    assert facts.features is None and bfloat16_on_cpu(facts) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"arm_bf16": True, "neon": True, "sve": False})
    assert read_facts().features == {"neon", "bf16"}


def test_an_outdated_library_is_told_not_raised(monkeypatch, tiny_checkpoint):
    """A pull without a new build: `doctor` must say so, and torch's code stays in reach."""
    monkeypatch.setattr(native, "_VERSION", 99)
    for name in ("_library", "library_problem"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)
    if native.library_file() is None:
        pytest.skip("no compiled library here")
    monkeypatch.delenv(native.VARIABLE, raising=False)
    facts = doctor.read_facts()
    assert facts.active_path is None and all("version 99" in x.problem for x in facts.instruction_paths[:-1])
    packed = [row for row in doctor.verdicts(facts) if row.way.runtime == "packed"]
    assert packed and not any(row.works for row in packed) and all("reinstall" in row.reason for row in packed)
    dense = next(row for row in doctor.verdicts(facts) if row.way.name == "dense-float32")
    with pytest.raises(ConfigError) as caught:
        ElasticModel.from_pretrained(tiny_checkpoint, 0.7)
    assert (dense.works, dense.reason) == (False, f"no level can be unpacked: {caught.value}")
    assert "none in use" in str(list(machine_table(facts).columns[1].cells))
    monkeypatch.setenv(native.VARIABLE, native.TORCH)
    facts = doctor.read_facts()
    assert facts.active_path == "torch"
    assert all(row.works for row in doctor.verdicts(facts) if row.way.runtime == "packed")
    ElasticModel.from_pretrained(tiny_checkpoint, 0.7)


def test_this_machine(monkeypatch):
    facts = read_facts()
    assert 0 < facts.free_bytes <= facts.memory_bytes and facts.cores >= 1
    assert facts.features is None or facts.features <= FEATURES.keys()
    report = json.loads(json.dumps(as_json(facts, verdicts(facts))))
    assert report["facts"]["torch"] == torch.__version__
    assert {row["way"] for row in report["ways"]} >= {"dense-float32", "packed-bfloat16"}
    assert report["ways"][0].keys() == {"way", "device", "levels", "works", "reason"}
