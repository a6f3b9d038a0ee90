"""Draw the pictures of docs/concepts.md from the library's own views: `python docs/tools/pictures.py`.

Everything in them is read off `View.input_ids`, `targets` and `attention` of one rollout: a prompt of two tokens and a
canvas of six that was decoded in three steps of two.
"""

import sys
from html import escape
from pathlib import Path

import torch

from trl_dllm import Rollout
from trl_dllm.blocks import Blocks
from trl_dllm.likelihood import (
    AnyOrder,
    BlockPseudoLikelihood,
    Elbo,
    Estimator,
    ExactTrajectory,
    MeanField,
    PseudoLikelihood,
    StepMerge,
    View,
)


FIGURES = Path(__file__).parents[1] / "figures"

WORDS = ["[M]", "say", "it:", "a", "cat", "sat", "on", "my", "mat"]  # by token id; 0 is the mask token
STEPS = [1, 0, 0, 2, 2, 1]  # the step that revealed each position of the canvas
MASK = 0

INK, GREY, LINE = "#1f2937", "#6b7280", "#9ca3af"
FILL = {"prompt": "#dbe4ee", "token": "#ffffff", "mask": "#64748b", "scored": "#fbbf24"}
SEEN = {"prompt": "#93a8bd", "token": "#2f7f79", "mask": "#f59e0b"}


def rollout(blocks: Blocks | None = None, steps: list[int] = STEPS) -> Rollout:
    ids = torch.arange(3, 9)[None]
    return Rollout(
        prompt_ids=torch.tensor([[1, 2]]),
        prompt_mask=torch.ones(1, 2, dtype=torch.bool),
        completion_ids=ids,
        unmask_step=torch.tensor([steps]),
        logps=torch.zeros(1, 6),
        counted=torch.ones(1, 6, dtype=torch.bool),
        view_seed=torch.tensor([9]),
        mask_token_id=MASK,
        steps=None if blocks else max(steps) + 1,
        blocks=blocks,
    )


def views(estimator: Estimator, drawn: Rollout) -> list[View]:
    return [estimator.view(drawn, n, drawn.view_seed, 0) for n in range(estimator.num_views(drawn))]


def columns(view: View) -> list[tuple[str, str]]:
    """(word, kind) of each column: what is shown, or what is asked for where the view scores a token."""
    out = []
    for n, (token, target) in enumerate(zip(view.input_ids[0].tolist(), view.targets[0].tolist(), strict=True)):
        if target >= 0:
            out.append((WORDS[target], "scored"))
        else:
            out.append(("M", "mask") if token == MASK else (WORDS[token], "prompt" if n < 2 else "token"))
    return out


