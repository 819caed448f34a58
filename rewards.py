"""Is a response's final answer right, and what reward follows?  Read down: extract, clean, parse, compare.

Both answers become syntax trees (plain tuples) by an own tokenizer and parser; nothing a model wrote is ever
run as code. Trees are compared from cheap to dear: text, structure, exact fractions with the symbols at fixed
random points; only what is no fraction is computed with 60 and with 120 digits, step by step. Everything is
bounded before it is computed. The choices where graders differ: docs/answers.md.
"""
from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import re
import select
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1500, 400, 24, 64  # of one answer; beyond: refused
MAX_BITS, MAX_LOG = 40_000, 4000  # of a fraction (2004! has 19,000 bits); logarithm of any other number
TOLERANCE = Fraction(1, 10_000)  # relative, and only where the gold answer is a decimal
Node = tuple  # (kind, ...): num value last_place | sym name | add nodes | pow a b | fn name args | ...
log = logging.getLogger(__name__)


class Refused(Exception):
    """Not an answer this module reads, or beyond its bounds. Never leaves the module."""


class _Unproven(Exception):
    """It takes numbers of many digits, and the caller said prove=False."""


# --- extract ------------------------------------------------------------------------------------------------
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.S)
_MARK = re.compile(r"####|(?i:\banswers?\b[\s*]{0,4}(?:is\b|are\b|:|=))|(?:^|(?<=\n))[ *]{0,4}A:")
_FORMULA = r"(?<!\\)\$\$?((?:\\\$|[^$]){1,400}?)(?<!\\)\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]"
_LOOSE = re.compile(_FORMULA + r"|(?<![\w.,])(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?(?:\\?%|percent)?)", re.S)
_PROSE = re.compile(r"[^\d\\$]*[A-Za-z]{3}|.*\S\n.*\S", re.S)
_MARKUP = re.compile(r"\\(?:q?quad|text|mbox|[()\[\],;: ])|[${}*\s\"]")
_JOINT = re.compile(r" *(?:[,;]|[^.?!:;]{0,30}\b(?:and|or)\b)? *(?:\w{1,8} *=)? *")


def extract_answer(response: str, loose: bool = False) -> str | None:
    """The answer a response commits to, or None: the last \\boxed{} (those joined by "," or "and": a list),
    else what follows ####, "the answer is", "answer:" or "A:". What stands after </think> goes first.

    loose: else the last formula or number at all. Not for training: it would pay for leaving the box out.
    """
    head, _, tail = response.rpartition("</think>")
    for find in (_boxed, _stated, *([_unmarked] if loose else [])):
        for text in (tail, head):
            if answer := find(text):
                return answer.strip()
    return None


def _runs(text: str, spans: list[tuple[int, int, str]]) -> list[str]:
    """Spans (start, end, content) as answers: those with only a connective between them are one list."""
    runs: list[list[str]] = []
    for i, (start, _, content) in enumerate(spans):
        gap = text[spans[i - 1][1]:start]
        joined = i and len(gap) <= 80 and _JOINT.fullmatch(_MARKUP.sub(" ", gap))
        runs[-1].append(content) if joined else runs.append([content])
    return [", ".join(dict.fromkeys(run)) for run in runs]


def _boxed(text: str) -> str | None:
    open_braces, boxes = [], []
    for m in _BRACE.finditer(text) if "box" in text else ():
        if m[0][-1] == "{" and m[0] != "\\{":
            open_braces.append(m)
        elif m[0] == "}" and open_braces and (box := open_braces.pop())[1]:
            while boxes and boxes[-1][0] > box.start():  # a box inside this one
                boxes.pop()
            boxes.append((box.start(), m.end(), text[box.end():min(m.start(), box.end() + 2 * MAX_CHARS)]))
    return _runs(text, boxes)[-1] if boxes else None


def _stated(text: str) -> str | None:
    marks = [m.end() for m in _MARK.finditer(text)]
    line = text[marks[-1]:][:4 * MAX_CHARS].strip(" \n*:").split("\n\n")[0] if marks else ""
    formula = re.match(rf"[^\w$\\]*(?:{_FORMULA})", line, re.S)  # may be displayed on several lines
    sentence = line[:formula.end()] if formula else ""
    sentence += re.split(r"\.(?:\s|$)|\n", line[len(sentence):])[0]
    return (_unmarked(sentence) or sentence).strip(" $")


def _unmarked(text: str) -> str | None:
    """All of a bare answer, else the last formulas or numbers."""
    if len(text) <= 100 and not _PROSE.match(text) and not parse_error(text):
        return text
    text = text[-2000:]
    spans = [(m.start(), m.end(), m[m.lastindex]) for m in _LOOSE.finditer(text)]
    return _runs(text, spans)[-1] if spans else None


# --- clean and tokenize -------------------------------------------------------------------------------------
_UNICODE = str.maketrans({
    "√": r"\sqrt ", "π": r"\pi ", "∞": r"\infty ", "≤": "<=", "≥": ">=", "≠": "!=", "×": "*",
    "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "∪": r"\cup ", "±": r"\pm ", "∈": r"\in ",
    "θ": r"\theta ", "≈": r"\approx ", "²": "^2", "³": "^3", "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
    "€": "", "£": "", "\u200b": "", "\ufeff": "", "∘": "°", "’": "'"})
