"""What made-up requests are about: errands, ways to say them, calls that do them."""

import datetime
import random
from collections.abc import Callable

from experiments.tinyagent.plan import Step, Value

_FIRST = (
    "Alice Bob Carla Daniel Elif Farid Grace Hugo Ines Jonas Kira Liam Mona".split()
)
_LAST = (
    "Moreau Tanaka Nowak Osei Kaya Rahimi Silva Berg Costa Meyer Petrov Doyle".split()
)
_TOPICS = (
    "the budget",
    "the launch",
    "the new office",
    "the quarterly report",
    "the trip to Lisbon",
    "the design review",
    "the hiring plan",
    "the team dinner",
)
_NEWS = (
    "I am running late",
    "the meeting is moved to Thursday",
    "the documents are ready",
    "dinner is at eight",
    "the train is delayed",
    "we need two more chairs",
    "the contract is signed",
    "the tests have passed",
)
_FILES = ("Budget", "Contract", "Thesis", "Invoice", "Minutes", "Roadmap", "Survey")
_PLACES = (
    "Central Station",
    "the Botanical Garden",
    "12 Harbour Street",
    "City Library",
    "Riverside Park",
    "the airport",
    "Museum of Design",
)
_EVENTS = (
    "Lunch",
    "Budget Review",
    "Design Meeting",
    "Team Breakfast",
    "Project Kickoff",
    "Interview",
    "Yoga Class",
)
_NOTES = ("Ideas", "Groceries", "Reading List", "Travel Plans", "Meeting Notes")
_FOLDERS = ("Work", "Private", "Research")
_TASKS = (
    "water the plants",
    "pay the rent",
    "call the dentist",
    "renew the passport",
    "buy milk",
    "back up the laptop",
)
_CONTENTS = (
    "bread, olives and tea",
    "ask for a quiet room",
    "three chapters by Sunday",
    "a smaller rank is enough",
    "compare both offers",
)


class Calls:
    """Steps of a plan that is being written, on a day."""

    def __init__(self, today: datetime.datetime) -> None:
        """Begin with none."""
        self.today = today
        self.steps: list[Step] = []

    def call(self, tool: str, *arguments: Value) -> str:
        """Adds a call, and returns what refers to its result; the same is not twice."""
        for step in self.steps:
            if (step.tool, step.arguments) == (tool, arguments):
                return f"${step.number}"
        self.steps.append(Step(len(self.steps) + 1, tool, arguments))
        return f"${len(self.steps)}"

    def emails(self, people: list[str]) -> list[Value]:
        """Looks up addresses."""
        return [self.call("get_email_address", person) for person in people]

    def phones(self, people: list[str]) -> list[Value]:
        """Looks up numbers."""
        return [self.call("get_phone_number", person) for person in people]


Slots = dict[str, str]
_Errand = tuple[Callable[[random.Random, Calls], Slots], tuple[str, ...]]
ERRANDS: dict[str, _Errand] = {}


def _errand(*ways: str) -> Callable[..., Callable[[random.Random, Calls], Slots]]:
    """Registers what makes an errand's calls, with the ways to say it.

    The last way is for the test split alone, the one before it for validation.
    """

    def register(
        make: Callable[[random.Random, Calls], Slots],
    ) -> Callable[[random.Random, Calls], Slots]:
        ERRANDS[make.__name__] = make, ways
        return make

    return register


@_errand(
    "text {people} that {news}",
    "send {people} a text message saying {news}",
    "let {people} know by SMS that {news}",
    "message {people} that {news}",
    "tell {people} in a text that {news}",
    "write an SMS to {people}: {news}",
)
def sms(dice: random.Random, calls: Calls) -> Slots:
    """Numbers, then one message."""
    people, news = _people(dice), dice.choice(_NEWS)
    calls.call("send_sms", calls.phones(people), _sentence(news))
    return {"people": _listed(people), "news": news}


@_errand(
    "email {people} about {topic}",
    "write an email to {people} about {topic}",
    "send {people} an email on {topic}",
    "compose an email about {topic} for {people}",
    "draft a mail to {people} regarding {topic}",
    "mail {people} with {topic} as the subject",
)
def email(dice: random.Random, calls: Calls) -> Slots:
    """Addresses, then one email."""
    people, topic = _people(dice), dice.choice(_TOPICS)
    calls.call("compose_new_email", calls.emails(people), [], _title(topic), "", [])
    return {"people": _listed(people), "topic": topic}


