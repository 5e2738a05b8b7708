"""What the sweep does with one architecture: build it tiny, take one step in eager and one compiled, compare."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from .pictures import batches

BATCH, LENGTH = 2, 17
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3
_NOTHING = 1e-7  # of the largest gradient's norm: a difference as small is rounding noise around zero

Row = dict[str, Any]
Step = tuple[float, dict[str, Any]]


def causal_types() -> list[str]:
    """The types that transformers' auto class knows as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def image_types() -> list[str]:
    """The types that transformers' auto class knows as models from images and text to text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def versions() -> dict[str, str]:
    """What the results hold for."""
    return {name: version(name) for name in ("torch", "transformers")}


def serve(pipe: Any, lowering: str = "eager", family: str = "text") -> None:
    """Answer each type's name that comes through the pipe with its row, until the other end closes it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what models say when they are built is nobody's concern here
    import torch
    import transformers

    from unsloth.compiler import run  # noqa: F401  imported before the first type's time starts

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    pipe.send("ready")
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(examine(name, lowering, family))


def examine(name: str, lowering: str = "eager", family: str = "text") -> Row:
    """One type's row.

    Args:
        family: "text" for the type's causal language model, "vision" for its model from images and text to text.
        lowering: the backend's option: "eager" takes a second or two, "inductor" half a minute.

    Returns:
        ``type``, ``status`` (equal, wrong, crashed, random, eager cannot run), ``reason`` unless it is equal,
        ``seeded`` (eager draws random numbers: all runs draw the same), and when it compiled ``graphs``, ``breaks``,
        ``counts`` {operator: [rewritten, of]}, ``places`` {family: [recognised, there]} and ``covered`` (shares of
        FLOPs and bytes), both counted without the matcher, and ``misses`` (distinct reasons, of graph breaks too).
    """
    try:
        model, batch, eager = runnable(name, family)
    except Exception as error:  # noqa: BLE001  whatever eager raises is the answer
        return {"type": name, "status": "eager cannot run", "reason": describe(error)}
    if difference := compare(step(model, model, batch), eager):
        return {"type": name, "status": "random", "reason": f"two eager runs differ: {difference}"}
    row: Row = {"type": name, "status": "equal", "seeded": bool(compare(step(model, model, batch, seed=1), eager))}
    try:
        ours, facts = compiled_step(model, batch, lowering=lowering, family=family)
        row |= facts
        if difference := compare(ours, eager):
            row |= {"status": "wrong", "reason": f"{difference} ({blame(model, batch, eager, family)})"}
    except Exception as error:  # noqa: BLE001
        row |= {"status": "crashed", "reason": f"{describe(error)} ({blame(model, batch, eager, family)})"}
    return row


def runnable(name: str, family: str = "text") -> tuple[Any, dict[str, Any], Step]:
    """A tiny model that eager can run, its batch, and eager's step.

    Raises:
        Exception: why the plainest tiny model does not run, when none does.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from unsloth.models.shrink import ways

    failed: list[Exception] = []
    for config in ways(CONFIG_MAPPING[name](), pictures=family == "vision"):
        try:
            model = build(config, family)
        except Exception as error:  # noqa: BLE001  the next way may suit this architecture
            failed.append(error)
            continue
        for make in batches(model, BATCH) if family == "vision" else (tokens,):
            try:
                batch = make()
                eager = finite(step(model, model, batch))
                if family == "vision":
                    looks(model, batch, eager)
                return model, batch, eager
            except Exception as error:  # noqa: BLE001  or the next layout of the images
                failed.append(error)
    raise failed[0] if failed else ValueError("its forward takes no images")


def looks(model: Any, batch: dict[str, Any], eager: Step) -> None:
    """See to it that the loss depends on the images.

    Raises:
        ValueError: when it does not, and the step would be one of text alone.
    """
    import torch

    pixels = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    # The first two numbers of such a patch are its row and column.
    others = {k: v.flip(-1) if k != "flattened_patches" else _other_patches(v) for k, v in pixels.items()}
    if step(model, model, {**batch, **others})[0] == eager[0]:
        raise ValueError("the loss does not depend on the images")


def _other_patches(patches: Any) -> Any:
    other = patches.flip(1) * -3
    other[..., :2] = patches[..., :2]
    return other


def build(config: Any, family: str = "text") -> Any:
    """The model with random weights; norms and biases, which start at one and zero, get noise as well."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family == "vision" else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() <= 1 or not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.train()


