"""Files that ``migrate-code`` reads and writes, its report and its exit status."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from safedefer.cli import main
from safedefer.migrate import code, edit
from safedefer.migrate.edits import CallEdit, Edits, Piece, Span
from safedefer.migrate.files import syntax_problem
from tests.migrate.test_shapes import run

OLD = "from google.appengine.ext import deferred\n"
NEW = "from safedefer import deferred\n"


def migrate(*arguments):
    return CliRunner().invoke(main, ["migrate-code", *map(str, arguments)])


def test_without_write_a_diff_is_shown_and_nothing_is_written(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(OLD)
    done = migrate(tmp_path)
    assert (done.exit_code, file.read_text()) == (0, OLD)
    assert "-from google.appengine.ext import deferred\n+from safedefer import deferred\n" in done.output
    assert done.output.endswith(
        "1 file would be rewritten; --write writes them (1 place); 0 refused, 0 by hand, 0 notes, 0 errors\n"
    )


def test_a_diff_is_one_that_patch_takes(tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes(b"# \xc3\xa9\r\nfrom google.appengine.ext import deferred\r\nx = 1")
    diff = json.loads(migrate("--json", file).output)["files"][0]["diff"]
    subprocess.run(["patch", "-s", "--binary", str(file)], input=diff.encode(), check=True)
    assert file.read_bytes() == b"# \xc3\xa9\r\nfrom safedefer import deferred\r\nx = 1"


def test_written_twice_is_written_once(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(OLD)
    assert migrate("--write", tmp_path).output.startswith("1 file rewritten (1 place)")
    stamp = file.stat()
    assert migrate("--write", tmp_path).output.startswith("0 files rewritten (0 places)")
    assert (file.read_text(), file.stat().st_mtime_ns, file.stat().st_ino) == (NEW, stamp.st_mtime_ns, stamp.st_ino)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (OLD.encode().replace(b"\n", b"\r\n"), NEW.encode().replace(b"\n", b"\r\n")),
        (
            b"# -*- coding: latin-1 -*-\nn = '\xe9'\n" + OLD.encode(),
            b"# -*- coding: latin-1 -*-\nn = '\xe9'\n" + NEW.encode(),
        ),
        (b"\xef\xbb\xbf" + OLD.encode() + "n = 'é'\n".encode(), b"\xef\xbb\xbf" + NEW.encode() + "n = 'é'\n".encode()),
        (
            b"#!/usr/bin/python3\n" + OLD.encode() + b"x = 1\x0c\n\ty=2"
            if False
            else OLD.encode() + b"x=1;\n\n\n\n# end",
            NEW.encode() + b"x=1;\n\n\n\n# end",
        ),
        (
            "é = 'ü'; from google.appengine.ext import deferred\n".encode(),
            "é = 'ü'; from safedefer import deferred\n".encode(),
        ),
        (b"if 1:\n\tfrom google.appengine.ext import deferred\n", b"if 1:\n\tfrom safedefer import deferred\n"),
    ],
    ids=["crlf", "latin-1", "byte order mark", "no newline at the end", "columns behind other letters", "tabs"],
)
def test_everything_else_of_a_file_stays(tmp_path, before, after):
    file = tmp_path / "a.py"
    file.write_bytes(before)
    file.chmod(0o751)
    assert migrate("--write", file).exit_code == 0
    assert file.read_bytes() == after
    assert file.stat().st_mode & 0o777 == 0o751
    assert [each.name for each in tmp_path.iterdir()] == ["a.py"]


def test_an_added_import_has_the_line_ends_of_the_file(tmp_path):
    file = tmp_path / "a.py"
    file.write_bytes(b"import django_rq\r\ndjango_rq.enqueue(f)\r\n")
    migrate("--write", file)
    assert file.read_bytes() == b"from safedefer import deferred\r\ndeferred.defer(f)\r\n"


def test_a_link_stays_a_link_and_its_file_is_written_once(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/a.py").write_text(OLD)
    (tmp_path / "app/b.py").symlink_to("a.py")
    (tmp_path / "app/loop").symlink_to(".")
    report = json.loads(migrate("--json", "--write", tmp_path / "app").output)
    assert (tmp_path / "app/b.py").is_symlink()
    assert (tmp_path / "app/a.py").read_text() == NEW
    assert report["totals"]["written"] == 1


def test_a_link_that_leads_out_of_the_folder_is_left(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "other.py").write_text(OLD)
    (tmp_path / "app/a.py").symlink_to("../other.py")
    done = migrate("--write", tmp_path / "app")
    assert (done.exit_code, (tmp_path / "other.py").read_text()) == (1, OLD)
    assert "error path: a link that leads out of the folder is left as it is" in done.output
    assert migrate("--write", tmp_path / "app/a.py").exit_code == 0  # named, it is written
    assert (tmp_path / "other.py").read_text() == NEW


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (b'from google.appengine.ext import deferred\nprint "x"\n', "a.py:2:0: error python-2"),
        (b"x = 0777\n", "error python-2"),
        (b"raise ValueError, 'x'\n", "error python-2"),
        (b"def f(a, (b, c)):\n    pass\n", "error python-2"),
        (b"def f(:\n", "error syntax"),
        (b"def f():\n    global x\n    x = 1\n    global x\n", "error syntax"),
        (b"x = '\xe9'\n", "error encoding"),
        (b"# coding: klingon\n", "error encoding"),
        (b"x = 1\0\n", "error syntax"),
        (b"x = " + b"(" * 5_000 + b")" * 5_000, "error syntax"),
        (b"# " + b"x" * 4 * 1024 * 1024, "error too-large"),
    ],
    ids=["print", "octal", "raise", "tuple parameter", "syntax", "global", "no utf-8", "codec", "nul", "deep", "large"],
)  # fmt: skip
def test_a_file_that_does_not_parse_is_reported_and_the_others_go_on(tmp_path, source, error):
    reports_it_and_goes_on(tmp_path, source, error)


def reports_it_and_goes_on(tmp_path, source, error):
    (tmp_path / "a.py").write_bytes(source)
    (tmp_path / "b.py").write_text(OLD)
    done = migrate("--write", tmp_path)
    assert done.exit_code == 1
    assert error in done.output.replace(f"{tmp_path}/", "")
    assert (tmp_path / "a.py").read_bytes() == source
    assert (tmp_path / "b.py").read_text() == NEW


@pytest.mark.parametrize("caught", ["ValueError", "(ValueError, TypeError)"])
def test_an_exception_after_a_comma_is_python_2_where_it_does_not_parse(tmp_path, caught):
    source = f"try:\n    f()\nexcept {caught}, e:\n    pass\n"
    if sys.version_info < (3, 14):
        reports_it_and_goes_on(tmp_path, source.encode(), "error python-2")
    else:  # it parses: e is one more class
        (tmp_path / "a.py").write_text(source)
        assert migrate(tmp_path).exit_code == 0


def test_what_installers_and_repositories_keep_is_left_out(tmp_path):
    for folder in (".git", ".venv", "venv", "node_modules", "lib/site-packages", "__pycache__", "own"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text(OLD)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pyvenv.cfg").touch()
    (tmp_path / "other/a.py").write_text(OLD)
    report = json.loads(migrate("--json", tmp_path).output)
    assert [each["path"] for each in report["files"]] == [str(tmp_path / "own/a.py")]


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    done = migrate(tmp_path / "nothing")
    assert (done.exit_code, "there is no such file or folder" in done.output) == (1, True)
    assert migrate().exit_code == 2


def test_a_file_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(OLD)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    done = migrate("--write", tmp_path)
    assert (done.exit_code, (tmp_path / "a.py").read_text(), [each.name for each in tmp_path.iterdir()]) == (
        1,
        OLD,
        ["a.py"],
    )
    assert "error unwritable: it cannot be written: No space left on device" in done.output


def test_a_file_that_would_not_compile_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(OLD)
    monkeypatch.setattr(edit, "rewrite", lambda *_: (b"def f(:\n", 1))
    assert "error unapplied: rewritten it would not compile" in migrate("--write", tmp_path).output
    assert (tmp_path / "a.py").read_text() == OLD


def test_an_edit_that_meets_nothing_leaves_the_file(tmp_path, monkeypatch):
    with pytest.raises(edit.Unapplied, match="line 7"):
        edit.rewrite(b"f(1)\n", Edits(calls={Span(7, 0, 7, 4): CallEdit("g", [Piece("keep", 0)])}))
    assert edit.rewrite(b"f(1)\n", Edits(calls={Span(1, 0, 1, 4): CallEdit("g", [Piece("keep", 0)])})) == (b"g(1)\n", 1)


def test_the_report_is_json_and_names_each_place(tmp_path):
    (tmp_path / "a.py").write_text(f"{OLD}é = 1; deferred.defer(lambda: 1)\n")
    done = migrate("--json", tmp_path)
    report = json.loads(done.output)
    assert done.exit_code == 1
    assert report["totals"] == {
        "files": 1, "changed": 1, "written": 0, "rewrites": 1, "note": 0, "by-hand": 0, "refused": 1, "error": 0,
    }  # fmt: skip
    [note] = report["files"][0]["notes"]
    assert (note["line"], note["column"], note["level"], note["code"]) == (2, 23, "refused", "lambda")


def test_notes_alone_are_no_failure(tmp_path):
    (tmp_path / "a.py").write_text("from safedefer import deferred\ndeferred.defer(f, _target='x')\n")
    done = migrate(tmp_path)
    assert (done.exit_code, "note target" in done.output) == (0, True)


def test_the_code_writes_nothing_to_the_terminal(tmp_path, monkeypatch):
    (tmp_path / "a\x1b[2J.py").write_text(f"{OLD}x = '\x1b[31m'\t# y\n")
    monkeypatch.setattr("safedefer.cli.migrate_code.is_terminal", lambda _: True)
    output = migrate(tmp_path).output
    assert "\x1b" not in output
    assert "\t# y" in output


def test_tasks_and_queues_of_one_file_are_known_in_another(tmp_path):
    found = run(
        tmp_path,
        **{
            "shop/__init__": "from .worker import app as celery\n",
            "shop/worker": "from celery import Celery\napp = Celery('shop')\n",
            "shop/tasks": "from . import celery\n@celery.task(queue='mail')\ndef send(a): ...\n",
            "shop/queues": "from rq import Queue\ndef get_queue():\n    return Queue('low', connection=c)\nhigh = Queue('high', connection=c)\n",
            "shop/views": "from shop import tasks\nfrom .tasks import send as s\nfrom .queues import get_queue, high\n"
            "tasks.send.delay(1)\ns.delay(2)\nget_queue().enqueue(f)\nhigh.enqueue('shop.views.f')\ndef f(): ...\n",
        },
    )
    assert found["shop/tasks"][0] == "def send(a): ...\n"
    assert found["shop/views"][0] == (
        "from shop import tasks\nfrom .tasks import send as s\nfrom .queues import get_queue, high\nfrom safedefer import deferred\n"
        "deferred.defer(tasks.send, 1, _queue='mail')\ndeferred.defer(s, 2, _queue='mail')\ndeferred.defer(f, _queue='low')\n"
        "deferred.defer(f, _queue='high')\ndef f(): ...\n"
    )


def test_a_function_of_another_file_is_judged(tmp_path):
    found = run(
        tmp_path,
        jobs="def g():\n    yield 1\n",
        go="from safedefer import deferred\nfrom jobs import g\ndeferred.defer(g)\n",
    )
    assert [note.code for note in found["go"][1]] == ["generator"]


def test_without_libcst_the_extra_is_named(tmp_path):
    hidden = "import sys; sys.modules['libcst'] = None; from safedefer.cli import main; main(['migrate-code', '.'])"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "pip install 'safedefer[migrate]'" in done.stderr) == (1, True)


def test_a_reports_totals_are_those_of_its_files():
    assert code.totals([]) == dict.fromkeys(
        ("files", "changed", "written", "rewrites", "note", "by-hand", "refused", "error"), 0
    )
    assert syntax_problem("x = 1") is None