@_errand(
    "email the {file} file to {people}",
    "send {people} an email with {file}.pdf attached",
    "attach {file}.pdf to an email to {people}",
    "mail {people} the file {file}",
    "share the document {file} with {people} by email",
    "get {file}.pdf to {people} as an attachment",
)
def email_file(dice: random.Random, calls: Calls) -> Slots:
    """Address and path, then an email."""
    people, file = _people(dice), dice.choice(_FILES)
    to = calls.emails(people)
    path = calls.call("open_and_get_file_path", file)
    calls.call("compose_new_email", to, [], file, "", [path])
    return {"people": _listed(people), "file": file}


@_errand(
    "email {people} a summary of {file}.pdf",
    "summarize {file}.pdf and send it to {people} by email",
    "send {people} an email with the summary of the {file} PDF",
    "mail a digest of the {file} PDF to {people}",
    "sum up {file}.pdf for {people} in an email",
)
def email_summary(dice: random.Random, calls: Calls) -> Slots:
    """Path, summary, and an email that says it."""
    people, file = _people(dice), dice.choice(_FILES)
    to = calls.emails(people)
    path = calls.call("open_and_get_file_path", file)
    summary = calls.call("summarize_pdf", path)
    calls.call("compose_new_email", to, [], f"Summary of {file}", summary, [])
    return {"people": _listed(people), "file": file}


@_errand(
    "email {people} the location of {place}",
    "send {people} an email with a map of {place}",
    "find {place} on the map and mail it to {people}",
    "mail {people} where {place} is",
    "let {people} have the map link of {place} by email",
)
def email_place(dice: random.Random, calls: Calls) -> Slots:
    """A link of the map in an email."""
    people, place = _people(dice), dice.choice(_PLACES)
    to = calls.emails(people)
    link = calls.call("maps_open_location", place)
    calls.call("compose_new_email", to, [], _title(place), link, [])
    return {"people": _listed(people), "place": place}


@_errand(
    "invite {people} to {event} {when}",
    "put {event} with {people} into the calendar {when}",
    "schedule {event} {when} and invite {people}",
    "create an event called {event} {when} with {people}",
    "set up {event} with {people} {when}",
    "add {event} to my calendar {when}, {people} should come",
)
def invite(dice: random.Random, calls: Calls) -> Slots:
    """An event with invitees."""
    people, event = _people(dice), dice.choice(_EVENTS)
    start, when = _moment(dice, calls)
    _event(calls, event, start, "", calls.emails(people), "")
    return {"people": _listed(people), "event": event, "when": when}


@_errand(
    "put {event} at {place} into the calendar {when}",
    "schedule {event} at {place} {when}",
    "add {event} {when} at {place} to my calendar",
    "create a calendar entry for {event} at {place} {when}",
    "block time for {event} {when} at {place}",
)
def event_at(dice: random.Random, calls: Calls) -> Slots:
    """An event somewhere."""
    event, place = dice.choice(_EVENTS), dice.choice(_PLACES)
    start, when = _moment(dice, calls)
    _event(calls, event, start, place, [], "")
    return {"event": event, "place": place, "when": when}


@_errand(
    "set up a Zoom meeting about {topic} with {people} {when}",
    "create a Zoom call on {topic} {when} with {people} and put it into the calendar",
    "schedule a Zoom meeting with {people} {when} about {topic}",
    "arrange a video call on Zoom {when} with {people} about {topic}",
    "get {people} into a Zoom meeting about {topic} {when}",
)
def zoom(dice: random.Random, calls: Calls) -> Slots:
    """A meeting, and an event that has its link."""
    people, topic = _people(dice), dice.choice(_TOPICS)
    start, when = _moment(dice, calls)
    to = calls.emails(people)
    link = calls.call("get_zoom_meeting_link", _title(topic), str(start), 60, to)
    _event(calls, _title(topic), start, "", to, link)
    return {"people": _listed(people), "topic": topic, "when": when}


@_errand(
    "email {people} a Zoom link for a meeting on {topic} {when}",
    "send {people} an email with the link to a Zoom meeting about {topic} {when}",
    "create a Zoom meeting about {topic} {when} and mail the link to {people}",
    "make a Zoom link for {topic} {when}, then email it to {people}",
    "mail {people} the link of a new Zoom call on {topic} {when}",
)
def zoom_email(dice: random.Random, calls: Calls) -> Slots:
    """A meeting, and an email that has its link."""
    people, topic = _people(dice), dice.choice(_TOPICS)
    start, when = _moment(dice, calls)
    to = calls.emails(people)
    link = calls.call("get_zoom_meeting_link", _title(topic), str(start), 60, to)
    calls.call("compose_new_email", to, [], _title(topic), link, [])
    return {"people": _listed(people), "topic": topic, "when": when}


