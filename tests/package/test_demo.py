"""`make demo`: what it says before, between and after, without its ten minutes."""

from __future__ import annotations

import json
import re

import demo
import pytest

import extrope_cli as cli


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """The calls of the command, whose rows take 7 seconds each."""
    made = []

    def command(arguments):
        given = vars(cli.make_parser().parse_args(arguments))
        made.append((given["task"], tuple(given["methods"])))
        print(f"the table of {given['task']}")
        rows = [{"method": name, "seconds": 7.0} for name in given["methods"]]
        (tmp_path / f"{given['task']}.json").write_text(json.dumps({"rows": rows}))
        return 0

    monkeypatch.setattr(demo, "command", command)
    monkeypatch.setattr(demo, "OUT", tmp_path)
    return made


def test_it_says_what_it_will_do_how_long_that_takes_and_where_the_pictures_are(calls, capsys):
    assert demo.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("reads 16,384 of the Python reference: 8 readings.")
    at = lines.index("A reading takes 7 s here, all 8 about 00:56.")
    assert lines[at + 1 : at + 3] == ["the table of loss", "the table of recall"]
    assert re.fullmatch(r"Done in 00:0\d\. The pictures:", lines[at + 3])
    assert lines[at + 4 :] == [f"  {demo.OUT / task}.png" for task in ("loss", "recall")]
    assert calls == [("loss", ("rope",)), *demo.PARTS.items()]


def test_it_ends_where_the_command_fails(calls, monkeypatch, capsys):
    codes = iter([0, 130])
    monkeypatch.setattr(demo, "command", lambda _: next(codes))
    monkeypatch.setattr(demo, "estimate", str)
    assert demo.main() == 130
    assert "Done" not in capsys.readouterr().out
