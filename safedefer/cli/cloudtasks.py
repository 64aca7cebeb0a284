"""``safedefer cloudtasks-emulator``: a Cloud Tasks service on this machine, for development and tests."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from safedefer.cli.supervisor import listen
from safedefer.queues import load_queue_file

if TYPE_CHECKING:
    from safedefer.queues.cloudtasks.emulator.server import EmulatorOptions


@click.command("cloudtasks-emulator")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; nobody has to log in.")
@click.option("--port", default=8123, show_default=True, type=click.IntRange(0, 65_535), help="0 takes a free one.")
@click.option(
    "--data", default=None, type=click.Path(dir_okay=False, path_type=Path), help="A file that keeps queues and tasks."
)
@click.option(
    "--queue", "queues", multiple=True, metavar="NAME",
    help="Make the queue projects/P/locations/L/queues/Q; may be repeated.",
)  # fmt: skip
@click.option(
    "--queue-yaml", default=None, type=click.Path(dir_okay=False, path_type=Path), help="Make the queues of this file."
)
@click.option(
    "--location", default="projects/local/locations/local", show_default=True, help="Where the queues of the file are."
)
@click.option("--app-engine", default=None, metavar="URL", help="The address that App Engine tasks are sent to.")
def cloudtasks_emulator(
    *,
    host: str,
    port: int,
    data: Path | None,
    queues: tuple[str, ...],
    queue_yaml: Path | None,
    location: str,
    app_engine: str | None,
) -> None:
    """Emulate Google Cloud Tasks: the v2 REST API, on this machine.

    The queue's URL is then cloudtasks://P/L?endpoint=http://127.0.0.1:8123&address=...
    """
    # Here: nobody else needs the emulator, aiohttp and cryptography.
    from safedefer.queues.cloudtasks.emulator.errors import ApiError  # noqa: PLC0415
    from safedefer.queues.cloudtasks.emulator.server import EmulatorOptions as Options  # noqa: PLC0415

    options = Options(
        data=data,
        app_engine=None if app_engine is None else app_engine.rstrip("/"),
        queues=queues,
        queue_file=None if queue_yaml is None else load_queue_file(queue_yaml),
        location=location,
    )
    try:
        asyncio.run(_serve(host, port, options))
    except ApiError as error:  # the name of a queue
        raise click.UsageError(str(error)) from None


async def _serve(host: str, port: int, options: EmulatorOptions) -> None:
    from safedefer.queues.cloudtasks.emulator.server import serving_emulator  # noqa: PLC0415

    listener, _ = listen(host, port)
    with listener:
        async with serving_emulator(listener, options) as address:
            click.echo(f"Cloud Tasks is emulated at {address}")
            stop = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await stop.wait()
