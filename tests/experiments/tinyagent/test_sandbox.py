"""The desk: every tool does what it says, to the desk alone."""

import builtins
import inspect
import json
import os
import socket
from pathlib import Path

import pytest

from experiments.tinyagent.executor import execute
from experiments.tinyagent.plan import parse_plan
from experiments.tinyagent.sandbox import TOOLS, Desk

PLAN = """\
1. get_email_address("alice")
2. get_phone_number("Bob")
3. create_calendar_event("Lunch", "2024-05-14 12:00", "2024-05-14 13", "", $1, "", None)
4. open_and_get_file_path("budget")
5. summarize_pdf("$4")
6. compose_new_email("$1", [], "Budget", "$5", ["$4"])
7. reply_to_email(["$1"], "", [])
8. forward_email(["$1"], "", "", [])
9. maps_open_location("City Library")
10. maps_show_directions("", "the airport", "r")
11. create_note("List", "bread", "Private")
12. open_note("ideas", "")
13. append_note_content("Ideas", "and a larger one", "")
14. create_reminder("Call", "2024-05-15", "", "", 0, True)
15. send_sms(["$2"], "Hello.")
16. get_zoom_meeting_link("Launch", "2024-05-14 12:00:00", 60, ["$1"])
17. join()"""


@pytest.fixture
def sealed(monkeypatch):
    """Nothing may be opened, started or connected to."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"touched something outside: {args}")

    for owner, name in (
        (builtins, "open"),
        (os, "system"),
        (os, "open"),
        (socket, "socket"),
    ):
        monkeypatch.setattr(owner, name, refuse)


def test_every_tool_leaves_its_mark_and_touches_nothing_else(sealed):
    desk = Desk()
    outcomes = execute(parse_plan(PLAN), desk.tools)
    assert {outcome.step.tool for outcome in outcomes} == set(TOOLS)
    assert [o.error for o in outcomes if o.error] == []
    results = {outcome.step.tool: outcome.result for outcome in outcomes}
    alice = "alice.moreau@example.com"
    assert results["get_email_address"] == alice
    assert desk.messages == [{"to": [results["get_phone_number"]], "message": "Hello."}]
    (event,) = desk.events
    assert event["invitees"] == [alice] and event["end"] == "2024-05-14 13:00:00"
    subjects = {mail["subject"] for mail in desk.mails}
    assert subjects == {"Budget", "Re: Plans for the week", "Fwd: Plans for the week"}
    (written,) = [mail for mail in desk.mails if mail["subject"] == "Budget"]
    assert written["to"] == [alice] and written["attachments"] == ["/files/Budget.pdf"]
    assert written["context"] == results["summarize_pdf"] == desk.files["Budget.pdf"]
    assert desk.notes["Private", "List"] == "bread"
    assert desk.notes["", "Ideas"].endswith("\nand a larger one")
    assert desk.reminders[0]["due"] == "2024-05-15"
    assert desk.meetings[0]["link"] == results["get_zoom_meeting_link"]
    assert results["maps_show_directions"] in desk.opened
    told = "\n".join(desk.changes())
    for word in ("Lunch", "Hello.", "bread", "a larger one", "Call", "Launch", "maps:"):
        assert word in told
    assert Desk().changes() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ('get_email_address("Zoe")', "nobody in the address book is named 'Zoe'"),
        ('get_email_address("")', "nobody in the address book is named ''"),
        ('open_and_get_file_path("")', "no file is named ''"),
        ('send_sms([], "x")', "a message needs a recipient"),
        ('open_note("Secrets", "")', "no note is named 'Secrets'"),
        ('open_note("Ideas", "Work")', "no note is named 'Ideas'"),
        ('open_and_get_file_path("../etc/passwd")', "no file is named"),
        ('summarize_pdf("/etc/passwd")', "no file is at '/etc/passwd'"),
        ('send_sms("Bob", "x")', "'Bob' is no phone number"),
        ('compose_new_email([], [], "x", "", [])', "an email needs a recipient"),
        ('compose_new_email("Bob", [], "x", "", [])', "'Bob' is no email address"),
        ('forward_email("", [], "", [])', "an email needs a recipient"),
        ('maps_show_directions("", "x", "f")', "transport is 'd', 'w' or 'r'"),
        ('create_reminder("x", "noon", "", "", 0, False)', "Invalid isoformat"),
        (
            'create_calendar_event("x", "2024-05-14 12:00:00", "2024-05-13 12:00:00", '
            '"", [], "", "")',
            "before it starts",
        ),
    ],
)
def test_what_cannot_be_done_says_why_and_leaves_nothing(call, message):
    desk = Desk()
    (outcome,) = execute(parse_plan(f"1. {call}\n2. join()"), desk.tools)
    assert message in outcome.error
    assert desk.changes() == []


def test_names_and_signatures_are_tinyagent_s():
    path = Path(__file__).parents[4] / "shared/data/tinyagent/tools.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    theirs = {
        tool["name"]: tool["signature"].replace("Sequence[", "list[")
        for tool in json.loads(path.read_text())
    }
    ours = {
        name: f"{name}{inspect.signature(tool)}" for name, tool in Desk().tools.items()
    }
    assert ours == theirs
