"""Where does the first step's time go? Cold and warm, stage by stage, each in a process of its own.

    python -m benchmarks.first_step [--model tiny-llama] [--layers 32] [--batch 2] [--seq 64] [--lowering inductor]
    python -m benchmarks.first_step --ours [--at-most 5]        # retrace and passes alone, in processor time
    python -m benchmarks.first_step --stacks                    # and below which functions the time went

A LoRA step (rank 16 on every linear layer) of a preset, made as deep as asked. *Cold* begins with an empty cache,
*warm* is a second process that finds what the first one left there. Seconds are those of a wall clock, by PyTorch's
own timers; *rest* is what none of them names: guards, Inductor's joint passes, running the step. Retrace and passes
alone are measured in processor time, which says the same on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from .sampling import sampled


def adapted(model: str, layers: int, batch: int, seq: int) -> tuple[Any, dict[str, Any]]:
    """The model with adapters, and a batch."""
    import torch

    from unsloth.models import presets
    from unsloth.models.adapters import add_lora
    from unsloth.models.load import random_batch

    presets.SHAPES[model]["num_hidden_layers"] = layers
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bare = presets.build(model, dtype=dtype, device=device)
    # In the model's dtype, as ``benchmarks.step`` trains them: without autocast, adapters in float32 beside a model in
    # half precision are another graph, in which none of them is recognised. B is random, so that A has a gradient.
    owner = add_lora(bare, autocast_adapter_dtype=False, init_lora_weights=False)
    return owner.train(), random_batch(bare, batch, seq)


def measure_ours(model: str, layers: int, batch: int, seq: int) -> dict[str, float]:
    """Retrace and recognise one step's graph in this process; seconds of processor time by stage."""
    import torch

    from unsloth.compiler.capture import retrace
    from unsloth.compiler.run import loss_of
    from unsloth.passes.recognise import RECOGNISERS
    from unsloth.passes.runner import run_passes

    owner, inputs = adapted(model, layers, batch, seq)
    seconds: dict[str, float] = {}

    def backend(gm: Any, example_inputs: Any) -> Any:
        begin = time.process_time()
        graph = retrace(gm, check=False)
        retraced = time.process_time()
        run_passes(graph, RECOGNISERS, strict=True)
        seconds.update({"capture": retraced - begin, "passes": time.process_time() - retraced})
        return gm

    torch.compile(lambda: loss_of(owner, inputs), backend=backend, fullgraph=True)()
    return {**seconds, "total": sum(seconds.values())}


def measure(model: str, layers: int, batch: int, seq: int, lowering: str) -> dict[str, float]:
    """Compile and run one training step in this process; seconds by stage, and ``total``."""
    import torch

    from unsloth.compiler.explain import explain

    owner, inputs = adapted(model, layers, batch, seq)
    started = time.perf_counter()
    explanation = explain(owner, inputs, options={"lowering": lowering, "logits": "drop", "strict": True})
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    total = time.perf_counter() - started
    seconds = explanation.seconds
    return {**seconds, "rest": total - sum(seconds.values()), "total": total}


def main(argv: list[str] | None = None) -> None:
    """Measure cold and warm, and print a table."""
    arguments = argparse.ArgumentParser("benchmarks.first_step", description=__doc__.split("\n")[0])
    arguments.add_argument("--model", default="tiny-llama", help="a preset")
    arguments.add_argument("--layers", type=int, default=32)
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--seq", type=int, default=64)
    arguments.add_argument("--lowering", choices=("eager", "inductor"), default="inductor")
    arguments.add_argument("--stacks", action="store_true", help="look at stacks meanwhile, and list functions by time")
    arguments.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    arguments.add_argument("--ours", action="store_true", help="retrace and passes alone, in this process")
    arguments.add_argument("--at-most", type=float, metavar="SECONDS", help="with --ours: exit code 1 above these")
    args = arguments.parse_args(argv)
    if args.ours:
        seconds = measure_ours(args.model, args.layers, args.batch, args.seq)
        print(f"{args.model}, {args.layers} layers, LoRA, {args.batch}×{args.seq}, seconds of processor time")
        print("\n".join(f"{stage:<14}{taken:>9.2f}s" for stage, taken in seconds.items()))
        sys.exit(args.at_most is not None and seconds["total"] > args.at_most)
    if args.here:
        with sampled() if args.stacks else contextlib.nullcontext() as samples:
            seconds = measure(args.model, args.layers, args.batch, args.seq, args.lowering)
        if samples is not None:
            print(samples.table(), file=sys.stderr)
        print(json.dumps(seconds))
        return
    given = [*(argv if argv is not None else sys.argv[1:]), "--here"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        runs = {}
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "benchmarks.first_step", *given]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            runs[name] = json.loads(done.stdout.splitlines()[-1])
    print(f"{args.model}, {args.layers} layers, LoRA, {args.batch}×{args.seq}, {args.lowering}")
    print(f"{'stage':<14}" + "".join(f"{name:>10}" for name in runs))
    for stage in dict.fromkeys(s for run in runs.values() for s in run):
        cells = (f"{run[stage]:>9.2f}s" if stage in run else f"{'–':>10}" for run in runs.values())
        print(f"{stage:<14}" + "".join(cells))


if __name__ == "__main__":
    main()
