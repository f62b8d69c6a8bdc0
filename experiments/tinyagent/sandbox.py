"""The planner's 16 tools on a desk that is nowhere but in memory.

Names and signatures are TinyAgent's (arXiv 2409.00608); what the tools do here stays in
this process. Their docstrings are what the planner is told.
"""

import dataclasses
import datetime
import functools
import threading
import urllib.parse
from collections.abc import Callable

_NONE = ("", None)
Texts = str | list[str] | None


@dataclasses.dataclass(frozen=True)
class Contact:
    """Someone in the address book."""

    name: str
    phone: str
    email: str


CONTACTS = (
    Contact("Alice Moreau", "+1 555 0101", "alice.moreau@example.com"),
    Contact("Bob Tanaka", "+1 555 0102", "bob.tanaka@example.com"),
    Contact("Carla Nowak", "+1 555 0103", "carla.nowak@example.com"),
    Contact("Daniel Osei", "+1 555 0104", "daniel.osei@example.com"),
    Contact("Elif Kaya", "+1 555 0105", "elif.kaya@example.com"),
    Contact("Farid Rahimi", "+1 555 0106", "farid.rahimi@example.com"),
)
FILES = {
    "Budget.pdf": "Spending rose by four per cent, most of it for travel.",
    "Contract.pdf": "Two years, with a month's notice on both sides.",
    "Thesis.pdf": "Low-rank optimizers train large models in little memory.",
}
_NOTES = {("", "Ideas"): "Try a smaller rank."}
_SELECTED = {"from": "Bob Tanaka", "subject": "Plans for the week"}


