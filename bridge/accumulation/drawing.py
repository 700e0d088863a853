"""A tree of additions as SVG: products at the foot, each addition above its operands."""

from __future__ import annotations

import html

from bridge.accumulation.tree import BIAS, Tree

_LEAF = 20  # px between neighbouring leaves
_TALLEST = 420  # px that the additions may take


def tree_svg(tree: Tree, title: str, ringed: Tree | None = None) -> str:
    """Return one `<svg>` element, in the colours of the page around it; `title` is its alternative text.

    Filled nodes fuse a multiply with their addition; hollow ones add rounded operands. The node `ringed` has a ring of
    class "ring" around it.

    >>> tree_svg(Tree.parse("F[2, (0+1)]"), "an example").count("<circle")
    2
    """
    order = _left_to_right(tree)
    level = min(22.0, _TALLEST / max(1, tree.height))
    width = _LEAF * max(1, len(order)) + 12
    foot = tree.height * level + 20
    at = {leaf: _LEAF * (i + 0.5) + 6 for i, leaf in enumerate(order)}
    lines, marks = [], []
    place: dict[Tree, tuple[float, float]] = {}
    for node in tree.nodes():
        if node.kind == "leaf":
            place[node] = at[node.leaf], foot
            continue
        ends = [place[child] for child in node.children]
        if node.kind == "fma":
            ends.append((at[node.leaf], foot))
        x, y = sum(end[0] for end in ends) / max(1, len(ends)), foot - level * node.height
        lines += [f'<path d="M{ex:.1f} {ey:.1f}L{x:.1f} {y:.1f}"/>' for ex, ey in ends]
        filled = ' class="fused" fill="currentColor"' if node.kind == "fma" else ' fill="none"'
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"{filled}/>')
        place[node] = x, y
        if node is ringed:
            marks.append(f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="9" fill="none" stroke-width="2.5"/>')
    labels = [
        f'<text x="{x:.1f}" y="{foot + 15:.1f}">{"bias" if leaf == BIAS else leaf}</text>' for leaf, x in at.items()
    ]
    at_ring = "" if ringed is None else f", ring around {ringed}"
    alternative = html.escape(f"{title}: {tree}{at_ring}", quote=True)
    return (
        f'<svg role="img" aria-label="{alternative}" viewBox="0 0 {width:.0f} {foot + 22:.0f}" width="{width:.0f}" '
        f'height="{foot + 22:.0f}" xmlns="http://www.w3.org/2000/svg" font-size="11" text-anchor="middle">'
        f"<title>{alternative}</title>"
        f'<g stroke="currentColor" stroke-width="1" opacity="0.55">{"".join(lines)}</g>'
        f'<g stroke="currentColor" stroke-width="1.5">{"".join(marks)}</g>'
        f'<g fill="currentColor">{"".join(labels)}</g></svg>'
    )


def _left_to_right(tree: Tree) -> list:
    """Return the leaves in an order in which no two lines cross: leaves that are added first stand to the left."""
    found: dict[Tree, list] = {}
    for node in tree.nodes():
        below = [leaf for child in node.children for leaf in found.pop(child)]
        found[node] = below if node.leaf is None else [*below, node.leaf]
    return found[tree]
