"""A micro-batch of completions as one row without padding, in which a prompt stands once for all its completions.

    prompt  completion 1  completion 2  prompt'  completion 1'  …

Everything but attention works on tokens one by one, and does on this row what it does on padded ones, less the padding
and the repetitions of each prompt. Attention is transformers' seam (``ALL_ATTENTION_FUNCTIONS``): queries, keys and
values, already rotated by their positions, are spread out to documents of a prompt and one completion each, attend
within them (:mod:`~unsloth.kernels.packed_attention`), and what completions and the first copy of each prompt have got
is put back into the row. Gradients of a prompt's keys and values are summed over its completions, in float32.

Where a model can be run so is asked of the model (:func:`unlike`), as the rollout engine asks whether it decodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.packed_attention import cu_seqlens, extents, packed_attention
from .generation.cache import at_rest, attending
from .generation.support import TOLERANCE, Unsupported, base_of, configured
from .policy import Head, PolicyStep, Scores, keeps_logits
from .policy_loss import PolicyLoss, Sampled, policy_loss

ATTENTION = "unsloth_shared_prompts"


class Packed(NamedTuple):
    """A micro-batch as one row.

    Attributes:
        row: int64 [3, tokens]: ids, positions, and where each token stands among the documents.
        documents: int64 [2, spread]: of documents of a prompt and one completion, one behind the other, each token's
            place in the row, and the document's number.
        scored: int64 [2, completion tokens]: where in the row the logits of each stand, and its id.
        slots: int64 [batch, length]: for each place of the padded completions which of the scored tokens it is; their
            number where there is none.
    """

    row: Tensor
    documents: Tensor
    scored: Tensor
    slots: Tensor


Told = list[tuple[int | None, torch.dtype]]


class _Layout(NamedTuple):
    """What attention is told. ``told`` notes each layer's window and the queries' dtype, for :func:`unlike`."""

    spread: Tensor
    back: Tensor
    cu_seqlens: Tensor
    extents: Tensor
    told: Told | None = None


def pack(batch: Mapping[str, Tensor]) -> Packed | None:
    """Lay a padded micro-batch out as a row. Asks the device once.

    Args:
        batch: ``prompt_ids``, ``prompt_mask`` (padded at the left), ``completion_ids``, ``completion_mask`` (at the
            right); int64 [batch, length].

    Returns:
        the row; None if there is no completion with a token in it.
    """
    prompt_ids, prompt_mask = batch["prompt_ids"], batch["prompt_mask"]
    completion_ids, completion_mask = batch["completion_ids"], batch["completion_mask"]
    shown = prompt_ids * prompt_mask
    same = (shown[1:] == shown[:-1]).all(1) & (prompt_mask[1:] == prompt_mask[:-1]).all(1)
    known = torch.stack([prompt_mask.sum(1), completion_mask.sum(1), F.pad(same.long(), (1, 0))])
    device, width, length = prompt_ids.device, prompt_ids.shape[1], completion_ids.shape[1]
    rows = [(index, *row) for index, row in enumerate(known.T.tolist()) if row[1] and row[0]]
    if not rows:
        return None
    taken: list[Tensor] = []  # of each token of the row, its place in the padded ids, flattened
    positions, back, spread, numbers, predicted = ([] for _ in range(5))
    filled = at = documents = 0  # tokens of the row, of the documents, and scored ones, so far
    scored, first, before = 0, 0, -2
    places = torch.full((len(prompt_ids), length), -1, dtype=torch.int64)
    for index, prompt, tokens, repeats in rows:
        begins = index * (width + length)
        shared = bool(repeats) and before == index - 1
        if not shared:
            first = filled
            taken.append(torch.arange(begins + width - prompt, begins + width))
            positions.append(torch.arange(prompt))
            back.append(torch.arange(at, at + prompt))
            filled += prompt
        taken.append(torch.arange(begins + width, begins + width + tokens))
        positions.append(torch.arange(prompt, prompt + tokens))
        back.append(torch.arange(at + prompt, at + prompt + tokens))
        spread += [torch.arange(first, first + prompt), torch.arange(filled, filled + tokens)]
        numbers.append(torch.full((prompt + tokens,), documents))
        predicted += [torch.tensor([first + prompt - 1]), torch.arange(filled, filled + tokens - 1)]
        places[index, :tokens] = torch.arange(scored, scored + tokens)
        filled, at, scored = filled + tokens, at + prompt + tokens, scored + tokens
        documents, before = documents + 1, index
    places[places < 0] = scored
    padded = torch.cat([prompt_ids, completion_ids], dim=1).flatten()
    source, slots = torch.cat(taken).to(device), places.to(device)
    row = torch.stack([torch.cat(positions), torch.cat(back)]).to(device)
    targets = completion_ids[completion_mask.bool() & (prompt_mask.sum(1, keepdim=True) > 0)]
    return Packed(
        torch.cat([padded[source][None], row]),
        torch.stack([torch.cat(spread), torch.cat(numbers)]).to(device),
        torch.stack([torch.cat(predicted).to(device), targets]),
        slots,
    )


# -- the step ----------------------------------------------------------------------------------------------------------


def score_packed(model: nn.Module, packed: Packed, head: Head, entropy: bool = False) -> Scores:
    """As :func:`~unsloth.runtime.policy.score`, of a row; within :func:`sharing`."""
    targets = packed.scored[1]
    logits = _logits(model, packed, head.keeps).float()
    if head.temperature != 1.0:
        logits = logits / head.temperature
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction="none")
    with nullcontext() if entropy else torch.no_grad():
        log_p = torch.log_softmax(logits, dim=-1)
        spread = -(log_p.exp() * log_p).sum(-1)
    return Scores(F.pad(-losses, (0, 1))[packed.slots], F.pad(spread[0], (0, 1))[packed.slots], None)


def packed_policy_step(
    model: nn.Module, packed: Packed, head: Head, sampled: Sampled, settings: PolicyLoss
) -> PolicyStep:
    """As :func:`~unsloth.runtime.policy.policy_step`, of a row."""
    scores = score_packed(model, packed, head, settings.entropy_bonus)
    return PolicyStep(policy_loss(scores.log_p, scores.entropy, sampled, settings), None)


def _logits(model: nn.Module, packed: Packed, keeps: bool, told: Told | None = None) -> Tensor:
    """Of the tokens that are scored, [1, completion tokens, vocabulary]."""
    ids, positions, back = packed.row
    offsets = cu_seqlens(packed.documents[1:])
    layout = _Layout(packed.documents[0], back, offsets, extents(offsets), told)
    where = packed.scored[0]
    more = {"logits_to_keep": where} if keeps else {}
    output = model(input_ids=ids[None], position_ids=positions[None], use_cache=False, shared_prompts=layout, **more)
    return output.logits if keeps else output.logits[:, where]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_prompts: _Layout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a row [1, heads, tokens, channels], as transformers calls it; [1, tokens, heads, channels]."""
    if shared_prompts is None:
        raise Unsupported("it does not hand on to its attention what it was told")
    if attention_mask is not None or softcap is not None or s_aux is not None:
        raise Unsupported("its attention has a mask, a cap or sinks of its own")
    if shared_prompts.told is not None:
        shared_prompts.told.append((sliding_window, query.dtype))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # A prompt's keys have as many gradients as it has completions: their sum is one of float32.
    wide = torch.promote_types(key.dtype, torch.float32)
    key, value = (x.to(wide).index_select(2, shared_prompts.spread).to(x.dtype) for x in (key, value))
    query = query.index_select(2, shared_prompts.spread)
    offsets, longest = shared_prompts.cu_seqlens, shared_prompts.extents
    out, _lse = packed_attention(query, key, value, offsets, longest, True, scale, sliding_window)
    return out.index_select(2, shared_prompts.back).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