def tokens() -> dict[str, Any]:
    """Ordinary tokens, no special ones, which some models mask or take as images."""
    import torch

    from unsloth.models.shrink import ORDINARY_TOKENS

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ORDINARY_TOKENS.start, ORDINARY_TOKENS.stop, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def step(run: Any, owner: Any, batch: dict[str, Any], seed: int = 0) -> Step:
    """Loss and gradients, from the same random state and the same buffers each time."""
    import torch

    from unsloth.compiler.run import loss_of, undisturbed

    with undisturbed(owner):
        owner.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        loss = loss_of(run, batch)
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def finite(result: Step) -> Step:
    """The step itself.

    Raises:
        ValueError: where it cannot be compared.
    """
    loss, gradients = result
    bad = [n for n, g in gradients.items() if not g.isfinite().all()]
    if bad or loss - loss != 0 or not gradients:
        raise ValueError(f"no finite step: loss {loss}, {len(bad)} gradients not finite {bad[:2]}")
    return result


def compiled_step(
    model: Any, batch: dict[str, Any], recognisers: Any = None, lowering: str = "eager", family: str = "text"
) -> tuple[Step, Row]:
    """The step under our backend, and what the backend says of it."""
    from torch._inductor import config as inductor_config

    from unsloth.compiler.breaks import watched
    from unsloth.compiler.explain import Explanation
    from unsloth.compiler.options import Options
    from unsloth.compiler.report import GraphReport
    from unsloth.compiler.run import compiled, sizes_in_graph
    from unsloth.passes.recognise import RECOGNISERS

    reports: list[GraphReport] = []
    options = Options.parse({"strict": True, "lowering": lowering})
    run = compiled(model, options, reports, RECOGNISERS if recognisers is None else recognisers)
    batch, left = as_trained(model, batch) if family == "vision" else (batch, [])
    # Inductor draws dropout masks of its own unless told to draw eager's.
    sizes = sizes_in_graph() if family == "vision" else nullcontext()
    with watched() as breaks, inductor_config.patch(fallback_random=True), sizes:
        result = step(run, model, batch)
    said = Explanation("", reports, tuple(breaks))
    misses = [f"{m.operator}: {m.detail}" for m in said.missed] + [f"break: {b.cause}" for b in breaks]
    misses += [f"{place.family}: no formula comes close" for place in said.unexplained] + left
    coverage = said.coverage
    return result, {
        "graphs": len(reports),
        "breaks": len(breaks),
        "counts": {name: list(count) for name, count in said.counts.items()},
        "places": {family: list(count) for family, count in coverage.places.items()},
        "covered": [coverage.flops.covered, coverage.bytes.covered],
        "misses": list(dict.fromkeys(misses)),
    }


def as_trained(model: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The batch as the trainer gives it to a model of images, and why what depends on their sizes is left to it."""
    from unsloth.runtime.image_shapes import ImageShapes

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        batch = ImageShapes(model)(batch)
    said = [str(warning.message).removeprefix("unsloth: ") for warning in caught]
    return batch, [text for text in said if text.startswith("each size of image")]


def compare(ours: Step, eager: Step) -> str:
    """The first difference, or nothing."""
    if not abs(ours[0] - eager[0]) <= LOSS_TOLERANCE * abs(eager[0]):
        return f"loss {ours[0]:.7f}, eager {eager[0]:.7f}"
    if odd := sorted(ours[1].keys() ^ eager[1].keys()):
        return f"gradient of {odd[0]} and {len(odd) - 1} more only {'compiled' if odd[0] in ours[1] else 'in eager'}"
    floor = _NOTHING * max(float(g.norm()) for g in eager[1].values())
    for name, gradient in eager[1].items():
        error, norm = float((ours[1][name] - gradient).norm()), float(gradient.norm())
        if not error <= max(GRADIENT_TOLERANCE * norm, floor):  # a NaN is never fine
            return f"gradient of {name} is off by {error / max(norm, floor):.1e}"
    return ""


def blame(model: Any, batch: dict[str, Any], eager: Step, family: str = "text") -> str:
    """Where it goes wrong: Dynamo without us, the capture without passes, or the pass that first does harm."""
    import torch

    from unsloth.compiler.run import sizes_in_graph
    from unsloth.passes.recognise import RECOGNISERS

    torch._dynamo.reset()
    try:
        with sizes_in_graph() if family == "vision" else nullcontext():
            alone = step(torch.compile(model, backend="eager"), model, batch)
        if compare(alone, eager):
            return "Dynamo alone is wrong too"
    except Exception:  # noqa: BLE001
        return "Dynamo alone fails too"
    for end in range(len(RECOGNISERS) + 1):
        try:
            same = not compare(compiled_step(model, batch, RECOGNISERS[:end], family=family)[0], eager)
        except Exception:  # noqa: BLE001
            same = False
        if not same:
            return f"pass {RECOGNISERS[end - 1].name}" if end else "capture"
    return "not reproducible"


def describe(error: BaseException) -> str:
    """The innermost cause's type and first line, and the file that raised it."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{where}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(examine(argument))