@_errand(
    "reply to the email with {file}.pdf attached",
    "answer the selected email and attach {file}.pdf",
    "reply to this email with the file {file}",
    "send {file}.pdf in a reply to this mail",
    "respond to the current email with {file} as an attachment",
)
def reply_file(dice: random.Random, calls: Calls) -> Slots:
    """A path, then a reply."""
    file = dice.choice(_FILES)
    path = calls.call("open_and_get_file_path", file)
    calls.call("reply_to_email", [], "", [path])
    return {"file": file}


@_errand(
    "reply to the email with a copy to {people}",
    "answer the selected email and cc {people}",
    "reply to this email, {people} in cc",
    "respond to the current mail and copy {people}",
    "write back to this email with {people} on copy",
)
def reply_cc(dice: random.Random, calls: Calls) -> Slots:
    """Addresses, then a reply."""
    people = _people(dice)
    calls.call("reply_to_email", calls.emails(people), "", [])
    return {"people": _listed(people)}


@_errand(
    "forward the email to {people}",
    "forward the selected email to {people}",
    "pass this email on to {people}",
    "send this mail on to {people}",
    "let {people} have this email, too",
)
def forward(dice: random.Random, calls: Calls) -> Slots:
    """Addresses, then the selected email."""
    people = _people(dice)
    calls.call("forward_email", calls.emails(people), [], "", [])
    return {"people": _listed(people)}


@_errand(
    "show {place} on the map",
    "open {place} in the maps",
    "find {place} on the map",
    "look up {place} in the maps",
    "where is {place} on the map",
)
def show_place(dice: random.Random, calls: Calls) -> Slots:
    """A place."""
    place = dice.choice(_PLACES)
    calls.call("maps_open_location", place)
    return {"place": place}


@_errand(
    "show the way to {end} {how}",
    "give me directions to {end} {how}",
    "show directions to {end} {how}",
    "how do I get to {end} {how}",
    "take me to {end} {how}",
)
def directions(dice: random.Random, calls: Calls) -> Slots:
    """From here."""
    end, (letter, how) = dice.choice(_PLACES), dice.choice(_TRANSPORT)
    calls.call("maps_show_directions", "", end, letter)
    return {"end": end, "how": how}


@_errand(
    "show the way from {start} to {end} {how}",
    "give me directions from {start} to {end} {how}",
    "how do I get from {start} to {end} {how}",
    "plan a route from {start} to {end} {how}",
    "find the route {how} between {start} and {end}",
)
def route(dice: random.Random, calls: Calls) -> Slots:
    """From somewhere else."""
    start, end = dice.sample(_PLACES, 2)
    letter, how = dice.choice(_TRANSPORT)
    calls.call("maps_show_directions", start, end, letter)
    return {"start": start, "end": end, "how": how}


@_errand(
    "create a note called {note} that says {content}",
    "write a note named {note} with {content}",
    "make a new note {note}: {content}",
    "start a note titled {note} saying {content}",
    "jot down {content} in a new note called {note}",
)
def note(dice: random.Random, calls: Calls) -> Slots:
    """A new note."""
    name, content = dice.choice(_NOTES), dice.choice(_CONTENTS)
    calls.call("create_note", name, content, "")
    return {"note": name, "content": content}


@_errand(
    "create a note called {note} in the folder {folder} that says {content}",
    "write a note {note} with {content} into my {folder} folder",
    "make a note named {note} in {folder} saying {content}",
    "add a new note {note} to the folder {folder}: {content}",
    "in the folder {folder}, write down {content} as {note}",
)
def note_in_folder(dice: random.Random, calls: Calls) -> Slots:
    """A new note, in a folder."""
    name, content = dice.choice(_NOTES), dice.choice(_CONTENTS)
    folder = dice.choice(_FOLDERS)
    calls.call("create_note", name, content, folder)
    return {"note": name, "content": content, "folder": folder}


@_errand(
    "open the note {note}",
    "open my note called {note}",
    "show me the note {note}",
    "read me the note named {note}",
    "pull up the note {note}",
)
def read_note(dice: random.Random, calls: Calls) -> Slots:
    """A note that there is."""
    name = dice.choice(_NOTES)
    calls.call("open_note", name, "")
    return {"note": name}


