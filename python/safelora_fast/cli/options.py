"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER", help="Folders of PEFT LoRA adapters, or Hub ids, ID or ID@REV.")
]
OneAdapter = Annotated[
    str | None, typer.Option("--adapter", metavar="DIR|HUB_ID[@REV]", help="A PEFT adapter to put on the model.")
]
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
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Do not project modules of this name, e.g. lm_head or layers.0.*; repeatable."
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw cosine and gain by depth (.png, .svg or .pdf).")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Threads. The result does not depend on it. (default: all cores)")
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the report as JSON on standard output, and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but warnings and errors.")]
Subject = Annotated[str, typer.Option("--model", metavar="PATH|HUB_ID[@REV]", help="The model that is asked.")]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="auto is float32 on the CPU, bfloat16 on a GPU."),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto is the GPU where there is one.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="A Jinja file in the place of the tokenizer's own chat template.")
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-args",
        metavar="NAME=VALUE",
        help="A variable of the chat template, e.g. enable_thinking=false; or a JSON object. May be given several times.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model.")
]
