"""What this machine can do: its facts, and from them which ways of running a level exist here, each with the reason.

`verdicts` is a pure function of `Facts`, so that it can be asked about machines that are not here.
"""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from elastic_sparsity.free_memory import host_free
from elastic_sparsity.native import TORCH, InstructionPath, active_path, has_threads, instruction_paths
from elastic_sparsity.precision import multiplies_bfloat16
from elastic_sparsity.semi_structured import semi_structured_problem
from elastic_sparsity.ways import Way

# What matters to the kernels and to torch -> the names it has in /proc/cpuinfo and in torch.cpu.get_capabilities().
FEATURES = {
    "avx2": ("avx2",),
    "avx512f": ("avx512f", "avx512_f"),
    "avx512_vbmi2": ("avx512_vbmi2",),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_bf16",),
    "neon": ("asimd", "neon"),
    "bf16": ("bf16", "arm_bf16"),
}
BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU that torch can use.

    Attributes:
        architecture: "sm_90", or AMD's name of it.
        semi_structured_problem: why 2:4 cannot run there; None = it can.
    """

    name: str
    architecture: str
    memory_bytes: int
    multiplies_bfloat16: bool
    semi_structured_problem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What there is.

    Attributes:
        features: names out of FEATURES; None = this system does not tell.
        cores: that this process may use.
        threads: that torch uses.
        free_bytes: memory that can be had without swapping, within the limit of a container.
        instruction_paths: kernels of the packed runtime, best first.
        active_path: the one in use; "torch" = no compiled one, None = the compiled ones are damaged or outdated.
        kernel_threads: whether they can use torch's threads.
    """

    cpu: str
    architecture: str
    features: frozenset[str] | None
    cores: int
    threads: int
    memory_bytes: int
    free_bytes: int
    torch: str
    instruction_paths: tuple[InstructionPath, ...]
    active_path: str | None
    kernel_threads: bool
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether one way exists here.

    Attributes:
        device: "cpu" or "cuda".
        levels: which levels the row is about: "all", "unstructured", "N:M" or "2:4".
        works: None = unknown.
    """

    way: Way
    device: str
    levels: str
    works: bool | None
    reason: str


def read_facts() -> Facts:
    """The facts of this machine. What a system does not tell is None or "unknown", never a guess."""
    cpu, features = _read_cpu()
    return Facts(
        cpu=cpu,
        architecture=platform.machine() or "unknown",
        features=features,
        cores=_usable_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=psutil.virtual_memory().total,
        free_bytes=host_free(),
        torch=torch.__version__,
        instruction_paths=instruction_paths(),
        active_path=active_path(),
        kernel_threads=has_threads(),
        gpus=tuple(_read_gpus()),
    )


def _usable_cores() -> int:
    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinity
        return psutil.cpu_count() or 1


def _read_cpu() -> tuple[str, frozenset[str] | None]:
    try:
        model, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    except OSError:  # not Linux
        model, flags = None, frozenset()
    ask = getattr(torch.cpu, "get_capabilities", None)
    capabilities = ask() if ask is not None else {}
    if not flags:
        flags = frozenset(name for name, value in capabilities.items() if value is True)
    features = known_features(flags) if flags else None
    return model or capabilities.get("cpu_name") or platform.processor() or "unknown", features


def parse_cpuinfo(text: str) -> tuple[str | None, frozenset[str]]:
    """Model name and flags from Linux' /proc/cpuinfo: x86 has "flags", Arm "Features" and part numbers, no name.

    Flags are those that every core has: phones mix cores.
    """
    rows = [(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in text.splitlines())]
    flags = [frozenset(value.split()) for key, value in rows if key in ("flags", "Features")]
    model = next((value for key, value in rows if key in ("model name", "Hardware")), None)
    parts = sorted({value for key, value in rows if key == "CPU part"})
    if model is None and parts:
        model = f"Arm, CPU part {', '.join(parts)}"
    return model, frozenset.intersection(*flags) if flags else frozenset()


def known_features(flags: frozenset[str]) -> frozenset[str]:
    """Names of FEATURES among a system's own names."""
    return frozenset(name for name, aliases in FEATURES.items() if flags.intersection(aliases))


def _read_gpus() -> Iterator[Gpu]:
    if not torch.cuda.is_available():
        return
    for number in range(torch.cuda.device_count()):
        properties: Any = torch.cuda.get_device_properties(number)
        yield Gpu(
            name=properties.name,
            architecture=_gpu_architecture(properties),
            memory_bytes=properties.total_memory,
            multiplies_bfloat16=multiplies_bfloat16("cuda"),
            semi_structured_problem=semi_structured_problem(f"cuda:{number}"),
        )


def _gpu_architecture(properties: Any) -> str:
    if torch.version.hip is not None:
        return str(properties.gcnArchName)
    return f"sm_{properties.major}{properties.minor}"