_FUNCTIONS = {f: f for f in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln exp".split()}
_FUNCTIONS |= {"log": "ln", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_SAME_AS = {spelling: token for token, spellings in {
    "<=": r"\le \leq \leqslant", ">=": r"\ge \geq \geqslant", "<": r"\lt", ">": r"\gt", "!=": r"\ne \neq",
    "~": r"\approx \simeq", "=": "==", "*": r"\cdot \times \ast", "/": r"\div", "^": "**", ":": r"\colon",
    r"\{": r"\lbrace", r"\}": r"\rbrace", "(": r"\langle", ")": r"\rangle", r"\emptyset": r"\varnothing"
    }.items() for spelling in spellings.split()}
_UNITS = set("cm mm km kg ft mi lb lbs oz hr hrs mins sec secs mph feet foot usd".split())
_UNIT_OF = {spelling: unit for unit, spellings in {
    "mm": "millimeter", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre kph",
    "inch": "inches", "ft": "foot feet", "yard": "yd", "mi": "mile mph", "g": "gram", "kg": "kilogram",
    "lb": "pound", "oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "",
    "month": "", "year": "", "dollar": "usd", "cent": "", "euro": ""}.items()
    for word in (unit, *spellings.split()) for spelling in (word, word + "s")}
_LETTERS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi "
    "chi psi upsilon varphi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell mho pi".split())
_WORDS = {"sqrt", "infty", "abs"} | _LETTERS | set(_FUNCTIONS)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|hbox|math(?:rm|it|sf)|operatorname)\s*\{([^{}]*)\}")
_ANY_WORD, _ANY_UNIT = ("|".join(sorted(words, key=len, reverse=True)) for words in (_WORDS, _UNITS))
_WRITTEN = _TEXT.pattern.replace("([^{}]*)", "[^{}]*")
_COMMANDS = "boxed|[dtc]?frac|left|right|text|sqrt|begin|end|cdot|times|pi|infty|circ|leq?|geq?|cup|quad|pm"
_MATRIX = r"\{(?:[pbB]?matrix|array|smallmatrix)\}"
_CLEAN = [(re.compile(pattern), replacement) for pattern, replacement in [
    (rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))", r"\\"),  # backslashes that were escaped once too often
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])|\\(?:displaystyle|limits)\b", ""),
    (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""), (r"\\%|\bpercent(?:age)?\b|\bpct\b", "%"),
    (r"\\text *\{ *([ap])\.? ?m\.? *\}|\b([ap])\. ?m\b\.?", r" \1\2m"),
    (r",\\!\s*|\s*\{,\s*\}(?=\d{3})|\\!", ""),
    (r"\\q?quad|(?<!\\)\\[,;:> ]|~|\\(?:angle|triangle|phantom)\b|\s+", " "),
    (r"(?i) *,? *(?:\\text *\{,? *(?:and|or),? *\}|\b(?:and|or)\b)", ", "), (r"\\text *\{ *to *\}", ":"),
    (r"\\sqrt *\[([^\[\]]*)\]", r"\\root{\1}"), (r"\\mathbb *\{R\}", r"(-\\infty,\\infty)"),
    (r"\\lg\b", r"\\log_{10}"), (r"\\(sin|cos|tan) *\^ *\{? *-1 *\}?", r"\\arc\1 "),
    (r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?/)", lambda m: m[0].replace(" ", "")),
    (r"(?<=\d),(?<!\d{4},)(?=\d{3}(?!\d))(?![^(\[]*[)\]]|[^{]*\\\})", ""),  # but (100,101) are two
    (r"\\[lr]?vert\b|\\mid\b", "|"), (r"\|([^|]+)\|", r"\\abs{\1}"),
    (r"\\l(floor|ceil)\b", r"\\\1{"), (r"\\r(floor|ceil)\b", "}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°"), (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime\b)", "'"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"(?i)^.{0,30}\banswer is:?\s|^ ?(?:\\approx|=)\s", ""),
    (_TEXT.pattern.replace("[^{}]*", r"\s*[ei]\s*|[^A-Za-z{}]*"), r" \1 "),  # \mathrm{e}, \text{5}
    (r"(?<![\d})°])(?<![\d})°] )" + _TEXT.pattern.replace("[^{}]", r"(?![A-Za-z]{2})[^{}]"), r" \1 "),
    (rf"({_WRITTEN}|(?<![A-Za-z\\])(?:{_ANY_UNIT})(?![a-z]))"  # \text{cm}^2, km/h: the first matters
     rf"(?: *\^ *\{{?-?\d\}}?| */ *(?:{_WRITTEN}|[a-z]+))+", r"\1"),
    (rf"\\begin{_MATRIX}(?:\{{[lcr|]*\}})?", r"\\matrix "), (rf"(?:\\\\ *)?\\end{_MATRIX}", r"\\endmatrix "),
    (r"\\[dtc]frac|\\[dt]binom", lambda m: "\\" + m[0][2:]),
    (r"\\(frac|binom|sqrt|root\{[^{}]*\}) *(\d)", r"\\\1{\2}"),
    (r"(\d*)\.(\d*)\\(?:overline|bar) *\{(\d{1,99})\}",  # 0.1 and a repeating 6 is 0.1 + 6/90
     lambda m: f"({m[1]}.{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"(?<![\d.^_{])(\d{1,99}) (\d{1,99})/(\d{1,99})", r"\1\\frac{\2}{\3}"),  # 1 4/5
    (r"(?<![\d.^_{])(\d{1,99}) ?\\frac *\{(\d{1,99})\} *\{(\d{1,99})\}",  # but 4\frac{5}{1} is a product
     lambda m: f"({m[1]}+{m[2]}/{m[3]})" if int(m[2]) < int(m[3]) else m[0]),
    (r"(?<![A-Za-z\\])([a-df-hj-zA-Z])\((\d+)\)", r"\1_{(\2)}")]]  # a value I(0), not I times 0
