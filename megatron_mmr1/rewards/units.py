"""Units of measure: what stands behind a number, and whether two units are one.

Nothing is converted: 100 cm is not 1 m here, since a question asks for one of them.
"""

from __future__ import annotations

import re

from megatron_mmr1.rewards.text import WORD_CLOSE, WORD_OPEN, words

# One unit a line: its symbol, other spellings. Symbols keep their case (mW is not MW), names don't.
_SPELLINGS = """
mm|millimeter millimeters millimetre millimetres 毫米
cm|centimeter centimeters centimetre centimetres 厘米
dm|decimeter decimeters decimetre decimetres 分米
m|meter meters metre metres 米
km|kilometer kilometers kilometre kilometres 千米 公里
μm|micrometer micrometers micron microns
nm|nanometer nanometers
in|inch inches
ft|foot feet
yd|yard yards
mi|mile miles
ha|hectare hectares
mg|milligram milligrams
g|gram grams 克
kg|kilogram kilograms 千克 公斤
t|ton tons tonne tonnes 吨
lb|lbs pound pounds
oz|ounce ounces
ml|mL milliliter milliliters millilitre millilitres 毫升
l|L liter liters litre litres 升
gal|gallon gallons
ms|millisecond milliseconds
s|sec secs second seconds 秒
min|mins minute minutes 分钟
h|hr hrs hour hours 小时
day|days 天
week|weeks
month|months
year|years yr yrs 年
N|newton newtons
kN|kilonewton kilonewtons
J|joule joules
kJ|kilojoule kilojoules
cal|calorie calories
W|watt watts
mW|milliwatt milliwatts
kW|kilowatt kilowatts
MW|megawatt megawatts
V|volt volts
C|coulomb coulombs
A|amp amps ampere amperes
mA|milliampere milliamperes
Ω|ohm ohms
kΩ|kiloohm kiloohms kilohm kilohms
MΩ|megaohm megaohms megohm
Hz|hertz
kHz|kilohertz
MHz|megahertz
Pa|pascal pascals
kPa|kilopascal kilopascals
F|farad farads
μF|microfarad microfarads
mol|mole moles
K|kelvin kelvins
°C|celsius
°F|fahrenheit
°|degree degrees deg
rad|radian radians
$|dollar dollars usd
cent|cents
€|euro euros
£|
yuan|元
%|percent
unit|units
"""
_SYMBOLS: dict[str, str] = {}
_NAMES: dict[str, str] = {}
for _line in _SPELLINGS.split("\n"):
    if _line:
        _symbol, _, _others = _line.partition("|")
        _SYMBOLS[_symbol] = _symbol
        for _other in _others.split():
            (_SYMBOLS if len(_other) < 3 or _other == "mL" else _NAMES)[_other] = _symbol
_NAMES |= {_symbol.lower(): _symbol for _symbol in ("day", "week", "month", "year", "unit", "cent")}
_COMPOUNDS = {"mph": {"mi": 1, "h": -1}, "kph": {"km": 1, "h": -1}, "kmh": {"km": 1, "h": -1}}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
# Words that are no unit: they change the number, or hedge it.
_NO_UNIT = frozenset(
    [
        "or",
        "and",
        "not",
        "no",
        "to",
        "than",
        "then",
        "maybe",
        "about",
        "around",
        "approximately",
        "roughly",
        "between",
        "if",
        "unless",
        "without",
        "either",
        "neither",
        "nor",
        "but",
        "minus",
        "plus",
        "times",
        "over",
        "divided",
        "by",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "dozen",
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "hundreds",
        "thousands",
        "millions",
        "billions",
        "more",
        "less",
        "least",
        "most",
        "factorial",
        "root",
        "is",
        "are",
        "was",
        "be",
        "equals",
        "equal",
        "wrong",
        "right",
        "incorrect",
        "correct",
        "answer",
        "unknown",
        "possibly",
        "perhaps",
        "probably",
        "ignore",
        "gold",
        "any",
        "all",
        "none",
    ]
)
Unit = tuple[tuple[str, int], ...]

