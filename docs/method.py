"""The method figure of README: probe, tune, correct, choose.

python docs/method.py          # writes docs/method.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FROZEN, TRAINED, SCORE, INK, PALE = "#9fb3c8", "#f0a04b", "#2f7d4f", "#22313f", "#eef2f6"
WIDTH, HEIGHT = 100, 160  # of a panel, in units of four pixels
SIDE = 64  # of a thumbnail, in pixels
PROMPT = "“a red circle and\na blue square”"


def scene(square: str = "blue", circle: str = "red") -> np.ndarray:
    """A circle beside a square, (SIDE, SIDE, 3) in [0, 1]."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    picture = np.ones((SIDE, SIDE, 3))
    picture[(columns - 20) ** 2 + (rows - 24) ** 2 < 12**2] = matplotlib.colors.to_rgb(circle)
    picture[32:54, 36:58] = matplotlib.colors.to_rgb(square)
    return picture


def noisy(picture: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The picture with a share of it replaced by coarse noise."""
    noise = np.random.default_rng(seed).uniform(0, 1, (SIDE // 4, SIDE // 4, 3)).repeat(4, 0).repeat(4, 1)
    return (1 - share) * picture + share * noise


def thumbnail(ax, picture, x, y, side, colour=INK, width=1.5):
    """A framed picture whose lower left corner is (x, y)."""
    ax.imshow(picture, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)
    ax.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=width, zorder=3))


def box(ax, text, x, y, width, height, colour, size=15):
    """A rounded box with text in its middle."""
    style = "round,pad=0,rounding_size=3"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, zorder=2))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK, zorder=4)


def arrow(ax, start, end, colour=INK, style="-", bend=0.0, width=2.0):
    """An arrow from start to end."""
    ax.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=18,
            color=colour,
            linestyle=style,
            linewidth=width,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=0,
            zorder=5,
        )
    )


def unet(ax, y, lora=False, label="frozen"):
    """Five blocks, the fourth of them probed; returns the foot of that one."""
    for k, height in enumerate((26, 19, 12, 19, 26)):
        x = 14 + 15 * k
        probed = k == 3
        ax.add_patch(
            Rectangle((x, y - height / 2), 11, height, facecolor=FROZEN, edgecolor=INK, linewidth=2.5 if probed else 1)
        )
        if lora:
            ax.add_patch(Rectangle((x + 3.5, y - height / 2), 4, height, facecolor=TRAINED, edgecolor="none"))
        if k:
            arrow(ax, (x - 4, y), (x, y), width=1.2)
    ax.text(14, y - 19, label, fontsize=14, color=INK, va="center")
    return 64.5, y - 19 / 2


def inputs(ax, y=92):
    """The noisy picture and the prompt, on their way into the U-Net."""
    thumbnail(ax, noisy(scene(), 0.55, 1), 12, 114, 24)
    ax.text(66, 126, PROMPT, ha="center", va="center", fontsize=14, color=INK)
    arrow(ax, (24, 113), (24, y + 15))
    arrow(ax, (66, 118), (66, y + 15))


def learning(ax, label, lora=False):
    """The inputs, the U-Net and the adapter that learns from it."""
    inputs(ax)
    arrow(ax, unet(ax, 92, lora=lora, label=label), (64.5, 60))
    box(ax, "adapter", 30, 46, 50, 14, TRAINED)


def panel(figure, number, title, under):
    """An empty panel with its title and one line below it."""
    ax = figure.add_axes(((number - 1) / 4 + 0.004, 0.01, 0.242, 0.98))
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    ax.axis("off")
    style = "round,pad=0,rounding_size=4"
    ax.add_patch(FancyBboxPatch((1, 1), 98, 158, boxstyle=style, facecolor=PALE, edgecolor="#c5d0db"))
    ax.text(50, 149, f"{number}  {title}", ha="center", va="center", fontsize=19, weight="bold", color=INK)
    ax.text(50, 8, under, ha="center", va="center", fontsize=14, color=INK)
    return ax


def probe(figure):
    """The adapter reads a block of the frozen U-Net and answers by two heads."""
    ax = panel(figure, 1, "Probe", "only the adapter learns")
    learning(ax, "U-Net, frozen")
    arrow(ax, (42, 46), (30, 36))
    arrow(ax, (68, 46), (72, 36))
    box(ax, "does it\nmatch?", 8, 18, 40, 18, "white")
    box(ax, "where\nis it?", 54, 18, 38, 18, "white")


def tune(figure):
    """LoRA in the U-Net learns along, and denoising with it."""
    ax = panel(figure, 2, "Tune", "adapter and LoRA learn")
    learning(ax, "U-Net + LoRA", lora=True)
    arrow(ax, (42, 46), (22, 36))
    arrow(ax, (56, 46), (52, 36))
    box(ax, "match", 5, 22, 28, 14, "white")
    box(ax, "where", 36, 22, 28, 14, "white")
    box(ax, "noise", 67, 22, 28, 14, "white")
    arrow(ax, (86, 78), (88, 36), bend=-0.1)


def correct(figure):
    """Before a step the latent moves along the gradient of the score."""
    ax = panel(figure, 3, "Correct", "the latent follows the score")
    thumbnail(ax, noisy(scene(square="#9040c0"), 0.5, 1), 12, 114, 24)
    thumbnail(ax, noisy(scene(), 0.5, 1), 62, 114, 24, SCORE, 3)
    arrow(ax, (37, 126), (61, 126), SCORE, width=3)
    ax.text(49, 133, "move", ha="center", fontsize=14, color=SCORE)
    arrow(ax, (24, 113), (24, 107))
    foot = unet(ax, 92, label="U-Net")
    arrow(ax, foot, (64.5, 60))
    box(ax, "adapter", 38, 46, 42, 14, FROZEN)
    arrow(ax, (59, 46), (59, 36))
    box(ax, "score", 38, 20, 42, 16, "white")
    arrow(ax, (37, 28), (10, 113), SCORE, "--", bend=-0.25, width=2.5)
    ax.text(20, 20, "gradient", ha="center", va="center", fontsize=14, color=SCORE)


def choose(figure):
    """Several noises are drawn for a while; the one of the highest score is finished."""
    ax = panel(figure, 4, "Choose", "only the best is finished")
    kept, scores, pictures = (
        2,
        (0.35, 0.5, 0.9, 0.2),
        (("red", "blue"), ("blue", "blue"), ("blue", "red"), ("red", "red")),
    )
    for k, (score, colours) in enumerate(zip(scores, pictures, strict=True)):
        x, colour = 7 + 23 * k, SCORE if k == kept else INK
        thumbnail(ax, noisy(scene(), 1, 10 + k), x, 118, 17)
        arrow(ax, (x + 8.5, 117), (x + 8.5, 106), colour)
        thumbnail(ax, noisy(scene(*colours), 0.45, 10 + k), x, 88, 17, colour, 3 if k == kept else 1.5)
        ax.add_patch(Rectangle((x + 4, 66), 9, 17 * score, facecolor=SCORE if k == kept else FROZEN, edgecolor=INK))
    ax.text(50, 60, "score, read early", ha="center", va="center", fontsize=14, color=INK)
    arrow(ax, (50, 54), (50, 46), SCORE, width=3)
    thumbnail(ax, scene(), 35, 15, 30, SCORE, 3)


def main() -> None:
    """Writes the figure beside this file."""
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure = plt.figure(figsize=(16, 6.4), dpi=100)
    for draw in (probe, tune, correct, choose):
        draw(figure)
    figure.savefig(Path(__file__).with_name("method.png"), dpi=100)


if __name__ == "__main__":
    main()