_TOKEN = re.compile(
    r" *(?:(?P<num>\d+(?:\.\d*)?(?:[eE][+-]?\d+\b)?|\.\d+(?:[eE][+-]?\d+\b)?)"
    r"|_ *(?P<sub>\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\w)|(?P<prime>')"
    "|" + _TEXT.pattern.replace("([", "(?P<text>[")
    + rf"|(?P<unit>(?:{_ANY_UNIT})(?![a-z])|(?<= )(?!(?:{_ANY_WORD})\b)(?=[A-Za-z]*[aeiou])[A-Za-z]{{4,}})"
    rf"|(?P<word>(?:{_ANY_WORD})(?![A-Za-z])|[a-z]{{5,}}|[A-Za-z])"  # five letters are prose, fewer a product
    r"|(?P<op>\\[A-Za-z]+|\\.|<=|>=|!=|==|\*\*|[^\s\w]))")


def _clean(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise Refused(f"longer than {MAX_CHARS} characters")
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(" .,;:")


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text), kind: num word text unit (words that are no maths) sub prime op stop."""
    tokens, pos = [], 0
    while m := _TOKEN.match(text, pos):
        value, pos = m[m.lastgroup].strip(), m.end()
        tokens.append((m.lastgroup, _SAME_AS.get(value, value)))
    if pos < len(text) or len(tokens) > MAX_TOKENS:
        raise Refused(f"unreadable or too many tokens: {text[pos:pos + 9]!r}")
    return [*tokens, ("stop", "")]


# --- parse --------------------------------------------------------------------------------------------------
def _num(value: Fraction | int, last_place: Fraction | None = None) -> Node:
    return ("num", Fraction(value), last_place)


def _chain(kind: str, a: Node, b: Node) -> Node:
    return (kind, (*(a[1] if a[0] == kind else (a,)), b))


def _add(a: Node, b: Node) -> Node:
    if a[0] == b[0] == "mat":
        return ("mat", tuple(tuple(map(_add, r, s)) for r, s in zip(a[1], b[1], strict=True)))
    return _chain("add", a, b)


def _mul(a: Node, b: Node) -> Node:
    a, b = (b, a) if a[0] == "mat" else (a, b)
    if b[0] == "mat":
        return ("mat", tuple(tuple(_mul(a, x) for x in row) for row in b[1]))
    return _num(-b[1], b[2]) if a == _num(-1) and b[0] == "num" else _chain("mul", a, b)


def _div(a: Node, b: Node) -> Node:
    return _mul(a, ("pow", b, _num(-1)))


def _neg(a: Node) -> Node:
    return _mul(_num(-1), a)


def _walk(node: Node) -> Iterator[Node]:
    """The node and all below it."""
    if node and isinstance(node[0], str):
        yield node
    for child in node:
        if isinstance(child, tuple):
            yield from _walk(child)


RELATION, UNION, RATIO, UNIT, SUM, PRODUCT, POWER = range(7)  # how tightly operators bind
_INFINITY, _MINUS_INFINITY = ("const", "oo"), _mul(_num(-1), ("const", "oo"))
_DEGREE = _div(("const", "pi"), _num(180))
_OPERATORS = {
    "\\cup": (UNION, functools.partial(_chain, "list")), ":": (RATIO, functools.partial(_chain, "ratio")),
    "+": (SUM, _add), "-": (SUM, lambda a, b: _add(a, _neg(b))), "*": (PRODUCT, _mul), "/": (PRODUCT, _div),
    "^": (POWER, lambda a, b: ("pow", a, b))}
_SUFFIXES = {"!": lambda a: ("fn", "fact", (a,)), "°": lambda a: ("deg", a), "%": lambda a: ("pct", a)}
_BRACKETS = {"{": ["}"], "\\{": ["\\}"], "(": [")", "]"], "[": [")", "]"]}
_NO_UNIT = re.compile(r"[^\w ./,()'{}-]|\d|\b(?i:not?|or)\b")  # 7 \text{ or maybe 8}
_RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "\\in", "~")
_CLOSING = {"\\}", "\\\\", "\\endmatrix", "\\in", *_OPERATORS}
_COMMAND = {  # name: (how many arguments, the node)
    "frac": (2, _div), "binom": (2, lambda a, b: ("fn", "binom", (a, b))),
    "sqrt": (1, lambda a: ("fn", "root", (a, _num(2)))),
    "root": (2, lambda n, a: ("fn", "root", (a, n))),
    **{x: (1, lambda a, x=x: ("fn", x, (a,))) for x in ("abs", "floor", "ceil")},
    "infty": (0, lambda: _INFINITY), "emptyset": (0, lambda: ("set", ())),
    **dict.fromkeys(["boxed", "fbox", "mathbf", "boldsymbol"], (1, lambda a: a)),
    **{x: (1, lambda a, x=x: ("sym", x + repr(a))) for x in "overline bar vec hat dot ddot".split()},
    **{x: (0, lambda x=x: ("const" if x == "pi" else "sym", x)) for x in _LETTERS}}
_FLIPPED = {">": "<", ">=": "<="}


class _Parser:
    """Operator precedence; juxtaposition multiplies."""

    def __init__(self, text: str) -> None:
        self.tokens, self.i, self.depth = _tokens(text), 0, 0

    kind = property(lambda self: self.tokens[self.i][0])
    value = property(lambda self: self.tokens[self.i][1] if self.kind not in ("text", "unit", "sub") else "")

    def take(self, *values: str) -> str:
        """Pass over the current token and return its text; with values, only one of these, else ""."""
        text = self.tokens[self.i][1]
        if self.kind == "stop" or values and self.value not in values:
            return ""
        self.i += 1
        return text

    def need(self, *values: str) -> str:
        if token := self.take(*values):
            return token
        raise Refused(f"unexpected {self.tokens[self.i][1] or 'end'!r}")

    def items(self, end: str = "") -> Node:
        """One item, or ("list", items); `p=5,q=2;p=7,q=2` is a list of two lists."""
        rows = self.rows(",", ";", RELATION)
        if end and self.kind != end:
            self.need(end)
        if len(rows) > 1:
            rows = [tuple(row[0] if len(row) == 1 else ("list", row) for row in rows)]
        items = rows[0]
        return items[0] if len(items) == 1 else ("list", items)

    def rows(self, between: str, after_row: str, level: int) -> tuple[tuple[Node, ...], ...]:
        rows = [(self.expr(level),)]
        while joint := self.take(between, after_row):
            row = () if joint == after_row else rows.pop()
            rows.append((*row, self.expr(level)))
        return tuple(rows)

    def expr(self, level: int = RELATION) -> Node:
        self.descend()
        sign = self.take("+", "-") if level <= PRODUCT or self.value == "-" else ""
        node = self.expr(max(level, PRODUCT)) if sign else self.primary()
        node = _neg(node) if sign == "-" else node
        while True:
            binds, build = _OPERATORS.get(self.value, (None, None))
            if self.kind in ("sub", "prime") and node[0] in ("num", "sym", "const"):  # 52_8, too, is a name
                node = ("sym", f"{node[1]}_" + re.sub(r"[{}\s]|\\text|\\mathrm", "", self.take()))
            elif self.value in _SUFFIXES:
                node = _SUFFIXES[self.take()](node)
            elif level <= UNIT and self.kind in ("text", "unit"):  # a unit, right or wrong
                if _NO_UNIT.search(self.take()):
                    raise Refused("words that may say more than a unit")
            elif level <= RELATION and self.value in _RELATIONS:
                node = self.relation(node)
            elif build and level <= binds and self.take():
                node = build(node, self.expr(binds + (binds != POWER)))
            elif level <= PRODUCT and self.starts_factor():
                node = _mul(node, self.expr(POWER))
            else:
                self.depth -= 1
                return node

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused("too deep")

    def starts_factor(self) -> bool:
        known = self.kind in ("num", "word") or self.value[:1] in ("(", "[", "{", "\\")
        return known and self.value not in _CLOSING

    def relation(self, node: Node) -> Node:
        """A chain such as 1 < x <= 2, written with < and <= only."""
        ops, sides = [], [node]
        while self.value in _RELATIONS:
            ops.append(self.take())
            sides.append(self.expr(UNION))
        if ops[0] in _FLIPPED:
            ops, sides = [_FLIPPED.get(op, op) for op in reversed(ops)], reversed(sides)
        return ("rel", tuple(ops), tuple(sides))

    def primary(self) -> Node:
        """A number, name, command or bracket."""
        if self.kind == "num":
            mantissa, _, exponent = self.take().lower().partition("e")
            if len(mantissa) > 400 or len(exponent) > 4:
                raise Refused("too many digits")
            scale, decimals = Fraction(10) ** int(exponent or 0), mantissa.partition(".")[2]
            return _num(Fraction(mantissa) * scale, scale / 10 ** len(decimals) if "." in mantissa else None)
        if self.kind in ("text", "unit"):
            return ("text", _text_key(self.take()))
        if self.value.startswith("\\") and self.value not in _BRACKETS or self.value in _WORDS:
            name = self.take().lstrip("\\")
            if name == "matrix":
                rows = self.rows("&", "\\\\", SUM)
                return self.need("\\endmatrix") and ("mat", tuple(zip(*zip(*rows, strict=True))))
            if name in _FUNCTIONS:
                return self.function(_FUNCTIONS[name])
            arguments, build = _COMMAND.get(name) or self.need("a known command")
            self.descend()
            node = build(*(self.primary() for _ in range(arguments)))
            self.depth -= 1
            return node
        if self.kind == "word" and len(self.value) == 1:
            return ("const" if self.value in "ei" else "sym", self.take())
        return self.bracket()

    def bracket(self) -> Node:
        opening = self.need(*_BRACKETS)
        if opening == "\\{" and self.take("\\}"):
            return ("set", ())
        node = self.items()
        pair = opening + self.need(*_BRACKETS[opening])
        if pair == "\\{\\}" or pair == "{}" and node[0] == "list":
            return ("set", node[1] if node[0] == "list" else (node,))
        if node[0] == "list":
            return ("seq", pair, node[1])
        return node if pair not in ("(]", "[)") else self.need(",")

    def function(self, name: str) -> Node:
        """\\sin^2 x, \\log_2 8, \\sin 2x: without brackets the argument is the product that follows."""
        base = _Parser(self.take().strip("{} ")).items("stop") if self.kind == "sub" else None
        power = self.expr(POWER) if self.take("^") else _num(1)
        bracketed = self.value in ("(", "[", "{")
        arg = self.primary() if bracketed else self.expr(POWER)
        while not bracketed and self.starts_factor() and self.value.strip("\\") not in {"(", *_FUNCTIONS}:
            arg = _mul(arg, self.expr(POWER))
        arg = _mul(arg[1], _DEGREE) if arg[0] == "deg" else arg
        node = _div(("fn", "ln", (arg,)), ("fn", "ln", (base,))) if base else ("fn", name, (arg,))
        return node if power == _num(1) else ("pow", node, power)


def _text_key(text: str) -> str:
    words = re.sub(r"[^\w\s]|_", " ", _TEXT.sub(r"\1", text)).casefold().split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


@functools.lru_cache(4096)
def _parse(text: str) -> Node:
    """The tree of one answer; ("text", key) if it is words. Raises Refused."""
    clean = _clean(text)
    bare, wrapped = _TEXT.sub(r" \1 ", clean).strip(), _TEXT.fullmatch(clean)
    words = [w for w in re.findall("[A-Za-z]+", bare) if w.lower() not in _WORDS | _UNITS]
    longest = max(map(len, words), default=0)
    if longest > (3 if bare == clean else 1) and re.fullmatch(r"[A-Za-z\s,.'\"()&-]+", bare):
        return ("text", _text_key(clean))
    try:
        if "\\pm" not in clean:
            return _Parser(bare if wrapped else clean).items("stop")
        nodes = [_Parser(clean.replace("\\pm", a).replace("\\mp", b)).items("stop") for a, b in ("+-", "-+")]
        items = [x for n in nodes for x in (n[1] if n[0] in ("list", "set") else (n,))]
        return ("list", tuple(items))  # all signs turn together
    except (Refused, ValueError, ArithmeticError, RecursionError) as error:  # matrix shapes, nonsense numbers
        if wrapped and _text_key(bare):
            return ("text", _text_key(clean))
        raise Refused(str(error)) from error


# --- evaluate -----------------------------------------------------------------------------------------------
def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def _limit(size: object, most: int) -> None:
    if size > most:
        raise Refused("number too large")


def _is_real(x: Fraction | object) -> bool:
    return isinstance(x, Fraction) or bool(x.is_real)


class _Evaluator:
    """Values of scalar trees at a point: fractions while that is exact, else sympy's numbers.

    Every step is a number and bounded before it is computed. digits=0: raises _Unproven if not exact.
    Raises ArithmeticError or ValueError where undefined; with real, also where a step is not real.
    """

    def __init__(self, point: dict[str, Fraction], digits: int, real: bool = True) -> None:
        self.point, self.digits, self.real, self.bits_left = point, digits, real, 25 * MAX_BITS

    def sympy(self, name: str) -> object:
        if not self.digits:
            raise _Unproven
        import sympy  # half a second, and most answers never come here
        return getattr(sympy, name)

    def inexact(self, x: Fraction | object) -> object:
        """A sympy number of so many digits, real or complex."""
        return x if getattr(x, "is_Float", False) else self.sympy("N")(self.sympy("sympify")(x), self.digits)

    def value(self, node: Node) -> Fraction | object:
        match node:
            case ("num", x, _):
                return self.checked(x)
            case ("sym", name) if name in self.point:
                return self.point[name]
            case ("const", name) if node != _INFINITY:
                return self.checked(self.sympy({"e": "E", "i": "I"}.get(name, name)))
            case ("add" | "mul" as kind, terms):
                values = map(self.value, terms)
                return functools.reduce(lambda a, b: self.checked(a + b if kind == "add" else a * b), values)
            case ("pow", a, b):
                return self.checked(self.power(self.value(a), self.value(b)))
            case ("fn", name, arguments):
                return self.checked(self.call(name, *map(self.value, arguments)))
            case ("deg" | "pct" as kind, inner):
                return self.value(inner) / (100 if kind == "pct" else 1)
        raise ZeroDivisionError("no number")

    def checked(self, x: Fraction | object) -> Fraction | object:
        if isinstance(x, Fraction):
            self.bits_left -= _bits(x)
            _limit(_bits(x), min(MAX_BITS, self.bits_left))
            return x
        x = self.inexact(x)
        if not x.is_finite or self.real and not x.is_real:
            raise ZeroDivisionError("undefined")
        _limit(self.log_size(x), 2 * MAX_LOG)
        return x

    def power(self, a: Fraction | object, b: Fraction | object) -> Fraction | object:
        if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
            _limit(_bits(a) * abs(b) if _bits(a) > 2 else 0, 2 * MAX_BITS)
            return a ** (b % 2 if abs(a) == 1 else b)
        a, b = map(self.inexact, (a, b))
        _limit(abs(b) * self.log_size(a), MAX_LOG)
        return a ** b

    def log_size(self, x: object) -> float:
        return abs(float(self.sympy("log")(abs(x)))) if x else 0.0

    def call(self, name: str, x: Fraction | object, y: Fraction | object = Fraction(0)) -> Fraction | object:
        if name == "abs":
            return abs(x)
        if name == "root":  # the odd root of a negative number, which a power is not
            odd = _is_real(x) and x < 0 and _is_real(y) and y % 2 == 1
            return -self.power(-x, 1 / y) if odd else self.power(x, 1 / y)
        if name in ("floor", "ceil") and _is_real(x):
            return Fraction({"floor": math.floor, "ceil": math.ceil}[name](self.rounded(x)))
        if name in ("fact", "binom"):
            if not all(isinstance(n, Fraction) and n.denominator == 1 and n >= 0 for n in (x, y)):
                raise ZeroDivisionError("undefined")
            _limit(min(y, x - y) * _bits(x) if name == "binom" else x * 10, MAX_BITS)
            return Fraction(math.factorial(int(x)) if name == "fact" else math.comb(int(x), int(y)))
        _limit(abs(x) if name in ("exp", "sinh", "cosh") else 0, MAX_LOG)
        return self.sympy({"ln": "log"}.get(name, name.replace("arc", "a")))(self.inexact(x))

    def rounded(self, x: Fraction | object) -> Fraction:
        """A real value as a fraction; ln(e^3) may come out a bit below 3."""
        return x if isinstance(x, Fraction) else Fraction(str(x.evalf(self.digits - 10)))


def _points(node: Node) -> Iterator[dict[str, Fraction]]:
    """Fixed pseudo-random values of the symbols; whole numbers where only those make sense."""
    nodes = list(_walk(node))
    names = sorted({n[1] for n in nodes if n[0] == "sym"})
    whole = any(n[0] == "fn" and n[1] in ("floor", "ceil", "fact", "binom")
                or n[0] == "pow" and n[1][0] == "num" and n[1][1] < 0 for n in nodes)
    kinds = [(23, 1), (23, -1), (23, 1), (997, 40), (997, 0.25)]  # largest whole number, scale of others
    for k, (span, scale) in enumerate(kinds[:5 if names else 1]):
        hashes = {name: zlib.crc32(f"{name}{k}".encode("utf-8", "replace")) for name in names}
        yield {name: Fraction(2 + h % span) if whole
               else Fraction(scale) * (-1 if k > 1 and h % 2 else 1) * Fraction(1000 + h % 2003, 997)
               for name, h in hashes.items()}


# --- compare ------------------------------------------------------------------------------------------------
def _is_name(node: Node) -> bool:
    """x, f(2), AB, (x,y), |AB|, S_1/S_2, \\text{area}: what may stand before the = of an answer."""
    if node[0] == "mul":
        arguments = ("num", "seq", "rel", "pow")
        return _is_name(node[1][0]) and all(_is_name(x) or x[0] in arguments for x in node[1])
    if node[0] in ("seq", "ratio") or node[:2] == ("fn", "abs"):
        return all(map(_is_name, node[-1]))
    return node[0] in ("sym", "text")


def _value(node: Node) -> tuple[Node | None, Node]:
    """(name, value) of `name = value`, `name in set` or a chain `x = 1+1 = 2`; (None, interval or node)."""
    if node[0] != "rel":
        return None, node
    _, ops, sides = node
    if "~" in ops:  # x = 1/3 ~ 0.33 says 1/3, x ~ 0.33 says 0.33
        cut = max(ops.index("~"), int(_is_name(sides[0])))
        ops, sides = ("=",) * cut, sides[:cut + 1]
    constant = [all(n[0] != "sym" for n in _walk(side)) for side in sides]
    if not ops or set(ops) == {"="} and all(constant):
        return None, sides[-1]
    sides = sides[::-1] if ops == ("=",) and constant[0] else sides  # 5 = x
    if _is_name(sides[0]) and set(ops) in ({"="}, {"\\in"}) and sides[0] not in _walk(sides[-1]):
        return sides[0], sides[-1]
    bounds = (_MINUS_INFINITY, *sides) if _is_name(sides[0]) else (*sides, _INFINITY)
    low, name, high = bounds if len(sides) == 2 else sides if len(sides) == 3 else (None, node, None)
    if set(ops) <= {"<", "<="} and _is_name(name):
        left, right = (ops * 2)[0] == "<" or low == _MINUS_INFINITY, ops[-1] == "<" or high == _INFINITY
        piece = ("seq", "[("[left] + "])"[right], (low, high))
        if name[:2] == ("fn", "abs") and low != _MINUS_INFINITY:  # 1 < |x| < 2
            return None, ("list", (piece, ("seq", "[("[right] + "])"[left], (_neg(high), _neg(low)))))
        return None, piece
    return None, ("rel", ops, sides)


def _plain(node: Node) -> Node:
    """The value; a column as the tuple (1,2), a matrix as a tuple that is only like one of its shape."""
    if node[0] == "mat":
        return ("seq", str(len(node[1])) if len(node[1][0]) > 1 else "()", sum(node[1], ()))
    return node[1][0] if node[0] in ("list", "set") and len(node[1]) == 1 else _value(node)[1]


class _Comparer:
    """Are two trees the same answer? prove=False: raises _Unproven where that takes inexact numbers."""

    def __init__(self, prove: bool) -> None:
        self.prove = prove

    def same(self, g: Node, p: Node) -> bool:
        if g == p:
            return True
        if (plain := (_plain(g), _plain(p))) != (g, p):
            kinds = {name[0] for name in (_value(g)[0], _value(p)[0]) if name}
            return kinds != {"sym", "mul"} and self.same(*plain) or (  # k=1 is a number, f(x)=1 is not
                g[0] == p[0] == "rel" and self.relation(g, p))
        kinds = {g[0], p[0]}
        if kinds == {"list", "seq"}:  # x=1, y=2 is (1,2)
            named, other = (g, p) if g[0] == "list" else (p, g)
            values = dict(map(_value, named[1]))
            return None not in values and len(values) == len(named[1]) and other[1] == "()" and (
                self.same(("seq", "()", tuple(values.values())), other))
        if kinds & {"list", "set"}:
            return self.cover(*(n[1] if n[0] in ("list", "set") else (n,) for n in (g, p)))
        if kinds == {"rel"}:
            return self.relation(g, p)
        if kinds == {"seq"}:
            return g[1] == p[1] and len(g[2]) == len(p[2]) and all(map(self.same, g[2], p[2]))
        if "ratio" in kinds:
            a, b = (n[1] if n[0] == "ratio" else (n, _num(1)) for n in (g, p))
            return len(a) == len(b) and all(self.equal(_div(x, a[-1]), _div(y, b[-1])) for x, y in zip(a, b))
        return kinds <= {"num", "sym", "const", "add", "mul", "pow", "fn", "pct", "deg"} and self.scalar(g, p)

    def cover(self, gs: Sequence[Node], ps: Sequence[Node]) -> bool:
        """The same elements in any order, repeats ignored; named ones (a=1, b=2) under the same names."""
        def same(g: Node, p: Node) -> bool:
            return len({_value(n)[0] for n in (g, p)} - {None}) < 2 and self.same(g, p)
        return bool(gs) == bool(ps) and max(len(gs), len(ps)) <= MAX_ITEMS and (
            all(any(same(g, p) for p in ps) for g in gs) and all(any(same(g, p) for g in gs) for p in ps))

    def relation(self, g: Node, p: Node) -> bool:
        """Equations and inequalities are the same up to a constant factor, for < and <= a positive one."""
        (_, g_ops, g_sides), (_, p_ops, p_sides) = g, p
        if g_ops != p_ops or len(g_ops) > 1 or g_ops[0] == "\\in":
            return g_ops == p_ops and all(map(self.same, g_sides, p_sides))
        a, b = (_add(sides[0], _neg(sides[1])) for sides in (g_sides, p_sides))
        with contextlib.suppress(ArithmeticError, ValueError):
            evaluator = _Evaluator(next(_points(_add(a, b))), 60 * self.prove)
            factor = evaluator.rounded(evaluator.value(_div(a, b)))
            alike = factor > 0 or factor and g_ops[0] in ("=", "!=")
            return alike and self.equal(a, _mul(_num(factor), b))
        return False

    def scalar(self, g: Node, p: Node) -> bool:
        """5% is 5 or 0.05, 90 degrees are 90 or pi/2; a decimal gold equals what rounds to it."""
        for mark, factor in (("pct", _num(Fraction(1, 100))), ("deg", _DEGREE)):
            if mark in (g[0], p[0]):
                bare = [n[1] if n[0] == mark else n for n in (g, p)]
                turned = [_mul(n[1], factor) if n[0] == mark else n for n in (g, p)]
                return self.scalar(*bare) or g[0] != p[0] and self.scalar(*turned)
        decimal = g[1][0] if g[0] == "mul" else g  # also one times a power of ten
        rounded = decimal[0] == "num" and decimal[1] and decimal[2]
        if not rounded or "sym" in {n[0] for n in _walk((g, p))}:
            return self.equal(g, p)
        with contextlib.suppress(ArithmeticError, ValueError):
            evaluator = _Evaluator({}, 40 * self.prove)
            value, near = (evaluator.rounded(evaluator.value(n)) for n in (g, p))
            return abs(value - near) <= abs(value) * min(decimal[2] / 2 / abs(decimal[1]), TOLERANCE)
        return False

    def equal(self, g: Node, p: Node) -> bool:
        """Do two scalar trees agree wherever both are defined over the reals?"""
        gap, met, refused = _add(g, _neg(p)), 0, None
        real = ("const", "i") not in _walk(gap)
        for point in _points(gap):
            try:
                size = abs(_Evaluator(point, 60 * self.prove, real).value(gap))
                if size and isinstance(size, Fraction):
                    return False
                if size and abs(_Evaluator(point, 120, real).value(gap)) > size * 1e-20:
                    return False  # rounding shrinks with more digits, a difference stays
                met += 1
            except Refused as error:
                refused = error
            except (ArithmeticError, ValueError):  # undefined here, but elsewhere?
                pass
        if refused and not met:
            raise refused
        return met > 0


# --- verdicts -----------------------------------------------------------------------------------------------
def _judge(answer: str, gold: str, prove: bool) -> bool:
    """The verdict on a bare answer. Raises Refused, and _Unproven if prove is False and it takes digits."""
    (gold, g), text = _gold(gold), _clean(answer)
    if text == gold or g[0] == "text" and _text_key(text) == g[1]:
        return True
    if re.fullmatch(r"-?\d*\.\d+", gold) and re.fullmatch(r"-?\d+,\d\d?", text):  # 2,74
        text = text.replace(",", ".")
    if g[0] == "text" or (asked := _units(gold)) and (given := _units(text)) and asked.isdisjoint(given):
        return False  # a unit may be missing, but not be another one
    return _Comparer(prove).same(g, _parse(text))


def _gold(gold: str) -> tuple[str, Node]:
    """Clean text and tree of a gold answer, or of the answer within a worked solution."""
    gold = re.search("boxed|####|answer is", gold) and extract_answer(gold) or gold
    return _clean(gold), _parse(gold)


def _units(text: str) -> set[str]:
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{2,}", text) + " ".join(_TEXT.findall(text)).split()
    return {_UNIT_OF[word] for word in map(str.lower, words) if word in _UNIT_OF}


def _verdict(answer: str | None, gold: str, prove: bool) -> str:
    """correct, wrong, refused or unproven. Arithmetic on what a model wrote may raise anything."""
    try:
        return "correct" if answer is not None and _judge(answer, gold, prove) else "wrong"
    except _Unproven:
        return "unproven"
    except Exception as error:
        log.info("not correct: %.80r: %s: %.80s", answer, type(error).__name__, error)
        return "refused" if isinstance(error, Refused) else "wrong"


def parse_error(gold: str) -> str | None:
    """Why a gold answer cannot be used, or None. Drop such a problem when loading; it never scores."""
    try:
        return _gold(gold) and None
    except Refused as error:
        return str(error)


def is_correct(response: str, gold: str, loose: bool = True) -> bool:
    """Does the response's final answer equal the gold answer? Never raises. Bounded work, no time limit."""
    return _verdict(extract_answer(response, loose), gold, prove=True) == "correct"


