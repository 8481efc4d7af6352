"""Options that several commands share."""

from __future__ import annotations

import functools
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from safelora_fast.projection.operators import names, owners
from safelora_fast.projection.settings import OPTIONS, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ADAPTERS = typer.Argument(metavar="ADAPTER", help="Folders of PEFT LoRA adapters, or Hub ids, ID or ID@REV.")
Adapters = Annotated[list[str], ADAPTERS]
OneAdapter = Annotated[
    str | None, typer.Option("--adapter", metavar="DIR|HUB_ID[@REV]", help="A PEFT adapter to put on the model.")
]
ALIGNED = typer.Option(metavar="PATH|HUB_ID[@REV]", help="The aligned model that the adapters were trained on.")
Aligned = Annotated[str, ALIGNED]
BASE = typer.Option(
    metavar="PATH|HUB_ID[@REV]",
    help="The model before alignment. Swapping the two gives the same result: C is even in V.",
)
Base = Annotated[str, BASE]
Subspace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="A file of `subspace build` instead of --aligned and --base; for orthogonal, select all."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Do not project modules with this name, e.g. lm_head or layers.0.*; repeatable."
    ),
]
Plot = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw cosine and gain by depth (.png, .svg or .pdf).")]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", help="Number of threads. The result does not depend on it. (default: all cores)"),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print the report as JSON on standard output, and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print only warnings and errors.")]
Subject = Annotated[str, typer.Option("--model", metavar="PATH|HUB_ID[@REV]", help="The model to evaluate.")]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="auto is float32 on the CPU, bfloat16 on a GPU."),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto is the GPU if there is one.")]
ChatTemplate = Annotated[
    str | None, typer.Option(metavar="FILE", help="A Jinja file that replaces the tokenizer's chat template.")
]
TemplateArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--template-args",
        metavar="NAME=VALUE",
        help="A variable of the chat template, e.g. enable_thinking=false; or a JSON object; repeatable.",
    ),
]
Strings = Annotated[
    str, typer.Option(metavar="chat|text", help="chat puts plain-text examples into the chat template; text does not.")
]
MaxLength = Annotated[int, typer.Option(metavar="N", help="Longer examples are skipped and counted.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", metavar="", help="Run Python code that comes with the model.")
]
JudgeAttempts = Annotated[
    int, typer.Option(metavar="N", help="Maximum attempts per score. After that, the answer counts as unscored.")
]
JudgeTokens = Annotated[
    int, typer.Option(metavar="N", help="Maximum tokens of a judge's reply. A judge that reasons needs more.")
]


def check_subject(command: str, model: str, adapters: Iterable[str] = ()) -> list[Path]:
    """Check the model and the adapters of a command before heavy imports, and download adapters from the Hub.

    Args:
        command: name of the command, for messages.
        model: path or Hub id of the model.
        adapters: folders or Hub ids of the adapters.

    Returns:
        The adapters' folders.

    Raises:
        MissingDependencyError: a package that loads models is missing.
        CheckpointError: the model does not exist.
        AdapterError: an adapter does not exist.
    """
    from safelora_fast.checkpoints.resolver import adapter_folder, find_model
    from safelora_fast.configuration.signatures import check_packages

    check_packages(command)
    find_model(model)
    return [adapter_folder(adapter, tokenizer=True) for adapter in adapters]


def with_settings(command: Callable[..., None], *, whole_model: bool = False) -> Callable[..., None]:
    """Add one option per projection setting to a command, which receives them as a dictionary named `settings`."""
    known = names(whole_model=whole_model)
    wanted = {name: option for name, option in OPTIONS.items() if not owners(name) or {*owners(name)} & {*known}}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        command(settings={name: given.pop(name) for name in [*wanted, "exclude"]}, **given)

    options = {}
    for name, option in wanted.items():
        default = getattr(Settings, name)
        kind: Any = option.values if option.values in {int, float, str} else str
        kind = kind if default else kind | None
        takers = " and ".join(taker for taker in owners(name) if taker in known) or option.select
        text = f"For {takers}: {option.help[0].lower()}{option.help[1:]}" if takers else option.help
        metavar = option.metavar or "|".join(known if name == "operator" else get_args(option.values))
        annotation = Annotated[kind, typer.Option(metavar=metavar, help=text)]
        options[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    options["exclude"] = Parameter("exclude", Parameter.KEYWORD_ONLY, default=None, annotation=Exclude)
    own = signature(command, eval_str=True).parameters
    place = list(own).index("settings")
    parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own.values() if each.name != "settings"]
    parameters[place:place] = options.values()
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def check_plot(path: Path | None) -> None:
    """Check that a plot can be drawn, before the work starts."""
    if path is not None:
        from safelora_fast import plotting

        plotting.check_plot(path)
