"""The `llama2-chat` command: mounts the subcommands and turns every end into an exit code.

0 done; 2 the user's input is wrong; 1 anything else; 130 on Ctrl-C and 143 on SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import traceback

import typer

from llama2_chat import interruption
from llama2_chat.cli import chat, data, evaluate, recipes, report, run, score, serve, stages
from llama2_chat.distributed import is_main_process
from llama2_chat.errors import Llama2ChatError, disk_full, out_of_memory

app = typer.Typer(
    name="llama2-chat",
    help="Turn a base language model into a chat model by the complete Llama 2-Chat method.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run.run)
app.command("validate")(recipes.validate)
app.add_typer(recipes.app, name="recipes")
for _kind, _command in stages.COMMANDS.items():
    app.command(_kind, help=_command.__doc__)(_command)
app.command("score")(score.score)
app.command("serve")(serve.serve)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(data.app, name="data")
app.command("report")(report.report)
app.command("chat")(chat.chat)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"llama2-chat {version('llama2-chat')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error"),
    version: bool = typer.Option(
        False, "--version", help="Print the version and stop", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of every command; `run_command` reads `--debug` itself, wherever it stands."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    # Allowed anywhere in the line, since one adds it to a command that has just failed.
    debug = "--debug" in arguments
    try:
        app(args=[word for word in arguments if word != "--debug"], prog_name="llama2-chat")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except interruption.Interrupted as stop:
        if is_main_process():
            print(f"{stop}; what is done is kept, the same command continues", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            traceback.print_exc()
        # What is wrong with the user's input all processes find; what else goes wrong may be one's own.
        if is_main_process() or not isinstance(error, Llama2ChatError):
            print(f"error: {_message(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, Llama2ChatError) else 1
    return 0


def _message(error: Exception) -> str:
    if isinstance(error, Llama2ChatError):
        return str(error)
    if disk_full(error):
        return "no space left on the disk; free some and run the same command to continue"
    if out_of_memory(error):
        return (
            "out of memory; make training.micro_batch_size, training.sequence_length or sampling.token_budget "
            "smaller, or run where there is more"
        )
    name = type(error).__name__
    return f"unexpected {name}: {error}\nrun again with `llama2-chat --debug …` for the traceback"


if __name__ == "__main__":
    main()
