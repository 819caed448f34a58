"""Is a response's final answer right, and what reward follows?  Read down: extract, clean, parse, compare.

Both answers become syntax trees (plain tuples) by an own tokenizer and parser; nothing a model wrote is ever
run as code. Trees are compared from cheap to dear: text, structure, exact fractions with the symbols at fixed
random points; only what is no fraction goes to sympy, step by step as numbers of 60 and of 120 digits.
Everything is bounded before it is computed. The choices where graders differ are a table in the README.
"""
from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import subprocess
import sys
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1500, 400, 24, 64  # of one answer; beyond: not correct
MAX_BITS = 40_000  # of one number: 2004! has 19,000
MEMORY_LIMIT = 600 << 20  # address space of a worker in bytes
TOLERANCE = Fraction(1, 10_000)  # relative, and only where the gold answer is a decimal
Node = tuple  # (kind, ...): num value last_place | sym name | add nodes | pow a b | fn name args | ...
log = logging.getLogger(__name__)


class Refused(Exception):
    """Not an answer this module reads, or beyond its bounds. Never leaves the module."""


class _Inexact(Exception):
    """Not a fraction: sympy must tell."""


class _Undecided(Exception):
    """It takes sympy, and the caller said prove=False."""


# --- extract ------------------------------------------------------------------------------------------------
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.S)
_MARK = re.compile(r"####|(?i:\banswers?\b[\s*]{0,4}(?:is\b|are\b|:|=))|(?:^|(?<=\n))[ *]{0,4}A:")
_FORMULA = r"(?<!\\)\$\$?((?:\\\$|[^$]){1,400}?)(?<!\\)\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]"
_LOOSE = (_FORMULA + r"|(?<![\w.,])(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?(?:\\?%|percent)?)")
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
        gap = text[spans[i - 1][1]:start] if i else ""
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


def _spans(pattern: str, text: str) -> list[tuple[int, int, str]]:
    return [(m.start(), m.end(), next(filter(None, m.groups()))) for m in re.finditer(pattern, text, re.S)]


def _stated(text: str) -> str | None:
    marks = [m.end() for m in _MARK.finditer(text)]
    line = text[marks[-1]:][:4 * MAX_CHARS].strip(" \n*:").split("\n\n")[0] if marks else ""
    formulas = _spans(_FORMULA, line)
    if formulas and not re.search(r"\w", line[:formulas[0][0]]):
        return _runs(line, formulas)[0]
    sentence = re.split(r"\.(?:\s|$)", line.split("\n")[0])[0]
    return _unmarked(sentence) or sentence


def _unmarked(text: str) -> str | None:
    prose = re.match(r"[^\d\\$]*[A-Za-z]{3}|.*\S\n.*\S", text, re.S)
    if len(text) <= 100 and not prose:  # a bare answer
        with contextlib.suppress(Refused):
            if _parse(text)[0] != "text":
                return text
    spans = _spans(_LOOSE, text[-2000:])
    return _runs(text[-2000:], spans)[-1] if spans else None


# --- clean and tokenize -------------------------------------------------------------------------------------
_UNICODE = str.maketrans({
    "²": "^2", "³": "^3", "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "≤": "<=", "≥": ">=", "≠": "!=",
    "×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "∪": "\\cup ", "±": "\\pm ", "∈": "\\in ",
    "θ": "\\theta ", "≈": "\\approx ", "€": "", "£": "", "\u200b": "", "\ufeff": "", "∘": "°",
    "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ",
    "′": "'", "’": "'"})
_FUNCTIONS = {f: f for f in "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln exp".split()}
_FUNCTIONS |= {"log": "ln", "lg": "lg", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_SAME_AS = {spelling: token for token, spellings in {
    "<=": r"\le \leq \leqslant", ">=": r"\ge \geq \geqslant", "<": r"\lt", ">": r"\gt", "!=": r"\ne \neq",
    "in": r"\in",
    "~": r"\approx \simeq", "=": "==", "*": r"\cdot \times \ast", "/": r"\div", "^": "**", "\\{": r"\lbrace",
    "\\}": r"\rbrace", "(": r"\langle", ")": r"\rangle", "|": r"\lvert \rvert \vert \mid", ":": r"\colon",
    "\\emptyset": r"\varnothing", "\\frac": r"\dfrac \tfrac \cfrac", "\\binom": r"\dbinom \tbinom",
    }.items() for spelling in spellings.split()}
_PERCENT = {"percent", "pct", "percentage"}
_UNITS = _PERCENT | set("cm mm km kg ft mi lb lbs oz hr hrs mins sec secs mph feet foot am pm sq usd".split())
_GREEK = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell mho"
    .split())
_WORDS = {"and", "or", "sqrt", "pi", "infty"} | _GREEK | set(_FUNCTIONS)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|hbox|math(?:rm|it|sf)|operatorname)\s*\{([^{}]*)\}")
_COMMANDS = "boxed|[dtc]?frac|left|right|text|sqrt|begin|end|cdot|times|pi|infty|circ|leq?|geq?|cup|quad|pm"
_CLEAN = [(re.compile(a), b) for a, b in [
    (rf"(?<!\\)\\\\(?=(?:{_COMMANDS})(?![A-Za-z]))", r"\\"), (r"\\\\\[[\d.]+\s*[a-z]{2}\]", r"\\\\"),
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])|\\(?:displaystyle|limits)\b", ""),
    (r"\$\s*,\s*\$", ", "), (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""), (r"\\%", "%"),
    (r"\b([ap])\. ?m\b\.?", r" \1m"),
    (r",\\!\s*|\s*\{,\s*\}(?=\d{3})|\\!", ""), (r"\\q?quad|(?<!\\)\\[,;:> ]|~|\\phantom(?:\{[^{}]*\})?", " "),
    (r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?/)", lambda m: m[0].replace(" ", "")),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°"), (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime\b)", "'"),
    (r"(?<=[\d)])(and|or)(?=[A-Za-z(])", r" \1 "), (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"\\(?:angle|triangle)\b|\s+", " "), (r"(?i)^.{0,30}\banswer is:?\s|^ ?(?:\\approx|=)\s", "")]]
