"""The command line, in this process."""

import io
import os
import sys
from pathlib import Path

import click
import pytest

from safedefer.cli.root import main


@click.command()
def broken():
    raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setitem(main.commands, "break-a-pipe", broken)
    return lambda: main.main(["break-a-pipe"], standalone_mode=False)


@pytest.mark.parametrize("output", [io.StringIO, lambda: Path(os.devnull).open("w")], ids=["no file", "a file"])
def test_a_connection_that_breaks_is_an_error_although_the_output_would_break_with_the_same(
    monkeypatch, command, output
):
    with output() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(click.ClickException, match="Broken pipe; correct that and start again"):
            command()


def test_an_output_whose_reader_has_left_is_left_to_click_which_ends_without_a_word(monkeypatch, command):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(click.ClickException):
            command()
        os.close(reader)
        with pytest.raises(SystemExit) as ended:
            command()
    assert ended.value.code == 1
