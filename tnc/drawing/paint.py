"""`draw`: a diagram on paper, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tnc.drawing.diagram import Diagram, Node, Panel, diagram
from tnc.drawing.layout import Place, places
from tnc.errors import TNCError
from tnc.terms import Expression

_RADIUS = 0.36
_LEG = 0.62  # length of an open leg beyond the node
_COLORS = {"tensor": "#dbe9f6", "packed": "#fde3c8", "copy": "#222222"}
_EDGES = {"tensor": "#2b5c8a", "packed": "#b5651d", "copy": "#222222"}
_LINES = ("#2b5c8a", "#b5651d", "#3b7d4f", "#8a3b6d", "#6b6b6b", "#a88a1e")
_SYMBOLS = {"left": "L", "right": "R", "coupling": "S", "vector": "d", "matrix": "W", "core": "G", "values": "V"}


def draw(expression: Expression, path: str | Path, *, title: str | None = None) -> Diagram:
    """Write the tensor-network diagram of an expression, with the decay of its bonds, and return it as data.

    Args:
        expression: any expression; sums and products are drawn beside each other.
        path: of the picture; the ending chooses the format (``.png``, ``.pdf``, ``.svg``).
        title: first line; the second says shape and bits.

    Raises:
        TNCError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TNCError('pictures need matplotlib; install it with: pip install "tnc[plot]"') from error
    found = diagram(expression)
    spots = [places(panel) for panel in found.panels]
    widths = [max(x for x, _ in spot) + 2.5 for spot in spots]
    decays = any(bond.values is not None for panel in found.panels for bond in panel.bonds)
    figure = Figure(figsize=(max(1.05 * sum(widths), 4.6) + (3.4 if decays else 0.0), 4.2), layout="constrained")
    if decays:
        network, curves = figure.subplots(1, 2, width_ratios=(max(1.05 * sum(widths), 4.6), 3.4))
        _curves(curves, found)
    else:
        network = figure.subplots()
    _network(network, found, spots, widths)
    figure.suptitle(_heading(found, title), fontsize=11)
    figure.savefig(path, dpi=200)
    return found


def _heading(found: Diagram, title: str | None) -> str:
    rows, columns = found.shape
    size = f"{rows} × {columns}, {found.bits_per_weight:.3g} bits per weight"
    return f"{title}\n{size}" if title else size


def _network(axes: Any, found: Diagram, spots: list[list[Place]], widths: list[float]) -> None:  # noqa: ANN401
    start, color = 0.0, 0
    low = min(y for spot in spots for _, y in spot) - _RADIUS - _LEG - 0.62
    for k, (panel, spot, width) in enumerate(zip(found.panels, spots, widths, strict=True)):
        axes.text(start - 0.66, 0.0, found.signs[k], ha="right", va="center", fontsize=18)
        axes.text(start + width - 1.4, 0.0, found.closings[k], ha="center", va="center", fontsize=18)
        color = _panel(axes, panel, [(x + start, y) for x, y in spot], color)
        centre = start + sum(x for x, _ in spot) / len(spot)
        axes.text(centre, low, panel.kind.replace("_", " "), ha="center", va="top", fontsize=9, style="italic")
        start += width
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.04)


def _panel(axes: Any, panel: Panel, spot: list[Place], color: int) -> int:  # noqa: ANN401
    """One leaf; returns the next colour of a bond."""
    for leg in panel.legs:
        _leg(axes, panel, spot, leg.node, leg.size, leg.out, _share(panel, leg))
    for bond in panel.bonds:
        shade = "#444444"
        if bond.values is not None:
            shade, color = _LINES[color % len(_LINES)], color + 1
        _bond(axes, panel, spot, bond.nodes, bond.size, shade)
    for index, (node, (x, y)) in enumerate(zip(panel.nodes, spot, strict=True)):
        _node(axes, node, index, x, y)
    return color


def _share(panel: Panel, leg: Any) -> tuple[int, int]:  # noqa: ANN401
    """Place of a leg among those of its node on its side, and how many there are."""
    same = [other for other in panel.legs if (other.node, other.out) == (leg.node, leg.out)]
    return next(k for k, other in enumerate(same) if other is leg), len(same)


def _leg(
    axes: Any, panel: Panel, spot: list[Place], node: int, size: int, out: bool, share: tuple[int, int]  # noqa: ANN401
) -> None:  # fmt: skip
    x, y = spot[node]
    sign = 1 if out else -1
    x += (share[0] - (share[1] - 1) / 2) * 0.34
    reach = _RADIUS + _LEG if panel.nodes[node].kind != "copy" else _LEG + 0.25
    axes.plot([x, x], [y, y + sign * reach], color="#444444", linewidth=1.4, zorder=1, solid_capstyle="round")
    axes.text(x, y + sign * (reach + 0.08), str(size), ha="center", va="bottom" if out else "top", fontsize=8)