_TOKEN = re.compile(
    r"(?P<num>(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][+-]?\d+\b)?|\.\d+(?:[eE][+-]?\d+\b)?"
    r"|\.(?=\\overline|\\bar))"
    r"|(?P<begin>\\begin\{\w+\*?\}(?:\{[^{}]*\})?)|(?P<end>\\end\{\w+\*?\})"
    r"|_ *(?P<sub>\{(?:[^{}]|\{[^{}]*\})*\}|\\[A-Za-z]+|\w)|" + _TEXT.pattern.replace("([", "(?P<text>[")
    + r"|(?P<cmd>\\[A-Za-z]+|\\.)|(?P<word>[A-Za-z]+)|(?P<op><=|>=|!=|==|\*\*|[^\s\w])")
def _clean(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise Refused(f"longer than {MAX_CHARS} characters")
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return _TEXT.sub(_inline, text).strip().rstrip(" .,;:")


def _inline(m: re.Match) -> str:
    """\\text{5}, \\mathrm{e} and \\text{(B)} are maths; \\text{cm} is not, nor is the m of 10\\text{ m}."""
    after_value = m.string[:m.start()].rstrip()[-1:] in tuple("0123456789})°")
    is_words = re.search(r"[A-Za-z]{2}|^ ?[a-df-hj-zA-Z](?:/.*)? ?$" if after_value else "[A-Za-z]{2}", m[1])
    return m[0] if is_words else f" {m[1]} "


def _tokens(text: str) -> list[tuple[str, str, bool]]:
    """(kind, text, after a space), kind: num word text sub begin end rel sep cmd op stop."""
    tokens, pos, depth = [], 0, 0
    while pos < len(text):
        start = re.compile(" *").match(text, pos).end()
        m = _TOKEN.match(text, start)
        if not m or len(tokens) >= MAX_TOKENS:
            raise Refused("too many tokens" if m else f"character {text[start:start + 1]!r}")
        kind, value, spaced = m.lastgroup, m[m.lastgroup], start > pos
        if kind == "num" and depth and "," in value:  # inside brackets a comma separates: (100,101)
            value = value.partition(",")[0]
        pos = start + len(value) if kind == "num" else m.end()
        value = value.strip() if kind == "text" else _SAME_AS.get(value, value)
        depth += (value in ("(", "[", "\\{")) - (value in (")", "]", "\\}"))
        if kind == "cmd" and value[0] != "\\" or value == "to":  # \langle is (, 3 \text{ to } 2 is 3:2
            kind, value = "op", ":" if value == "to" else value
        if value.lower().strip(", ") in ("and", "or") or value in (",", ";"):
            kind, value = "sep", value.lower().strip(", ") or value
        kind = "rel" if value in ("=", "<", ">", "<=", ">=", "!=", "in", "~") else kind
        tokens.append((kind, value, spaced))
    return [*tokens, ("stop", "", False)]


# --- parse --------------------------------------------------------------------------------------------------
def _num(value: Fraction | int, last_place: Fraction | None = None) -> Node:
    return ("num", Fraction(value), last_place)


def _add(a: Node, b: Node) -> Node:
    if a[0] == b[0] == "mat":
        return ("mat", tuple(tuple(map(_add, r, s)) for r, s in zip(a[1], b[1], strict=True)))
    return ("add", (*(a[1] if a[0] == "add" else (a,)), b))


def _mul(a: Node, b: Node) -> Node:
    if a[0] == b[0] == "mat":
        size = sum(1 for _ in itertools.islice(_walk((a, b)), 2 * MAX_TOKENS))  # products grow exponentially
        if size == 2 * MAX_TOKENS or len(a[1][0]) != len(b[1]):
            raise Refused("matrices too large or of shapes that do not fit")
        columns = tuple(zip(*b[1]))
        return ("mat", tuple(tuple(functools.reduce(_add, map(_mul, r, c)) for c in columns) for r in a[1]))
    a, b = (b, a) if a[0] == "mat" else (a, b)
    if b[0] == "mat":
        return ("mat", tuple(tuple(_mul(a, x) for x in row) for row in b[1]))
    if a == _num(-1) and b[0] == "num":
        return _num(-b[1], b[2])
    return ("mul", (*(a[1] if a[0] == "mul" else (a,)), b))


def _div(a: Node, b: Node) -> Node:
    return _mul(a, ("pow", b, _num(-1)))


def _neg(a: Node) -> Node:
    return _mul(_num(-1), a)


def _walk(node: Node) -> Iterator[Node]:
    if node and isinstance(node[0], str):
        yield node
    for child in node:
        if isinstance(child, tuple):
            yield from _walk(child)


def _replace(node: Node, rule: Callable[[Node], Node | None]) -> Node:
    new = rule(node) if node else None
    return new if new is not None else tuple(_replace(x, rule) if isinstance(x, tuple) else x for x in node)


RELATION, UNION, RATIO, UNIT, SUM, PRODUCT, POWER = range(7)  # how tightly operators bind
_BINDS = {"\\cup": UNION, ":": RATIO, "+": SUM, "-": SUM, "\\pm": SUM, "\\mp": SUM,
          "*": PRODUCT, "/": PRODUCT, "^": POWER}


class _Parser:
    """Operator precedence on _BINDS; juxtaposition multiplies."""

    def __init__(self, text: str) -> None:
        self.tokens, self.i, self.depth, self.bars = _tokens(text), 0, 0, 0

    kind = property(lambda self: self.tokens[self.i][0])
    value = property(lambda self: self.tokens[self.i][1] if self.kind not in ("text", "sub") else "")

    def take(self, *values: str) -> str:
        """Pass over the current token and return its text; with values, only one of these, else ""."""
        text = self.tokens[self.i][1]
        if self.kind == "stop" or values and self.value not in values:
            return ""
        self.i += 1
        return text

    def need(self, *values: str) -> str:
        return self.take(*values) or self.fail()

    def fail(self) -> str:
        raise Refused(f"unexpected {self.tokens[self.i][1] or 'end'!r}")

    def items(self, whole: bool = False) -> Node:
        """One item, or ("list", items, joined by "or"); `p=5,q=2;p=7,q=2` is a list of two lists."""
        groups, joints = [[self.expr()]], set()
        while self.kind == "sep":
            joints.add(joint := self.take())
            if self.kind == "sep" and self.value in ("and", "or"):
                joints = joints - {","} | {self.take()}
            groups.append([self.expr()]) if joint == ";" else groups[-1].append(self.expr())
        nested = len(groups) > 1 and max(map(len, groups)) > 1
        items = [("list", tuple(g), False) for g in groups] if nested else sum(groups, [])
        if len(items) > MAX_ITEMS or whole and self.kind != "stop":
            self.fail()
        return items[0] if len(items) == 1 else ("list", tuple(items), joints == {"or"})

    def expr(self, level: int = RELATION) -> Node:
        self.deeper(1)
        if sign := self.take("+", "-", "\\pm", "\\mp") if level <= PRODUCT or self.value == "-" else "":
            node = self.signed(sign, self.expr(max(level, PRODUCT)))
        else:
            node = self.primary(mixed=level < POWER)
        while True:
            op, binds = self.value, RELATION if self.kind == "rel" else _BINDS.get(self.value)
            if level <= UNIT and self.is_unit():
                node = self.unit(node)
            elif op in ("!", "°", "%") and self.take():
                node = ("fn", "fact", (node,)) if op == "!" else ("deg" if op == "°" else "pct", node)
            elif binds is not None and level <= binds:
                node = self.binary(self.take(), node, self.expr(binds + (binds != POWER)))
            elif level <= PRODUCT and binds is None and self.starts_factor():
                node = self.binary("*", node, self.expr(POWER))
            else:
                self.deeper(-1)
                return node

    def deeper(self, step: int) -> None:
        self.depth += step
        if self.depth > MAX_DEPTH:
            raise Refused("too deep")

    @staticmethod
    def signed(sign: str, node: Node) -> Node:
        return {"+": node, "-": _neg(node)}.get(sign) or (sign[1:], node)

    def binary(self, op: str, a: Node, b: Node) -> Node:
        if op in ("+", "-", "\\pm", "\\mp"):
            return _add(a, self.signed(op, b))
        if op in ("*", "/"):
            return _mul(a, b) if op == "*" else _div(a, b)
        if op == "^":
            return ("pow", a, b)
        if op in ("\\cup", ":"):
            kind = {"\\cup": "cup", ":": "ratio"}[op]
            return (kind, (*(a[1] if a[0] == kind else (a,)), b))
        return ("rel", (*a[1], op), (*a[2], b)) if a[0] == "rel" else ("rel", (op,), (a, b))

    def is_unit(self) -> bool:
        kind, value, spaced = self.tokens[self.i]
        wordy = spaced and len(value) >= 4 and re.search("[aeiou]", value) and value not in _WORDS
        return kind == "text" or kind == "word" and bool(value.lower() in _UNITS or wordy)

    def unit(self, node: Node) -> Node:
        """Words after a value: percent, or a unit and its power."""
        words = []
        while self.is_unit():
            words.append(self.take().lower().strip(" ."))
            if re.search(r"(?<![a-z^{])\d", words[-1]):  # "7 \text{ maybe 8}"
                self.fail()
            if self.take("^"):
                words[-1] += str(self.primary()[1])
            if self.value == "/" and self.tokens[self.i + 1][0] in ("text", "word"):
                words[-1] += self.take() + self.take()
        name = " ".join(words)
        if re.search(r"[^\w ./,()'^{}-]|\b(?:not?|or)\b", name):  # "7 \text{ is not it}"
            raise Refused(f"words {name!r}")
        return ("pct", node) if words[0] in _PERCENT else ("unit", node, name)

    def starts_factor(self) -> bool:
        if self.kind in ("op", "cmd"):
            closing = ("\\}", "\\rfloor", "\\rceil", "\\\\")
            return self.value in ("(", "[", "{") or self.value == "|" and not self.bars or (
                self.kind == "cmd" and self.value not in closing)
        return self.kind in ("num", "begin") or self.kind == "word" and not self.is_unit()

    def primary(self, mixed: bool = True) -> Node:
        if self.kind == "num":
            return self.number(mixed)
        if self.kind == "text":
            return ("text", _text_key(self.take()))
        if self.kind == "word" and self.value in {*_FUNCTIONS, "sqrt", "infty", "abs"}:
            return self.command(self.take())
        if self.kind == "word":
            known = self.value in ("pi", *_GREEK)
            if re.fullmatch("[a-z]{5,}", self.value) and not known:
                self.fail()  # prose, no product
            return self.symbol(self.take() if known else self.first())
        if self.kind == "begin":
            return self.matrix()
        if self.kind == "cmd" and self.value != "\\{":
            return self.command(self.take()[1:])
        opening, bars = self.need("(", "[", "{", "\\{", "|"), self.bars
        self.bars = int(opening == "|")
        node = ("set", ()) if opening == "\\{" and self.value == "\\}" else self.items()
        self.bars = bars
        pair = opening + self.need(*{"{": ["}"], "\\{": ["\\}"], "|": ["|"]}.get(opening, [")", "]"]))
        if pair == "||":
            return ("fn", "abs", (node,))
        if pair in ("\\{\\}", "{}") and (node[0] == "list" or pair != "{}" and node != ("set", ())):
            return ("set", node[1] if node[0] == "list" else (node,))
        if node[0] == "list":
            return ("seq", pair, node[1])
        if self.kind == "sub" and node[0] == "num" and pair == "()":
            return ("base", str(node[1]), self.take().strip("{ }"))  # (52)_8
        return node if pair not in ("(]", "[)") else self.fail()

    def first(self) -> str:
        """The first character of the current token; the rest is read next: 2xy, \\frac12."""
        kind, text, spaced = self.tokens[self.i]
        if len(text) == 1:
            return self.take()
        self.tokens[self.i] = (kind, text[1:], False)
        return text[0]

    def argument(self) -> Node:
        """A command's argument: a group, or by TeX's rule the next digit, letter or command."""
        if self.kind == "num":
            return _num(int(self.first())) if self.value[0].isdigit() else self.fail()
        self.deeper(1)
        node = _neg(self.argument()) if self.take("-") else self.primary(mixed=False)
        self.deeper(-1)
        return node

    def number(self, mixed: bool) -> Node:
        text = self.take().replace(",", "").lower()
        mantissa, _, exponent = text.partition("e")
        whole, dot, decimals = mantissa.partition(".")
        if len(mantissa) > 400 or len(exponent) > 4:
            raise Refused("too many digits")
        if self.kind == "sub" and not exponent:
            return ("base", mantissa.lstrip("0"), self.take().strip("{ }"))
        if dot and self.take("\\overline", "\\bar") and self.need("{"):  # 0.1\overline{6}
            cycle = self.take() if self.kind == "num" and self.value.isdigit() else self.fail()
            self.need("}")
            period = Fraction(int(cycle), 10 ** len(cycle) - 1)
            return _num(Fraction(mantissa + "0") + period / 10 ** len(decimals))
        node = _num(Fraction(text), Fraction(10) ** (int(exponent or 0) - len(decimals)) if dot else None)
        if mixed and text.isdigit() and self.take("\\frac"):  # 1\frac{4}{5}
            match part := self.command("frac"):
                case ("mul", (("num", top, None), ("pow", ("num", bottom, None), _))) if 0 < top < bottom:
                    return _add(node, part)
            return _mul(node, part)
        match self.tokens[self.i:self.i + 3]:
            case [("num", top, True), (_, "/", _), ("num", bottom, _)] if (text + top + bottom).isdigit():
                self.i += 3  # 1 4/5
                return _add(node, _num(Fraction(int(top), int(bottom))))
        return node

    def symbol(self, name: str) -> Node:
        while self.kind == "sub" or self.value == "'":
            mark = "" if self.value else "_"
            name += mark + re.sub(r"[{}\s]|\\text|\\mathrm", "", self.take())
        match self.tokens[self.i:self.i + 3]:
            case [(_, "(", _), ("num", argument, _), (_, ")", _)] if name not in ("e", "i", "pi"):
                self.i += 3
                return ("sym", f"{name}({argument})")  # the value I(0), not I times 0
        return ("const" if name in ("e", "i", "pi") else "sym", name)

    def command(self, name: str) -> Node:
        if name in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            return _div(top, bottom) if name == "frac" else ("fn", "binom", (top, bottom))
        if name == "sqrt":
            index = self.expr(SUM) if (bracket := self.take("[")) else _num(2)
            return ("fn", "root", (self.argument() if not bracket or self.need("]") else None, index))
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if name in ("lfloor", "lceil"):
            node = ("fn", name[1:], (self.expr(SUM),))
            return node if self.need("\\r" + name[1:]) else node
        if name in "overline bar vec hat dot ddot tilde widehat overrightarrow".split():
            return self.symbol(name + repr(self.argument()))
        if name in ("boxed", "fbox", "mathbf", "boldsymbol", "abs"):
            return ("fn", "abs", (self.argument(),)) if name == "abs" else self.argument()
        if name == "mathbb":
            return ("const", "R") if self.argument() == ("sym", "R") else self.fail()
        if name in ("infty", "emptyset"):
            return ("const", "oo") if name == "infty" else ("set", ())
        return self.symbol(name) if name in _GREEK | {"pi", "max", "min"} else self.fail()

    def function(self, name: str) -> Node:
        """\\sin^2 x, \\log_2 8, \\sin 2x: without brackets the argument is the product that follows."""
        base, power = _num(10) if name == "lg" else None, None
        while self.kind == "sub" or self.value == "^":
            if self.kind == "sub":
                base = _Parser(self.take().strip("{}")).items()
            else:
                power = self.take() and self.expr(POWER)
        bracketed = self.value in ("(", "[", "{")
        arg = self.primary() if bracketed else self.expr(POWER)
        while not bracketed and self.starts_factor() and self.value.strip("\\") not in {"(", *_FUNCTIONS}:
            arg = _mul(arg, self.expr(POWER))
        arg = _replace(arg, lambda n: _mul(_div(n[1], _num(180)), ("const", "pi")) if n[0] == "deg" else None)
        if power == _num(-1) and name in ("sin", "cos", "tan"):
            name, power = "arc" + name, None
        node = ("fn", name if base is None else "ln", (arg,))
        node = node if base is None else _div(node, ("fn", "ln", (base,)))
        return node if power is None else ("pow", node, power)

    def matrix(self) -> Node:
        if not re.match(r"\\begin\{(?:[pbB]?matrix|array|smallmatrix)\}", self.take()):
            self.fail()
        rows = [[self.expr(SUM)]]
        while self.kind != "end":
            if self.take("&"):
                rows[-1].append(self.expr(SUM))
            elif self.need("\\\\") and self.kind != "end":
                rows.append([self.expr(SUM)])
        self.take()
        return ("mat", tuple(map(tuple, rows))) if len({*map(len, rows)}) == 1 else self.fail()


def _text_key(text: str) -> str:
    words = re.sub(r"[^\w\s]|_", " ", _TEXT.sub(r"\1", text)).casefold().split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


@functools.lru_cache(4096)
def _parse(text: str) -> Node:
    """The tree of one answer; ("text", key) if it is words. Raises Refused."""
    clean = _clean(text)
    bare, wrapped = _TEXT.sub(r" \1 ", clean).strip(), _TEXT.fullmatch(clean)
    words = [w for w in re.findall("[A-Za-z]+", bare) if w.lower() not in _WORDS | _UNITS]
    shortest = 4 if bare == clean else 2
    if re.fullmatch(r"[A-Za-z\s,.'\"()&-]+", bare) and any(len(word) >= shortest for word in words):
        return ("text", _text_key(clean))
    try:
        return _Parser(bare if wrapped else clean).items(whole=True)
    except (Refused, ValueError, ArithmeticError, RecursionError) as error:  # matrix shapes, nonsense numbers
        if wrapped and _text_key(bare):
            return ("text", _text_key(clean))
        raise Refused(str(error)) from error


# --- compare: numbers ---------------------------------------------------------------------------------------
def _fold(node: Node, leaf: Callable, power: Callable, call: Callable, check: Callable) -> object:
    """The value of a scalar tree in fractions or sympy's numbers; `check` sees each value on the way."""
    kind, fold = node[0], functools.partial(_fold, leaf=leaf, power=power, call=call, check=check)
    if kind in ("num", "sym", "const"):
        return check(leaf(node))
    if kind in ("add", "mul"):
        return functools.reduce(lambda a, b: check(a + b if kind == "add" else a * b), map(fold, node[1]))
    if kind in ("pow", "fn"):
        return check(power(*map(fold, node[1:])) if kind == "pow" else call(node[1], *map(fold, node[2])))
    if kind in ("deg", "unit", "pct"):
        return fold(_div(node[1], _num(100)) if kind == "pct" else node[1])
    raise Refused(f"{kind} inside a formula")


def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


def _rational(node: Node, point: dict[str, Fraction]) -> Fraction:
    """The exact value at a point. Raises _Inexact if it is no fraction, ZeroDivisionError where undefined."""
    spent = 0

    def check(x: Fraction) -> Fraction:
        nonlocal spent
        spent += _bits(x)
        if _bits(x) > MAX_BITS or spent > 25 * MAX_BITS:
            raise Refused("number too large")
        return x

    def leaf(n: Node) -> Fraction:
        if n[0] == "const":
            raise _Inexact
        return n[1] if n[0] == "num" else point[n[1]]

    def power(a: Fraction, b: Fraction) -> Fraction:
        if b.denominator == 2 and a >= 0:
            root = Fraction(math.isqrt(a.numerator), math.isqrt(a.denominator))
            a, b = (root, b * 2) if root * root == a else (a, b)
        if b.denominator != 1:
            raise _Inexact
        if _bits(a) > 2 and _bits(a) * abs(b) > 2 * MAX_BITS:
            raise Refused("power too large")
        return a ** int(b if _bits(a) > 2 or not a else b % 2)

    def call(name: str, x: Fraction, y: Fraction = Fraction(0)) -> Fraction:
        if name in ("floor", "ceil", "abs"):
            return Fraction({"floor": math.floor, "ceil": math.ceil, "abs": abs}[name](x))
        if name == "root" and y == 2:
            return power(x, 1 / y)
        if name not in ("fact", "binom"):
            raise _Inexact
        if x.denominator * y.denominator != 1 or x < 0 or y < 0:
            raise ZeroDivisionError
        if (min(y, x - y) * _bits(x) if name == "binom" else x * 10) > MAX_BITS:
            raise Refused("factorial too large")
        return Fraction(math.factorial(int(x)) if name == "fact" else math.comb(int(x), int(y)))

    return _fold(node, leaf, power, call, check)


def _sympy(node: Node, point: dict[str, Fraction], real: bool, digits: int) -> object:
    """The value at a point to so many digits. ArithmeticError where undefined, too large or, if real, not so.

    Every step is a number again: left symbolic, a short formula can keep sympy's evalf busy for hours.
    """
    import sympy

    def check(x: object) -> object:
        x = x.evalf(digits)
        if not x.is_finite or real and not x.is_real:
            raise ZeroDivisionError
        return x

    def leaf(n: Node) -> object:
        if n[0] == "const":
            return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}.get(n[1], sympy.zoo)
        x = n[1] if n[0] == "num" else point[n[1]]
        if _bits(x) > 4000:
            raise OverflowError
        return sympy.Rational(x.numerator, x.denominator)

    def power(a: object, b: object) -> object:
        if a != 0 and abs(b * sympy.log(abs(a)).evalf(9)) > 4000:
            raise OverflowError
        return a ** b

    def call(name: str, x: object, y: object = None) -> object:
        if name == "root":
            return -power(-x, 1 / y) if x.is_negative and y % 2 == 1 else power(x, 1 / y)
        if name == "binom":
            return call("fact", x) / call("fact", y) / call("fact", x - y)
        if name in ("exp", "sinh", "cosh"):
            power(sympy.E, x)
        if name == "fact":
            return sympy.gamma(x + 1) if abs(x) < 500 else power(sympy.E, 9999)
        if name in ("floor", "ceil") and x.is_real and abs(x - round(x)) < 1e-40:  # ln(e^3), a bit below 3
            return sympy.Integer(round(x))
        renamed = {"ln": "log", "ceil": "ceiling", "abs": "Abs"}
        return getattr(sympy, renamed.get(name, name.replace("arc", "a")))(x)

    return _fold(node, leaf, power, call, check)


