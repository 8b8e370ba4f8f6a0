"""The commands of `trl-ext`; each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trl_ext.cli.contributed import LightCommand, LightGroup, contributed_group
from trl_ext.cli.new_plugin import new_plugin
from trl_ext.cli.plugin_commands import plugins_app
from trl_ext.records import TRAINERS, TrainerKind

KINDS: tuple[TrainerKind, ...] = TRAINERS
"""The training commands, each TRL's script of this name."""

app = typer.Typer(
    cls=contributed_group("trl_ext.commands"),
    help="A plugin layer for Hugging Face TRL.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes half of the time of a help
)
app.add_typer(plugins_app, name="plugins", cls=LightGroup)
app.command("new-plugin", cls=LightCommand)(new_plugin)


class _Verbatim(LightCommand):
    """Hands all arguments on as they are, `--help` included, to a parser of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the versions and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(*(f"{name} {installed(name)}" for name in ("trl-ext", "trl", "transformers", "torch")), sep="\n")
        raise typer.Exit


def _add_training_command(kind: TrainerKind) -> None:
    def command(ctx: typer.Context) -> None:
        from trl_ext.cli.train import train

        train(kind, ctx.args)

    what = {"reward": "a reward model", "distillation": "a student of a teacher"}.get(kind, f"with {kind.upper()}")
    streams = "" if kind == "reward" else " --streams,"
    about = f"Train {what}: TRL's flags and YAML, --plugins,{streams} --num_processes."
    app.command(kind, cls=_Verbatim, help=about)(command)


for _kind in KINDS:
    _add_training_command(_kind)


@app.command(cls=_Verbatim)
def validate(ctx: typer.Context) -> None:
    """Check a training configuration and run one window of it, without a step and without writing a file."""
    from trl_ext.cli.validate import validate_command

    validate_command(ctx.args)


@app.command(cls=LightCommand)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, plugins with problems and what is supported here, for a bug report."""
    from trl_ext.cli.doctor import doctor_command

    doctor_command(as_json)


@app.command(cls=LightCommand, context_settings={"allow_interspersed_args": False})
def run(
    script: Annotated[Path, typer.Argument(help="A Python script that uses TRL's trainers.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its arguments.", metavar="[ARGS]...")] = None,
    plugins: Annotated[
        list[str] | None,
        typer.Option(help="Plugins for every config of the script that names none: power:alpha=10,ema"),
    ] = None,
) -> None:
    """Run an unmodified TRL script with plugins (also under torchrun -m, accelerate launch -m)."""
    from trl_ext.cli.train import run_script

    run_script(script, arguments or [], plugins)


@app.command(cls=LightCommand)
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
    rich_markup_mode=None,
)
app.add_typer(probe_app, name="probe")


@probe_app.callback()
def _probe() -> None:
    """Measure a model before training, with probes that plugin distributions bring."""