class Drawing:
    """An SVG, written by hand so that its bytes are the same everywhere."""

    def __init__(self):
        self.parts: list[str] = []
        self.width = self.height = 0

    def box(self, x: int, y: int, width: int, height: int, fill: str, line: str = LINE) -> None:
        self.parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{line}"/>')
        self.width, self.height = max(self.width, x + width), max(self.height, y + height)

    def text(self, x: int, y: int, text: str, size: int = 13, fill: str = INK, anchor: str = "start", turn=0) -> None:
        turned = f' transform="rotate({turn} {x} {y})"' if turn else ""
        place = f'x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{turned}'
        self.parts.append(f"<text {place}>{escape(text)}</text>")
        if anchor == "start" and not turn:
            self.width = max(self.width, x + int(len(text) * size * 0.56))
        self.height = max(self.height, y + 4)

    def svg(self, title: str) -> str:
        width, height = self.width + 12, self.height + 12
        size = f'width="{width}" height="{height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}"'
        return (
            f'{head} font-family="system-ui, sans-serif"><title>{escape(title)}</title>'
            f'<rect {size} fill="#fff"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


CELL, TOP = 46, 30


def row(drawing: Drawing, y: int, cells: list[tuple[str, str]], label: str) -> None:
    for n, (word, kind) in enumerate(cells):
        x = 12 + n * CELL + (8 if n >= 2 else 0)  # a gap between prompt and canvas
        drawing.box(x, y, CELL - 4, TOP - 4, FILL[kind])
        drawing.text(x + CELL // 2 - 2, y + 18, word, 13, "#fff" if kind == "mask" else INK, "middle")
    drawing.text(12 + len(cells) * CELL + 20, y + 18, label, 13, GREY)


LEGEND = [
    ("token", "shown"),
    ("mask", "[MASK], not scored"),
    ("scored", "[MASK] to the model, which is asked for this"),
]


def legend(drawing: Drawing, y: int, entries: list[tuple[str, str]], colours: dict[str, str]) -> None:
    x = 12
    for kind, text in entries:
        drawing.box(x, y, 14, 14, colours[kind])
        drawing.text(x + 20, y + 12, text, 12, GREY)
        x += 44 + int(len(text) * 6.6)


def draw_views(title: str, estimator: Estimator) -> str:
    drawn, drawing = rollout(), Drawing()
    found = views(estimator, drawn)
    for n, view in enumerate(found):
        row(drawing, 12 + n * TOP, columns(view), f"forward {n + 1} of {len(found)}")
    legend(drawing, 22 + len(found) * TOP, LEGEND, FILL)
    return drawing.svg(title)


def draw_trajectory() -> str:
    """The canvas before each step, as the exact trajectory's views show it, and the finished one."""
    drawn, drawing = rollout(), Drawing()
    for n, view in enumerate(views(ExactTrajectory(), drawn)):
        cells = [(word, kind) if kind != "scored" else ("M", "mask") for word, kind in columns(view)]
        revealed = ", ".join(word for word, kind in columns(view) if kind == "scored")
        row(drawing, 12 + n * TOP, cells, f"step {n} reveals {revealed}")
    final = [(WORDS[1], "prompt"), (WORDS[2], "prompt"), *((word, "token") for word in WORDS[3:])]
    row(drawing, 12 + 3 * TOP, final, "the completion")
    row_of_steps = 12 + 4 * TOP
    for n, step in enumerate(STEPS):
        drawing.text(20 + (n + 2) * CELL + CELL // 2 - 2, row_of_steps + 12, str(step), 13, GREY, "middle")
    drawing.text(12 + 8 * CELL + 20, row_of_steps + 12, "unmask_step", 13, GREY)
    return drawing.svg("A canvas of six tokens, decoded in three steps of two")


SIDE, LEFT = 24, 70


def draw_attention(title: str, view: View, groups: list[tuple[str, int]]) -> str:
    """The matrix of a view: rows see the coloured columns. `groups` names runs of columns."""
    drawing, cells, allowed = Drawing(), columns(view), view.attention.allowed()[0].tolist()
    shown = [(word, "mask" if kind == "scored" else kind) for word, kind in cells]
    starts = [sum(width for _, width in groups[:n]) for n in range(len(groups))]
    place = [LEFT + n * SIDE + 8 * sum(n >= start for start in starts[1:]) for n in range(len(cells))]
    for n, (word, kind) in enumerate(cells):
        colour = INK if kind != "scored" else "#b45309"
        drawing.text(place[n] + 15, LEFT - 8, word if kind != "scored" else f"M({word})", 12, colour, turn=-55)
        drawing.text(LEFT - 8, place[n] + 16, word if kind != "scored" else f"M({word})", 12, colour, "end")
        for k in range(len(cells)):
            fill = SEEN[shown[k][1]] if allowed[n][k] else "#fff"
            drawing.box(place[k], place[n], SIDE - 2, SIDE - 2, fill, "#d1d5db")
    for (name, _), start in zip(groups, starts, strict=True):
        drawing.text(place[-1] + SIDE + 10, place[start] + 16, f"rows: {name}", 12, GREY)
    legend(
        drawing,
        place[-1] + SIDE + 12,
        [("prompt", "sees a prompt token"), ("token", "sees a token"), ("mask", "sees a mask")],
        SEEN,
    )
    return drawing.svg(title)


def pictures() -> dict[str, str]:
    """SVG by file name."""
    denoiser = views(StepMerge(2), rollout())[1]
    (any_order,) = views(AnyOrder(), rollout())
    # Blocks of two positions from the prompt on: each block of the canvas in two steps, of which this is the second.
    block_causal = views(ExactTrajectory(), rollout(Blocks(2), steps=[1, 0, 2, 3, 5, 4]))[1]
    # Without the prompt's last token in the noisy stream: here the canvas begins a block, and nothing sees it.
    block_causal = block_causal.columns(lambda table: torch.cat([table[:, :8], table[:, 9:]], dim=1))
    return {
        "trajectory.svg": draw_trajectory(),
        "views_mean_field.svg": draw_views("mean_field: one forward", MeanField()),
        "views_step_merge.svg": draw_views("step_merge with two segments", StepMerge(2)),
        "views_exact_trajectory.svg": draw_views("exact_trajectory: a forward a step", ExactTrajectory()),
        "views_pkl.svg": draw_views("pkl with all positions", PseudoLikelihood()),
        "views_pkl_u.svg": draw_views("pkl_u in sets of two", BlockPseudoLikelihood(2, "partition")),
        "views_elbo.svg": draw_views("elbo with three draws", Elbo(3)),
        "attention_denoiser.svg": draw_attention("The denoiser", denoiser, [("prompt", 2), ("canvas", 6)]),
        "attention_any_order.svg": draw_attention(
            "any_order: prompt, tokens, masks", any_order, [("prompt", 2), ("tokens", 6), ("masks", 6)]
        ),
        "attention_block_causal.svg": draw_attention(
            "Block-causal: clean stream, noisy stream",
            block_causal,
            [("clean: prompt", 2), ("clean: canvas", 6), ("noisy canvas", 6)],
        ),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIGURES
    for name, svg in pictures().items():
        (folder / name).write_text(svg)
