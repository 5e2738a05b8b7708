"""Rules over the weights: embedding, head and norms, which are small enough to read whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .rule import ERROR, WARNING, Evidence, rule
from .subject import Subject
from .templates import _rendered
from .tensors import Tensors
from .tokens import ids, listed, shown

UNTRAINED = 0.02
"""A row is taken for untrained when its norm is below this share of the median's."""

COPIES = 3
"""Rows that are the same to the last bit are taken for untrained when there are at least so many."""

FP16_MAX = 65_504.0


def untrained(tensors: Tensors, name: str) -> set[int]:
    """Rows of an embedding or head that training has never touched: next to nothing, or the same as several others.

    Embeddings are initialised with one variance and grow apart while they are trained; reserved tokens stay at zero, at
    a tiny value, or at the mean that they were set to. Rows of weights in blocks of 4 bits can be equal by accident no
    more than others.
    """
    norms = tensors.row_norms(name)
    found = set(torch.nonzero(norms <= UNTRAINED * norms.median()).flatten().tolist())
    # Equal rows have equal norms, so only those that share one are compared.
    _, group, counts = norms.unique(return_inverse=True, return_counts=True)
    alike = torch.nonzero(counts[group] >= COPIES).flatten()
    if len(alike):
        rows = tensors.read(name)[alike.to(tensors.read(name).device)]
        _, same, sizes = rows.float().unique(dim=0, return_inverse=True, return_counts=True)
        found |= set(alike[(sizes[same] >= COPIES).cpu()].tolist())
    return found


def _tables(subject: Subject) -> list[tuple[str, str]]:
    """(in words, name) of the embedding and the head, which is the embedding where they are tied."""
    tensors = subject.tensors
    if tensors is None:
        return []
    named = [("embedding", tensors.embedding), ("head", tensors.head)]
    tied = getattr(subject.text_config, "tie_word_embeddings", False)
    return [(word, name) for word, name in named if name is not None and not (tied and word == "head")]


def _unused(subject: Subject, used: dict[int, str]) -> Iterator[str]:
    assert subject.tensors is not None
    for word, name in _tables(subject):
        found = sorted(untrained(subject.tensors, name) & used.keys())
        if found:
            which = [f"{shown(subject.tokenizer, i)} in {used[i]}" for i in found]
            norms = subject.tensors.row_norms(name)
            norm, median = norms[found].max().item(), norms.median().item()
            yield (
                f"{len(found)} token{'s' * (len(found) != 1)} with untrained rows in the {word} (norm at most "
                f"{norm:.3g}, median {median:.3g}): {listed(which)}"
            )


@rule(
    "untrained-tokens-in-data",
    ERROR,
    "weights data tokenizer config",
    remedy="train the embedding and the head beside the adapters (modules_to_save: [embed_tokens, lm_head]), set these "
    "rows to the mean of the trained ones, or use tokens that were trained",
)
def untrained_tokens_in_data(subject: Subject) -> Iterator[Evidence]:
    """The data uses tokens whose rows were never trained: they mean nothing, and adapters cannot help it."""
    used = {i: row.name for row in reversed(subject.rows or ()) for i in row.ids}
    trained = subject.run is not None and bool(subject.run.saved_modules)
    for text in _unused(subject, used):
        yield Evidence(text, WARNING if trained else None)


@rule(
    "untrained-tokens-in-template",
    ERROR,
    "weights template config",
    remedy="take the template that the model was trained with; a base model needs one of plain text, or its embedding "
    "and head trained (modules_to_save: [embed_tokens, lm_head])",
)
def untrained_tokens_in_template(subject: Subject) -> Iterator[Evidence]:
    """The template uses tokens whose rows were never trained, as a chat template on a base model does."""
    used = dict.fromkeys(ids(subject.tokenizer, _rendered(subject)), "the template")
    trained = subject.run is not None and bool(subject.run.saved_modules)
    for text in _unused(subject, used):
        yield Evidence(text, WARNING if trained else None)


@rule(
    "embedding-size",
    ERROR,
    "weights config",
    remedy="set vocab_size to the number of rows, or resize with model.resize_token_embeddings",
)
def embedding_size(subject: Subject) -> Iterator[str]:
    """Embedding or head have another number of rows than vocab_size says: loading makes rows up, or fails."""
    assert subject.tensors is not None
    for word, name in _tables(subject):
        rows = subject.tensors.entries[name].shape[0]
        if rows != subject.vocabulary:
            yield f"the {word} ({name}) has {rows:,} rows, vocab_size is {subject.vocabulary:,}"