class Desk:
    """Address book, calendar, mail, messages, notes, reminders and files.

    Attributes:
      contacts: By name.
      files: Text of each, by name.
      events, mails, messages, reminders, meetings: What was made, in order.
      notes: Text by folder and name.
      opened: Places and files that were opened.
    """

    def __init__(self) -> None:
        """Lay out a desk with a few contacts, files and a note."""
        self.contacts = {contact.name: contact for contact in CONTACTS}
        self.files = dict(FILES)
        self.events: list[dict[str, object]] = []
        self.mails: list[dict[str, object]] = []
        self.messages: list[dict[str, object]] = []
        self.reminders: list[dict[str, object]] = []
        self.meetings: list[dict[str, object]] = []
        self.notes = dict(_NOTES)
        self.opened: list[str] = []
        self._lock = threading.RLock()  # steps run at the same time

    def changes(self) -> list[str]:
        """Returns a line for everything that was made."""
        made = {
            "event": self.events,
            "email": self.mails,
            "message": self.messages,
            "reminder": self.reminders,
            "meeting": self.meetings,
        }
        lines = [
            f"{kind}: {', '.join(f'{name} {value!r}' for name, value in one.items())}"
            for kind, some in made.items()
            for one in some
        ]
        lines += [
            f"note: {name!r} {text!r}"
            for (folder, name), text in self.notes.items()
            if _NOTES.get((folder, name)) != text
        ]
        return lines + [f"opened: {what}" for what in self.opened]

    @property
    def tools(self) -> dict[str, Callable[..., str]]:
        """All 16, by name."""
        return {name: self._locked(getattr(self, name)) for name in TOOLS}

    def _locked(self, tool: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(tool)
        def call(*arguments: object) -> str:
            with self._lock:
                return tool(*arguments)

        return call

    def get_phone_number(self, name: str) -> str:
        """Find someone in the address book; returns the phone number."""
        return self._contact(name).phone

    def get_email_address(self, name: str) -> str:
        """Find someone in the address book; returns the email address."""
        return self._contact(name).email

    def create_calendar_event(
        self,
        title: str,
        start_date: str,
        end_date: str,
        location: str,
        invitees: list[str],
        notes: str,
        calendar: str,
    ) -> str:
        """Put an event into the calendar; returns whether that was done.

        Dates are 'YYYY-MM-DD HH:MM:SS'. Invitees are email addresses, or an empty list.
        Location, notes and calendar may be empty or None.
        """
        start, end = _time(start_date), _time(end_date)
        if end < start:
            raise ValueError(f"the event ends at {end}, before it starts at {start}")
        self.events.append(
            {
                "title": title,
                "start": str(start),
                "end": str(end),
                "location": location or "",
                "invitees": _addresses(invitees),
                "notes": notes or "",
                "calendar": calendar or "Home",
            }
        )
        return f"Event {title!r} is in the calendar."

    def open_and_get_file_path(self, file_name: str) -> str:
        """Open a file; returns its path."""
        wanted = file_name.casefold().removesuffix(".pdf")
        for name in self.files:
            if wanted and wanted in name.casefold():
                self.opened.append(name)
                return f"/files/{name}"
        raise LookupError(f"no file is named {file_name!r}")

    def summarize_pdf(self, pdf_path: str) -> str:
        """Summarize a PDF; returns the summary.

        The path is what open_and_get_file_path has returned.
        """
        name = pdf_path.removeprefix("/files/")
        if name not in self.files:
            raise LookupError(f"no file is at {pdf_path!r}")
        return self.files[name]

    def compose_new_email(
        self,
        recipients: list[str],
        cc: list[str],
        subject: str,
        context: str,
        attachments: list[str],
    ) -> str:
        """Write an email; returns whether that was done.

        Recipients and cc are one address or a list of them, attachments one path or a
        list. The context is what other steps have found and the email is to say, as a
        link or a place on the map; else it is empty.
        """
        to = _addresses(recipients)
        if not to:
            raise ValueError("an email needs a recipient")
        return self._mail(to, cc, subject, context, attachments)

    def reply_to_email(
        self, cc: list[str], context: str, attachments: list[str]
    ) -> str:
        """Reply to the email that is selected; returns whether that was done.

        Arguments are as of compose_new_email.
        """
        to = [self._contact(_SELECTED["from"]).email]
        subject = f"Re: {_SELECTED['subject']}"
        return self._mail(to, cc, subject, context, attachments)

    def forward_email(
        self, recipients: list[str], cc: list[str], context: str, attachments: list[str]
    ) -> str:
        """Forward the email that is selected; returns whether that was done.

        Arguments are as of compose_new_email.
        """
        to = _addresses(recipients)
        if not to:
            raise ValueError("an email needs a recipient")
        subject = f"Fwd: {_SELECTED['subject']}"
        return self._mail(to, cc, subject, context, attachments)

    def maps_open_location(self, location: str) -> str:
        """Show a place, an address or coordinates on the map; returns a link to it."""
        return self._open(f"maps://?q={urllib.parse.quote(location)}")

    def maps_show_directions(
        self, start_location: str, end_location: str, transport: str
    ) -> str:
        """Show the way from one place to another on the map; returns a link to it.

        An empty start is where one is. Transport is 'd' (by car), 'w' (on foot) or 'r'
        (public transport).
        """
        if transport not in ("d", "w", "r"):
            raise ValueError(f"transport is 'd', 'w' or 'r', not {transport!r}")
        start, end = (
            urllib.parse.quote(start_location),
            urllib.parse.quote(end_location),
        )
        return self._open(f"maps://?from={start}&to={end}&by={transport}")

    def create_note(self, name: str, content: str, folder: str) -> str:
        """Write a new note; returns whether that was done. The folder may be empty."""
        self.notes[folder or "", name] = content
        return f"Note {name!r} is written."

    def open_note(self, name: str, folder: str) -> str:
        """Open a note; returns its content. The folder may be empty."""
        return self.notes[self._note(name, folder)]

    def append_note_content(self, name: str, content: str, folder: str) -> str:
        """Add to a note; returns whether that was done. The folder may be empty."""
        key = self._note(name, folder)
        self.notes[key] = f"{self.notes[key]}\n{content}"
        return f"Note {name!r} is longer."

    def create_reminder(
        self,
        name: str,
        due_date: str,
        notes: str,
        list_name: str,
        priority: int,
        all_day: bool,
    ) -> str:
        """Set a reminder; returns whether that was done.

        The date is 'YYYY-MM-DD HH:MM:SS', or 'YYYY-MM-DD' if all_day is True. The list
        may be empty; the priority is 0 unless another one is asked for, all_day False.
        """
        due = datetime.date.fromisoformat(due_date) if all_day else _time(due_date)
        self.reminders.append(
            {
                "name": name,
                "due": str(due),
                "notes": notes or "",
                "list": list_name or "Reminders",
                "priority": priority,
            }
        )
        return f"Reminder {name!r} is set."

    def send_sms(self, recipients: list[str], message: str) -> str:
        """Send a message to a phone number or a list; returns whether that was done."""
        to = _list(recipients)
        if not to:
            raise ValueError("a message needs a recipient")
        if unknown := [n for n in to if not n.startswith("+")]:
            raise ValueError(f"{unknown[0]!r} is no phone number")
        self.messages.append({"to": to, "message": message})
        return f"Message sent to {', '.join(to)}."

    def get_zoom_meeting_link(
        self, topic: str, start_time: str, duration: int, meeting_invitees: list[str]
    ) -> str:
        """Set up a Zoom meeting; returns the link to join it.

        The start is 'YYYY-MM-DD HH:MM:SS', the duration in minutes, 60 unless another
        one is asked for. The link goes into an event's notes or an email's context.
        """
        invitees = _addresses(meeting_invitees)
        link = f"https://zoom.example/j/{len(self.meetings) + 1}"
        self.meetings.append(
            {
                "topic": topic,
                "start": str(_time(start_time)),
                "minutes": duration,
                "invitees": invitees,
                "link": link,
            }
        )
        return link

    def _contact(self, name: str) -> Contact:
        wanted = name.casefold()
        for contact in self.contacts.values():
            if wanted and wanted in contact.name.casefold():
                return contact
        raise LookupError(f"nobody in the address book is named {name!r}")

    def _note(self, name: str, folder: str) -> tuple[str, str]:
        wanted = name.casefold()
        for where, title in self.notes:
            if title.casefold() == wanted and folder in ("", None, where):
                return where, title
        raise LookupError(f"no note is named {name!r}")

    def _mail(
        self, to: list[str], cc: Texts, subject: str, context: str, attachments: Texts
    ) -> str:
        self.mails.append(
            {
                "to": to,
                "cc": _addresses(cc),
                "subject": subject,
                "context": context or "",
                "attachments": _list(attachments),
            }
        )
        return f"Email to {', '.join(to)} is written."

    def _open(self, link: str) -> str:
        self.opened.append(link)
        return link


TOOLS = (
    "get_phone_number",
    "get_email_address",
    "create_calendar_event",
    "open_and_get_file_path",
    "summarize_pdf",
    "compose_new_email",
    "reply_to_email",
    "forward_email",
    "maps_open_location",
    "maps_show_directions",
    "create_note",
    "open_note",
    "append_note_content",
    "create_reminder",
    "send_sms",
    "get_zoom_meeting_link",
)


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _list(given: Texts) -> list[str]:
    if given in _NONE:
        return []
    return [given] if isinstance(given, str) else list(given)


def _addresses(given: Texts) -> list[str]:
    found = _list(given)
    if wrong := [address for address in found if "@" not in address]:
        raise ValueError(f"{wrong[0]!r} is no email address")
    return found
