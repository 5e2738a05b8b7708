"""Settings that must be in place before torch and triton are imported by a test, and what keeps the suite short."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

# Without a GPU, Triton kernels run in Triton's interpreter: same code, real numbers, small shapes.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# The interpreter's products are NumPy's. OpenBLAS picks a kernel by the processor, and those of some add up in an order
# that depends on the block's shape; this one is on every x86-64 machine, and gives the same bits for every tiling.
if platform.machine() == "x86_64":
    os.environ.setdefault("OPENBLAS_CORETYPE", "Nehalem")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A graph from the cache of an earlier run was planned in another process: a test would see nothing of it.
os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
# Every worker compiles by itself: a pool of its own would import PyTorch in further processes on the same cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

LONGEST = (
    "compiler/test_backend.py",
    "runtime/test_train.py",
    "runtime/test_sturdy.py",
    "runtime/test_trainer.py",
    "runtime/test_two_processes.py",
    "test_examples.py",
    "runtime/test_smaller.py",
    "models/test_smollm2.py",
    "compiler/test_equalities.py",
    "compiler/test_explain_verify.py",
    "compiler/test_caches.py",
    "test_benchmarks.py",
    "runtime/test_learning_rates.py",
    "passes/test_nf4.py",
    "passes/test_cross_entropy.py",
    "test_sweep.py",
    "passes/test_lora_linear.py",
    "memory/test_same_numbers.py",
    "kernels/test_low_rank_product.py",
)
"""Files that are begun first, so that no worker is alone with one of them at the end (``--no-loadscope-reorder``)."""


SLOW = (
    "compiler/test_backend.py::test_inductor_lowering_equals_eager[tiny-gemma2-0.0-None]",
    "compiler/test_backend.py::test_inductor_lowering_equals_eager[tiny-phi3-0.1-0]",
    "compiler/test_backend.py::test_inductor_lowering_equals_eager[tiny-qwen3-None-0]",
    "compiler/test_equalities.py::test_gradient_checkpointing[True]",
    "compiler/test_explain_verify.py::test_verify_names_the_place[wrong0-model.layers.0.mlp]",
    "kernels/test_capped_attention.py::test_compiles_for_hopper",
    "kernels/test_low_rank_product.py::test_every_tiling_compiles_for_hopper_and_fits_its_shared_memory",
    "memory/test_adapters.py::test_no_plan_changes_a_bit",
    "memory/test_nf4_plan.py::test_through_inductor",
    "memory/test_partition.py::test_inductor_with_eagers_dropout_masks[keep]",
    "memory/test_same_numbers.py::test_through_inductor_with_dropout",
    "memory/test_slices.py::test_through_inductor_with_several_lengths",
    "memory/test_spans.py::test_the_same_bits[by way of the host-dynamic-]",
    "memory/test_spans.py::test_the_same_bits[on the device-dynamic-]",
    "models/test_smollm2.py::test_it_answers_in_16_and_in_4_bits",
    "passes/test_cross_entropy.py::test_no_value_of_the_graph_is_as_large_as_the_logits[dynamic-cohere]",
    "passes/test_cross_entropy.py::test_no_value_of_the_graph_is_as_large_as_the_logits[dynamic-granite]",
    "passes/test_cross_entropy.py::test_no_value_of_the_graph_is_as_large_as_the_logits[dynamic-llama]",
    "passes/test_nf4.py::test_every_product_of_a_model_is_found[dtype0-True-False]",
    "passes/test_nf4.py::test_every_product_of_a_model_is_found[dtype1-False-False]",
    "passes/test_nf4.py::test_gradients_equal_eager_in_float32[static]",
    "passes/test_nf4.py::test_gradients_in_bfloat16_are_no_further_from_the_truth_than_eager",
    "passes/test_nf4.py::test_under_autocast[dtype0-compute_dtype0-True]",
    "passes/test_nf4.py::test_under_autocast[dtype2-compute_dtype2-False]",
    "runtime/test_image_shapes.py::test_random_sizes_share_few_graphs[idefics3-_squares]",
    "runtime/test_image_shapes.py::test_random_sizes_share_few_graphs[paddleocr_vl-_patches_by_rows]",
    "runtime/test_image_shapes.py::test_random_sizes_share_few_graphs[qwen3_vl-_patches]",
    "runtime/test_learning_rates.py::test_the_compiled_step_with_other_adapters[rsLoRA]",
    "runtime/test_train.py::test_a_signal_and_going_on[2-130]",
    "test_benchmark_grpo.py::test_rows_are_equal_in_loss",
    "test_benchmark_long_context.py::test_a_whole_step",
    "test_benchmark_rollout.py::test_rows_say_how_fast_and_how_right",
    "test_benchmark_rollout.py::test_trained_weights_continue_text",
    "test_benchmarks.py::test_a_failure_is_a_row_and_is_tried_again",
    "test_benchmarks.py::test_models_of_images_are_measured_and_equal_in_loss",
    "test_benchmarks.py::test_systems_are_checked_against_float32",
    "test_benchmarks.py::test_systems_at_one_time_are_timed_alone",
    "test_sweep.py::test_architecture_is_equal_under_inductor[gpt_oss]",
    "test_sweep.py::test_architecture_is_equal_under_inductor[olmo2]",
)
"""More of what other tests try as well: other models, dtypes and ways through Inductor. ``make test-all`` runs them."""


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    name = f"{item.path.relative_to(Path(__file__).parent).as_posix()}::{item.name}"
    # A backend that warns goes on with less, and gradients are right all the same: nothing else would notice.
    item.add_marker(pytest.mark.filterwarnings("error::unsloth.passes.runner.CompilerWarning"))
    if name in SLOW or name.partition("[")[0] in SLOW:
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, order = Path(__file__).parent, {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


def pytest_collection_finish() -> None:
    # pytest listens to every logger that does not propagate, and as long as anybody listens to this one, PyTorch
    # prints each graph of each compilation for it, several times.
    logging.getLogger("torch.__trace").propagate = True
    _look_for_builtins_once()
    _keep_what_is_there()
    gc.set_threshold(100_000, 20, 50)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is not None and nextitem.path != item.path:
        _keep_what_is_there()


def _look_for_builtins_once() -> None:
    """A third of what Triton's interpreter takes is looking through its language at each call of each function."""
    if (interpreter := sys.modules.get("triton.runtime.interpreter")) is None:
        return
    is_builtin = interpreter.tl.core.is_builtin

    @functools.cache
    def names(part: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(part) if is_builtin(member)]

    def patch(part: Any, *rest: Any) -> None:
        for name in names(part):
            if is_builtin(member := getattr(part, name)):  # else a caller has done so
                interpreter._patch_attr(part, name, member, *rest)

    interpreter._patch_builtin = patch


def _keep_what_is_there() -> None:
    """What is imported lives as long as the process: a million objects that need not be looked through again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions find their objects alive at the end, and say so