_TOKEN = re.compile(r"\^\{?\(?(-?[0-9]+)\)?\}?|([^\W\d_]+|[°$€£%Ωμ]+[A-Za-z]*)|([/*·])|(.)")
_FRACTION_OF_UNITS = re.compile(
    rf"\\frac\{{{WORD_OPEN}([^{WORD_CLOSE}]*){WORD_CLOSE}\}}\{{{WORD_OPEN}([^{WORD_CLOSE}]*){WORD_CLOSE}\}}$"
)
_WORDS_AT_END = re.compile(
    rf"(?:(?:\\mu\s*)?{WORD_OPEN}[^{WORD_OPEN}{WORD_CLOSE}]*{WORD_CLOSE}"
    r"\s*(?:\^\{?-?[0-9]+\}?)?\s*[/*]?\s*)+$"
)
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_ANY_WORD = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]{2,})?")


def read_unit(text: str) -> Unit | None:
    """Read a unit as powers of known ones, sorted; None if it is no unit.

    Args:
        text: in normal form, what stands behind a number.
    """
    text = words(text).replace(r"\cdot", "*").replace(r"\Omega", "Ω").replace(r"\mu", "μ")
    text = text.replace("µ", "μ").replace(r"^\circ", "°").replace(r"^{\circ}", "°")
    text = re.sub(r"°\s*([CF])\b", r"°\1", text).replace("μ ", "μ")
    text = re.sub(r"\bdegrees? (?=celsius|fahrenheit)", "", text, flags=re.IGNORECASE)
    powers: dict[str, int] = {}
    sign, ahead, last = 1, 1, None
    for power, name, operator, other in _TOKEN.findall(text):
        if power:
            if last is None:
                return None
            factor = sign if powers[last] > 0 or sign < 0 else 1
            powers[last] = int(power) * (1 if factor > 0 else -1)
        elif operator == "/" or name.lower() == "per":
            sign, last = -1, None
        elif name:
            lower = name.lower()
            if lower in _POWERS:
                ahead = _POWERS[lower]
            elif lower in _POWERS_AFTER and last is not None:
                powers[last] *= _POWERS_AFTER[lower]
            elif lower in _COMPOUNDS:
                for part, exponent in _COMPOUNDS[lower].items():
                    powers[part] = powers.get(part, 0) + sign * exponent
            else:
                last = _SYMBOLS.get(name) or _NAMES.get(lower) or _NAMES.get(name)
                if last is None:
                    return None
                powers[last] = powers.get(last, 0) + sign * ahead
                ahead = 1
        elif other.strip() and other not in "{}()":
            return None
    found = tuple(sorted((unit, power) for unit, power in powers.items() if power))
    return found or None


def is_counted_thing(text: str) -> bool:
    """Whether what stands behind a number is one or two plain words, as in "12 apples"."""
    text = words(text).lower()
    return bool(_ANY_WORD.fullmatch(text)) and not _NO_UNIT & set(text.split())


def split_unit(text: str) -> tuple[str, str]:
    """Cut a normal form into an expression and what may be its unit ("" if nothing is).

    A unit is marked as words, is a known name or symbol after a space or a number, or a sign.
    """
    if text.startswith("$") and text.count("$") == 1:
        return text[1:].strip(), "$"
    match = re.search(rf"\^\{{?\s*\\circ\s*\}}?[\s{WORD_OPEN}]*[CF]?[\s{WORD_CLOSE}]*$", text)
    if match and match.start() > 0 and not _FUNCTION.search(text):
        return text[: match.start()].strip(), match.group()
    if match := _FRACTION_OF_UNITS.search(text):
        return text[: match.start()].strip(), f"{match.group(1)}/{match.group(2)}"
    if (match := _WORDS_AT_END.search(text)) and match.start() > 0:
        return text[: match.start()].strip(), match.group()
    if text.endswith("%") and len(text) > 1:
        return text[:-1].strip(), "%"
    match = re.match(r"(.*?[0-9})])(\s*(?:[^\W\d_]|[μΩ°€£]|\\Omega|\\mu).*)$", text)
    if match and WORD_CLOSE not in match.group(1):
        head, tail = match.groups()
        if head.count("{") != head.count("}"):
            return text, ""
        long_enough = tail[0] == " " or len(re.sub(r"[^A-Za-z]", "", tail)) != 1
        if long_enough and (read_unit(tail) or (tail[0] == " " and is_counted_thing(tail))):
            return head.strip(), tail.strip()
    return text, ""
