"""The commands of `trl-ext`; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from trl_ext.cli.contributed import contributed_group
from trl_ext.cli.plugin_commands import plugins_app

app = typer.Typer(
    cls=contributed_group("trl_ext.commands"),
    help="A plugin layer for Hugging Face TRL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(plugins_app, name="plugins")


class _Verbatim(TyperCommand):
    """Hands all arguments on as they are, `--help` included, to a parser of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the versions and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(*(f"{name} {installed(name)}" for name in ("trl-ext", "trl", "transformers", "torch")), sep="\n")
        raise typer.Exit


@app.command(cls=_Verbatim)
def sft(ctx: typer.Context) -> None:
    """Train with SFT: TRL's flags and YAML, plus --plugins, --streams, --dataset_columns."""
    from trl_ext.cli.train import train

    train("sft", ctx.args)


@app.command(cls=_Verbatim)
def grpo(ctx: typer.Context) -> None:
    """Train with GRPO: TRL's flags and YAML, plus --plugins, --streams, --dataset_columns."""
    from trl_ext.cli.train import train

    train("grpo", ctx.args)


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A Python script that uses TRL's SFTTrainer or GRPOTrainer.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", metavar="[ARGS]...")] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(help="Plugins for every config of the script that names none: power:alpha=10,ema"),
    ] = None,
) -> None:
    """Run an unmodified TRL script with plugins (also under torchrun -m, accelerate launch -m)."""
    from trl_ext.cli.train import run_script

    run_script(script, arguments or [], plugins)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the table, the plot and the runs.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Few steps and one seed, to see that it works.")] = False,
) -> None:
    """Train a tiny model, then fine-tune it on noisy data with and without plugins, and compare."""
    from trl_ext.demo import main

    main(output_dir=output_dir, quick=quick)


probe_app = typer.Typer(
    cls=contributed_group("trl_ext.probes"),
    help="Measure a model before training, with probes that plugin distributions bring.",
    no_args_is_help=True,
)
app.add_typer(probe_app, name="probe")


@probe_app.callback()
def _probe() -> None:
    """Measure a model before training, with probes that plugin distributions bring."""