class Checker(contextlib.AbstractContextManager):
    """is_correct for many pairs, with the same verdicts, from any thread.

    What is no fraction goes to `workers` processes, started at first need; an answer that takes one longer
    than `time_limit` seconds, or kills it, is not correct. workers=0: all in this process and no limit.
    Counters, reset by the caller: timeouts (slow or killed checks), refused (answers beyond the bounds of
    length, depth, digits or size, or not readable) and check_ms_max.
    """

    def __init__(self, workers: int = 1, time_limit: float = 1.0, loose: bool = True) -> None:
        if workers < 0 or time_limit <= 0:
            raise ValueError(f"workers={workers} must be 0 or more, time_limit={time_limit} positive")
        self.workers, self.time_limit, self.loose = workers, time_limit, loose
        self.timeouts, self.refused, self.check_ms_max = 0, 0, 0.0
        self._lock, self._idle = threading.Lock(), [None] * workers

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """One verdict for each (response, gold)."""
        with self._lock:
            answers = [(extract_answer(response, self.loose), gold) for response, gold in pairs]
            verdicts = {}
            for pair in dict.fromkeys(answers):
                start = time.perf_counter()
                verdicts[pair] = _verdict(*pair, prove=self.workers == 0)
                self._note(start)
            if hard := [pair for pair, verdict in verdicts.items() if verdict == "unproven"]:
                with ThreadPoolExecutor(self.workers) as pool:
                    verdicts |= zip(hard, pool.map(self._ask, hard))
            found = [verdicts[pair] for pair in answers]
            self.timeouts += list(verdicts.values()).count("timeout")
            self.refused += found.count("refused")
            return [verdict == "correct" for verdict in found]

    def _note(self, start: float) -> None:
        self.check_ms_max = max(self.check_ms_max, 1000 * (time.perf_counter() - start))

    def _ask(self, pair: tuple[str, str]) -> str:
        """A worker's verdict, or "timeout" for one that it did not survive."""
        worker, verdict = self._idle.pop(), ""
        try:
            for _ in range(2):  # a worker that died while idle is replaced
                worker, start = worker or self._start(), time.perf_counter()
                with contextlib.suppress(OSError):
                    worker.stdin.write(json.dumps(pair) + "\n")
                    worker.stdin.flush()
                    ready = select.select([worker.stdout], [], [], self.time_limit)[0]
                    verdict = worker.stdout.readline().strip() if ready else "timeout"
                self._note(start)
                if verdict in ("", "timeout"):
                    worker = self._stop(worker)
                if verdict:
                    break
        finally:
            self._idle.append(worker)
        return verdict or "timeout"

    @staticmethod
    def _start() -> subprocess.Popen:
        command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]  # -P: not our modules
        worker = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  start_new_session=True)
        if worker.stdout.readline() != "ready\n":  # its imports are no answer's time
            raise RuntimeError("the worker that checks answers did not start: is sympy installed?")
        return worker

    @staticmethod
    def _stop(worker: subprocess.Popen | None) -> None:
        if worker:
            worker.kill()
            worker.communicate()

    def close(self) -> None:
        with self._lock:
            for i, worker in enumerate(self._idle):
                self._idle[i] = self._stop(worker)

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve() -> None:
    """A worker process: pairs in as JSON, verdicts out, one a line."""
    _Evaluator({}, 60).inexact(1)  # imports
    print("ready", flush=True)
    for line in sys.stdin:
        print(_verdict(*json.loads(line), prove=True), flush=True)


