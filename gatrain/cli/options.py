"""Options and words that several commands take."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gatrain import trust
from gatrain.cli import completion

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="recipe=NAME KEY=VALUE",
        help="A recipe and overrides.",
        show_default=False,
        autocompletion=completion.words,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
Retune = Annotated[bool, typer.Option("--retune", help="Measure again, whatever is remembered.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that the run folder holds, on purpose.")
]
Nproc = Annotated[
    int | None, typer.Option("--nproc", help="Processes on this node, by default one for each GPU.")
]
Nnodes = Annotated[int, typer.Option("--nnodes", help="Nodes of the run.")]
NodeRank = Annotated[int, typer.Option("--node-rank", help="This node's number, from 0.")]
Endpoint = Annotated[
    str | None, typer.Option("--rdzv-endpoint", help="HOST:PORT of node 0, the same on every node.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        trust.OPTION,
        metavar="NAME",
        callback=lambda names: trust.accept(names or ()),
        help="Let _target_ name this one thing that is refused otherwise; may be repeated.",
        show_default=False,
    ),
]
MaxRestarts = Annotated[int, typer.Option("--max-restarts", help="Restarts after a failed rank.")]


def slurm_option(option: str, text: str) -> Any:
    return typer.Option(option, rich_help_panel="Slurm", help=text)
