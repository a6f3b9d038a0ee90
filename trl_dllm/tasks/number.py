"""Exact numbers in untrusted text."""

import re
from fractions import Fraction
from typing import Any


_FRACTION = re.compile(r"\\[dt]?frac\s{0,9}\{\s{0,9}(\d{1,40})\s{0,9}\}\s{0,9}\{\s{0,9}(\d{1,40})\s{0,9}\}")
# Digits with commas at thousands only; what is longer than 40 digits is no answer of any task.
NUMBER = re.compile(
    r"(?<!\d)(?<!\d:)(?P<sign>[-−]\s?)?\\?\$?(?P<whole>\d{1,3}(?:(?:,|\{,\}|\\,|\\!)+\d{3})+(?!\d)|\d{1,40}(?!\d))"
    r"(?P<rest>\.\d{1,40})?(?:/(?P<below>\d{1,40}))?|(?<!\d)\.\d{1,40}",
    re.ASCII,
)
MAX_ANSWER = 1000  # characters of a marked answer that are read, from its end


def to_number(text: str | None) -> Fraction | None:
    """
    The last number in an answer, exactly; None without one.

    Takes a sign, a dollar, commas at thousands (also LaTeX's), decimals, a/b and `\\frac{a}{b}`. Never raises.
    """
    if text is None:
        return None
    text = _FRACTION.sub(r" \1/\2 ", text[-MAX_ANSWER:])
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    if match["whole"] is None:
        return Fraction(match.group())
    value = Fraction(re.sub(r"\D", "", match["whole"]) + (match["rest"] or ""))
    if match["below"] is not None:
        below = int(match["below"])
        if below == 0:
            return None
        value /= below
    before = text[: match.start()].rstrip()[-1:]
    # A minus between two operands subtracts; only one that nothing stands before is a sign.
    negative = match["sign"] is not None and not (before.isalnum() or before in (")", "}"))
    return -value if negative else value


def gold_number(value: Any) -> Fraction | None:
    """A gold answer, a number or a string with one, exactly."""
    if value is None:  # a stored output whose gold answer was lost
        return None
    return to_number(value) if isinstance(value, str) else Fraction(value)
