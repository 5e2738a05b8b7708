"""Rules over the arithmetic of the code: norms, rotations, activations, the embedding's scale.

Each part is run alone on random numbers, in bfloat16 as in training, and held against its formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configs import parameters_of
from .probe import Probe, modules, tokens
from .rope import Rotation, declared
from .rule import ERROR, rule
from .subject import Subject

BF16 = torch.bfloat16
_SAME = 0.01
"""Share of values that may differ between two runs of one formula, whose sums are taken in different orders."""


# -- norms -------------------------------------------------------------------------------------------------------------

_NORM_ORDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rounds, then multiplies by its weight": lambda normed, w: w * normed.to(w.dtype),
    "multiplies by its weight in float32, then rounds": lambda normed, w: (w.float() * normed).to(w.dtype),
    "multiplies by 1 + its weight in float32, then rounds": lambda normed, w: ((1 + w.float()) * normed).to(w.dtype),
    "adds 1 to its weight in float32 and rounds that, then multiplies": lambda normed, w: (
        (1 + w.float()).to(w.dtype) * normed.to(w.dtype)
    ),
}


def norm_order(norm: nn.Module, eps: float) -> str | None:
    """What an RMSNorm does in bfloat16, in words of the table above; "low precision" where it is none of these.

    Returns:
        None for a module that is no RMSNorm.
    """
    generator = torch.Generator().manual_seed(0)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return None
    x = torch.randn(64, weight.numel(), generator=generator) * torch.logspace(-1, 1, 64)[:, None]
    w = 0.5 * torch.randn(weight.shape, generator=generator)
    # The parameter comes from the model's own dtype and goes back to it: the module is not ours.
    held = norm.weight
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(norm, n)), eps)

    def run(dtype: torch.dtype) -> Tensor | None:
        norm.weight = nn.Parameter(w.to(dtype), requires_grad=False)
        try:
            out = norm(x.to(dtype))
        except Exception:  # noqa: BLE001  it may want more than one tensor, as gated norms do
            return None
        finally:
            norm.weight = held
        return out if isinstance(out, Tensor) and out.shape == x.shape else None

    exact = _normed(x.double(), eps)
    plain = run(torch.float32)
    if plain is None or not any(
        torch.allclose(plain.double(), (offset + w.double()) * exact, rtol=1e-3, atol=1e-4) for offset in (0, 1)
    ):
        return None
    rounded = run(BF16)
    if rounded is None:
        return None
    normed = _normed(x.to(BF16).float(), eps)
    for words, formula in _NORM_ORDERS.items():
        if (formula(normed, w.to(BF16)) != rounded).float().mean() < _SAME:
            return words
    return "low precision"


def _normed(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def norm_orders(model: nn.Module, config: Any) -> dict[str, tuple[str, str]]:
    """What each class of RMSNorm does: class name → (path of one, words)."""
    eps = getattr(config, "rms_norm_eps", getattr(config, "norm_eps", 1e-6)) or 1e-6
    found = {}
    for path, module in modules(model, lambda path, m: "norm" in type(m).__name__.lower() and not [*m.children()]):
        if (words := norm_order(module, eps)) is not None:
            found[type(module).__name__] = (path, words)
    return found


@rule(
    "norm-low-precision",
    ERROR,
    "code",
    remedy="take the mean of squares and the root in float32, as transformers' norms do, and round afterwards",
)
def norm_low_precision(subject: Subject) -> Iterator[str]:
    """An RMSNorm takes its statistics in bfloat16: every layer's input is off by up to a percent."""
    probe = subject.probe
    for name, (path, words) in norm_orders(probe.build(), probe.config).items():
        if words == "low precision":
            yield f"{path} ({name}) in bfloat16 is none of the formulas that take their statistics in float32"


@rule(
    "norm-cast-order",
    ERROR,
    "code",
    remedy="round where transformers' class of this model type rounds; the weights were trained with that",
)
def norm_cast_order(subject: Subject) -> Iterator[str]:
    """An RMSNorm rounds at another place than that of the model type: the weights were trained with the other."""
    probe = subject.probe
    if probe.is_reference or probe.reference_class is None:
        return
    theirs = {words for _, words in norm_orders(probe.build(reference=True), probe.config).values()}
    for name, (path, words) in norm_orders(probe.build(), probe.config).items():
        if theirs and words not in theirs and words != "low precision":
            yield f"{path} ({name}) {words}; {probe.reference_class.__name__}'s {' or '.join(sorted(theirs))}"