def sharing(model: nn.Module) -> Any:
    """A context in which the model's attention is ours."""
    return attending(model, ATTENTION)


# -- whether a model can be run so -------------------------------------------------------------------------------------

_PROMPT, _COMPLETIONS = 3, (2, 4, 3)


def unlike(model: nn.Module) -> str | None:
    """Run a few tokens of the model both ways: why it cannot be run as a row, or None.

    Two completions of one prompt and one of another are compared with three rows of their own.
    """
    try:
        base = base_of(model)
        configured(base)
        if dropout := getattr(base.config.get_text_config(decoder=True), "attention_dropout", 0.0):
            return f"its attention drops {dropout:.0%} of what it sees"
        with at_rest(model):
            return _difference(base)
    except Unsupported as reason:
        return str(reason)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a model may raise anything when it is told something new
        return f"running it as a row raises {type(error).__name__}: {str(error)[:200]}"


def _difference(model: Any) -> str | None:
    embedding = model.get_input_embeddings()
    device, vocabulary, longest = embedding.weight.device, embedding.weight.shape[0], max(_COMPLETIONS)
    ids = torch.arange(len(_COMPLETIONS) * (_PROMPT + longest), device=device).view(len(_COMPLETIONS), -1)
    ids = (ids * 7 + 11) % vocabulary
    ids[1, :_PROMPT] = ids[0, :_PROMPT]
    tokens = torch.tensor(_COMPLETIONS, device=device)[:, None]
    mask = (torch.arange(longest, device=device) < tokens).long()
    batch = {"prompt_ids": ids[:, :_PROMPT], "completion_ids": ids[:, _PROMPT:], "completion_mask": mask}
    packed = pack({**batch, "prompt_mask": torch.ones_like(batch["prompt_ids"])})
    assert packed is not None
    told: Told = []
    with sharing(model):
        found = _logits(model, packed, keeps_logits(model), told)[0]
    whole = [
        model(input_ids=row[None, : _PROMPT + n], use_cache=False) for row, n in zip(ids, _COMPLETIONS, strict=True)
    ]
    expected = torch.cat([output.logits[0, _PROMPT - 1 : -1] for output in whole])
    error = float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
    text = model.config.get_text_config(decoder=True)
    kinds: Sequence[str] | None = getattr(text, "layer_types", None)
    if len(told) != text.num_hidden_layers:
        return "its attention is not chosen by name in every layer"
    if not error <= max(TOLERANCE.get(dtype, 8e-2) for _, dtype in told):  # a head may be of another dtype
        return f"as a row it gives other logits, by {error:.1e} of their norm"
    if any(
        kind == "sliding_attention" and window is None for kind, (window, _) in zip(kinds or (), told, strict=False)
    ):
        return "its attention is not told of its window"
    return None
