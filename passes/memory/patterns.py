"""What one layer may keep, from its inputs alone to everything: the best choice for each number of bytes.

An integer program per distinct layer, over its values (Jain et al. 2020, Checkmate, arXiv:1910.02653, without time,
which a layer that is recomputed as a whole does not need):

    minimise    Σ seconds(o) run(o)                    over the layer's operators o that backward runs again
    subject to  have(v) ≤ keep(v) + run(maker of v)    for every value v
                run(o) ≤ have(v)                       for every value v that o reads
                have(v) = 1                            for what backward wants
                Σ bytes(v) keep(v) ≤ limit

Layers that are alike are solved once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from .costs import Sizes
from .joint import Joint, inputs, is_free, is_pinned, is_value, maker, unpacks
from .liveness import root

LIMITS = 12
"""How many numbers of bytes between the least and the most a layer is solved for."""


@dataclass(frozen=True)
class Pattern:
    """What one layer keeps.

    Attributes:
        kept: positions in :attr:`Layer.values`.
        bytes: of the kept values.
        seconds: of what backward runs again for it.
    """

    kept: frozenset[int]
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Layer:
    """One repeated layer of the model, seen as the values that its forward makes.

    Attributes:
        name: (container, index).
        values: in graph order.
        must: positions of what every plan keeps: what crosses the layer's border, what may not run again.
        most: positions of what the largest plan keeps.
        wanted: positions of what backward reads.
        signature: equal for layers that are alike.
    """

    name: tuple[str, int]
    values: list[fx.Node]
    must: frozenset[int]
    most: frozenset[int]
    wanted: frozenset[int]
    signature: Any


def read_layers(
    joint: Joint,
    home: Mapping[fx.Node, tuple[str, int]],
    plans: tuple[Iterable[fx.Node], Iterable[fx.Node]],
    sizes: Sizes,
) -> list[Layer]:
    """The repeated layers of a joint graph, in the order in which forward runs them.

    Args:
        home: the layer of each node, as :func:`~unsloth.passes.memory.joint.layers` says.
        plans: what the smallest plan keeps, and what the largest does.
    """
    members: dict[tuple[str, int], list[fx.Node]] = {}
    for node in joint.forward:
        if node in home and is_value(node) and not is_free(node) and root(node) is node:
            members.setdefault(home[node], []).append(node)
    least, most = (set(map(root, kept)) for kept in plans)
    wanted = {root(n) for n in joint.wanted}
    result = []
    for name, values in members.items():
        place = {n: i for i, n in enumerate(values)}
        must = frozenset(i for n, i in place.items() if n in least)
        all_of_it = must | {i for n, i in place.items() if n in most}
        reads = frozenset(i for n, i in place.items() if n in wanted)
        facts = tuple(
            (
                str(maker(n).target),
                str(n.args[1]) if maker(n) is not n else "",
                sizes.bytes(n),
                tuple(place.get(root(s), -1) for s in inputs(n)),
                is_pinned(n, joint),
            )
            for n in values
        )
        result.append(Layer(name, values, must, all_of_it, reads, (facts, must, all_of_it, reads)))
    return result


def patterns(layer: Layer, joint: Joint, sizes: Sizes) -> list[Pattern]:
    """The layer's choices that no other one beats, by bytes, up to what the largest plan keeps.

    Returns:
        none where there is no SciPy, or nothing to choose.
    """
    try:
        program = _Program(layer, joint, sizes)
    except ImportError:
        return []
    everything = program.solve(keep=layer.most)
    if everything is None:
        return []
    least = sum(sizes.bytes(layer.values[i]) for i in layer.must)
    found = {everything}
    for step in range(LIMITS if layer.must != layer.most else 0):
        solved = program.solve(limit=least + (everything.bytes - least) * step // LIMITS)
        if solved is not None and solved.seconds > everything.seconds and solved.bytes < everything.bytes:
            found.add(solved)
    best: list[Pattern] = []
    for pattern in sorted(found, key=lambda p: (p.bytes, p.seconds)):
        if not best or pattern.seconds < best[-1].seconds - 1e-9:
            best.append(pattern)
    return best


class _Program:
    def __init__(self, layer: Layer, joint: Joint, sizes: Sizes) -> None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        bounds: Any = Bounds  # whose types say numbers, and which takes arrays
        self._milp, self._bounds, self._constraint = milp, bounds, LinearConstraint
        self.layer, values = layer, layer.values
        place = {n: i for i, n in enumerate(values)}
        makers = list(dict.fromkeys(map(maker, values)))
        operation = {m: i for i, m in enumerate(makers)}
        count, operators = len(values), len(makers)
        self.count = count
        # Columns: keep (count), have (count), run (operators).
        self.size = np.array([sizes.bytes(n) for n in values], dtype=float)
        self.seconds = np.array([sizes.seconds(m) for m in makers])
        width = 2 * count + operators
        rows = []
        for n, i in place.items():
            row = np.zeros(width)
            row[count + i], row[i], row[2 * count + operation[maker(n)]] = 1, -1, -1
            rows.append(row)
        for m, j in operation.items():
            for source in {root(s) for s in m.all_input_nodes if is_value(s)}:
                if source in place:
                    row = np.zeros(width)
                    row[2 * count + j], row[count + place[source]] = 1, -1
                    rows.append(row)
        self.rows = np.array(rows)
        low, high = np.zeros(width), np.ones(width)
        for i in layer.must:
            low[i] = low[count + i] = 1
        for i in layer.wanted:
            low[count + i] = 1
        for n, i in place.items():
            if is_pinned(n, joint):
                high[2 * count + operation[maker(n)]] = 0
            if unpacks(maker(n).target):
                high[i] = 0  # keeping what was unpacked would undo the packing
        self.low, self.high = low, high

    def solve(self, *, limit: int | None = None, keep: frozenset[int] | None = None) -> Pattern | None:
        """The fastest choice within so many bytes, or that keeps just those values; None where there is none."""
        count, scale = self.count, self.size.sum() or 1.0
        low, high = self.low.copy(), self.high.copy()
        if keep is not None:
            low[:count] = high[:count] = [i in keep for i in range(count)]
        # Ties go to fewer bytes: a layer's altogether weigh as much as a tenth of a microsecond.
        cost = np.concatenate([self.size / scale * 1e-1, np.zeros(count), self.seconds * 1e6])
        constraints = [self._constraint(self.rows, -np.inf, 0)]
        if limit is not None:
            kept = np.concatenate([self.size / scale, np.zeros(len(cost) - count)])
            constraints.append(self._constraint(kept, -np.inf, limit / scale * (1 + 1e-9)))
        bounds, whole = self._bounds(low, high), np.ones(len(cost))
        solved = self._milp(cost, integrality=whole, bounds=bounds, constraints=constraints)
        if solved.x is None:
            return None
        chosen = np.round(solved.x).astype(int)
        kept = frozenset(int(i) for i in np.flatnonzero(chosen[:count]))
        return Pattern(kept, int(sum(self.size[i] for i in kept)), float(self.seconds @ chosen[2 * count :]))


def members(layer: Layer, pattern: Pattern) -> Sequence[fx.Node]:
    """The values of that layer that a pattern keeps."""
    return [layer.values[i] for i in sorted(pattern.kept)]