def _points(*nodes: Node) -> list[dict[str, Fraction]]:
    """Fixed pseudo-random values of the symbols; whole numbers where only those make sense."""
    kinds = [n for node in nodes for n in _walk(node)]
    names = sorted({n[1] for n in kinds if n[0] == "sym"})
    whole = any(n[:2] in [("fn", f) for f in ("floor", "ceil", "fact", "binom")]
                or n[0] == "pow" and n[1][0] == "num" and n[1][1] < 0 for n in kinds)
    points = []
    for k, scale in enumerate((1, 1, 1, 40, Fraction(1, 4)) if names else (1,)):
        point = {}
        for i, name in enumerate(names):
            h = zlib.crc32(f"{name}{k}".encode("utf-8", "replace"))
            sign = -1 if k == 1 or k == 2 and i % 2 == 0 else 1
            real = sign * scale * Fraction(1000 + h % 2003, 997)
            point[name] = Fraction(2 + h % (23 if k < 3 else 997)) if whole else real
        points.append(point)
    return points


def _equal(g: Node, p: Node, prove: bool) -> bool:
    """Do two scalar trees agree wherever both are defined over the reals?"""
    points, met = _points(g, p), 0
    with contextlib.suppress(_Inexact):
        for point in points:
            try:
                if _rational(g, point) != _rational(p, point):
                    return False
                met += 1
            except (ZeroDivisionError, Refused) as error:  # undefined or too large here, but elsewhere?
                if not point:
                    raise Refused(str(error) or "undefined") from error
        return met > 0
    if not prove:
        raise _Undecided
    nodes = list(_walk((g, p)))
    if len(nodes) > MAX_TOKENS:
        raise Refused("formula too long")
    real = ("const", "i") not in nodes
    for point in points:
        with contextlib.suppress(ArithmeticError):
            coarse, fine = (abs(_sympy(g, point, real, d) - _sympy(p, point, real, d)) for d in (60, 120))
            if coarse != 0 and fine > coarse * 1e-20:  # rounding shrinks with more digits, a difference stays
                return False
            met += 1
    return met > 0


