"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapters = Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Folders of PEFT LoRA adapters.")]
Aligned = Annotated[
    str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The aligned model, which the adapters were trained on.")
]
Base = Annotated[
    str,
    typer.Option(
        metavar="PATH|HUB_ID[@REV]",
        help="The model before alignment. Swapping the two gives the same result: C is even in V.",
    ),
]
Operator = Annotated[str, typer.Option(metavar="safelora|orthogonal|zero", help="What selected modules become.")]
Normalize = Annotated[
    str | None,
    typer.Option(
        metavar="frobenius|spectral",
        help="For safelora. frobenius (default) is the paper's; spectral has gain at most 1.",
    ),
]
Rank = Annotated[int | None, typer.Option(metavar="K", help="For orthogonal: leading singular vectors of V to keep.")]
Energy = Annotated[
    float | None, typer.Option(metavar="E", help="For orthogonal, instead of --rank: share of ‖V‖² to keep.")
]
Select = Annotated[
    str,
    typer.Option(
        metavar="threshold|number|all", help="Which modules are projected, by the paper's cosine whatever the operator."
    ),
]
Threshold = Annotated[
    float | None, typer.Option(metavar="T", help="For threshold: cosines at most this. (default 0.5)")
]
NumLayers = Annotated[int | None, typer.Option(metavar="N", help="For number: how many of the lowest. (default 10)")]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw cosine and gain by depth (.png, .svg or .pdf).")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads. The result does not depend on it. (default: all cores)")
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the report as JSON on standard output, and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but warnings and errors.")]
