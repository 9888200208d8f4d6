"""Made-up machines, and a profile made up for a checkpoint."""

from elastic_sparsity.device_profile import Profile
from elastic_sparsity.doctor import Facts, Gpu
from elastic_sparsity.native import InstructionPath

GB = 10**9


def machine(**changes):
    """A desktop without anything special; `changes` replace facts."""
    facts = {
        "cpu": "Made Up 1", "architecture": "x86_64", "features": frozenset({"avx2"}), "cores": 4, "threads": 2,
        "memory_bytes": 16 * GB, "free_bytes": 8 * GB, "torch": "2.13.0", "instruction_paths": (),
        "active_path": "torch", "kernel_threads": True,
        "gpus": (),
    }  # fmt: skip
    return Facts(**{**facts, **changes})


def kernels(active, **problems):
    """Facts of a machine with a packed runtime: kernels by name, and why they cannot run."""
    paths = tuple(InstructionPath(name=name, problem=problem) for name, problem in problems.items())
    return {"instruction_paths": paths, "active_path": active}


def gpu(**changes):
    facts = {
        "name": "Made Up GPU", "architecture": "sm_90", "memory_bytes": 80 * GB,
        "multiplies_bfloat16": True, "semi_structured_problem": None,
    }  # fmt: skip
    return Gpu(**{**facts, **changes})


def profile_data(rows, *, kind="measured", ways=(("dense", "float32"), ("packed", "float32"))):
    """JSON of a profile. `rows`: (checkpoint_id, level, way, milliseconds a token at batch 1)."""
    return {
        "format": "elastic_sparsity.device_profile",
        "format_version": 1,
        "kind": kind,
        "name": "made up",
        "source": "a test",
        "device": {
            "kind": "cpu", "model": "Made Up 1", "architecture": "x86_64", "features": None, "threads": 2,
            "memory_bytes": 16 * GB, "torch": "2.13.0", "instruction_path": "avx2",
        },
        "protocol": {"prompt": 16, "new_tokens": 4, "repeats": 2},
        "ways": {
            f"{runtime}-{dtype}": {
                "runtime": runtime, "dtype": dtype, "overhead_s": 1e-4, "bytes_per_s": 1e8, "fit_error": None,
            }
            for runtime, dtype in ways
        },
        "measurements": [
            {
                "checkpoint_id": checkpoint_id, "level": level, "way": way, "disk_bytes": 100, "resident_bytes": 200,
                "streamed_bytes": 150, "linears": 14, "prefill": {"tokens_per_s": 1000.0, "speedup": 1.0},
                "decode": [{"batch": 1, "step_s": ms / 1000, "speedup": 1.0}],
            }
            for checkpoint_id, level, way, ms in rows
        ],
        "shapes": [],
    }  # fmt: skip


def made_up_profile(rows, **options):
    return Profile.model_validate(profile_data(rows, **options))
