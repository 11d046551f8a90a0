"""Draws docs/lockstep.svg, which shows how the micro-batches of a lockstep window take turns.

Run it in the repository: ``python tools/draw_lockstep.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import List

MICRO_BATCHES = 3
SLOT, GAP, BAR = 68, 14, 40  # widths: of a turn, beside a meeting point, and of a meeting point
ROW, BOX = 40, 28  # heights: of a micro-batch, and of a box in it
LEFT, WIDTH, HEIGHT = 130, 980, 540

# The background is part of the drawing, so it can be read on dark pages as well.
HEAD = f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"
     font-family="Helvetica, Arial, sans-serif" font-size="14" role="img" aria-label="The turns of a lockstep window">
  <style>
    .forward {{ fill: #eaf2fb; stroke: #2f6db3; stroke-width: 1.5 }}
    .both {{ fill: #fde3cf; stroke: #c2571a; stroke-width: 1.5 }}
    .meeting {{ fill: #fdf3d8; stroke: #b8860b; stroke-width: 1.5 }}
    .update {{ fill: #e4f3e4; stroke: #3b7d3b; stroke-width: 1.5 }}
    .waits {{ stroke: #888; stroke-width: 1.5; stroke-dasharray: 2 4 }}
    text {{ fill: #111; text-anchor: middle }}
    .small {{ font-size: 12px; fill: #444 }}
    .left {{ text-anchor: start }}
    .title {{ font-weight: bold }}
  </style>
  <rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>"""


class Panel:
    """A time axis with a row for each micro-batch. Each method draws what comes next."""

    def __init__(self, top: int, title: str) -> None:
        self.x = LEFT
        self.top = top
        self.lines = [text(20, top, title, "title left")]
        self._since = [LEFT] * MICRO_BATCHES  # when each micro-batch began to wait
        for number in range(MICRO_BATCHES):
            self.lines.append(text(20, self._row(number) + 19, f"micro-batch {number + 1}", "left"))

    def stage(self, title: str, detail: str, kind: str) -> None:
        """Draws one turn of each micro-batch."""
        middle = self.x + MICRO_BATCHES * SLOT / 2
        self.lines += [text(middle, self.top + 28, title), text(middle, self.top + 45, detail, "small")]
        for number in range(MICRO_BATCHES):
            self._wait(number)
            self.lines.append(rect(self.x + 2, self._row(number), SLOT - 4, BOX, kind))
            self.x += SLOT
            self._since[number] = self.x - 2

    def meeting(self, title: str, detail: str) -> None:
        """Draws a point at which all micro-batches wait for one another."""
        self.x += GAP
        for number in range(MICRO_BATCHES):
            self._wait(number)
        height = MICRO_BATCHES * ROW + 4
        self.lines.append(rect(self.x, self.top + 54, BAR, height, "meeting"))
        middle = self.x + BAR / 2
        self.lines += [
            text(middle, self.top + height + 74, title),
            text(middle, self.top + height + 91, detail, "small"),
        ]
        self.x += BAR
        self._since = [self.x] * MICRO_BATCHES
        self.x += GAP

    def _row(self, number: int) -> int:
        return self.top + 62 + ROW * number

    def _wait(self, number: int) -> None:
        y = self._row(number) + BOX / 2
        if self.x - self._since[number] > GAP and self._since[number] > LEFT:
            self.lines.append(f'<path class="waits" d="M{self._since[number]:g} {y:g} H {self.x:g}"/>')


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Returns an element with words."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{words}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Returns an element with a box."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def draw() -> str:
    """Returns the drawing."""
    forward = Panel(32, "Forward")
    forward.stage("stage 1", "convolution", "forward")
    forward.meeting("meeting point 1", "batch normalization: statistics merge")
    forward.stage("stage 2", "normalize, ReLU, convolution", "forward")
    forward.meeting("meeting point 2", "batch normalization: statistics merge")
    forward.stage("stage 3", "normalize, ReLU, loss; backward pass", "both")

    backward = Panel(278, "Backward")
    backward.meeting("meeting point 2", "sums of gradients merge")
    backward.stage("stage 2, computed again", "forward and backward pass", "both")
    backward.meeting("meeting point 1", "sums of gradients merge")
    backward.stage("stage 1, computed again", "forward and backward pass", "both")
    x = backward.x + 24
    backward.lines += [
        rect(x, 278 + 88, 164, 56, "update"),
        text(x + 82, 278 + 111, "optimizer.update()"),
        text(x + 82, 278 + 130, "once", "small"),
    ]
    lines: List[str] = [*forward.lines, *backward.lines, *key(20, 520)]
    return "\n  ".join([HEAD, *lines]) + "\n</svg>\n"


def key(x: float, y: float) -> List[str]:
    """Draws what the colours mean."""
    lines = []
    for kind, words, width in [
        ("forward", "a forward pass runs; its graph is dropped at the meeting point", 400),
        ("both", "a graph and its backward pass", 230),
    ]:
        lines += [rect(x, y - 12, 22, 14, kind), text(x + 30, y, words, "small left")]
        x += width
    wait = f'<path class="waits" d="M{x:g} {y - 5:g} H {x + 26:g}"/>'
    return [*lines, wait, text(x + 34, y, "waits: its arrays are in the store", "small left")]


if __name__ == "__main__":
    (Path(__file__).resolve().parents[1] / "docs" / "lockstep.svg").write_text(draw(), encoding="utf-8")