def verdicts(facts: Facts) -> list[Verdict]:
    """Every way of this package, whether it exists on a machine of these facts, and why or why not."""
    rows = [*_dense_on_cpu(facts), *_packed_on_cpu(facts), *_on_gpus(facts)]
    if facts.active_path is not None:
        return rows
    reason = f"no level can be unpacked: {_kernels_problem(facts)}"  # whichever way it is to run then
    return [row if row.works is False else replace(row, works=False, reason=reason) for row in rows]


def existing_ways(rows: list[Verdict], device: str) -> list[Way]:
    """Ways that work for some level on "cpu" or "cuda", in the rows' order."""
    return list(dict.fromkeys(row.way for row in rows if row.device == device and row.works))


def _dense_on_cpu(facts: Facts) -> Iterator[Verdict]:
    def row(dtype: str, works: bool | None, reason: str) -> Verdict:
        return Verdict(way=Way(runtime="dense", dtype=dtype), device="cpu", levels="all", works=works, reason=reason)

    yield row("float32", True, "every CPU has it; zeros are multiplied like other weights")
    native = bfloat16_on_cpu(facts)
    if native is None:
        yield row("bfloat16", None, "this system does not tell whether the CPU multiplies bfloat16")
    elif native:
        yield row("bfloat16", True, "the CPU multiplies it; zeros are multiplied like other weights")
    else:
        yield row("bfloat16", False, "the CPU has no bfloat16 products; emulated ones are slower than float32")


def bfloat16_on_cpu(facts: Facts) -> bool | None:
    """Whether the CPU multiplies bfloat16 natively; None = unknown."""
    return None if facts.features is None else bool(facts.features & BFLOAT16_FEATURES)


def _packed_on_cpu(facts: Facts) -> Iterator[Verdict]:
    reason = _packed_reason(facts)
    emulated = "; what is not packed runs in emulated bfloat16, which packed-float32 avoids"
    for dtype in ("bfloat16", "float32"):
        hint = emulated if dtype == "bfloat16" and bfloat16_on_cpu(facts) is False else ""
        for levels in ("unstructured", "N:M"):
            way = Way(runtime="packed", dtype=dtype)
            works = facts.active_path is not None
            yield Verdict(way=way, device="cpu", levels=levels, works=works, reason=reason + hint * works)


def _packed_reason(facts: Facts) -> str:
    if facts.active_path is None:
        return _kernels_problem(facts)
    refused = [f"{path.name}: {path.problem}" for path in facts.instruction_paths if path.problem is not None]
    why = f" ({'; '.join(refused)})" if refused else ""
    if facts.active_path == TORCH:
        return f"in pure torch: saves memory, costs time{why}"
    threads = "" if facts.kernel_threads else ", on one thread: torch has another OpenMP than GNU's here"
    slow = f": saves memory, costs time{why}" if facts.active_path == "portable" else ""
    return f"{facts.active_path} kernel{threads}{slow}"


def _kernels_problem(facts: Facts) -> str:
    """Why the compiled library is of no use, where it is there and is not; every path then has the same problem."""
    return str(facts.instruction_paths[0].problem)


def _on_gpus(facts: Facts) -> Iterator[Verdict]:
    if not facts.gpus:
        for runtime, levels in (("dense", "all"), ("semi_structured", "2:4")):
            way = Way(runtime=runtime, dtype="bfloat16")
            yield Verdict(way=way, device="cuda", levels=levels, works=False, reason="torch sees no GPU")
        return
    gpu = facts.gpus[0]  # what "cuda" means
    where = f"{gpu.name} ({gpu.architecture})"

    def row(runtime: str, dtype: str, levels: str, works: bool, reason: str) -> Verdict:
        way = Way(runtime=runtime, dtype=dtype)
        return Verdict(way=way, device="cuda", levels=levels, works=works, reason=f"{where}: {reason}")

    zeros = "zeros are multiplied like other weights"
    native = gpu.multiplies_bfloat16
    yield row("dense", "bfloat16", "all", native, zeros if native else "it has no bfloat16 products")
    yield row("dense", "float16", "all", True, zeros)
    yield row("packed", "bfloat16", "all", False, "the packed runtime has no GPU kernel")
    problem = gpu.semi_structured_problem
    for dtype, fits in (("bfloat16", native), ("float16", True)):
        reason = problem or ("2:4 runs on sparse tensor cores" if fits else "it has no bfloat16 products")
        yield row("semi_structured", dtype, "2:4", problem is None and fits, reason)


def as_json(facts: Facts, rows: list[Verdict]) -> Mapping[str, Any]:
    """Facts and verdicts as plain JSON."""
    found = asdict(facts)
    found["features"] = None if facts.features is None else sorted(facts.features)
    ways = [{"way": r.way.name, **{k: v for k, v in asdict(r).items() if k != "way"}} for r in rows]
    return {"facts": found, "ways": ways}
