"""Which module may import what, as a table that the test executes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "elastic_sparsity"
ALLOWED = {
    # layer 0: plain data
    "errors": set(),
    "ladder": {"errors"},
    "config_errors": {"errors"},
    "config": {"config_errors", "errors", "ladder"},
    # layer 1: tensors or plain numbers only
    "precision": {"torch"},
    "importance": {"torch", "errors"},
    "masks": {"torch", "errors"},
    "mask_moves": {"torch", "errors"},
    "allocation": {"errors", "ladder"},
    "search": {"allocation", "errors"},
    "descent": {"allocation", "errors"},
    "allocation_file": {"allocation", "errors", "files"},
    "allocation_plot": {"allocation_file", "errors"},
    "soft_mask": {"torch", "errors"},
    "metric_refresh": {"torch", "errors"},
    "channel_order": {"torch", "errors"},
    "head_basis": {"torch", "errors", "metric_refresh"},
    "spectral_loss": {"torch"},
    "mixer": {"torch", "errors"},
    "sparsegpt": {"torch", "errors", "importance"},
    "structured_order": {"torch", "errors"},
    "structured_sizes": {"errors"},
    "unit_budget": {"descent", "errors"},
    "packing": {"torch", "numpy", "errors"},
    "packed_weight": {"torch", "packing", "precision"},
    "native": {"torch", "errors", "packed_weight"},
    "fused": {"torch", "errors", "native"},
    "bitmask": {"torch", "numpy", "errors", "packing", "precision"},
    "files": {"safetensors", "errors"},
    "allocator": set(),
    "activations": {"torch", "numpy", "errors", "files"},
    "workers": {"torch", "accelerate", "errors"},
    "run_folder": {"torch", "errors", "files", "tensor_file", "tensor_file_writer"},
    "tensor_file": {"torch", "safetensors", "errors"},
    "tensor_file_writer": {"torch", "errors"},
    "shells": {"torch", "numpy", "errors", "ladder", "masks", "packing", "precision"},
    "manifest": {"errors", "ladder", "shells"},
    "checkpoint": {
        "torch", "safetensors", "checkpoint_writer", "errors", "files", "ladder", "manifest", "precision", "shells",
        "tensor_file",
    },
    "checkpoint_writer": {
        "torch", "errors", "files", "ladder", "manifest", "precision", "shells", "tensor_file_writer",
    },
    "hub": {"errors", "files", "manifest"},
    "inspection": {"checkpoint", "hub", "ladder", "shells"},
    "transfer": {"checkpoint", "errors", "files", "hub", "manifest"},
    "terminal": set(),
    "records": {"files", "terminal"},
    "report": {"errors", "terminal"},
    "ways": {"checkpoint", "ladder", "packed_weight", "precision", "semi_structured", "shells"},
    "free_memory": {"torch", "precision"},
    "doctor": {"torch", "free_memory", "native", "precision", "semi_structured", "ways"},
    "device_profile": {"checkpoint", "errors", "files", "ladder", "ways"},
    "device_report": {"device_profile", "doctor", "report", "ways"},
    "choosing": {
        "torch", "checkpoint", "device_profile", "errors", "hub", "inspection", "ladder", "manifest", "placement",
        "precision", "report", "ways",
    },
    # layer 2: know Hugging Face models
    "arch": {"torch", "transformers", "errors"},
    "tiny": {"torch", "transformers", "arch"},
    "wiring": {"torch", "arch", "errors"},
    "folding": {"torch", "arch", "errors"},
    "absorption": {"torch", "errors", "folding", "wiring"},
    "rotation": {"torch", "arch", "errors", "folding", "wiring"},
    "residual": {"torch", "arch", "errors", "folding", "wiring"},
    "functional_fold": {"torch", "absorption", "arch"},
    "sized": {"torch", "transformers", "arch", "errors", "wiring"},
    "structured_parts": {"torch", "accelerate", "arch", "errors", "sized", "structured_sizes", "wiring"},
    "weight_stream": {"torch", "transformers", "accelerate", "arch", "errors", "sized", "tensor_file"},
    "models": {
        "torch", "safetensors", "transformers", "gguf", "arch", "errors", "files", "induction_file", "precision",
        "sized", "tiny", "weight_stream",
    },
    "model_shapes": {"torch", "transformers", "arch", "errors", "files", "models", "precision", "tiny", "wiring"},
    "induction_file": {"torch", "arch", "errors", "files", "tensor_file", "tensor_file_writer"},
    "generating": {"torch", "transformers"},
    "data": {"torch", "datasets", "errors", "files", "generating"},
    "blocks": {"torch", "activations", "errors"},
    "fused_layers": {"torch", "fused"},
    "attention": {"torch", "transformers", "fused"},
    "adapters": {"torch", "arch", "errors", "ladder", "masks", "precision"},
    "sharding": {"torch", "adapters"},
    "block_state": {"torch", "adapters", "arch", "ladder", "shells"},
    "semi_structured": {"torch", "arch", "errors"},
    "gguf_vocab": {"gguf", "errors"},
    "export_gguf": {"torch", "gguf", "arch", "errors", "gguf_vocab", "wiring"},
    "export_onnx": {"torch", "onnx", "openvino", "errors"},
    "packed_files": {
        "torch", "safetensors", "accelerate", "arch", "bitmask", "errors", "files", "precision", "semi_structured",
        "sized",
    },
    # layer 3: stages
    "calibrate": {"torch", "activations", "arch", "blocks", "importance"},
    "calibration_text": {"torch", "safetensors", "arch", "config", "data", "errors", "files", "models", "precision"},
    "distill": {"torch", "activations", "adapters", "blocks", "errors", "ladder", "mixer"},
    "end_to_end": {"torch", "adapters", "arch", "distill", "errors", "fused", "ladder"},
    "induction": {
        "torch", "adapters", "arch", "blocks", "distill", "end_to_end", "errors", "feature_stage", "importance",
        "ladder", "soft_mask",
    },
    "feature_stage": {"torch", "errors", "functional_fold", "ladder", "soft_mask", "spectral_loss"},
    "absorbed_stage": {
        "torch", "absorption", "arch", "blocks", "calibrate", "end_to_end", "errors", "feature_stage",
        "functional_fold", "head_basis", "importance", "ladder", "masks", "metric_refresh", "soft_mask",
        "spectral_loss",
    },
    "fold_choice": {
        "torch", "arch", "blocks", "calibrate", "channel_order", "errors", "feature_stage", "functional_fold",
        "head_basis", "importance", "ladder", "metric_refresh", "rotation", "soft_mask", "wiring",
    },
    "residual_order": {
        "torch", "arch", "calibrate", "channel_order", "feature_stage", "fold_choice", "importance", "ladder",
        "residual", "wiring",
    },
    "gains": {"torch", "arch", "blocks", "feature_stage", "functional_fold", "ladder"},
    "inducing": {
        "torch", "absorbed_stage", "absorption", "arch", "attention", "calibration_text", "config", "distill",
        "errors", "feature_stage", "files", "fold_choice", "folding", "fused_layers", "induction",
        "induction_file", "ladder", "models", "precision", "residual", "residual_order", "wiring", "workers",
    },
    "block_phase": {
        "torch", "activations", "adapters", "arch", "block_state", "blocks", "calibrate", "config", "distill", "errors",
        "importance", "ladder", "masks", "mixer", "models", "precision", "run_folder", "workers",
    },
    "supernet": {"torch", "allocation", "arch", "blocks", "calibrate", "errors", "importance", "ladder"},
    "allocating": {
        "allocation", "allocation_file", "attention", "calibration_text", "config", "data", "errors", "files",
        "descent", "fused_layers", "models", "precision", "search", "supernet", "torch", "wiring",
    },
    "baselines": {
        "torch", "arch", "blocks", "calibrate", "errors", "importance", "ladder", "mask_moves", "masks", "sparsegpt",
    },
    "structured": {
        "torch", "arch", "blocks", "calibrate", "errors", "importance", "structured_order", "structured_parts",
        "structured_sizes", "wiring",
    },
    "unit_net": {
        "torch", "arch", "blocks", "calibrate", "errors", "structured", "structured_order", "structured_parts",
        "structured_sizes", "wiring",
    },
    "structured_search_file": {"errors", "files"},
    "structured_search": {
        "torch", "allocation", "arch", "attention", "descent", "errors", "fused_layers", "sized", "structured_parts",
        "structured_search_file", "structured_sizes", "supernet", "unit_budget", "unit_net", "wiring",
    },
    "structured_tuning": {"torch", "arch", "attention", "distill", "end_to_end", "fused_layers"},
    "pruning": {
        "torch", "arch", "calibration_text", "config", "data", "descent", "end_to_end", "errors", "files", "models",
        "precision", "structured", "structured_parts", "structured_search", "structured_search_file",
        "structured_sizes", "structured_tuning",
    },
    "structured_section": {
        "torch", "arch", "checkpoint", "errors", "ladder", "packing", "structured_parts", "structured_sizes",
        "tensor_file", "wiring",
    },
    "adding": {
        "torch", "arch", "calibration_text", "checkpoint", "checkpoint_writer", "config", "data", "errors", "hub",
        "ladder", "models", "precision", "pruning", "skeleton", "structured", "structured_parts",
        "structured_search", "structured_section", "structured_sizes", "files", "manifest", "run_folder",
    },
    "placement": {"torch", "accelerate", "errors", "precision", "semi_structured", "ways"},
    "packed": {"torch", "adapters", "errors", "native", "packed_weight"},
    "decoding": {
        "torch", "numpy", "adapters", "errors", "ladder", "native", "packed_weight", "packing", "precision", "shells",
    },
    "skeleton": {
        "torch", "transformers", "accelerate", "arch", "checkpoint", "errors", "ladder", "sized", "structured_section",
    },
    "slicing": {
        "torch", "transformers", "accelerate", "checkpoint", "choosing", "decoding", "errors", "files", "hub", "ladder",
        "native", "packed", "packed_weight", "placement", "semi_structured", "skeleton",
        "structured_section", "tensor_file", "ways",
    },
    "verify": {
        "torch", "safetensors", "arch", "checkpoint", "errors", "hub", "ladder", "shells", "slicing", "wiring",
    },
    "overlay": {
        "torch", "safetensors", "checkpoint", "checkpoint_writer", "errors", "files", "manifest", "models", "packing",
        "shells", "tensor_file_writer",
    },
    "peft_export": {"torch", "safetensors", "peft", "arch", "checkpoint", "errors", "files", "hub", "manifest"},
    "exports": {
        "torch", "checkpoint", "errors", "export_gguf", "export_onnx", "files", "hub", "ladder", "packed_files",
        "placement", "precision", "slicing",
    },
    "evaluate": {"torch", "arch", "errors"},
    "task_files": {"torch", "numpy", "transformers", "datasets", "lm_eval", "errors", "files"},
    "zero_shot": {"torch", "numpy", "lm_eval", "arch", "errors", "precision", "report", "task_files"},
    "plan_sizes": {"allocation", "config", "data", "ladder", "model_shapes", "precision", "shells"},
    "structured_plan": {"descent", "model_shapes", "plan_sizes", "structured_sizes", "wiring"},
    "fold_plan": {"fold_choice", "plan_sizes"},
    "memory_plan": {"config", "files", "fold_plan", "masks", "model_shapes", "plan_sizes", "structured_plan"},
    "work_plan": {"allocation", "descent", "fold_plan", "plan_sizes", "structured_plan"},
    "probe": {
        "torch", "transformers", "activations", "arch", "attention", "block_phase", "blocks", "calibrate", "config",
        "distill", "fused_layers", "mixer", "models", "precision", "run_folder", "work_plan", "workers",
    },
    # layer 4: the flow
    "planning": {
        "torch", "adding", "allocation_file", "config", "errors", "free_memory", "memory_plan", "model_shapes",
        "plan_sizes", "precision", "probe", "supernet", "work_plan",
    },
    "preparing": {
        "torch", "adding", "allocation", "allocation_file", "allocator", "arch", "block_phase", "calibration_text",
        "config", "data", "errors", "free_memory", "inducing", "manifest", "model_shapes", "models", "plan_sizes",
        "planning", "precision", "run_folder", "supernet", "workers",
    },
    "pipeline": {
        "torch", "adapters", "adding", "allocating", "allocation_file", "allocator", "arch", "attention",
        "block_phase", "block_state", "calibration_text", "checkpoint", "checkpoint_writer", "config", "distill",
        "end_to_end", "errors", "files", "fused_layers", "inducing", "manifest", "precision", "preparing", "run_folder",
        "sharding", "shells", "supernet", "workers",
    },
    "quality_record": {"checkpoint", "config", "errors", "files", "ladder", "manifest", "run_folder"},
    "measure_memory": {
        "config", "errors", "free_memory", "model_shapes", "precision", "quality_record", "workers",
    },
    "measure": {
        "torch", "arch", "baselines", "calibration_text", "checkpoint", "config", "data", "errors", "evaluate", "files",
        "hub", "ladder", "models", "precision", "quality_record", "skeleton", "slicing", "workers", "zero_shot",
    },
    "report_results": {"errors", "files", "records"},
    "report_facts": {
        "checkpoint", "hub", "inspection", "ladder", "manifest", "models", "records", "report_results", "shells",
    },
    "report_words": {"report", "report_facts", "report_results"},
    "report_plots": {"report_facts", "report_words"},
    "report_page": {"report_facts", "report_words"},
    "model_card": {"report", "report_facts", "report_page", "report_results", "report_words"},
    "reporting": {
        "checkpoint", "errors", "files", "hub", "manifest", "model_card", "report_facts", "report_page", "report_plots",
    },
    "bench": {
        "torch", "transformers", "calibration_text", "checkpoint", "device_profile", "doctor", "errors", "free_memory",
        "generating", "hub", "ladder", "slicing", "ways",
    },
    # layer 5
    "__main__": {"cli"},
    "cli_device": {"bench", "device_profile", "device_report", "doctor", "errors", "files", "precision", "terminal"},
    "cli_eval": {"doctor", "errors", "files", "measure", "precision", "report", "task_files", "zero_shot"},
    "cli_export": {"transformers", "exports", "terminal"},
    "cli_induce": {"config", "inducing", "terminal"},
    "cli_search": {"allocating", "allocation_plot", "config", "descent", "errors", "search", "terminal"},
    "cli_plan": {"free_memory", "config", "errors", "plan_sizes", "planning", "report"},
    "cli_progress": {"terminal", "transformers"},
    "cli_prune": {"errors", "pruning", "sized", "structured", "structured_search", "structured_sizes", "terminal"},
    "cli_structured": {"adding", "checkpoint", "cli_prune", "errors", "report", "structured_sizes", "terminal"},
    "cli_report": {"reporting", "terminal"},
    "cli": {
        "checkpoint", "choosing", "cli_device", "cli_eval", "cli_export", "cli_induce", "cli_plan",
        "cli_progress", "cli_prune", "cli_report", "cli_search", "cli_structured", "config", "errors", "files",
        "hub", "inspection", "measure", "measure_memory", "overlay", "peft_export", "pipeline", "precision",
        "quality_record", "report", "sized", "slicing", "structured_sizes", "terminal", "transfer", "verify", "workers",
    },
}  # fmt: skip
WATCHED = {"torch", "numpy", "safetensors", "transformers", "peft", "datasets", "lm_eval", "accelerate", "gguf", "onnx",
           "openvino"}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} uses a relative import"
            names = [node.module]
        for name in names:
            if name.startswith("elastic_sparsity.") or name.split(".")[0] in WATCHED:
                yield name.removeprefix("elastic_sparsity.").split(".")[0]


@pytest.mark.parametrize("path", [p for p in PACKAGE.glob("*.py") if p.stem != "__init__"], ids=lambda p: p.stem)
def test_module_imports_only_what_its_row_allows(path):
    extra = set(imported(path)) - ALLOWED[path.stem]
    assert not extra, f"{path.stem}: extra imports {extra}"


def test_the_table_has_no_dead_rows():
    assert set(ALLOWED) == {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}


def test_import_loads_no_slow_library():
    slow = ("transformers", "peft", "datasets", "lm_eval")
    code = f"import sys, elastic_sparsity; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_modules_stay_small():
    sizes = {p.name: len(p.read_text().splitlines()) for p in PACKAGE.glob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 400} == {}
