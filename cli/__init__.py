"""The command line. Each command is a module of its own, imported only when it is called or asked for help."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import signal
import sys
from typing import Any

import click

from edgeflame import __version__
from edgeflame.errors import EXIT_INTERRUPTED, EdgeFlameError

# name: (module that holds `command`, short help). The short help stands here so that `edgeflame --help`
# imports no command module.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("cli.demo", "See all of EdgeFlame work on this machine, and read the report."),
    "demo-data": ("cli.demo_data", "Write generated furniture boards with defects and masks."),
    "broker": ("cli.broker", "Run the embedded MQTT 5 broker."),
    "aggregate": ("cli.aggregate", "Serve the training rounds of a fleet."),
    "train": ("cli.train", "Take part in a fleet's training rounds."),
    "rounds": ("cli.rounds", "Decide about a running fleet's rounds: stop, finish, remove a site."),
    "site": ("cli.site", "Pause a site of a run, let it go on, or leave the run."),
    "simulate": ("cli.simulate", "Simulate a fleet's rounds on this machine, or on a Ray cluster."),
    "fit": ("cli.fit", "Fit a model to good images at one site and write its package."),
    "evaluate": ("cli.evaluate", "Measure a package on test images."),
    "learn": ("cli.learn", "Learn from what people marked as good and bad."),
    "calibrate": ("cli.calibrate", "Set a package's threshold from good images of the line."),
    "export": ("cli.export", "Write a package's model for other runtimes."),
    "inspect": ("cli.inspect", "Judge the parts that pass a camera: pass, fail or unknown."),
    "line": ("cli.line", "Ask something of a running inspection: status, pause, snapshot."),
    "marks": ("cli.marks", "See, export and import what people said parts really were."),
    "bench": ("cli.bench", "Time a package on this machine."),
    "fleet": ("cli.fleet", "Make a fleet, enrol and revoke its sites, see how it is doing."),
    "model": ("cli.model", "Look into model packages."),
    "doctor": ("cli.doctor", "Say what is wrong with this installation, and what to do."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(COMMANDS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1) if args[0] not in COMMANDS else []
        if near and not args[0].startswith("-"):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeflame")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How log lines on standard error are written.",
)
@click.option("-v", "--verbose", count=True, help="Log details as well.")
def cli(log_format: str, verbose: int) -> None:
    """Visual defect detection, trained across sites that may not share images.

    Start with `edgeflame demo`, then `edgeflame fit` on good photographs of your own part.
    """
    from edgeflame.log import configure_logging

    configure_logging(log_format=log_format, verbosity=verbose)


def main() -> None:
    """Run the command line; expected errors become one line and the exit code of their family."""
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As on standard error: a file's name that is not UTF-8 must not end a command when its work is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(prog_name="edgeflame", standalone_mode=False)
        # Without standalone mode click returns what a command gave to `ctx.exit`.
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("edgeflame: interrupted\n")
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`edgeflame ... | head`); nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_INTERRUPTED)
    except EdgeFlameError as exc:
        from edgeflame.log import error_prefix, printable
        from edgeflame.masking import without_secrets

        sys.stderr.write(f"{error_prefix()}edgeflame: {printable(without_secrets(str(exc)))}\n")
        sys.exit(exc.exit_code)
    except Exception:  # noqa: BLE001 - the outermost frame: an unexpected error must not look like exit code 1, "no"
        import traceback

        traceback.print_exc()
        sys.stderr.write("edgeflame: this error was not expected; please report it with the lines above\n")
        sys.exit(EdgeFlameError.exit_code)


def _interrupt(signum: int, frame: Any) -> None:
    del signum, frame
    raise KeyboardInterrupt