# --- shaping ------------------------------------------------------------------------------------------------
def length_rewards(correct: Sequence[float], lengths: Sequence[int], alpha: float,
                   reference: str = "all") -> list[float]:
    """Eq. 11 of arXiv 2601.19404 within one group: a correct response of `len` tokens gets
    clip(1 / (1 + exp(-alpha * (l_ref - len))), 0.5, 1); a wrong one stays 0. [RPO-5]

    l_ref: mean length of the group's responses, or with reference "correct" of its correct ones. alpha 0: the
    accuracies unchanged. Raises ValueError if the two do not have the same number.
    """
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} accuracies but {len(lengths)} lengths: give one of each a response")
    counted = [n for n, c in zip(lengths, correct) if c > 0 or reference == "all"]
    if alpha == 0 or not counted:
        return list(correct)
    mean = sum(counted) / len(counted)
    gains = [0.5 + 0.5 * math.tanh(0.5 * alpha * (mean - n)) for n in lengths]  # the sigmoid without overflow
    return [min(max(gain, 0.5), 1.0) if c > 0 else 0.0 for c, gain in zip(correct, gains)]


def cosine_reward(correct: bool, length: int, longest: int) -> float:
    """Falls along half a cosine from 0 to `longest` tokens: 1 to 0.5 if correct, 0 to -0.5 if not.

    As in the recipe that the authors build on (open-rs, 2503.16219), but in tokens, not characters.
    """
    return 0.25 * (1 + math.cos(math.pi * min(length / longest, 1))) + (0.5 if correct else -0.5)