def _decimal(node: Node) -> tuple[Fraction, Fraction] | None:
    """(value, last place) of a decimal, a negative one, or one times a power of ten."""
    if node[0] == "mul" and (inner := _decimal(node[1][0])) and len(node[1]) == 2:
        with contextlib.suppress(_Inexact, KeyError, ZeroDivisionError):
            factor = _rational(node[1][1], {})
            return inner[0] * factor, abs(inner[1] * factor)
    return node[1:3] if node[0] == "num" and node[2] else None


def _scalar(g: Node, p: Node, prove: bool) -> bool:
    for mark, factor in (("pct", _num(Fraction(1, 100))), ("deg", _div(("const", "pi"), _num(180)))):
        if g[0] == p[0] == mark:
            return _scalar(g[1], p[1], prove)
        if mark in (g[0], p[0]):  # 5% is 5 or 0.05; 90 degrees are 90 or pi/2
            marked = g if g[0] == mark else p
            if mark == "pct" or ("const", "pi") in {*_walk(g), *_walk(p)}:
                if _scalar(*(_mul(n[1], factor) if n is marked else n for n in (g, p)), prove):
                    return True
            return _scalar(*(n[1] if n is marked else n for n in (g, p)), prove)
    if not (decimal := _decimal(g)):
        return _equal(g, p, prove)
    if "sym" in (n[0] for n in _walk(p)):
        return False
    try:
        try:
            value = _rational(p, {})
        except _Inexact:
            if not prove:
                raise _Undecided from None
            value = Fraction(str(_sympy(p, {}, real=True, digits=30)))
    except ArithmeticError:  # undefined or too large
        return False
    return abs(value - decimal[0]) <= min(decimal[1] / 2, abs(decimal[0]) * TOLERANCE)