# -- rotations ---------------------------------------------------------------------------------------------------------


def _rotations(model: nn.Module, config: Any) -> Iterator[tuple[str, Any, Rotation, str]]:
    """(path, module, what is declared for it, kind) of the rotary modules whose formula is known."""
    parameters = parameters_of(config).get("")
    for path, module in modules(model, lambda path, m: isinstance(getattr(m, "inv_freq", None), Tensor)):
        if parameters is None:
            continue
        rotation = declared(parameters, 2 * module.inv_freq.numel())  # pyright: ignore[reportCallIssue]
        if rotation is not None:
            yield path, module, rotation, parameters.get("rope_type", "default")


def _of_real_size(probe: Probe) -> Any:
    """A tiny model whose heads are as wide as the real one's, by which YaRN's ramp is laid out; else the tiny one."""
    config = probe.real
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    try:
        return probe.build(head_dim=width)
    except Exception:  # noqa: BLE001  not every class has a head_dim of its own
        return probe.build()


@rule(
    "rope-frequencies",
    ERROR,
    "code config",
    remedy="compute them from rope_parameters; a class of its own that reads rope_theta or rope_scaling needs these",
)
def rope_frequencies(subject: Subject) -> Iterator[str]:
    """The code rotates with other frequencies or another attention factor than the configuration declares."""
    model = subject.probe.build() if subject.probe.given is None else _of_real_size(subject.probe)
    for path, module, (frequencies, factor), kind in _rotations(model, model.config):
        off = (module.inv_freq.double() / frequencies - 1).abs()
        if off.max() > 1e-2:
            i = int(off.argmax())
            yield (
                f"{path}: {kind} scaling with base {parameters_of(model.config)['']['rope_theta']:,g} gives "
                f"{frequencies[i]:.4g} radians per position at pair {i}, the model has {module.inv_freq[i]:.4g}"
            )
        found = getattr(module, "attention_scaling", None)
        if isinstance(found, int | float) and abs(found / factor - 1) > 1e-3:
            yield f"{path}: {kind} scaling declares the attention factor {factor:.4g}, the model has {found:.4g}"


@rule(
    "rope-low-precision",
    ERROR,
    "code config",
    remedy="hold inv_freq and compute angles in float32; load with dtype=bfloat16 instead of casting with .to()",
)
def rope_low_precision(subject: Subject) -> Iterator[str]:
    """Angles of the rotation are computed in 16 bits: far positions can no longer be told apart."""
    probe = subject.probe
    far = min(getattr(probe.real, "max_position_embeddings", None) or 4096, 16_384) - 1
    models = [probe.build(dtype=BF16)] if probe.given is None else [probe.build(dtype=BF16), probe.given]
    for model in models:
        for path, module, (frequencies, factor), _ in _rotations(model, model.config):
            place = module.inv_freq.device
            positions = torch.arange(max(far - 255, 0), far + 1, device=place)[None]
            made = module(torch.zeros(1, 1, 1, dtype=BF16, device=place), positions)
            truth = (positions[0, :, None].cpu().double() * frequencies).cos() * factor
            # Each pair's cosine once, or twice: halves of a head, or neighbours.
            layouts = (truth, truth.repeat(1, 2), truth.repeat_interleave(2, -1))
            same = module.inv_freq.cpu().double().div(frequencies).sub(1).abs().max() < 1e-2
            cosine = made[0][0].cpu().double() if isinstance(made, tuple) and isinstance(made[0], Tensor) else None
            if cosine is None or not any(cosine.shape == layout.shape for layout in layouts):
                continue
            error = min(float((cosine - t).abs().max()) for t in layouts if t.shape == cosine.shape)
            if same and error > 0.05:  # other frequencies have a rule of their own; bfloat16 rounds by 0.004
                held = str(module.inv_freq.dtype).removeprefix("torch.")
                yield f"{path}: at position {far:,} the cosine is off by {error:.2f} (inv_freq in {held})"
                return