def format_reward(text: str) -> float:
    """1 if the thoughts are closed exactly once, by </think> on a line of its own (open-rs, 2503.16219)."""
    return float(text.count("\n</think>\n") == 1)


def overlong_reward(length: int, longest: int, buffer: float) -> float:
    """0, within the last `buffer` tokens below `longest` falling to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


class RewardFileError(ValueError):
    """A user's reward function is missing, fails, or returns what is no reward."""


class RewardFile:
    """A user's `reward(problem, response_text) -> float | dict[str, float]`; a dict's parts are summed."""

    def __init__(self, path: str) -> None:
        self.path = path
        spec = importlib.util.spec_from_file_location("reward_file", path)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except Exception as error:
            raise RewardFileError(f"--reward-file {path}: cannot be loaded as Python: {error!r}") from error
        self.reward = getattr(module, "reward", None)
        if not callable(self.reward):
            raise RewardFileError(f"--reward-file {path}: has no function reward(problem, response_text)")

    def __call__(self, problem: object, text: str) -> dict[str, float]:
        """{"file": reward} or {"file/NAME": part}. Raises RewardFileError."""
        try:
            value = self.reward(problem, text)
            parts = {f"file/{k}": float(v) for k, v in value.items()} if isinstance(value, dict) else {
                "file": float(value)}
        except Exception as error:
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else "?"
            raise RewardFileError(f"--reward-file {self.path}: reward() failed at line {line}: "
                                  f"{error!r}") from error
        if not all(map(math.isfinite, parts.values())):
            raise RewardFileError(f"--reward-file {self.path}: reward() must return finite numbers, "
                                  f"not {parts}")
        return parts


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