# --- compare: everything else -------------------------------------------------------------------------------
def _is_name(node: Node) -> bool:
    """x, f(2), AB, (x,y), |AB|, S_1/S_2, \\text{area}: what may stand before the = of an answer."""
    if node[0] == "mul":
        arguments = ("num", "seq", "rel", "pow")
        return _is_name(node[1][0]) and all(_is_name(x) or x[0] in arguments for x in node[1][1:])
    if node[0] in ("seq", "ratio") or node[:2] == ("fn", "abs"):
        return all(map(_is_name, node[-1]))
    return node[0] in ("sym", "text")


def _value(node: Node) -> tuple[Node | None, Node]:
    """(name, value) of `name = value`, `name in set` or a chain `x = 1+1 = 2`; else (None, node)."""
    if node[0] != "rel":
        return None, node
    _, ops, sides = node
    if "~" in ops:  # x = 1/3 ~ 0.33 says 1/3, x ~ 0.33 says 0.33
        cut = max(ops.index("~"), int(_is_name(sides[0])))
        ops, sides = ("=",) * cut, sides[:cut + 1]
    constant = [all(n[0] != "sym" for n in _walk(side)) for side in sides]
    if not ops or set(ops) == {"="} and all(constant):
        return None, sides[-1]
    if _is_name(sides[-1]) and constant[0] and ops == ("=",):
        sides = sides[::-1]
    if _is_name(sides[0]) and set(ops) in ({"="}, {"in"}) and sides[0] not in _walk(sides[-1]):
        return sides[0], sides[-1]
    return None, ("rel", ops, sides)


