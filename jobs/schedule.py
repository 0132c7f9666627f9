"""When a schedule is due: five-field cron expressions.

    minute hour day-of-month month day-of-week      e.g. "30 2 * * 1-5"

Fields take `*`, numbers, ranges `a-b`, steps `*/n` and `a-b/n`, and lists of these by commas; days
of the week are 0 to 7 (0 and 7 are Sunday) or SUN to SAT, months 1 to 12 or JAN to DEC. Where both
days are restricted, either one is enough, as in cron (IEEE 1003.1, crontab).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of the month", 1, 31, (), 0),
    ("month", 1, 12, MONTHS, 1),
    ("day of the week", 0, 7, DAYS, 0),
)


class ScheduleError(ValueError):
    """A schedule can't be read; the message names the field and what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Cron:
    """A parsed expression.

    Attributes:
        minutes: 0 to 59.
        hours: 0 to 23.
        days: Of the month, 1 to 31.
        months: 1 to 12.
        weekdays: 0 (Sunday) to 6.
        either: Whether a day of the month or of the week is enough.
        zone: Time zone in which the expression is meant.
    """

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either: bool
    zone: ZoneInfo


def parse(expression: str, *, zone: str = "UTC") -> Cron:
    """Reads an expression.

    Args:
        expression: Five fields, separated by blanks.
        zone: Name in the IANA time zone database.

    Raises:
        ScheduleError: A field or the zone can't be read, or no day fits, as on 30 February.
    """
    fields = expression.split()
    if len(fields) != len(FIELDS):
        raise ScheduleError(
            f"schedule {expression!r} has {len(fields)} fields: it takes 5, minute, hour, day of "
            "the month, month and day of the week, as in '30 2 * * 1-5'"
        )
    try:
        where = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise ScheduleError(
            f"time zone {zone!r} isn't known: name one as 'Europe/Berlin', or 'UTC'"
        ) from None
    parts = [_field(text, *field) for text, field in zip(fields, FIELDS, strict=True)]
    made = Cron(
        minutes=parts[0],
        hours=parts[1],
        days=parts[2],
        months=parts[3],
        weekdays=frozenset(day % 7 for day in parts[4]),
        either=not fields[2].startswith("*") and not fields[4].startswith("*"),
        zone=where,
    )
    longest = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
    fits = any(min(made.days) <= longest.get(month, 31) for month in made.months)
    if not fits and not made.either:
        raise ScheduleError(f"schedule {expression!r} is never due: no such day is in its months")
    return made


def next_after(cron: Cron, moment: datetime) -> datetime:
    """The first time after `moment` at which a schedule is due.

    A local time that a change of clocks skips is due never, one that it repeats once.

    Args:
        cron: The schedule.
        moment: Aware.

    Returns:
        A whole minute, UTC.
    """
    day = moment.astimezone(cron.zone).date()
    while True:
        weekday = day.isoweekday() % 7
        in_month, in_week = day.day in cron.days, weekday in cron.weekdays
        chosen = in_month or in_week if cron.either else in_month and in_week
        if chosen and day.month in cron.months:
            for hour in sorted(cron.hours):
                for minute in sorted(cron.minutes):
                    local = datetime(day.year, day.month, day.day, hour, minute, tzinfo=cron.zone)
                    due = local.astimezone(UTC)
                    skipped = due.astimezone(cron.zone).hour != hour
                    if due > moment and not skipped:
                        return due
        day += timedelta(days=1)


def _field(
    text: str, name: str, lowest: int, highest: int, names: Sequence[str], first: int
) -> frozenset[int]:
    def number(part: str) -> int:
        if part.upper() in names:
            return names.index(part.upper()) + first
        if not part.isdecimal() or not lowest <= int(part) <= highest:
            also = f", or {names[0]} to {names[-1]}" if names else ""
            raise ScheduleError(
                f"{name} {text!r}: {part!r} isn't a number from {lowest} to {highest}{also}"
            )
        return int(part)

    found: set[int] = set()
    for part in text.split(","):
        span, _, step = part.partition("/")
        if step and (not step.isdecimal() or int(step) < 1):
            raise ScheduleError(f"{name} {text!r}: step {step!r} isn't a number above 0")
        if span == "*":
            start, end = lowest, highest
        else:
            low, dash, high = span.partition("-")
            start = number(low)
            end = number(high) if dash else highest if step else start
        if start > end:
            raise ScheduleError(f"{name} {text!r}: {span!r} goes backwards")
        found.update(range(start, end + 1, int(step or 1)))
    return frozenset(found)
