"""Rules over a sample of the data, as tokens and as what is trained on of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .rule import ERROR, WARNING, Evidence, rule
from .subject import Row, Subject
from .templates import turn_end
from .tokens import listed, shown, stop_ids

IGNORED = -100
_MANY_CUT, _MANY_ALIKE, _MANY_UNKNOWN = 0.05, 0.10, 0.001


def kept(subject: Subject) -> list[tuple[Row, Sequence[int], Sequence[int]]]:
    """(row, tokens, labels) as far as the run's ``max_length`` lets the model see them."""
    limit = subject.run.max_length if subject.run is not None else None
    return [(row, row.ids[:limit], row.labels[:limit]) for row in subject.rows or ()]


def share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.0%})"


@rule(
    "ids-outside-embedding",
    ERROR,
    "data config",
    remedy="tokenise the data with this model's tokenizer, or resize the embedding",
    stops=True,
)
def ids_outside_embedding(subject: Subject) -> Iterator[str]:
    """The data holds tokens that have no row in the embedding: the lookup fails."""
    for row in subject.rows or ():
        if row.ids and max(row.ids) >= subject.vocabulary:
            yield f"{row.name}: token {max(row.ids)}; the embedding has {subject.vocabulary:,} rows"


@rule(
    "nothing-to-learn",
    ERROR,
    "data",
    remedy="raise max_length, shorten the prompts, or look at what the template marks as the assistant's",
    stops=True,
)
def nothing_to_learn(subject: Subject) -> Iterator[Evidence]:
    """Rows of which nothing is trained on, because all is masked or the answer lies behind max_length."""
    # The first token is never a target.
    rows = kept(subject)
    empty = [row.name for row, _, labels in rows if all(label == IGNORED for label in labels[1:])]
    if empty:
        text = f"{share(len(empty), len(rows))} rows have no token that is trained on: {listed(empty)}"
        yield Evidence(text, None if len(empty) == len(rows) else WARNING)


@rule(
    "rows-cut-off",
    WARNING,
    "data run",
    remedy="raise max_length (memory grows with it: unsloth plan), or shorten or split these rows",
)
def rows_cut_off(subject: Subject) -> Iterator[str]:
    """Many rows are longer than max_length: the model learns from beginnings, and not where texts end."""
    limit = subject.run.max_length if subject.run is not None else None
    rows = subject.rows or ()
    long = [row for row in rows if limit is not None and len(row.ids) > limit]
    if len(long) > _MANY_CUT * len(rows):
        longest = max(long, key=lambda row: len(row.ids))
        most = f"{longest.name} has {len(longest.ids):,}"
        yield f"{share(len(long), len(rows))} rows are longer than {limit:,} tokens; {most}"


@rule(
    "end-not-learnt",
    ERROR,
    "data tokenizer",
    remedy="do not mask EOS (a padding token of its own, a collator that masks by place), and have the template end "
    "answers with it",
)
def end_not_learnt(subject: Subject) -> Iterator[str]:
    """The token that ends a text is there and is never trained on: the model does not learn to stop."""
    ends = {subject.tokenizer.eos_token_id, turn_end(subject)} - {None}
    ends |= set(stop_ids(subject)) if subject.config is not None else set()
    rows = kept(subject)
    there = [row for row in rows if ends & set(row[1])]
    learnt = [row for row in there if ends & set(row[2])]
    if there and not learnt:
        which = listed([shown(subject.tokenizer, i) for i in sorted(ends) if any(i in ids for _, ids, _ in there)])
        yield f"{which} stands in {share(len(there), len(rows))} rows, with a label in none of them"


@rule(
    "bos-doubled-in-data",
    ERROR,
    "data tokenizer",
    remedy="leave BOS out of the texts, or tokenise them with add_special_tokens=False",
)
def bos_doubled_in_data(subject: Subject) -> Iterator[str]:
    """Rows begin with BOS twice: they bring it as text, and the tokenizer adds its own."""
    bos = subject.tokenizer.bos_token_id
    rows = subject.rows or ()
    double = [row.name for row in rows if list(row.ids[:2]) == [bos, bos]]
    if bos is not None and double:
        yield f"{share(len(double), len(rows))} rows begin with {shown(subject.tokenizer, bos)} twice: {listed(double)}"


@rule(
    "control-tokens-in-text",
    WARNING,
    "data tokenizer",
    remedy="remove or spell them otherwise; they end turns and open others where the text means none",
)
def control_tokens_in_text(subject: Subject) -> Iterator[str]:
    """Messages hold the text of special tokens, which the tokenizer reads as the tokens themselves."""
    special = [str(t) for t in subject.tokenizer.all_special_tokens if len(str(t)) > 2]
    for row in subject.rows or ():
        for message in row.messages:
            content = message.get("content")
            found = [t for t in special if isinstance(content, str) and t in content]
            if found:
                yield f"{row.name}: a message of {message.get('role')} holds {listed(found)}"


@rule(
    "unknown-tokens",
    WARNING,
    "data tokenizer",
    remedy="take a model whose tokenizer knows these characters, or replace them",
)
def unknown_tokens(subject: Subject) -> Iterator[str]:
    """Much of the text is unknown to the tokenizer, and lost."""
    unknown = subject.tokenizer.unk_token_id
    special = {subject.tokenizer.eos_token_id, subject.tokenizer.bos_token_id}
    if unknown is None or unknown in special:
        return
    rows = subject.rows or ()
    counts = [(row.name, sum(i == unknown for i in row.ids)) for row in rows]
    found, tokens = sum(n for _, n in counts), sum(len(row.ids) for row in rows)
    if found > _MANY_UNKNOWN * tokens:
        where = listed([name for name, n in counts if n])
        yield f"{share(found, tokens)} tokens are {shown(subject.tokenizer, unknown)}: {where}"


@rule("rows-alike", WARNING, "data", remedy="leave the repetitions out; each is one more pass over the same row")
def rows_alike(subject: Subject) -> Iterator[str]:
    """Many rows are the same: they weigh more than was meant, and a held-out part of them measures nothing."""
    rows = subject.rows or ()
    counts = Counter(tuple(row.ids) for row in rows)
    repeated = len(rows) - len(counts)
    if repeated > _MANY_ALIKE * len(rows):
        (most, times) = counts.most_common(1)[0]
        first = next(row.name for row in rows if tuple(row.ids) == most)
        yield f"{share(repeated, len(rows))} rows repeat another one; {first} is there {times} times"


@rule(
    "beyond-positions",
    WARNING,
    "data config",
    remedy="lower max_length, or extend the context first (YaRN)",
)
def beyond_positions(subject: Subject) -> Iterator[Evidence]:
    """Rows are longer than the positions that the model was trained for."""
    config = subject.text_config
    positions = getattr(config, "max_position_embeddings", None)
    lengths = [(len(ids), row.name) for row, ids, _ in kept(subject)]
    if positions and lengths and max(lengths)[0] > positions:
        length, name = max(lengths)
        learnt = getattr(config, "rope_parameters", None) is None and not hasattr(config, "alibi")
        text = f"{name} has {length:,} tokens, max_position_embeddings is {positions:,}"
        yield Evidence(text, ERROR if learnt else None)


@rule(
    "documents-joined",
    WARNING,
    "run",
    remedy="packing_strategy: bfd keeps documents apart",
)
def documents_joined(subject: Subject) -> Iterator[str]:
    """Packing cuts rows from one stream of text: documents attend to the ones before them."""
    if subject.run is not None and subject.run.packing == "wrapped":
        yield "packing_strategy is 'wrapped'"
