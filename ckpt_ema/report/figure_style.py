"""What all pictures have in common: their kinds of files, colours and marks."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".png", ".svg")
_DOTS_PER_INCH = 220

# Okabe and Ito's colours suit the colour-blind; marks tell lines apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKS = "os^Dv<>p"
DASHES = ("-", (0, (5, 1)), ":", (0, (3, 1, 1, 1)))  # of each further round of colours
STYLE: Any = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "figure.facecolor": "white",  # also where the viewer is dark
    "svg.hashsalt": "ckpt-ema",  # the same picture for the same content
    "svg.fonttype": "none",
}


def saved(figure: "Figure", kind: str) -> bytes:
    """Return the content of a file of this kind; the same for the same figure."""
    content = io.BytesIO()
    metadata = {"Date" if kind == ".svg" else "Software": None}
    figure.savefig(content, format=kind[1:], dpi=_DOTS_PER_INCH, metadata=metadata)
    return content.getvalue()


def x_label(unit: str) -> str:
    """Return the label of an axis of steps, epochs or checkpoints.

    >>> x_label("steps")
    'training step'
    """
    return {"steps": "training step", "epochs": "epoch"}.get(unit, "checkpoint")