def _bond(
    axes: Any, panel: Panel, spot: list[Place], ends: tuple[int, int], size: int, color: str  # noqa: ANN401
) -> None:  # fmt: skip
    (x0, y0), (x1, y1) = spot[ends[0]], spot[ends[1]]
    width = 1.2 + 0.35 * max(size, 1).bit_length()
    bulge = _bulge(panel, spot, ends)
    xs, ys = _curve((x0, y0), (x1, y1), bulge)
    axes.plot(xs, ys, color=color, linewidth=width, zorder=1, solid_capstyle="round")
    if not _labelled(panel, ends):
        return
    middle = len(xs) // 2
    axes.text(
        xs[middle], ys[middle], str(size), fontsize=8, ha="center", va="center", color=color, zorder=2,
        bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def _labelled(panel: Panel, ends: tuple[int, int]) -> bool:
    """One number a copy dot: on its own leg, else on the first of its lines."""
    dots = [end for end in ends if panel.nodes[end].kind == "copy"]
    if not dots:
        return True
    first = next(bond.nodes for bond in panel.bonds if dots[0] in bond.nodes)
    return first == ends and all(leg.node != dots[0] for leg in panel.legs)


def _bulge(panel: Panel, spot: list[Place], ends: tuple[int, int]) -> float:
    """How far a line leaves the straight one: past nodes in between, and apart from a line with the same ends."""
    (x0, y0), (x1, y1) = spot[ends[0]], spot[ends[1]]
    between = any(
        k not in ends and abs(y - y0) < 0.1 and min(x0, x1) < x < max(x0, x1) for k, (x, y) in enumerate(spot)
    )
    if abs(y0 - y1) < 0.1 and between:
        return 1.25 + 0.1 * abs(x1 - x0)
    same = [bond for bond in panel.bonds if set(bond.nodes) == set(ends)]
    if len(same) < 2:
        return 0.0
    position = next(k for k, bond in enumerate(same) if bond.nodes == ends)
    return (position - (len(same) - 1) / 2) * 0.5


def _curve(a: Place, b: Place, bulge: float) -> tuple[list[float], list[float]]:
    """A parabola from ``a`` to ``b`` that leaves the chord by ``bulge`` in the middle."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = (dx**2 + dy**2) ** 0.5 or 1.0
    steps = [k / 40 for k in range(41)]
    xs = [a[0] + t * dx - 4 * t * (1 - t) * bulge * dy / length for t in steps]
    ys = [a[1] + t * dy + 4 * t * (1 - t) * bulge * dx / length for t in steps]
    return xs, ys


def _node(axes: Any, node: Node, index: int, x: float, y: float) -> None:  # noqa: ANN401
    from matplotlib.patches import Circle, FancyBboxPatch

    style: dict[str, Any] = {
        "facecolor": _COLORS[node.kind],
        "edgecolor": _EDGES[node.kind],
        "linewidth": 1.4,
        "zorder": 3,
    }
    if node.kind == "copy":
        axes.add_patch(Circle((x, y), 0.07, **style))
        return
    if node.kind == "packed":
        side = 2 * _RADIUS + 0.1
        axes.add_patch(FancyBboxPatch((x - side / 2, y - side / 2), side, side, boxstyle="round,pad=0.04", **style))
        axes.text(x, y, node.text.replace(" ", "\n"), ha="center", va="center", fontsize=8, zorder=4)
        return
    axes.add_patch(Circle((x, y), _RADIUS, **style))
    axes.text(x, y, _symbol(node.name), ha="center", va="center", fontsize=11, zorder=4)


def _symbol(name: str) -> str:
    """``core0`` is $A_1$, ``factor2`` is $U_3$; other tensors by their letter."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :]
    if not digits:
        return f"${_SYMBOLS.get(stem, stem[:1].upper())}$"
    letter = {"core": "A", "factor": "U"}.get(stem, stem[:1].upper())
    return f"${letter}_{{{int(digits) + 1}}}$"


def _curves(axes: Any, found: Diagram) -> None:  # noqa: ANN401
    """Decay of every bond in the colour of its line."""
    color = 0
    whole = True
    for panel in found.panels:
        for bond in panel.bonds:
            if bond.values is None:
                continue
            shade, color = _LINES[color % len(_LINES)], color + 1
            whole = whole and bond.parts
            kept = bond.values[bond.values > 1e-6]
            style = "-" if bond.parts else ":"
            axes.semilogy(range(1, len(kept) + 1), kept.tolist(), style, color=shade, linewidth=1.6,
                          label=f"{panel.kind.replace('_', ' ')}, {bond.size}")  # fmt: skip
    axes.set_xlabel("index of the bond", fontsize=9)
    axes.set_ylabel("singular value, largest = 1" if whole else "singular value (dotted: norm of slice)", fontsize=9)
    axes.tick_params(which="both", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, which="major")