def _alternatives(node: Node) -> list[Node]:
    """[a+b, a-b] for a \\pm b; all signs of one element turn together."""
    if not {"pm", "mp"} & {n[0] for n in _walk(node)}:
        return [node]

    def turned(n: Node, plus: str) -> Node | None:
        if n[0] not in ("pm", "mp"):
            return None
        inner = _replace(n[1], lambda m: turned(m, plus))
        return inner if n[0] == plus else _neg(inner)
    return [_replace(node, lambda n: turned(n, plus)) for plus in ("pm", "mp")]


def _items(node: Node) -> list[Node]:
    return [x for n in (node[1] if node[0] in ("list", "set") else [node]) for x in _alternatives(n)]


def _flip(node: Node) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    """Operators and sides of a relation, written with < and <=."""
    flipped = {">": "<", ">=": "<="}
    ops, sides = node[1:]
    return (tuple(flipped.get(o, o) for o in ops[::-1]), sides[::-1]) if ops[0] in flipped else (ops, sides)


def _region(node: Node) -> list[Node] | None:
    """Part of the line as pieces, from a union, an interval or inequalities for one name; else None."""
    low, high = _neg(("const", "oo")), ("const", "oo")
    if node[0] == "cup" or node[0] == "list" and node[2]:
        parts = [_region(x) for x in node[1]]
        return None if None in parts else sum(parts, [])
    if node[0] in ("set", "seq") or node == ("const", "R"):
        pieces = [("set", (x,)) for x in node[1]] if node[0] == "set" else [node]
        return [("seq", "()", (low, high))] if node[0] == "const" else pieces
    if node[0] != "rel":
        return None
    ops, sides = _flip(node)
    if ops == ("in",):
        return _region(sides[1])
    if ops == ("!=",) and _is_name(sides[0]):
        return [("seq", "()", (low, sides[1])), ("seq", "()", (sides[1], high))]
    if len(ops) == 1:
        ops, sides = (("<", *ops), (low, *sides)) if _is_name(sides[0]) else ((*ops, "<"), (*sides, high))
    if len(ops) != 2 or not set(ops) <= {"<", "<="} or not _is_name(sides[1]):
        return None
    left, right = (op == "<" for op in ops)
    pieces = [("seq", "[("[left] + "])"[right], sides[::2])]
    if sides[1][:2] == ("fn", "abs") and sides[0] != low:  # 1 < |x| < 2
        pieces.append(("seq", "[("[right] + "])"[left], (_neg(sides[2]), _neg(sides[0]))))
    return pieces


