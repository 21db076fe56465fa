r"""What people write as an answer, as text that math-verify can read and compare.

A number may carry a mark: a unit, a currency, %, a degree sign, the base of its digits, a.m. or
p.m. With a mark on one side only, the bare number decides, since a problem often names the unit
itself: 72 cm, $72 and 72\% all answer 72. Two marks that are known and differ are different
answers: 5 cm is not 5 km. What a mark is worth counts as well: 72\% is 0.72, 90^\circ is \pi/2 and
1010_2 is 10.

Words are compared as words, a letter of multiple choice as a letter. A decimal that ends in dots
says not which number it is: it equals what is written alike. A period over or behind digits does,
0.\overline{3} is 1/3.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from itertools import product

MAX_LENGTH = 2_000  # characters; a longer answer is compared as text


@dataclass(frozen=True)
class Answer:
    """One answer, read."""

    text: str  # without what is around it
    values: tuple[str, ...] = ()  # what it is worth, for math-verify; each is one way to read it
    bare: tuple[str, ...] = ()  # the same without the mark
    mark: str | None = None
    words: str | None = None  # where it is no mathematics
    choice: str | None = None  # the letter of (A) and A

    @property
    def vote(self) -> str:
        return (*self.values, *self.bare, self.text)[0]


def equal_as_text(a: Answer, b: Answer) -> bool | None:
    """Whether two answers are equal, where text decides; None where mathematics does."""
    if a.text == b.text:
        return True
    if a.choice and b.choice:
        return a.choice == b.choice
    if a.words or b.words:  # \text{DNE} and DNE
        return (a.words or _as_words(a.text)) == (b.words or _as_words(b.text))
    return None


def pairs_to_compare(a: Answer, b: Answer) -> list[tuple[str, str]]:
    """Pairs of texts: the answers are equal if one pair is. A set and a tuple have no pairs."""
    if {_brackets(a.text), _brackets(b.text)} == {"{}", "()"}:
        return []
    pairs = [*product(a.values, b.values)]
    known_to_differ = a.mark != b.mark and _is_known(a.mark) and _is_known(b.mark)
    if (a.mark or b.mark) and not known_to_differ:
        pairs += product(a.bare or a.values, b.bare or b.values)
    return pairs


def _brackets(text: str) -> str:
    """The brackets around the whole text, if there are any."""
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)\b|[\\ ]", "", text)
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and i < len(text) - 1:
            return ""
    return text[:1] + text[-1:]


# Characters


def _characters() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    table |= dict.fromkeys(map(ord, "−‐‑‒–—﹣"), "-")
    table |= dict.fromkeys(
        map(ord, "\u00a0\u2000\u2002\u2003\u2005\u2007\u2009\u202f\u3000\n\t"), " "
    )
    table |= dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"), "")
    table |= {
        ord(character): text
        for character, text in {
            **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "⁄": "/"},
            **{"π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ", "∪": r"\cup "},
            **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "≈": r"\approx "},
            **{"∅": r"\emptyset ", "∈": r"\in ", "…": r"\ldots", "’": "'", "∩": r"\cap "},
        }.items()
    }
    return table


CHARACTERS = _characters()
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")


def _as_latex(text: str) -> str:
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(SUPERSCRIPTS) + "}", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: _fraction(unicodedata.numeric(m[0])), text)
    text = re.sub(r"[^\W\D]", lambda m: str(unicodedata.decimal(m[0])), text)  # any script's digits
    return text.translate(CHARACTERS)


def _fraction(value: float) -> str:
    denominator = next(d for d in range(2, 11) if abs(value * d - round(value * d)) < 1e-9)
    return rf"\frac{{{round(value * denominator)}}}{{{denominator}}}"


# What stands around an answer

TEXT = r"\\(?:text|textrm|textbf|textit|textnormal|mathrm|mathbf|mathit|mbox|hbox|rm|operatorname)"
WRAPPERS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\$\$([^$]*)\$\$",
        r"\$((?:[^$\\]|\\.)*)\$",
        r"\\\[(.*)\\\]",
        r"\\\(((?:(?!\\\().)*)\\\)",
        r"\*\*(.*)\*\*",
        r"`([^`]*)`",
        r"\\(?:boxed|underline|boldsymbol|bm)\s*\{([^{}]*)\}",
        r"\\(?:text)?color\s*\{\w+\}\s*\{?([^{}]*)\}?",
        r"\\(?:displaystyle|textstyle|approx)\b(.*)",
        TEXT + r"\s*\{([^{}]*\d[^{}]*)\}",
        r"(?i:(?:the )?(?:final )?answer(?: is)?\s*[:=]?\s)(.*)",
    )
]
SPACES = re.compile(r"\\[,;:!> ]|\\q?quad\b|(?<!\\)~")
DOTS = re.compile(r"\s*(?:\\[lc]?dots[cbm]?\b|\.\.\.+)")


def _without_wrapping(text: str) -> str:
    text = SPACES.sub(lambda m: "" if m[0] == r"\!" else " ", text).replace("{,}", ",")
    while True:
        before = text
        text = text.strip()
        if not (text.endswith("..") or text.endswith((r"\right.", r"\left."))):
            text = text.rstrip(".,;: ")
        for wrapper in WRAPPERS:
            if match := wrapper.fullmatch(text):
                text = match[1]
        if text == before:
            return text


# Marks

UNITS = {
    unit: names.split()[0]
    for names in (
        "mm millimeter millimetre",
        "cm centimeter centimetre",
        "dm decimeter decimetre",
        "m meter metre",
        "km kilometer kilometre",
        "in inch inches",
        "ft foot feet",
        "yd yard",
        "mi mile",
        "mg milligram",
        "g gram gramme",
        "kg kilogram kilo",
        "t tonne ton",
        "lb pound",
        "oz ounce",
        "ml milliliter millilitre mL",
        "l liter litre L",
        "s second sec",
        "min minute",
        "h hour hr",
        "day",
        "week",
        "month",
        "year yr",
        "mph",
        "$ dollar USD",
        "£ GBP quid",
        "€ euro EUR",
        "¥ yen JPY",
        "₹ rupee INR",
        "cent ¢",
        "am",
        "pm",
        "°C",
        "°F",
    )
    for unit in names.split()
}
# Of one letter only behind a space: 5m may be 5 times m.
SHORT_UNITS = "|".join(sorted((u for u in UNITS if u.isalpha() and len(u) > 1), key=len)[::-1])
LETTER_UNITS = "(?<= )[mgshlL]"

NUMBER = (
    r"\d{1,2}:\d{2}|[-+]?\s*(?:\\pm\s*)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+|\s+\d+/\d+|\s*\\[dt]?frac\b.*)?"
    r"|[-+]?\s*\\[dt]?frac\b.*|[-+]?\d*\s*\\sqrt\b.*"
)
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
SIGN = re.compile(
    r"(-?)\s*(?:(?:US|A|C)?\\?\$|\\text\{\\?\$\}|\\pounds\b|£|€|\\euro\b|¥|₹|USD|EUR|GBP|Rs\.?)"
    r"\s*(?=[-\d.\\])"
)
SIGNS = {r"\pounds": "£", "GBP": "£", r"\euro": "€", "EUR": "€", "USD": "$", r"\$": "$"}
SIGNS |= {"Rs": "₹", "Rs.": "₹", r"US\$": "$", r"\text{$}": "$", r"\text{\$}": "$"}
AT_THE_END = [
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (r"(.*[^\s\\])\s*(?:\\?%|\\text\{\s*(?:%|percent)\s*\}|(?<=[\d}])\s*percent)", "%"),
        (rf"(.*\S)\s*\^\s*\{{?\\circ\}}?\s*(?:{TEXT}\s*\{{\s*)?([CF])\s*\}}?", "°C"),
        (r"(.*\S)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\s(?:\\text\{)?degrees?\}?)", "°"),
        (r"([\dA-Z]+)\s*_\s*\{?\s*(?:\\text\{)?\s*(\d+|[a-z]+)\s*\}?\s*\}?", "base"),
        (r"(.*\S)\s*(?:\\pmod|\\bmod|\(\s*(?:\\mod|mod))\s*\{?\s*(\w+)\s*\}?\)?", "mod"),
        (rf"(.*[^\s=(,])\s*((?:[/ ]|\\cdot|{TEXT}\s*\{{[^{{}}]*\}}{POWER})+)", "text"),
        (rf"({NUMBER})\s*((?:{SHORT_UNITS}|{LETTER_UNITS})s?\b{POWER}(?:/[a-z]+)?)", "unit"),
        (rf"((?:[a-z]\s*=\s*)?(?:{NUMBER}))\s+([A-Za-z][A-Za-z'./ -]+{POWER})", "words"),
        (rf"({NUMBER})\s*([€£¥¢]|\\?\$)", "unit"),
    )
]
# With these, words after a number are no unit.
PROSE = {
    *("or", "and", "more", "less", "than", "least", "most", "to", "if", "not", "no", "is", "are"),
    *("thousand", "million", "billion", "plus", "minus", "times", "over", "mod", "for", "when"),
    *("where", "any", "all", "solutions"),
}


def _marked(text: str) -> tuple[str, str | None]:
    """The text without its mark, and the mark."""
    if sign := SIGN.match(text):
        rest = sign[1] + text[sign.end() :]
        name = sign[0].strip().lstrip("-").strip()
        return _marked_behind(rest)[0], SIGNS.get(name, name)
    return _marked_behind(text)


def _marked_behind(text: str) -> tuple[str, str | None]:
    """The same, but for a currency before the number."""
    for pattern, kind in AT_THE_END:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        if kind in ("%", "°"):
            return match[1], kind
        if kind == "°C":
            return match[1], f"°{match[2]}"
        if kind == "base":
            word = match[2]
            base = str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word
            if re.fullmatch(r"[2-9]|[12]\d|3[0-6]", base) and match[1][0].isdigit():
                return match[1], f"base {base}"
            continue
        if kind == "mod":
            return match[1].replace(r"\equiv", "="), f"mod {match[2]}"
        unit = " ".join(re.findall(r"[^\W\d_]+|[$€£¥¢%/]", re.sub(TEXT, "", match[2])))
        if not unit or PROSE & set(unit.lower().split()):
            continue
        has_number = re.search(r"\d|\\pi|\\[dt]?frac|\\sqrt", match[1])
        if kind == "text" and not (has_number and re.search(TEXT, match[2])):
            continue
        power = re.search(r"\^\D*(-?\d)", match[2])
        return match[1].strip(), _unit_name(unit) + (f"^{power[1]}" if power else "")
    return text, None


def _is_known(mark: str | None) -> bool:
    """Whether it means one thing only."""
    return mark is not None and (
        mark.partition("^")[0] in UNITS.values() or mark.startswith(("%", "°", "base ", "mod "))
    )


def _unit_name(unit: str) -> str:
    for name in (unit, unit.lower(), unit.lower().replace(" ", "").removesuffix("s")):
        for form in (name, name.removesuffix("s")):
            if form in UNITS:
                return UNITS[form]
    return unit.lower()


# Numbers as people write them

REPEATING = re.compile(r"(-?\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{?(\d+)\}?|\((\d+)\))(?![\d(])")
REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(\d)\s*\^?(?:st|nd|rd|th)\b", r"\1"),
        (r"\*\*", "^"),
        (r"(?<![\w.}])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])", r"\1\\cdot 10^{\2}"),
        (r"(\d)\s*[xX*]\s*10\s*\^", r"\1\\cdot 10^"),
        (r"\^\s*(-?\d{2,}|-\d)", r"^{\1}"),
        (r"(?<![\w./}])(\d+)\s+(\d+)/(\d+)(?![\w./])", r"\1\\frac{\2}{\3}"),
        (r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        # Words that are a part of a number.
        (r"(\d)\s+thousand\b", r"\1\\cdot 10^{3}"),
        (r"(\d)\s+million\b", r"\1\\cdot 10^{6}"),
        (r"(\d)\s+billion\b", r"\1\\cdot 10^{9}"),
        (r"\\varnothing|\\O\b|\\\{\s*\\\}", r"\\emptyset "),
    )
]
RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")  # of two numbers it is a fraction
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")


def _repeating(match: re.Match[str]) -> str:
    whole, first, digits = match[1], match[2], match[3] or match[4]
    sign, whole = ("-" if whole.startswith("-") else ""), whole.lstrip("-")
    low = int(whole + first or "0")
    scale = 10 ** len(first)
    numerator = low * (10 ** len(digits) - 1) + int(digits)
    return rf"{sign}\frac{{{numerator}}}{{{scale * (10 ** len(digits) - 1)}}}"


def _readings(text: str) -> tuple[str, ...]:
    """Ways to read a text without a mark as mathematics."""
    text = REPEATING.sub(_repeating, text.strip())
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    if RATIO.fullmatch(text):
        parts = [int(part) for part in text.split(":")]
        divisor = math.gcd(*parts) or 1
        return (f"({', '.join(str(part // divisor) for part in parts)})",)
    if r"\pm" in text and r"\{" not in text:
        upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
        lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
        return (f"{upper}, {lower}",)
    if THOUSANDS.fullmatch(text):
        # As a number first; as a list it is one as well.
        return re.sub("[ ,]", "", text), re.sub(",", ", ", text)
    return (text,)


# Words

FUNCTIONS = {
    *("sqrt", "frac", "log", "exp", "max", "min", "gcd", "lcm", "mod", "det", "deg", "dim", "ker"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh"),
    *("tanh", "lim", "inf", "infty", "infinity", "and"),
}
WORDS = {"yes", "no", "true", "false", "none", "odd", "even", "dne"}
NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
CHOICE = re.compile(r"\(?\s*([A-Z])\s*(?:[.):]|\)\s*[.:]?)?\s*(.*)", re.DOTALL)
POWERS_OF_TEN = r"\b(?:thousand|million|billion)\b"
CHOICE_MARK = re.compile(r"\(?\s*[A-Z]\s*[.):]")  # of (A) 5 and A: 5, not of P(A) = 5
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")


def _is_prose(text: str) -> bool:
    text = re.sub(r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[clr|]*\})?", "", text)
    inside = " ".join(re.findall(TEXT + r"\s*\{([^{}]*)\}", text))
    words = [w.lower() for w in WORD.findall(inside) if w.lower() not in ("or", "and")]
    if any(len(w) > 1 for w in words):
        return True
    plain = WORD.findall(re.sub(TEXT + r"\s*\{[^{}]*\}|" + POWERS_OF_TEN, "", text))
    if text.lower() in WORDS:
        return True
    return any(
        w.lower() not in FUNCTIONS and (len(w) > 3 or re.fullmatch("[A-Z][a-z]{2}", w))
        for w in plain
    )


def _as_words(text: str) -> str:
    text = re.sub(TEXT, "", text)
    return " ".join(re.findall(r"[^\W_]+|[-+*/^=<>]", text.casefold()))


ALL_REALS = re.compile(r"(?:\\text\{\s*)?(?:all )?real(?:s| numbers)\s*\}?|\\mathbb\s*\{?R\}?")
PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:%|percent)\s*\}|\bpercent\b)")
DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\[dt]?frac\s*\{\d+\}\s*\{\d+\})"
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree\b|(?:\\text\{\s*)?\bdegrees?\b\}?)"
)


def read_answer(text: str) -> Answer:
    """An answer, with or without a box, dollars and a period around it."""
    if len(text) > MAX_LENGTH:
        return Answer(text.strip(), words=text.strip())
    text = _without_wrapping(_as_latex(text))
    if not text:
        return Answer("")
    if text.lower() in NUMBER_WORDS:
        return Answer(text, values=(str(NUMBER_WORDS.index(text.lower())),))
    if ALL_REALS.fullmatch(text):
        text = r"(-\infty, \infty)"
    if re.search(r"\d" + DOTS.pattern + "$", text):
        return Answer(text, words=DOTS.sub("...", text))
    plain = re.sub(TEXT + r"\s*\{([^{}]*)\}", r"\1 ", text).strip()
    if choice := CHOICE.fullmatch(plain):
        letter, rest = choice[1], choice[2].strip()
        if not rest:
            return Answer(text, values=(letter,), choice=letter)
        if CHOICE_MARK.match(plain) and rest[0] not in "=^_":
            return replace(_read_value(rest), text=text, choice=letter)
    return _read_value(text)


def _read_value(text: str) -> Answer:
    """Of what is no letter of multiple choice."""
    bare, mark = _marked(text)
    if mark is None and (found := PERCENT.search(text) or DEGREES.search(text)):
        mark = "%" if found.re is PERCENT else "°"  # within, as in (50%, 25%) and sin 30°
    if mark is None:
        if _is_prose(text):
            return Answer(text, words=_as_words(text))
        return Answer(text, values=_readings(_unwrapped(text)))
    readings = _readings(_unwrapped(bare))
    if _is_prose(bare):
        return Answer(text, words=_as_words(text))
    if mark == "%":
        within = _readings(PERCENT.sub(r"\\%", _unwrapped(text)))
        values = (rf"\frac{{1}}{{100}}\cdot({readings[0]})",) if bare != text else within
        readings = _readings(PERCENT.sub("", _unwrapped(text)))
    elif mark == "°":
        values = _readings(DEGREES.sub(r"(\\frac{\1\\pi}{180})", _unwrapped(text)))
        readings = _readings(DEGREES.sub(r"\1", _unwrapped(text)))
    elif mark.startswith("base"):
        try:
            values = (str(int(bare, int(mark.removeprefix("base ")))),)
        except ValueError:  # digits beyond the base
            values = ()
    else:
        values = ()
    return Answer(text, values, readings, mark)


def _unwrapped(text: str) -> str:
    r"""\text{x} as x, which stands for a variable; \text{ or } stays."""
    return re.sub(TEXT + r"\s*\{\s*(\w)\s*\}", r"\1", text)