@rule(
    "tied-weights-differ",
    ERROR,
    "weights config",
    remedy="set tie_word_embeddings to false if the head was trained by itself; else save the model again",
)
def tied_weights_differ(subject: Subject) -> Iterator[str]:
    """Embedding and head are declared to be one tensor, and are two: one of them is lost when the model is loaded."""
    tensors = subject.tensors
    if tensors is None or not getattr(subject.text_config, "tie_word_embeddings", False):
        return
    if tensors.embedding is None or tensors.head is None:
        return
    one, other = tensors.read(tensors.embedding), tensors.read(tensors.head)
    if one.shape != other.shape:
        yield f"{tensors.embedding} has the shape {tuple(one.shape)}, {tensors.head} {tuple(other.shape)}"
    elif one.data_ptr() != other.data_ptr():
        differing = int((one != other).any(dim=1).sum())
        if differing:
            yield f"{tensors.embedding} and {tensors.head} differ in {differing:,} of {one.shape[0]:,} rows"
        elif tensors.live:
            yield f"{tensors.embedding} and {tensors.head} are equal and two tensors: training pulls them apart"


@rule(
    "head-missing",
    ERROR,
    "weights config",
    remedy="set tie_word_embeddings to true if the head is the embedding; else find the checkpoint's missing file",
)
def head_missing(subject: Subject) -> Iterator[str]:
    """The head is declared to be a tensor of its own, and the checkpoint holds none: it would start at random."""
    tensors = subject.tensors
    tied = getattr(subject.text_config, "tie_word_embeddings", False)
    if tensors is None or tensors.embedding is None or tensors.head is not None or tied:
        return
    rows = tensors.entries[tensors.embedding].shape[0]
    # Heads have many names; none is as long as the vocabulary and is no head.
    others = [n for n, e in tensors.entries.items() if len(e.shape) == 2 and rows in e.shape and n != tensors.embedding]
    if not others:
        yield f"tie_word_embeddings is false, and of {len(tensors.entries):,} tensors none is a head"


@rule(
    "tied-weights-parted",
    WARNING,
    "config run",
    remedy="name both embed_tokens and lm_head, or neither",
)
def tied_weights_parted(subject: Subject) -> Iterator[str]:
    """One of two tied weights is trained beside the adapters: the model that is saved has two, and its configuration
    says one."""
    if subject.run is None or not getattr(subject.text_config, "tie_word_embeddings", False):
        return
    saved = {name.rpartition(".")[2] for name in subject.run.saved_modules}
    if len(saved & {"embed_tokens", "lm_head"}) == 1:
        yield f"modules_to_save holds {', '.join(sorted(saved))}; tie_word_embeddings is true"


def _read(subject: Subject) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that these rules look into."""
    assert subject.tensors is not None
    for name in [*(name for _, name in _tables(subject)), *subject.tensors.norms]:
        yield name, subject.tensors.read(name)


@rule(
    "weights-not-finite",
    ERROR,
    "weights config",
    remedy="load the checkpoint from before it broke; this one cannot be repaired",
    stops=True,
)
def weights_not_finite(subject: Subject) -> Iterator[str]:
    """Embedding, head or a norm hold NaN or infinity: so does everything that is computed from them."""
    for name, tensor in _read(subject):
        if bad := int((~torch.isfinite(tensor)).sum()):
            yield f"{name}: {bad:,} of {tensor.numel():,} numbers are not finite"


@rule(
    "fp16-weights-overflow",
    ERROR,
    "weights config run",
    remedy="train in bfloat16, or in float32 where there is none",
    stops=True,
)
def fp16_weights_overflow(subject: Subject) -> Iterator[str]:
    """Weights are larger than float16 can hold (65,504), and become infinite in it."""
    if subject.run is None or subject.run.dtype != "float16":
        return
    for name, tensor in _read(subject):
        largest = float(tensor.abs().max())
        if FP16_MAX < largest < float("inf"):
            yield f"{name}: {largest:,.0f}"


@rule(
    "fp16-of-a-bf16-model",
    WARNING,
    "config run",
    remedy="train in bfloat16; on cards without it in float32, or watch skipped_steps in the log",
)
def fp16_of_a_bf16_model(subject: Subject) -> Iterator[str]:
    """The model was trained in bfloat16, which reaches as far as float32, and runs in float16, which ends at 65,504:
    activations of some layers overflow."""
    declared = str(getattr(subject.text_config, "dtype", None) or "").removeprefix("torch.")
    if subject.run is not None and subject.run.dtype == "float16" and declared == "bfloat16":
        yield "config.json says bfloat16, the run float16"