def _relation(g: Node, p: Node, prove: bool) -> bool:
    """Equations and inequalities are the same up to a constant factor, for < and <= a positive one."""
    (g_ops, g_sides), (p_ops, p_sides) = _flip(g), _flip(p)
    if g_ops != p_ops or len(g_ops) > 1 or g_ops[0] == "in":
        return g_ops == p_ops and all(_same(a, b, prove) for a, b in zip(g_sides, p_sides))
    a, b = (_add(sides[0], _neg(sides[1])) for sides in (g_sides, p_sides))
    ratio = _div(a, b)
    elsewhere = _replace(ratio, lambda n: ("sym", n[1] + "'") if n[0] == "sym" else None)
    size = ("fn", "abs", (ratio,))
    return _equal(ratio, elsewhere, prove) and (g_ops[0] in ("=", "!=") or _equal(ratio, size, prove))


def _cover(gs: Sequence[Node], ps: Sequence[Node], prove: bool) -> bool:
    """The same elements in any order, repeats ignored; named ones (a=1, b=2) under the same names."""
    def same(g: Node, p: Node) -> bool:
        names = {_value(n)[0] for n in (g, p)} - {None}
        return (len(names) < 2 or len(gs) == 1) and _same(g, p, prove)
    return bool(gs) == bool(ps) and max(len(gs), len(ps)) <= MAX_ITEMS and (
        all(any(same(g, p) for p in ps) for g in gs) and all(any(same(g, p) for g in gs) for p in ps))


def _same(g: Node, p: Node, prove: bool) -> bool:
    """Are two trees of any kind the same answer?"""
    if g == p:
        return True
    if any(n[0] in ("cup", "rel") or n == ("const", "R") or n[0] == "list" and n[2] for n in (g, p)):
        regions = _region(g), _region(p)
        if None not in regions:
            return _cover(*regions, prove)
    for a, b in ((g, p), (p, g)):  # x=1, y=2 against (1,2)
        named = [_value(n) for n in a[1]] if a[0] == "list" and b[0] == "seq" else [(None, None)]
        if len({name for name, _ in named} - {None}) == len(named) == len(b[-1]):
            a = ("seq", "()", tuple(value for _, value in named))
            return _same(*((a, b) if b is p else (b, a)), prove)
    gs, ps = _items(g), _items(p)
    if (len(gs), len(ps)) != (1, 1):
        return _cover(gs, ps, prove)
    (_, gv), (_, pv) = _value(gs[0]), _value(ps[0])
    if "rel" not in (gv[0], pv[0]):
        if (_plain(gv, pv, prove) if (gv, pv) == (g, p) else _same(gv, pv, prove)):
            return True
    return gs[0][0] == ps[0][0] == "rel" and _relation(gs[0], ps[0], prove)


def _plain(g: Node, p: Node, prove: bool) -> bool:
    """One value against one value."""
    if "unit" in (g[0], p[0]):
        other = {"cent": "dollar", "dollar": "cent", "am": "pm", "pm": "am"}
        if "pct" in (g[0], p[0]) or g[0] == p[0] and other.get(g[2].rstrip("s")) == p[2].rstrip("s"):
            return False
        return _same(*(n[1] if n[0] == "unit" else n for n in (g, p)), prove)
    if {g[0], p[0]} == {"mat", "seq"}:  # a column against a tuple
        column = [n for n in (g, p) if n[0] == "mat" and len(n[1][0]) == 1]
        g, p = (("seq", "()", sum(n[1], ())) if n in column else n for n in (g, p))
    if g[0] == p[0] == "mat":
        g, p = (("seq", str(len(n[1])), sum(n[1], ())) for n in (g, p))
    if g[0] == p[0] == "seq":
        return g[1] == p[1] and len(g[2]) == len(p[2]) and all(_same(a, b, prove) for a, b in zip(g[2], p[2]))
    if "ratio" in (g[0], p[0]) and "unit" in (n[0] for n in _walk((g, p))):  # 4:40 a.m. is no 1/10
        return g[0] == p[0] and len(g[1]) == len(p[1]) and all(map(_same, g[1], p[1], [prove] * len(g[1])))
    if "ratio" in (g[0], p[0]):
        a, b = (n[1] if n[0] == "ratio" else (n, _num(1)) for n in (g, p))
        return len(a) == len(b) and all(_equal(_div(x, a[-1]), _div(y, b[-1]), prove) for x, y in zip(a, b))
    scalars = ("num", "sym", "const", "add", "mul", "pow", "fn", "pct", "deg")
    finite = all(("const", "oo") not in _walk(n) for n in (g, p))
    return finite and g[0] in scalars and p[0] in scalars and _scalar(g, p, prove)