@_errand(
    "email {people} what the note {note} says",
    "send {people} an email with the content of the note {note}",
    "open the note {note} and mail it to {people}",
    "mail the note {note} to {people}",
    "share the content of the note {note} with {people} by email",
)
def email_note(dice: random.Random, calls: Calls) -> Slots:
    """A note's content in an email."""
    people, name = _people(dice), dice.choice(_NOTES)
    to = calls.emails(people)
    content = calls.call("open_note", name, "")
    calls.call("compose_new_email", to, [], name, content, [])
    return {"people": _listed(people), "note": name}


@_errand(
    "add {content} to the note {note}",
    "append {content} to my note {note}",
    "write {content} at the end of the note {note}",
    "put {content} into the note {note} as well",
    "extend the note {note} by {content}",
)
def append(dice: random.Random, calls: Calls) -> Slots:
    """More in a note."""
    name, content = dice.choice(_NOTES), dice.choice(_CONTENTS)
    calls.call("append_note_content", name, content, "")
    return {"note": name, "content": content}


@_errand(
    "add a summary of {file}.pdf to the note {note}",
    "summarize {file}.pdf and append it to the note {note}",
    "append the summary of the {file} PDF to my note {note}",
    "write a digest of {file}.pdf into the note {note}",
    "sum up {file}.pdf at the end of the note {note}",
)
def append_summary(dice: random.Random, calls: Calls) -> Slots:
    """A summary in a note."""
    name, file = dice.choice(_NOTES), dice.choice(_FILES)
    path = calls.call("open_and_get_file_path", file)
    summary = calls.call("summarize_pdf", path)
    calls.call("append_note_content", name, summary, "")
    return {"note": name, "file": file}


@_errand(
    "remind me to {task} {when}",
    "set a reminder to {task} {when}",
    "create a reminder {when} to {task}",
    "add a reminder that I have to {task} {when}",
    "make sure I {task} {when}",
)
def remind(dice: random.Random, calls: Calls) -> Slots:
    """At an hour."""
    task, (start, when) = dice.choice(_TASKS), _moment(dice, calls)
    calls.call("create_reminder", _title(task), str(start), "", "", 0, False)
    return {"task": task, "when": when}


@_errand(
    "remind me {day} to {task}, all day",
    "set an all-day reminder {day} to {task}",
    "create a reminder for the whole of the day {day} to {task}",
    "add an all-day reminder to {task} {day}",
    "have me reminded all day {day} to {task}",
)
def remind_all_day(dice: random.Random, calls: Calls) -> Slots:
    """On a day."""
    task, (date, day) = dice.choice(_TASKS), _day(dice, calls)
    calls.call("create_reminder", _title(task), str(date.date()), "", "", 0, True)
    return {"task": task, "day": day}


_TRANSPORT = (("d", "by car"), ("w", "on foot"), ("r", "by public transport"))


def _event(
    calls: Calls,
    title: str,
    start: datetime.datetime,
    place: str,
    people: list[Value],
    notes: str,
) -> None:
    end = start + datetime.timedelta(hours=1)
    calls.call(
        "create_calendar_event", title, str(start), str(end), place, people, notes, ""
    )


def _people(dice: random.Random) -> list[str]:
    count = dice.choice((1, 1, 1, 2, 3))
    names = []
    for first in dice.sample(_FIRST, count):
        last = f" {dice.choice(_LAST)}" if dice.random() < 1 / 2 else ""
        names.append(f"{first}{last}")
    return names


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _day(dice: random.Random, calls: Calls) -> tuple[datetime.datetime, str]:
    days = dice.randint(1, 14)
    date = calls.today + datetime.timedelta(days=days)
    if days == 1:
        return date, "tomorrow"
    if days < 7 and dice.random() < 1 / 2:
        return date, f"on {date:%A}"
    return date, f"on {date:%B} {date.day}"


def _moment(dice: random.Random, calls: Calls) -> tuple[datetime.datetime, str]:
    date, day = _day(dice, calls)
    hour = dice.randint(8, 20)
    clock = {12: "noon"}.get(
        hour, f"{(hour - 1) % 12 + 1} {'AM' if hour < 12 else 'PM'}"
    )
    return date.replace(hour=hour), f"{day} at {clock}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _title(text: str) -> str:
    plain = text.removeprefix("the ")
    return plain[0].upper() + plain[1:]
