"""`safelora-fast persona`: extract a persona vector from a model's own responses, or show one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safelora_fast.cli import options
from safelora_fast.cli.commands import Command, Group, refuse_unused
from safelora_fast.printable import say

if TYPE_CHECKING:
    from rich.table import Table

    from safelora_fast.persona_vector import PersonaVector

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Extract the persona vector that steering adds and monitors project on, or show one.",
)


@app.command("extract", cls=Command)
def extract(
    model: Annotated[str, typer.Option(metavar="PATH|HUB_ID[@REV]", help="The model to fine-tune later.")],
    trait: Annotated[
        str,
        typer.Option(
            metavar="FILE.yaml|NAME", help="The trait: a file, or one of the built-in malicious and sycophantic."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FILE.safetensors", help="The file to write; responses are stored next to it, in .responses.jsonl."
        ),
    ],
    samples: Annotated[int, typer.Option(metavar="N", help="Responses to each question under each system prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the responses.")] = 0,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Sampling temperature; 0 takes the most likely token.")
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens of a response.")] = 128,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Responses per batch.")] = 16,
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="A judge's scores of stored responses: an id and a score from 0 to 100 per line. Positive responses must score "
            "above the threshold, negative ones below it.",
        ),
    ] = None,
    threshold: Annotated[float, typer.Option(metavar="T", help="Threshold for --scores.")] = 50.0,
    dtype: Annotated[
        str, typer.Option(metavar="bfloat16|float16|float32", help="Data type of the weights.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="auto is the GPU if there is one.")] = "auto",
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE.jinja", help="Replaces the tokenizer's chat template.")
    ] = None,
    template_args: options.TemplateArgs = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", metavar="", help="Replace an existing vector; its responses are reused."),
    ] = False,
    regenerate: Annotated[
        bool, typer.Option("--regenerate", metavar="", help="Discard the responses of an earlier run.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Extract the persona vector of a trait.

    The model answers every question under system prompts that ask for the trait, and under others that ask for its opposite.
    The vector of a layer is the mean activation of the first responses minus that of the second. Responses are stored at
    once: after an interruption the same command resumes, and with --scores it generates nothing new.
    """
    from safelora_fast.cli.options import check_subject
    from safelora_fast.files.progress import ProgressBar
    from safelora_fast.models.quiet_libraries import quiet_libraries
    from safelora_fast.persona.response_filter import read_scores

    if scores is None:
        refuse_unused("without --scores", "threshold")
    if temperature == 0:
        refuse_unused("with --temperature 0", "seed")
    choose("dtype", dtype, ("bfloat16", "float16", "float32"))
    choose("device", device, ("auto", "cpu", "cuda"))
    judge = None if scores is None else read_scores(scores)
    check_subject("persona extract", model)
    with quiet_libraries(), ProgressBar(wanted=not (quiet or as_json)) as progress:
        from safelora_fast.models.templates import read_arguments
        from safelora_fast.persona import extract_persona_vector

        vector = extract_persona_vector(
            model,
            trait,
            output=output,
            samples=samples,
            seed=seed,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            judge=judge,
            threshold=threshold,
            dtype=dtype,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
            chat_template=chat_template,
            template_args=read_arguments(template_args),
            overwrite=overwrite,
            regenerate=regenerate,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(vector.to_dict(), indent=2, ensure_ascii=False))
    elif not quiet:
        print_counts(vector)
        print_suggestion(vector)
        say(f"written to {output} ({output.stat().st_size / 1e6:.3g} MB)")


@app.command("show", cls=Command)
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File that persona extract wrote.")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the separation by layer (.png, .svg or .pdf).")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show how well each layer separates positive from negative responses, and suggest a layer."""
    from safelora_fast.cli.console import out
    from safelora_fast.persona_vector import PersonaVector

    vector = PersonaVector.load(file)
    if plot is not None:
        from safelora_fast.persona.plot import plot_separation

        plot_separation(vector, plot)
    if as_json:
        typer.echo(json.dumps(vector.to_dict(), indent=2, ensure_ascii=False))
        return
    print_counts(vector)
    out.print(_by_layer(vector))
    print_suggestion(vector)


def choose(name: str, value: str, known: tuple[str, ...]) -> None:
    """Check that an option has one of the known values.

    Raises:
        SettingsError: it does not; the message lists the known values.
    """
    from safelora_fast.errors import SettingsError

    if value not in known:
        raise SettingsError(f"--{name} is {value!r}, it must be one of {', '.join(known)}")


def print_counts(vector: PersonaVector) -> None:
    """Print the trait, the model, the settings, and the numbers of responses on each side."""
    facts = vector.provenance
    model, settings = facts.get("model", {}), facts.get("settings", {})
    revision = f" at {model['revision']}" if model.get("revision") else ""
    _line("trait", f"{vector.trait}: {facts.get('trait', {}).get('description', '')}")
    _line("model", f"{model.get('source', 'unknown')}{revision}, {model.get('dtype', '')}")
    given = (f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items() if value is not None)
    _line("settings", ", ".join(given))
    for side, counts in facts.get("counts", {}).items():
        _line(side, ", ".join(f"{count} {name}" for name, count in counts.items()))


def print_suggestion(vector: PersonaVector) -> None:
    """Print the suggested layer and the reason. Warn on standard error if the vector separates the two sides poorly."""
    from safelora_fast.cli.console import warn

    layer = vector.suggestion
    if layer is None:
        _line("suggested", "none: too few responses to hold some out")
    else:
        one = vector.separation[layer]
        metrics = f"d {one.effect:.3g}, {one.share:.0%} of held-out responses on their own side"
        _line("suggested", f"layer {layer} ({metrics}): {vector.rule}")
    if vector.weak:
        warn(
            "held-out responses are hardly told apart, so the vector may hold little of the trait: read some responses; a lower "
            "--temperature, more --samples, a judge's --scores, or a larger model may help"
        )


def _line(label: str, text: str) -> None:
    from safelora_fast.cli.console import out

    out.print(f"{label:<10} {text}", soft_wrap=True)


def _by_layer(vector: PersonaVector) -> Table:
    from safelora_fast.cli.console import figure_table

    table = figure_table("layer", "‖vector‖", "effect d", "held-out share", "")
    for layer, values in enumerate(vector.to_dict()["blocks"]):
        effect, share = ("–" if values[name] is None else f"{values[name]:.3g}" for name in ("effect", "share"))
        chosen = "suggested" if layer == vector.suggestion else ""
        table.add_row(str(layer), f"{values['norm']:.4g}", effect, share, chosen)
    return table
