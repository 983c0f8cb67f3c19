"""Where the nodes of a panel stand: outputs above, inputs below, chains along the middle."""

from __future__ import annotations

from tnc.drawing.diagram import Panel

Place = tuple[float, float]

WIDTH = 1.6  # between neighbours in a row
HEIGHT = 1.35  # between rows


def places(panel: Panel) -> list[Place]:
    """(x, y) of every node, x from 0.

    Nodes that only outputs leave stand in the top row, those that only inputs enter in the bottom row, all others
    in the middle. A copy dot stands at the mean of what it joins, moved towards its own legs.
    """
    rows: dict[int, list[int]] = {1: [], 0: [], -1: []}
    for index, node in enumerate(panel.nodes):
        if node.kind != "copy":
            rows[_row(panel, index)].append(index)
    widest = max(len(row) for row in rows.values()) or 1
    found: dict[int, Place] = {}
    flat = not rows[1] and not rows[-1]
    for level, row in rows.items():
        for k, index in enumerate(row):
            found[index] = ((k + (widest - len(row)) / 2) * WIDTH, 0.0 if flat else level * HEIGHT)
    for index in _hubs(panel) if rows[1] and rows[-1] else ():
        for end in {b for a, b in (bond.nodes for bond in panel.bonds) if a == index} & set(rows[0]):
            found[end] = (found[end][0] - 0.6 * WIDTH, found[end][1])  # beside the line that it sits on
    for index, node in enumerate(panel.nodes):
        if node.kind == "copy":
            found[index] = _dot(panel, index, found)
    return _apart([found[index] for index in range(len(panel.nodes))], panel)


def _row(panel: Panel, index: int) -> int:
    """1 for the top, -1 for the bottom row."""
    dots = {a for a, b in (bond.nodes for bond in panel.bonds) if b == index and panel.nodes[a].kind == "copy"}
    own = {leg.out for leg in panel.legs if leg.node == index}
    shared = {leg.out for leg in panel.legs if leg.node in dots}
    sides = own or shared
    if len(sides) != 1 or (not own and len({leg.out for leg in panel.legs}) > 1 and _joined(panel, index) > 2):
        return 0
    return 1 if True in sides else -1


def _hubs(panel: Panel) -> tuple[int, ...]:
    """Copy dots without legs of their own."""
    owners = {leg.node for leg in panel.legs}
    return tuple(k for k, node in enumerate(panel.nodes) if node.kind == "copy" and k not in owners)


def _joined(panel: Panel, index: int) -> int:
    return sum(index in bond.nodes for bond in panel.bonds)


def _dot(panel: Panel, index: int, found: dict[int, Place]) -> Place:
    ends = [found[b] for a, b in (bond.nodes for bond in panel.bonds) if a == index and b in found]
    y = sum(place[1] for place in ends) / len(ends)
    if index in _hubs(panel):
        outer = [place for place in ends if place[1] != 0] or ends
        return sum(place[0] for place in outer) / len(outer), y
    return max(place[0] for place in ends) + 0.6 * WIDTH, y


def _apart(found: list[Place], panel: Panel) -> list[Place]:
    """The same places with nodes that would lie on each other moved aside."""
    taken: set[tuple[float, float]] = set()
    result = []
    for (x, y), _ in zip(found, panel.nodes, strict=True):
        while (round(x, 2), round(y, 2)) in taken:
            x += 0.4 * WIDTH
        taken.add((round(x, 2), round(y, 2)))
        result.append((x, y))
    left = min(x for x, _ in result)
    return [(x - left, y) for x, y in result]