# --- verdicts -----------------------------------------------------------------------------------------------
def _judge(answer: str, gold: str, prove: bool) -> bool:
    """The verdict on a bare answer. Raises Refused, and _Undecided when it takes sympy and prove is False."""
    g, text = _parse(_whole(gold)), _clean(answer)
    if text == _clean(_whole(gold)) or g[0] == "text" and _text_key(text) == g[1]:
        return True
    if _decimal(g) and re.fullmatch(r"-?\d+,\d\d?", text):  # 2,74
        text = text.replace(",", ".")
    return g[0] != "text" and _same(g, _parse(text), prove)


def _whole(gold: str) -> str:
    """The answer within a gold answer that is a worked solution."""
    marked = "boxed" in gold or "####" in gold or "answer is" in gold
    return marked and extract_answer(gold) or gold


def _verdict(answer: str | None, gold: str, prove: bool) -> bool | None:
    """_judge without exceptions, None if undecided. Sympy may raise anything, hence Exception."""
    try:
        return answer is not None and bool(_judge(answer, gold, prove))
    except _Undecided:
        return None
    except Exception as error:
        log.info("not correct: %.80r: %s: %.80s", answer, type(error).__name__, error)
        return False


def parse_error(gold: str) -> str | None:
    """Why a gold answer cannot be used, or None. Drop such a problem when loading; it never scores."""
    try:
        return None if _parse(_whole(gold)) else "empty"
    except Refused as error:
        return str(error)


def is_correct(response: str, gold: str, loose: bool = True) -> bool:
    """Does the response's final answer equal the gold answer? Never raises. Bounded work, no time limit."""
    return _verdict(extract_answer(response, loose), gold, prove=True) is True


class Checker:
    """is_correct for many pairs, with the same verdicts, from any thread.

    What needs sympy goes to `workers` processes, started at first need; an answer that takes one longer than
    `time_limit` seconds, or kills it, is not correct. workers=0: all in this process and no limit.
    Counters, reset by the caller: timeouts (slow or killed checks) and check_ms_max.
    """

    def __init__(self, workers: int = 1, time_limit: float = 1.0, loose: bool = True) -> None:
        if workers < 0 or time_limit <= 0:
            raise ValueError(f"workers={workers} must be 0 or more, time_limit={time_limit} positive")
        self.workers, self.time_limit, self.loose = workers, time_limit, loose
        self.timeouts, self.check_ms_max = 0, 0.0
        self._lock, self._idle = threading.Lock(), queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """One verdict for each (response, gold)."""
        with self._lock:
            answers = [(extract_answer(response, self.loose), gold) for response, gold in pairs]
            verdicts = {}
            for pair in dict.fromkeys(answers):
                start = time.perf_counter()
                verdicts[pair] = _verdict(*pair, prove=self.workers == 0)
                self._note(start)
            hard = [pair for pair, verdict in verdicts.items() if verdict is None]
            if hard:
                with ThreadPoolExecutor(self.workers) as pool:
                    verdicts |= zip(hard, pool.map(self._ask, hard))
            return [verdicts[pair] for pair in answers]

    def _note(self, start: float) -> None:
        self.check_ms_max = max(self.check_ms_max, 1000 * (time.perf_counter() - start))

    def _ask(self, pair: tuple[str, str]) -> bool:
        worker, line = self._idle.get(), ""
        try:
            for _ in range(2):  # one that died while idle is replaced
                worker = worker or self._start()
                start = time.perf_counter()
                with contextlib.suppress(OSError):
                    worker.stdin.write(json.dumps(pair) + "\n")
                    worker.stdin.flush()
                    ready = select.select([worker.stdout], [], [], self.time_limit)[0]
                    line = worker.stdout.readline() if ready else None
                self._note(start)
                if not line:
                    worker = self._stop(worker)
                if line != "":
                    break
        finally:
            self._idle.put(worker)
        if not line:
            self.timeouts += 1
            log.info("not correct: no verdict within %s s: %.80r", self.time_limit, pair)
        return line == "true\n"

    @staticmethod
    def _start() -> subprocess.Popen:
        worker = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if worker.stdout.readline() != "ready\n":  # sympy is loaded; that is no answer's time
            raise RuntimeError("the worker that checks answers did not start: is sympy installed?")
        return worker

    @staticmethod
    def _stop(worker: subprocess.Popen | None) -> None:
        if worker:
            worker.kill()
            worker.communicate()

    def close(self) -> None:
        for _ in range(self.workers):
            self._stop(self._idle.get())
            self._idle.put(None)

    def __enter__(self) -> Checker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve() -> None:
    """A worker process: pairs in, verdicts out, one JSON value a line."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]  # sympy must not meet a project module
    import resource

    import sympy  # noqa: F401
    with contextlib.suppress(ValueError, OSError):  # some systems do not limit address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_verdict(*json.loads(line), prove=True)), flush=True)


def length_rewards(correct: Sequence[float], lengths: Sequence[int], alpha: float) -> list[float]:
    """Eq. 11 of arXiv 2601.19404 within one group: a correct response of `len` tokens gets
    clip(1 / (1 + exp(-alpha * (l_ref - len))), 0.5, 1), l_ref the group's mean length; a wrong one stays 0.
    alpha 0: the accuracies unchanged. Raises ValueError if the two do not have the same number.
    """
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} accuracies but {len(lengths)} lengths: give one of each a response")
    if alpha == 0 or not lengths:
        return list(correct)
    mean = sum(lengths) / len(lengths)
    gains = [0.5 + 0.5 * math.tanh(0.5 * alpha * (mean - n)) for n in lengths]  # the sigmoid without overflow
    return [min(max(gain, 0.5), 1.0) if c > 0 else 0.0 for c, gain in zip(correct, gains)]


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
