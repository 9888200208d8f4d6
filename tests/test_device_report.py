"""Tables and sentences about devices: the verdict follows the numbers, and an estimate is called one everywhere."""

import pytest
from machines import gpu, kernels, machine, made_up_profile, profile_data
from rich.console import Console

from elastic_sparsity.device_profile import PrefillEntry, Profile, read_profile
from elastic_sparsity.device_report import (
    lines_table,
    machine_table,
    shapes_table,
    sizes_table,
    speed_table,
    verdict_lines,
    ways_table,
)
from elastic_sparsity.doctor import verdicts


def shown(table, width=200):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return " ".join(capture.get().split())


def timed_profile(*, packed_speedups, packed_bytes):
    """Dense at 10 and 20 ms a step, batches 1 and 8; packed by its speedups."""
    data = profile_data([("c", "0.7", "dense-float32", 10.0), ("c", "0.7", "packed-float32", 1.0)])
    dense, packed = data["measurements"]
    dense["decode"] = [{"batch": 1, "step_s": 0.01, "speedup": 1.0}, {"batch": 8, "step_s": 0.02, "speedup": 1.0}]
    packed["decode"] = [
        {"batch": row["batch"], "step_s": row["step_s"] / speedup, "speedup": speedup}
        for row, speedup in zip(dense["decode"], packed_speedups, strict=True)
    ]
    dense["streamed_bytes"], packed["streamed_bytes"] = 100, packed_bytes
    data["shapes"] = [
        {"outputs": 64, "inputs": 32, "level": "0.7", "way": "packed-float32", "tokens": 1, "seconds": 2.5e-5}
    ]
    return Profile.model_validate(data)


@pytest.mark.parametrize(
    ("speedups", "size", "lines"),
    [
        (
            (2.1, 0.8),
            41,
            [
                "packed-float32 at 70 % decodes faster than dense-float32 and reads 0.41 of its bytes: use it at "
                "batch 1 (2.10x).",
                "packed-float32 at 70 % is slower than dense-float32 and reads 0.41 of its bytes: use it only where "
                "memory is short, at batch 8 (0.80x).",
            ],
        ),
        (
            (1.5, 1.06),
            50,
            [
                "packed-float32 at 70 % decodes faster than dense-float32 and reads 0.50 of its bytes: use it at "
                "batch 1 (1.50x), batch 8 (1.06x).",
            ],
        ),
        (
            (1.04, 0.96),
            60,
            [
                "packed-float32 at 70 % is no faster than dense-float32 and reads 0.60 of its bytes: use it only where "
                "memory is short, at batch 1 (1.04x), batch 8 (0.96x).",
            ],
        ),
        (
            (0.5, 0.5),
            100,
            ["packed-float32 at 70 % gains nothing: use dense-float32 at batch 1 (0.50x), batch 8 (0.50x)."],
        ),
    ],
)
def test_the_verdict_in_words(speedups, size, lines):
    assert list(verdict_lines(timed_profile(packed_speedups=speedups, packed_bytes=size))) == lines


def test_slower_prompts_are_told():
    profile = timed_profile(packed_speedups=(2.0, 2.0), packed_bytes=41)
    slow = profile.measurements[1].model_copy(update={"prefill": PrefillEntry(tokens_per_s=400.0, speedup=0.4)})
    profile = profile.model_copy(update={"measurements": [profile.measurements[0], slow]})
    assert list(verdict_lines(profile))[1:] == ["packed-float32 at 70 % reads prompts slower than dense (0.40x)."]


def test_tables_hold_the_numbers():
    profile = timed_profile(packed_speedups=(2.0, 0.5), packed_bytes=41)
    text = shown(speed_table(profile))
    for part in ("70 %", "packed-float32", "batch 8", "200", "2.00x", "0.50x", "1000"):
        assert part in text
    assert "200 B │ 41 B │ 100 B" in shown(sizes_table(profile))
    assert "64 x 32 │ 70 % │ packed-float32 │ 25.0" in shown(shapes_table(profile))
    assert "packed-float32 │ 0.1 │ 100 │ not measured" in shown(lines_table(profile))


def test_every_table_of_an_estimate_says_so():
    phone = read_profile("phone")
    for table in (speed_table, sizes_table, shapes_table, lines_table):
        assert "phone (estimate, not measured)" in shown(table(phone))
        assert "estimate" not in shown(table(made_up_profile([("c", "0.7", "dense-float32", 1.0)])))
    assert list(verdict_lines(phone)) == []


def test_names_fit_into_80_columns():
    text = shown(speed_table(timed_profile(packed_speedups=(2.0, 0.5), packed_bytes=41)), width=80)
    assert "…" not in text
    assert "semi_structured-bfloat16" in shown(ways_table(verdicts(machine())), width=80)


def test_the_machine():
    facts = machine(gpus=(gpu(name="[bold]X"),), **kernels("avx2", avx512="no AVX-512", avx2=None))
    text = shown(machine_table(facts))
    for part in (
        "Made Up 1",
        "avx2 yes, avx512f no",
        "16.0 GB, 8.0 GB free",
        "2 threads on 4 cores",
        "[bold]X",
        "sm_90",
    ):
        assert part in text
    assert "avx2 in use; avx512 no (no AVX-512), avx2 yes" in text
    text = shown(machine_table(machine(features=None)))
    assert "unknown: this system does not tell" in text and "none that torch can use" in text
    assert "unknown" in shown(ways_table(verdicts(machine(features=None))))
