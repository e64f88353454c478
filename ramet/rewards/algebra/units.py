"""Units of measurement, and amounts written in words."""

from __future__ import annotations

NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
    "fifteen", "sixteen",
)  # fmt: skip
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Powers of ten."""
NUMBER_WORDS = frozenset((
    "or", "and", "plus", "minus", "times", "divided", "over", "squared", "cubed", "is", "isnt", "are", "was", "not", "no", "but", "if",
    "then", "than", "half", "halves", "quarter", "quarters", "third", "thirds", "point", "negative", "zero", "one", "two", "three",
    "four", "five", "six", "seven", "eight", "nine", "ten", "except", "unless", "approximately", "about", "hundredths", "tenths",
    "between", "to", "through", "versus", "vs", "equals", "equal", "wrong", "incorrect", "maybe",
    "hundred", "thousand", "million", "billion", "trillion",
))  # fmt: skip
"""Words that change what a number says, or whether it is said: none of them is a unit."""
SHORT_UNITS = frozenset((
    "cm", "mm", "km", "dm", "nm", "kg", "mg", "lb", "lbs", "oz", "ft", "in", "yd", "mi", "mph", "kph", "hr", "hrs", "min", "mins", "sec",
    "secs", "ms", "am", "pm", "ml", "mL", "kL", "gal", "pt", "qt", "sq", "cu", "rad", "rpm", "Hz", "kHz", "MHz", "kW", "kWh", "eV", "keV",
    "MeV", "Pa", "kPa", "mol", "Ω", "cal", "kcal", "dB", "day", "men", "cup", "jar", "box", "bag", "toy", "pen", "egg", "hen", "cow",
    "pig", "cat", "dog", "car", "bus", "mile", "feet", "inch", "US", "USD", "usd", "EUR", "GBP", "pct",
))  # fmt: skip
"""Two and three letters that are a unit after a number, and no product."""
SMALL_UNITS = frozenset(("m", "s", "g", "h", "L", "l", "J", "N", "W", "V", "A", "K", "C", "F"))
"""Single letters that are a unit after a number and a space, at the end."""
CURRENCIES = {"\\$": "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "\\pounds": "£", "\\euro": "€"}

_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km", "kilometre": "km", "meter": "m",
    "metre": "m", "kilogram": "kg", "gram": "g", "pound": "lb", "lbs": "lb", "ounce": "oz", "foot": "ft", "feet": "ft", "inch": "in",
    "inche": "in", "yard": "yd", "mile": "mi", "hour": "h", "hr": "h", "hrs": "h", "minute": "min", "min": "min", "mins": "min",
    "second": "s", "sec": "s", "secs": "s", "liter": "l", "litre": "l", "milliliter": "ml", "millilitre": "ml", "dollar": "$", "usd": "$",
    "us": "", "euro": "€", "eur": "€", "gbp": "£", "percent": "%", "pct": "%", "percentage": "%", "degree": "°", "deg": "°",
    "gallon": "gal", "quart": "qt", "pint": "pt", "sq": "square", "cu": "cubic", "cent": "cent", "mph": "mi per h", "kph": "km per h",
}  # fmt: skip


def unit_name(words: list[str]) -> str:
    """The canonical name of a unit: singular, abbreviated, powers as exponents."""
    named = []
    for word in (word.casefold() for word in words if word.casefold() not in ("a", "an", "the", "of", "each")):
        stem = word if word in _UNITS or len(word) < 4 else word.removesuffix("s")
        named.append(_UNITS.get(stem, stem))
    if named[:1] in (["square"], ["cubic"]) and len(named) > 1:
        named = [named[1] + ("^2" if named[0] == "square" else "^3"), *named[2:]]
    return "%" if named == ["per", "cent"] else " ".join(filter(None, named))
