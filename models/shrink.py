"""A tiny configuration of any architecture: rules over what fields mean by their names, no list of models.

A field's new value depends on its name, on its old value and on the width of its own (sub-)configuration, so that the
ratios an architecture relies on (grouped heads, an inner width of twice the hidden one) survive. Layers are thinned out
to one of each kind, and no dropout or other noise is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from .shrink_pictures import Pictures, pictures_of

WIDTH, HEADS, HEAD_DIM, EXPERTS, VOCABULARY = 64, 4, 16, 4, 128
ORDINARY_TOKENS = range(32, 100)
"""Ids that no special token has: those are kept below or moved above."""
_KINDS = 4  # of layers; no architecture interleaves more
_WINDOW = 8  # shorter than the sweep's sequences, so that windows and chunks matter

_HIDDEN = ("hidden_size", "d_model", "n_embd", "embedding_dim", "emb_dim", "embed_dim")
_ATTENTION_HEADS = ("num_attention_heads", "n_heads", "n_head", "attention_heads", "decoder_attention_heads")
_LAYERS = r"(num_|n_)?(\w+_)?(layers?|blocks)|depth|num_layers_per_stack"
_LAYERS_ELSEWHERE = (
    r"num_(dense|kv_shared|residual|lstm|nextn_predict)_layers|num_(mem|random|res)_blocks|feature_layer"
)


class Widths:
    """What the rules know of a configuration as a whole: its old widths, and how many layers it will have."""

    def __init__(self, fields: dict[str, Any], layers: int, widest: int | None = None) -> None:
        self.fields = fields
        self.hidden = _first_int(fields, _HIDDEN) or WIDTH
        self.widest = max(widest or self.hidden, WIDTH)  # becomes WIDTH
        self.heads = _first_int(fields, _ATTENTION_HEADS) or HEADS
        self.head_dim = _first_int(fields, ("head_dim",)) or self.hidden // self.heads
        self.expand = _first_int(fields, ("mamba_expand", "expand"))
        self.rotated = fields.get("qk_rope_head_dim")  # a part of a head, where latent attention has two
        self.layers = layers

    def proportional(self, value: int) -> int:
        """As wide in relation to the hidden size as before, in steps of 16."""
        return min(value, max(16, round(value * WIDTH / self.widest / 16) * 16))

    def head_width(self, value: int) -> int:
        """Heads that together are once or twice as wide as the model stay so."""
        if self.rotated:
            return min(value, HEAD_DIM if value <= self.rotated else 2 * HEAD_DIM)
        for multiple in (1, 2):
            if value * self.heads == multiple * self.hidden:
                return min(value, multiple * self.proportional(self.hidden) // min(self.heads, HEADS))
        return min(value, HEAD_DIM)

    def groups(self, value: int) -> int:
        """Heads of keys and values: as many as there are queries, one, or one for two."""
        return min(self.heads, HEADS) if value >= self.heads else min(value, 2)


def _at_most(limit: int) -> Callable[[int, Widths], int]:
    return lambda value, widths: min(value, limit)


def _proportional(value: int, widths: Widths) -> int:
    return widths.proportional(value)


def _token(value: int, widths: Widths) -> int:
    return (
        value if value < ORDINARY_TOKENS.start else ORDINARY_TOKENS.stop + value % (VOCABULARY - ORDINARY_TOKENS.stop)
    )


def _state_heads(value: int, widths: Widths) -> int:
    return min(value, (widths.expand or 1) * WIDTH // HEAD_DIM)


# Name → the new value. The first expression that matches the whole name decides; other integers stay.
_RULES: list[tuple[str, Callable[[int, Widths], int]]] = [
    (r"\w*(token_id|token_index|bos_index|eos_index|pad_index|vocab_offset)", _token),
    (r"type_vocab_size|task_type_vocab_size", lambda v, w: v),
    (r"\w*vocab(_size\w*)?|codebook_size|num_centroids", _at_most(VOCABULARY)),
    (r"\w*(max_position_embeddings|n_positions|max_seq_len|n_ctx|context_length|max_target_positions)", _at_most(64)),
    (r"num_kv_shared_layers", lambda v, w: min(v, w.layers // 2) if w.layers > 2 else 0),
    (r"n_(input|output|recurrent)_layers", _at_most(1)),
    (_LAYERS_ELSEWHERE, _at_most(1)),
    (r"first_k_dense_replace|\w*layer_(offset|index_start|start_index)", _at_most(1)),
    (r"moe_layer_end_index|loop_layer_index_end", lambda v, w: w.layers - 1),
    (r"\w*(_period|_every_n_layers|layer_interval|layer_group_size|sliding_window_pattern)", _at_most(2)),
    (r"n_layers_per_attn_res_block", _at_most(1)),
    (_LAYERS, lambda v, w: min(v, w.layers)),
    (r"max_window_layers", _at_most(1)),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", _state_heads),
    (r"d_kv", lambda v, w: w.head_width(v)),
    (r"num_heads", lambda v, w: _state_heads(v, w) if w.expand else min(v, HEADS)),
    (r"\w*(key_value|kv|query_groups|kv_n)_?(heads)?", lambda v, w: w.groups(v)),
    (r"linear_num_key_heads", _at_most(2)),
    (r"\w*(attention_heads(_per_layer)?|n_heads?|num_heads|num_value_heads)", _at_most(HEADS)),
    (r"mamba_d_head|mamba_head_?dim|mamba_headdim", _at_most(HEAD_DIM)),
    (r"qk_head_dim|index(er)?_head_dim", _at_most(2 * HEAD_DIM)),
    (r"(qk_nope|qk_rope|v|swa|linear|linear_\w+)_head_dim|rotary_dim|attention_head_size", _at_most(HEAD_DIM)),
    (r"\w*(head_dim|head_size|d_head|dim_head|d_kv|kv_channels)", lambda v, w: w.head_width(v)),
    (r"\w*(num|routed|local)_experts|moe_num_experts", _at_most(EXPERTS)),
    (r"zero_expert_num", _at_most(2)),
    (r"n_group|num_expert_group|n_groups|mamba_n_?groups|\w*(experts_per_tok(en)?|top_?k|moe_k)", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"\w*(d_state|state_size)|\w*(dt_rank|step_rank)|\w*_rank", _at_most(16)),
    (r"\w*(chunk_size|chunk_length|window|window_size|window_len|local_attention|block_size)", _at_most(_WINDOW)),
    (r"(\w+_)?(hidden_size|d_model|n_embd|emb(ed(ding)?)?_dim)", _proportional),
    (r"\w*(_size|_dim|_width|_channels?|_inner|n_inner|d_ff|dff|dim_ff|d_ssm|_filters|_lowrank)", _proportional),
]  # fmt: skip
_UNTOUCHED = re.compile(
    r"input_size|\w*(image_size|patch_size|conv\w*|kernel_size|merge_size|input_feat_size|num_channels)"
)
_NOISE = re.compile(r"\w*(drop|jitter)\w*")


# What a default configuration may leave open although its model wants a number.
_OPEN = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2}
_OPEN |= {"image_token_id": ORDINARY_TOKENS.stop, "image_token_index": ORDINARY_TOKENS.stop}
_OPEN |= {"num_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_OPEN |= {"video_token_index": ORDINARY_TOKENS.stop + 1, "video_token_id": ORDINARY_TOKENS.stop + 1}
_OPEN |= {"top_k_experts": 2, "moe_intermediate_size": WIDTH // 2}
_OPEN |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 2 * HEAD_DIM, "indexer_budget": _WINDOW}
_OPEN |= {"indexer_compress_ratio": 2}
# What a configuration may not know of at all although its model asks for it.
_UNKNOWN = {"pad_token_id": 0, "decoder_start_token_id": 1, "vision_start_token_id": ORDINARY_TOKENS.stop + 2}


@dataclass(frozen=True)
class Way:
    """How to shrink; what one architecture needs, another cannot bear.

    Attributes:
        copies: layers kept of each kind. Some layers share what an earlier one of their kind has.
        fill: give fields that are None a value.
        widest: hidden size that becomes ``WIDTH``, for parts that are to stay in proportion to each other.
        pictures: what a model of text and images needs to know of its images; None makes a causal language model.
    """

    copies: int = 1
    fill: bool = False
    widest: int | None = None
    pictures: Pictures | None = None


def ways(config: Any, pictures: bool = False) -> Iterator[Any]:
    """Tiny configurations, the plainest first; the first that eager can run is the one to take.

    Ways that the class refuses are left out, unless it refuses all of them.

    Args:
        pictures: keep the model of text and images that the configuration is of; otherwise also its text part alone.

    Raises:
        Exception: what the class raised when it refused the first one.
    """
    refused, found = [], 0
    for way in _ways_with_pictures(config) if pictures else _ways(config):
        try:
            shrunk = shrink(config, way)
        except Exception as error:  # noqa: BLE001  classes validate in any way they like
            refused.append(error)
            continue
        found += 1
        yield shrunk
        # A configuration of several parts may stand for the causal language model inside of it.
        if not pictures and (decoder := shrunk.get_text_config(decoder=True)) is not shrunk:
            yield decoder
    if not found:
        raise refused[0]


def _ways(config: Any) -> tuple[Way, ...]:
    hidden = [_first_int(vars(part), _HIDDEN) or 0 for part in (config, *all_parts(config))]
    return Way(), Way(fill=True), Way(copies=2, fill=True), Way(fill=True, widest=max(hidden))


def _ways_with_pictures(config: Any) -> Iterator[Way]:
    for side in (4, 8):
        for way in _ways(config):
            inside = (config.get_text_config(), *(part.get_text_config() for part in all_parts(config)))
            text = next(filter(None, (_first_int(vars(part), _HIDDEN) for part in inside)), WIDTH)
            yield replace(way, pictures=pictures_of(config, side, Widths({"hidden_size": text}, 2, way.widest)))


def shrink(config: Any, way: Way = Way()) -> Any:
    """A tiny configuration of the same class, without noise, as a causal language model.

    Args:
        config: an instance. It is not changed.

    Raises:
        Exception: whatever the class raises when it refuses the new values.
    """
    fields = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    overrides = getattr(vars(config).get("_heterogeneity_spec"), "per_layer_overrides", {})
    count = _layer_count(fields)
    kept = _kept_layers(fields, overrides, count, way.copies)
    widths = Widths(fields, len(kept), way.widest)
    result, special = {}, {}
    defaults = vars(type(config)())
    if way.pictures is not None and way.fill and fields.get("vision_config", 0) is None:
        fields["vision_config"] = _part_left_open(config, "vision_config")
    for name, value in fields.items():
        new = _field(name, value, widths, kept, count, way)
        if hasattr(value, "model_type") or type(new) is not type(value) or new != value:
            result[name] = new
        elif name not in defaults or defaults[name] != value:
            special[name] = value
    if overrides:
        layers = {i: overrides[old] for i, old in enumerate(kept) if old in overrides}
        own = {i: Widths(fields | o, len(kept), way.widest) for i, o in layers.items()}
        result["per_layer_config"] = {i: {k: _number(k, v, own[i]) for k, v in o.items()} for i, o in layers.items()}
    if fields.get("is_decoder") is False and way.pictures is None:
        result["is_decoder"] = True  # else a bidirectional encoder
    if "default_language" in fields and fields["default_language"] is None:
        result["default_language"] = fields["languages"][0]
    try:
        made = type(config)(**special, **result)
    except Exception:  # noqa: BLE001  not every attribute is an argument
        made = type(config)(**result)
    if way.pictures is not None and way.fill:
        for name, value in _UNKNOWN.items():
            if not hasattr(made, name):
                setattr(made, name, value)
    return made


def _field(name: str, value: Any, widths: Widths, kept: list[int], count: int, way: Way) -> Any:
    if _NOISE.fullmatch(name) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return type(value)(0)
    if hasattr(value, "model_type"):
        return shrink(value, way)
    if way.pictures is not None:
        known, new = way.pictures.field(name, value, widths, kept, way.fill)
        if known:
            return new
    if isinstance(value, dict):
        new = _dictionary(value, widths)
        if way.pictures is not None and way.fill and name == "rope_parameters" and "mrope_section" not in value:
            turned = value.get("partial_rotary_factor") or widths.fields.get("partial_rotary_factor") or 1.0
            new = new | {"mrope_section": _sections_of(int(widths.head_width(widths.head_dim) * turned) // 2, 3)}
        return new
    if isinstance(value, (list, tuple)):
        if _is_index_list(value, count):
            return type(value)(new for new, old in enumerate(kept) if old in value)
        thinned = [value[i] for i in kept] if _is_per_layer(value, count) else value
        return type(value)(_number(name, v, widths) for v in thinned)
    if value is None and way.fill:
        kinds = widths.fields.get("layer_types") or ()
        if name == "sliding_window" and (
            "num_sliding_attention_heads" in widths.fields or any("sliding" in k for k in kinds)
        ):
            return _WINDOW
        kinds = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}
        return [kinds[name]] * len(kept) if name in kinds else _OPEN.get(name)
    return _number(name, value, widths)


def parts(config: Any) -> list[Any]:
    """The configurations inside of one: of its text, its images, …"""
    return [v for v in vars(config).values() if hasattr(v, "model_type")]


def all_parts(config: Any) -> Iterator[Any]:
    """As :func:`parts`, and those inside of these."""
    for part in parts(config):
        yield part
        yield from all_parts(part)


def _part_left_open(config: Any, name: str) -> Any:
    """The default of a part that a configuration may do without; None where its class is left open too."""
    made = getattr(type(config), "sub_configs", {}).get(name)
    return made() if made is not None and getattr(made, "model_type", "") else None


def _number(name: str, value: Any, widths: Widths) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or _UNTOUCHED.fullmatch(name):
        return value
    rule = next((rule for expression, rule in _RULES if re.fullmatch(expression, name)), None)
    return value if rule is None else rule(value, widths)


def _dictionary(value: dict[Any, Any], widths: Widths) -> dict[Any, Any]:
    """Rotary settings: sections are parts of a head, and are as large a part of the new one."""
    result = {}
    for key, item in value.items():
        if isinstance(item, dict):
            result[key] = _dictionary(item, widths)
        elif key == "mrope_section":
            result[key] = _sections_of(sum(item) * min(widths.head_dim, HEAD_DIM) // widths.head_dim, len(item))
        else:
            result[key] = item
    return result


def _sections_of(frequencies: int, axes: int) -> list[int]:
    """How many of a head's frequencies turn with time, height and width; models of one position take no notice.

    As even as can be and the larger first, as frequencies that are dealt out in turn are. So the first two sections of
    eight frequencies are equally long, which models that pair height's and width's ask for.
    """
    return [frequencies // axes + (axis < frequencies % axes) for axis in range(axes)]


# -- layers -----------------------------------------------------------------------------------------------------------


def _kept_layers(fields: dict[str, Any], overrides: dict[int, Any], count: int, copies: int) -> list[int]:
    """The first layers of each kind, and at least two; a kind is what all per-layer settings say of a layer."""
    if (sections := _sections(fields, count)) is not None:
        return list(range(sections))
    lists = [v for v in fields.values() if isinstance(v, (list, tuple))]
    kinds: dict[str, list[int]] = {}
    for i in range(count):
        member = [i in v for v in lists if _is_index_list(v, count)]
        kind = [v[i] for v in lists if _is_per_layer(v, count)]
        kinds.setdefault(str((member, kind, overrides.get(i))), []).append(i)
    kept = sorted(i for layers in list(kinds.values())[:_KINDS] for i in layers[:copies])
    rest = [i for i in range(count) if i not in kept]
    return sorted(kept + rest[: max(0, 2 - len(kept))])


def _sections(fields: dict[str, Any], count: int) -> int | None:
    """How many parts the layers are counted in, where such counts (``n_input_layers``, …) sum up to all of them."""
    parts = [v for k, v in fields.items() if re.fullmatch(r"n_\w+_layers", k) and isinstance(v, int)]
    return len(parts) if len(parts) > 1 and sum(parts[:3]) >= count else None


def _layer_count(fields: dict[str, Any]) -> int:
    names = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "decoder_layers", "num_blocks", "depth")
    return _first_int(fields, names) or 2


def _is_per_layer(value: Any, count: int) -> bool:
    return len(value) == count and not _is_index_list(value, count)


def _is_index_list(value: Any, count: int) -> bool:
    """Whether it names layers by their numbers."""
    if not value or any(not isinstance(v, int) or isinstance(v, bool) for v in value):
        return False
    return all(a < b for a, b in pairwise(value)) and value[0] >= 0 and value[-1] < count


def _first_int(fields: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((fields[n] for n in names if isinstance(fields.get(n), int)), None)