# -- activations -------------------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, tuple[tuple[str, ...], Callable[[Tensor], Tensor]]] = {
    "GELU": (("gelu", "gelu_python"), F.gelu),
    "GELU's tanh form": (
        ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "GELU's sigmoid form": (("quick_gelu",), lambda x: x * torch.sigmoid(1.702 * x)),
    "SiLU": (("silu", "swish"), F.silu),
    "ReLU": (("relu",), F.relu),
    "squared ReLU": (("relu2",), lambda x: F.relu(x).square()),
}


@rule(
    "gelu-variant",
    ERROR,
    "code config",
    remedy="use the activation that the configuration names (ACT2FN[config.hidden_activation or config.hidden_act])",
)
def gelu_variant(subject: Subject) -> Iterator[str]:
    """The MLP computes another activation than the configuration names, such as the exact GELU for its tanh form."""
    probe, config = subject.probe, subject.text_config
    names = [getattr(config, n, None) for n in ("hidden_activation", "hidden_act", "activation_function")]
    name = next((n for n in names if isinstance(n, str)), None)
    wanted = next((words for words, (known, _) in _ACTIVATIONS.items() if name in known), None)
    if wanted is None:
        return
    x = torch.linspace(-6, 6, 1201)
    for path, module in modules(probe.build(), lambda path, m: not [*m.parameters()] and _is_activation(path)):
        try:
            y = module(x)
        except (RuntimeError, TypeError):
            continue
        off = {words: float((formula(x) - y).abs().max()) for words, (_, formula) in _ACTIVATIONS.items()}
        if off[wanted] > 1e-5:
            nearest = min(off, key=lambda words: off[words])
            what = nearest if off[nearest] < 1e-5 else "another function"
            yield f"{path} is {what}, off by up to {off[wanted]:.1g}; the configuration says {name!r} ({wanted})"


def _is_activation(path: str) -> bool:
    last = path.rpartition(".")[2]
    inner = "mlp" in path.lower() and not any(
        part in path.lower() for part in ("vision", "image", "audio", "encoder", "router")
    )
    return inner and last in ("act_fn", "act", "activation_fn", "activation", "activation_func")


# -- the embedding's scale ---------------------------------------------------------------------------------------------


def embedding_scale(model: Any) -> tuple[float, bool] | None:
    """By what the first layer's input is the embedding: the factor, and whether it is rounded to bfloat16 itself.

    Args:
        model: in bfloat16.

    Returns:
        None where the input is no multiple of the embedding.
    """
    held: list[Tensor] = []
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None:
        return None
    hook = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: held.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    ids = tokens(1, 32)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    rows, inputs = model.get_input_embeddings().weight.detach()[ids[0]].double(), held[0][0].double()
    if rows.shape != inputs.shape:
        return None
    factor = float((rows * inputs).sum() / rows.square().sum())
    if abs(factor - 1) < 1e-3 or (inputs - factor * rows).norm() > 0.01 * inputs.norm():
        return None
    rounded = torch.tensor(factor).to(BF16).double()
    off = ((rows * rounded).to(BF16) != held[0][0]).double().mean()
    return factor, bool(off < _SAME)


@rule(
    "embedding-scale-rounding",
    ERROR,
    "code",
    remedy="round the scale to the weights' dtype before multiplying, as the model was trained (Gemma: 55.5 in "
    "bfloat16, not √3072 = 55.43)",
)
def embedding_scale_rounding(subject: Subject) -> Iterator[str]:
    """The factor on the embeddings is rounded otherwise than by transformers' class of this model type: every input is
    off by the same part."""
    probe = subject.probe
    if probe.is_reference or probe.reference_class is None:
        return
    # √96 is no number of bfloat16; √64, the tiny model's, is.
    ours, theirs = (
        embedding_scale(probe.build(dtype=BF16, reference=reference, hidden_size=96)) for reference in (False, True)
    )
    name = probe.reference_class.__name__
    if ours is None and theirs is not None:
        yield f"the embedding is not scaled; {name} multiplies it by {theirs[0]:.4g} at a width of 96"
    elif ours is not None and theirs is not None and ours[1] != theirs[1]:
        words = {True: "rounds the scale to bfloat16 first", False: "multiplies by the scale in float32"}
        yield f"{probe.name} {words[ours[1]]}; {name} {words[theirs[1]]}"
