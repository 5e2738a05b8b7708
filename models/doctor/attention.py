"""Rules over attention as the code computes it: what an output depends on, and whether caps and padding are minded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .probe import Probe, accepts, reach, tokens
from .rule import ERROR, WARNING, Evidence, rule
from .subject import Subject


def _causal(subject: Subject) -> list[set[int]]:
    return reach(subject.probe.build(), 12)


@rule("future-seen", ERROR, "code", remedy="mask later positions: the attention mask of a causal model is triangular")
def future_seen(subject: Subject) -> Iterator[str]:
    """An output depends on tokens behind it: training loss falls to nothing, and generation is noise."""
    for position, seen in enumerate(_causal(subject)):
        if seen and max(seen) > position:
            yield f"the output at position {position} depends on position {max(seen)}"
            return


@rule(
    "window-off-by-one",
    ERROR,
    "code config",
    remedy="a window of w tokens holds the token itself and the w - 1 before it",
)
def window_off_by_one(subject: Subject) -> Iterator[str]:
    """A layer's sliding window is not as long as the configuration says, or does not slide at all."""
    config = subject.probe.config
    layers, kinds = getattr(config, "num_hidden_layers", None), getattr(config, "layer_types", None)
    if not getattr(config, "sliding_window", None) or not layers or (kinds and "sliding_attention" not in kinds):
        return
    alone = {"layer_types": ["sliding_attention"] * layers} if kinds else {}
    window, length = 4, 16 * layers

    def sees(size: int) -> int:
        (seen,) = reach(subject.probe.build(sliding_window=size, **alone), length, [length - 1])
        return length - min(seen)

    # A token more in the window is one more per attention that looks back. There may be fewer than layers (some take
    # the keys of others) or more (loops); a convolution adds tokens of its own.
    found, attentions = sees(window), sees(window + 1) - sees(window)
    extra = found - 1 - attentions * (window - 1)
    if attentions == 0 and found == length:
        yield f"with a window of {window} an output sees all {length} tokens of a row"
    elif attentions and abs(extra) == attentions:
        yield (
            f"through {attentions} attentions with a window of {window} an output sees {found} tokens; each adds "
            f"{window - 1}, which makes {found - extra}"
        )


@rule(
    "documents-mixed",
    WARNING,
    "code",
    remedy="train without packing, or with an attention implementation that reads position_ids (sdpa, eager, "
    "flash_attention_2)",
)
def documents_mixed(subject: Subject) -> Iterator[Evidence]:
    """Packed documents, whose position ids restart, see each other."""
    model = subject.probe.build()
    if not accepts(model, "position_ids"):
        return
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    seen = reach(model, 12, position_ids=positions)
    packs = subject.run is not None and subject.run.packing is not None
    if subject.run is not None and not packs:
        return
    if crossed := [p for p in range(6, 12) if seen[p] and min(seen[p]) < 6]:
        text = f"two documents of 6 tokens in a row: the second one's position {crossed[0] - 6} sees the first"
        yield Evidence(text, ERROR if packs else None)


@rule(
    "softcap-dropped",
    ERROR,
    "code config",
    remedy="take an attention implementation that caps scores: attn_implementation='eager' or 'flex_attention'",
)
def softcap_dropped(subject: Subject) -> Iterator[str]:
    """The configuration declares a cap on attention scores or logits, and the code, or the attention implementation
    that was chosen, leaves it out."""
    probe = subject.probe
    for name, where in (("attn_logit_softcapping", "attention scores"), ("final_logit_softcapping", "logits")):
        cap = getattr(probe.real, name, None)
        if not cap:
            continue
        # A cap far below the scores and one far above: a model that minds it cannot give the same numbers with both.
        try:
            with_cap, without = (_logits(probe, **{name: value}) for value in (0.5, 1e6))
        except ValueError as error:
            if "softcap" not in str(error):
                raise
            yield f"{probe.attn_implementation} attention refuses: {str(error).splitlines()[0]}"
            continue
        if torch.allclose(with_cap, without, rtol=1e-4, atol=1e-4):
            with_what = f" with {probe.attn_implementation} attention" if probe.attn_implementation else ""
            yield f"{name} is {cap:g}, and the {where} of {probe.name}{with_what} are the same with a cap and without"


def _logits(probe: Probe, **changes: Any) -> torch.Tensor:
    with torch.no_grad():
        return probe.build(**changes)(input_ids=tokens(1, 12), use_cache=False).logits


@rule(
    "left-padding-nan",
    ERROR,
    "code",
    remedy="mask with the dtype's smallest number, not with -inf: a row that sees nothing is 0/0",
)
def left_padding_nan(subject: Subject) -> Iterator[str]:
    """Padding on the left makes NaN, in the outputs or only in the gradients, where it ruins every weight."""
    dtype = torch.float16 if subject.run is not None and subject.run.dtype == "float16" else torch.bfloat16
    for kind in (torch.float32, dtype):
        model = subject.probe.build(dtype=kind)
        ids, mask, _ = _left_padded()
        output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
        if not torch.isfinite(output.logits[mask.bool()]).all():
            yield f"with 4 of 8 tokens padded on the left, outputs in {_short(kind)} are not finite"
            return
        model.zero_grad(set_to_none=True)
        output.loss.backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
        if bad:
            yield (
                f"with 4 of 8 tokens padded on the left, the loss in {_short(kind)} is {output.loss.item():.3g} and "
                f"the gradient of {bad[0]} is not finite (as are {len(bad) - 1} others)"
            )
            return


@rule(
    "left-padding-changes",
    WARNING,
    "code",
    remedy="generate from rows of one length, or pad on the right; where the class takes position_ids, count them "
    "from the first real token",
)
def left_padding_changes(subject: Subject) -> Iterator[str]:
    """A row answers otherwise when it is padded on the left: generation in batches is not that of single rows."""
    model = subject.probe.build()
    ids, mask, positions = _left_padded()
    more = {"position_ids": positions} if accepts(model, "position_ids") else {}
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[1, 4:]
        # With position ids as well: not every class begins at 0 when it counts itself.
        more = {"position_ids": positions[1:, 4:]} if more else {}
        alone = model(input_ids=ids[1:, 4:], use_cache=False, **more).logits[0]
    off = float((padded - alone).norm() / alone.norm())
    if off > 1e-3:  # NaN has a rule of its own
        yield f"the same 4 tokens give logits that differ by {off:.1%} behind 4 of padding"


def _left_padded() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :4] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def head_of(model: Any) -> nn.Module | None:
    """The head, where the model has one."""
    return model.get_output_embeddings()
