"""Is a response's final answer right?  Read down: extract, clean, parse, evaluate, compare, verdicts.

Our own tokenizer and parser turn both answers into trees of tuples; nothing a model wrote is run as code.
Trees are compared from cheap to expensive: text, structure, exact fractions with the symbols at fixed random
points; only what is not a fraction is computed with 60 and with 120 digits. Everything is bounded before it
is computed, by counting and not by a clock: a verdict is the same on every machine. See docs/answers.md."""
import contextlib
import functools
import math
import random
import re
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from fractions import Fraction

MAX_CHARS, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 1500, 400, 24, 64  # of one answer; beyond: refused
MAX_BITS, MAX_LOG = 40_000, 4000  # bits of a fraction (2004! has 19,000); logarithm of any other number
MAX_WORK = 500_000  # of one comparison, roughly in microseconds
TOLERANCE = Fraction(1, 10_000)  # relative, and only where the gold answer is a decimal
Node = tuple  # (kind, ...): num value last_place | sym name | add nodes | pow a b | fn name args | ...


class Refused(Exception):
    """The answer cannot be read or is beyond the bounds. Never leaves this module."""


def _limit(size: object, most: int, what: str = "number too large, or too much work") -> None:
    if size > most:
        raise Refused(what)


# --- extract ------------------------------------------------------------------------------------------------
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(\{)|\\.|[{}]", re.S)
_MARK = re.compile(r"####|(?i:\banswers?\b[\s*]{0,4}(?:(?:is|are)\b(?! not\b)|:|=))|(?:^|(?<=\n))[ *]{0,4}A:")
_FORMULA = r"(?<!\\)\$\$?((?:\\\$|[^$]){1,400}?)(?<!\\)\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]"
_LOOSE = re.compile(_FORMULA + r"|(?<![\w.,])(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?\s?(?:\\?%|percent)?)", re.S)
_SAID = re.compile(rf"(?:[^\w$\\]*(?:{_FORMULA}))?.*?(?=\.(?:\s|\Z)|\n|\Z)", re.S)
_PROSE = re.compile(r"[^\d\\$]*[A-Za-z]{3}|.*\S\n.*\S", re.S)
_AFTERTHOUGHT = re.compile(  # 72, which is the total; but not: 72, or maybe 73
    r"(.*?)(?:(?<=[\w$)}\]%°!])(?:[,;] *| +\((?!mod)| +(?=(?:which|because|since|so|not)\b))"
    r"(?=an? |[a-z]{2})(?!(?:and|sin|cos|ln|log)\b"
    r"|.*\b(?:or|may|maybe|might|could|perhaps|possibly|but|though|wait|actually)\b).*)?", re.S)
_MARKUP = re.compile(r"\\(?:q?quad|text|mbox|[()\[\],;: ])|[${}*\s\"]")
_JOINT = re.compile(r" *(?:[,;]|[^.?!:;]{0,30}\b(?:and|or)\b)? *(?:\w{1,8} *=)? *")


def extract_answer(response: str, loose: bool = False) -> str | None:
    """The answer a response commits to, or None: the last \\boxed{} (those joined by "," or "and": one list),
    else what follows ####, "the answer is", "answer:" or "A:". Text after </think> is searched first.
    loose: failing these, the last formula or number; in training, that would reward leaving out the box."""
    head, _, tail = response.rpartition("</think>")
    for find in (_boxed, _stated, _unmarked)[:3 if loose else 2]:
        for text in (tail, head):
            if (answer := find(text)) or answer == "" and text is tail:
                return answer.strip() or None
    return None


def _runs(text: str, spans: list[tuple[int, int, str]]) -> list[str]:
    """Answers from spans (start, end, content): spans with only a connective between them are one list."""
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
    if any(m[1] and m.start() > max(boxes, default=(-1,))[0] for m in open_braces):
        return ""  # the last box was cut off: there is no answer
    return _runs(text, boxes)[-1] or None if boxes else None


def _stated(text: str) -> str | None:
    marks = [m.end() for m in _MARK.finditer(text)]
    line = text[marks[-1]:][:4 * MAX_CHARS].strip(" \n*:").split("\n\n")[0] if marks else ""
    sentence = _SAID.match(line)[0]
    value = _AFTERTHOUGHT.fullmatch(sentence)[1]
    sentence = value if re.search(r"[\d$\\]|\b[A-Z]\b", value) else sentence  # not: obviously, as said, 72
    return (_unmarked(sentence) or sentence).strip(" $*") or None


def _unmarked(text: str) -> str | None:
    """The whole text if it is a bare answer, else its last formulas or numbers."""
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
    "ℝ": r"\mathbb{R}", "€": "", "£": "", "\u200b": "", "\ufeff": "", "∘": "°", "’": "'"})
_FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp".split())
_SAME_AS = {spelling: token for token, spellings in {
    "<=": r"\le \leq \leqslant", ">=": r"\ge \geq \geqslant", "<": r"\lt", ">": r"\gt", "!=": r"\ne \neq",
    "~": r"\approx \simeq", "=": "==", "*": r"\cdot \times \ast", "/": r"\div", "^": "**", "(": r"\langle",
    ")": r"\rangle", r"\{": r"\lbrace", r"\}": r"\rbrace", r"\emptyset": r"\varnothing", ",": "&",
    r"\setminus": r"\backslash", r"\log": r"ln \ln", ";": r"\\"}.items() for spelling in spellings.split()}
_UNIT_OF = {spelling: unit for unit, spellings in {
    "mm": "millimeter", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre kph",
    "inch": "inches", "ft": "foot feet", "yard": "yd", "mi": "mile mph", "g": "gram", "kg": "kilogram",
    "lb": "pound", "oz": "ounce", "s": "sec second", "min": "minute", "h": "hr hour", "day": "", "week": "",
    "month": "", "year": "", "dollar": "usd", "cent": "", "euro": ""}.items()
    for word in (unit, *spellings.split()) for spelling in (word, word + "s")}
_UNITS = {word for word in _UNIT_OF if len(word.rstrip("s")) > 1} - {"min"}  # the others may be products
_LETTERS = set(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau "
    "phi chi psi varphi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega hbar ell mho".split())
_WORDS = {"sqrt", "infty", "abs"} | _LETTERS | _FUNCTIONS
_OPTION = re.compile(r"\(?([A-J])[).:]+(?!.*((?<!\\)\b[A-HJ]\b|\b(is|are|or|not|maybe)\b)).*")  # one letter
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|hbox|math(?:rm|it|sf)|operatorname)\s*\{([^{}]*)\}")
_ANY_WORD, _ANY_UNIT = ("|".join(sorted(words, key=len, reverse=True)) for words in (_WORDS, _UNITS))
_WRITTEN = _TEXT.pattern.replace("([^{}]*)", "[^{}]*")
_SAYS = (r"(?:(?:so|thus|hence|therefore),? )*(?:(?:the|my|our|final) (?:[a-z-]{1,20} ){0,6})?"
         r"[a-z]{2,20}(?: is\b| are\b|(?<=answer) ?[:=]):?")
_CLEAN = [(re.compile(pattern), replacement) for pattern, replacement in [
    (r"(?<!\\)\\\\(?=[a-z]{3}|(?:pi|pm|[lgn]e)(?![a-z]))", r"\\"),  # escaped once too often
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])|\\(?:displaystyle|limits)\b", ""),
    (r"^\s*(-?)\\\$\s*([\d.,]+)$", r"\1\2 dollar"),  # a unit, as others
    (r"\\\$|\$|(?<!\\)\\[()\[\]]", ""), (r"\\%|\bpercent(?:age)?\b|\bpct\b", "%"),
    (r",\\!\s*|\s*\{,\s*\}(?=\d{3})|\\!", ""), (r"(\\\\) *\[-?[\d.]+ *[a-z]{2}\]", r"\1"),  # \\[2pt]
    (r"\\q?quad|(?<!\\)\\[,;:> ]|~|\\(?:angle|triangle|phantom)\b|\s+", " "),
    (r"(?i) *,? *(?:\\text *\{,? *(?:and|or),? *\}|\b(?:and|or)\b)", ", "),
    (r"(?<=[\d)} ])(?:is )?to\b(?= *[\d\\({])|\\text *\{ *(?:is )?to *\}", ":"),
    (r"(?<![\^_}])(?<![A-Za-z]{2})(?:\\math[a-z]+ *)?\{ *([:=<>,;]) *\}", r"\1"),
    (r"\\sqrt *\[([^\[\]]*)\]", r"\\root{\1}"), (r"\\mathbb *(?:\{R\}|R\b)|\\R\b", r"(-\\infty,\\infty)"),
    (r"\\lg\b", r"\\log_{10}"), (r"\\(sin|cos|tan) *\^ *\{? *-1 *\}?", r"\\arc\1 "),
    (r"(?<![\d.,] )(?<![\d.,])[1-9]\d{0,2}(?: \d{3})+(?![\d/]| ?/)", lambda m: m[0].replace(" ", "")),
    (r"(?<=\d),(?<!\d{4},)(?=\d{3}(?!\d))(?![^(\[]*[)\]]|[^{]*\\\})", ""),  # but (100,101) are two
    (r"\\[lr]?vert\b|\\mid\b", "|"), (r"\|([^|]+)\|", r"\\abs{\1}"),
    (r"\\l(floor|ceil)\b", r"\\\1{"), (r"\\r(floor|ceil)\b", "}"), (r"\\\{ *\\\}", r"\\emptyset "),
    (r"\\\{ *[A-Za-z](?: *\\in *\(-\\infty,\\infty\))? *[|:] *((?:(?!\\\}).)+)\\\}", r"\\{\1\\}"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)|\\degree\b", "°"), (r"\^\s*(?:\{\s*\\prime\s*\}|\\prime\b)", "'"),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "), (r"^ ?(?:\\approx|=)\s", ""),
    (rf"(?i)^ *(\\[a-z]+ *\{{)? *{_SAYS} *(?(1)(\}}|)|)", lambda m: m[1] if m[1] and not m[2] else ""),
    (_TEXT.pattern.replace("[^{}]*", r"\s*[ei]\s*|[^A-Za-z{}]*(?:(?i:[ap]\.? ?m)\.? *)?"), r" \1 "),
    (r"(?i)(?<![\w.])(\d{1,2})(:\d\d)? *([ap])\.? ?m\b\.?(?! *[\^/*+=-])",  # a time is a name
     lambda m: f"t_{{{int(m[1])}{m[2] or ':00'}{m[3].lower()}m}}"),
    (r"(?:^|(?<=[=,;])) *([A-Z]{2,})(?=[ .]*(?:$|[,;]))", r" \\text{\1}"),  # an order or a name, no product
    (r"(?<![\d})°])(?<![\d})°] )" + _TEXT.pattern.replace("[^{}]", r"(?![A-Za-z]{2})[^{}]"), r" \1 "),
    (rf"({_WRITTEN}|(?<![A-Za-z\\])(?:{_ANY_UNIT})(?![a-z]))"  # \text{cm}^2, km/h: the first counts
     rf"(?: *\^ *\{{?-?\d\}}?| */ *(?:{_WRITTEN}|[a-z]+))+", r"\1"),
    (r"(?:\\\\ *)?\\(begin|end)\{(?:[pbB]?matrix|array)\}(?:\{[lcr|]*\})?", r"\\\1matrix "),
    (r"\\[dtc](frac|binom)", r"\\\1"), (r"\\(frac|binom|sqrt|root\{[^{}]*\}) *(\d)", r"\\\1{\2}"),
    (r"\\frac(\{[^{}]*\}) *(\d)", r"\\frac\1{\2}"), (r"^[ \"'`“*]+(.*?)[\"'`”*]+[ .]*$", r"\1"),
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
    _limit(len(text), MAX_CHARS, f"longer than {MAX_CHARS} characters")
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE))
    for pattern, replacement in _CLEAN:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(" .,;:\\")


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


_neg, _minus = functools.partial(_mul, _num(-1)), functools.partial(_chain, "minus")


def _items(node: Node, *kinds: str) -> tuple[Node, ...]:
    return node[1] if node[0] in kinds else (node,)


def _walk(node: Node) -> list[Node]:
    """The node and all nodes below it."""
    below = [n for child in node if isinstance(child, tuple) for n in _walk(child)]
    return [node, *below] if node and isinstance(node[0], str) else below


ROWS, ITEMS, RELATION, UNION, RATIO, UNIT, SUM, PRODUCT, POWER, SUFFIX, ARGUMENT = range(11)  # binding
_INFINITY, _DEGREE = ("const", "oo"), _div(("const", "pi"), _num(180))
_OPERATORS = {
    ";": (ROWS, functools.partial(_chain, "rows")),  # p=5,q=2;p=7,q=2 are two rows of two items
    ",": (ITEMS, functools.partial(_chain, "list")),
    ":": (RATIO, functools.partial(_chain, "ratio")), "\\setminus": (UNION, _minus), "+": (SUM, _add),
    "\\cup": (UNION, lambda a, b: ("set", a[1] + b[1]) if a[0] == b[0] == "set" else _chain("union", a, b)),
    "-": (SUM, lambda a, b: _minus(a, b) if b[0] == "set" else _add(a, _neg(b))),
    "*": (PRODUCT, _mul), "/": (PRODUCT, _div), "^": (POWER, lambda a, b: ("pow", a, b))}
_SUFFIXES = {"!": lambda a: ("fn", "fact", (a,)), "°": lambda a: ("deg", a), "%": lambda a: ("pct", a)}
_BRACKETS = {"{": ["}"], "\\{": ["\\}"], "(": [")", "]"], "[": [")", "]"]}
_NO_UNIT = re.compile(r"[^\w ./,()'{}-]|\d|\b(?i:not?|or)\b")  # 7 \text{ or maybe 8}
_RELATIONS = ("=", "<", ">", "<=", ">=", "!=", "\\in", "~")
_CLOSING = {"\\}", "\\endmatrix", "\\in", *_OPERATORS}
_COMMAND = {  # name: (how many arguments, the node)
    "frac": (2, _div), "binom": (2, lambda a, b: ("fn", "binom", (a, b))),
    "sqrt": (1, lambda a: ("fn", "root", (a, _num(2)))), "root": (2, lambda n, a: ("fn", "root", (a, n))),
    **{x: (1, lambda a, x=x: ("fn", x, (a,))) for x in ("abs", "floor", "ceil")},
    "infty": (0, lambda: _INFINITY), "emptyset": (0, lambda: ("set", ())),
    **dict.fromkeys(["boxed", "fbox", "mathbf", "boldsymbol"], (1, lambda a: a)),
    **{x: (1, lambda a, x=x: ("sym", x + repr(a))) for x in "overline bar vec hat dot ddot".split()},
    **{x: (0, lambda x=x: ("const" if x == "pi" else "sym", x)) for x in _LETTERS}}


class _Parser:
    """Parses by operator precedence; juxtaposition multiplies."""

    def __init__(self, text: str) -> None:
        self.tokens, self.i, self.depth, end = [], 0, 0, 0  # tokens: (group of _TOKEN or stop, text)
        while m := _TOKEN.match(text, end):
            value, end = m[m.lastgroup].strip(), m.end()
            self.tokens.append((m.lastgroup, _SAME_AS.get(value, value)))
        if end < len(text) or len(self.tokens) > MAX_TOKENS:
            raise Refused(f"unreadable or too many tokens: {text[end:end + 9]!r}")
        self.tokens.append(("stop", ""))

    kind = property(lambda self: self.tokens[self.i][0])
    value = property(lambda self: self.tokens[self.i][1] if self.kind not in ("text", "unit", "sub") else "")

    def take(self, *values: str) -> str:
        """Consume the current token and return its text; with values, only one of these, else ""."""
        text = self.tokens[self.i][1]
        if self.kind == "stop" or values and self.value not in values:
            return ""
        self.i += 1
        return text

    def need(self, *values: str) -> str:
        if token := self.take(*values):
            return token
        raise Refused(f"unexpected {self.tokens[self.i][1] or 'end'!r}")

    def whole(self) -> Node:
        node = self.expr()
        return node if self.kind == "stop" else self.need("the end")

    def expr(self, level: int = ROWS) -> Node:
        self.depth += 1
        _limit(self.depth, MAX_DEPTH, "too deep")
        sign = self.take(*("+-" if level <= PRODUCT else "-")) if level <= POWER else ""
        node = self.expr(max(level, PRODUCT)) if sign else self.primary()
        node = _neg(node) if sign == "-" else node
        while True:
            binds, build = _OPERATORS.get(self.value, (None, None))
            if self.kind in ("sub", "prime") and node[0] in ("num", "sym", "const"):  # 52_8, too, is a name
                node = ("sym", f"{node[1]}_" + re.sub(r"[{}\s]|\\text|\\mathrm", "", self.take()))
            elif level <= SUFFIX and self.value in _SUFFIXES:
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

    def starts_factor(self) -> bool:
        known = self.kind in ("num", "word") or self.value[:1] in ("(", "[", "{", "\\")
        return known and self.value not in _CLOSING

    def relation(self, node: Node) -> Node:
        """A chain such as 1 < x <= 2; one with > or >= is turned around."""
        ops, sides = [], [node]
        while self.value in _RELATIONS:
            ops.append(self.take())
            sides.append(self.expr(UNION))
        if ops[0] in (">", ">="):
            ops, sides = [op.replace(">", "<") for op in reversed(ops)], reversed(sides)
        return ("rel", tuple(ops), tuple(sides))

    def primary(self) -> Node:
        """A number, name, command or bracket."""
        if self.kind == "num":
            mantissa, _, exponent = self.take().lower().partition("e")
            _limit(max(len(mantissa), 100 * len(exponent)), 400, "too many digits")
            scale, decimals = Fraction(10) ** int(exponent or 0), mantissa.partition(".")[2]
            return _num(Fraction(mantissa) * scale, scale / 10 ** len(decimals) if "." in mantissa else None)
        if self.kind in ("text", "unit"):
            return ("text", _text_key(self.take()))
        if self.value.startswith("\\") and self.value not in _BRACKETS or self.value in _WORDS:
            name = self.take().lstrip("\\")
            if name == "beginmatrix":
                rows = [_items(row, "list") for row in _items(self.expr(), "rows")]
                return self.need("\\endmatrix") and ("mat", tuple(zip(*zip(*rows, strict=True))))
            if name in _FUNCTIONS:
                return self.function(name)
            arguments, build = _COMMAND.get(name) or self.need("a known command")
            return build(*(self.expr(ARGUMENT) for _ in range(arguments)))
        if self.kind == "word" and len(self.value) == 1:
            return ("const" if self.value in "ei" else "sym", self.take())
        opening = self.need(*_BRACKETS)
        node = self.expr()
        pair = opening + self.need(*_BRACKETS[opening])
        if pair == "\\{\\}" and node[0] != "rel" or pair == "{}" and node[0] in ("list", "rows"):
            return ("set", _items(node, "list", "rows"))
        if node[0] in ("list", "rows"):
            return ("seq", pair, node[1])
        return node if pair not in ("(]", "[)") else self.need(",")

    def function(self, name: str) -> Node:
        """\\sin^2 x, \\log_2 8, \\sin 2x: without brackets the argument is the product that follows."""
        base = _Parser(self.take().strip("{} ")).whole() if self.kind == "sub" else None
        power = self.expr(POWER) if self.take("^") else _num(1)
        bracketed = self.value in ("(", "[", "{")
        arg = self.primary() if bracketed else self.expr(POWER)
        while not bracketed and self.starts_factor() and self.value.strip("\\") not in {"(", *_FUNCTIONS}:
            arg = _mul(arg, self.expr(POWER))
        arg = _mul(arg[1], _DEGREE) if arg[0] == "deg" else arg
        node = _div(("fn", "log", (arg,)), ("fn", "log", (base,))) if base else ("fn", name, (arg,))
        return node if power == _num(1) else ("pow", node, power)


def _text_key(text: str) -> str:
    words = re.sub(r"[^\w\s]|_", " ", _TEXT.sub(r"\1", text)).casefold().split()
    return " ".join(words[1:] if words[1:] and words[0] in ("a", "an", "the") else words)


@functools.lru_cache(4096)
def _parse(clean: str) -> Node:
    """The tree of a clean answer; ("text", key) if it is words. Raises Refused."""
    bare, wrapped = _TEXT.sub(r" \1 ", clean).strip(), _TEXT.fullmatch(clean)
    words = [w for w in re.findall("[A-Za-z]+", bare) if w.lower() not in _WORDS | _UNITS]
    prose = max(map(len, words), default=0) > (3 if bare == clean else 1)
    if prose and re.fullmatch(r"[A-Za-z\s,.'\"()&-]+", bare):
        return ("text", _text_key(clean))
    try:
        if "\\pm" not in clean:  # else all signs turn together
            return _Parser(bare if wrapped else clean).whole()
        nodes = [_Parser(clean.replace("\\pm", a).replace("\\mp", b)).whole() for a, b in ("+-", "-+")]
        return ("list", tuple(x for n in nodes for x in _items(n, "list", "rows", "set", "union")))
    except (Refused, ValueError, ArithmeticError, RecursionError) as error:  # matrix shapes, nonsense numbers
        if wrapped and _text_key(bare):
            return ("text", _text_key(clean))
        raise Refused(str(error)) from error


# --- evaluate -----------------------------------------------------------------------------------------------
def _bits(x: Fraction) -> int:
    return x.numerator.bit_length() + x.denominator.bit_length()


class _Evaluator:
    """Computes scalar trees at points: in fractions while that is exact, else in sympy's numbers. Every step
    is bounded before it is computed and counts as work; a tree's value at a point is computed once."""

    def __init__(self) -> None:
        self.work_left, self.known = MAX_WORK, {}

    def at(self, node: Node, point: dict[str, Fraction], digits: int = 60, real: bool = True) -> object:
        """A value, or None where there is none; with real, also where a step is not real."""
        key = (node, digits, real, *point.items())
        if key not in self.known:
            self.known[key], self.point, self.digits, self.real = None, point, digits, real
            with contextlib.suppress(ArithmeticError, ValueError):
                self.known[key] = self.value(node)
        return self.known[key]

    def number(self, node: Node, point: dict[str, Fraction]) -> Fraction | None:
        """The same as a fraction, without its last digits."""
        value = self.at(node, point)
        return None if value is None else self.rounded(value)

    def gap(self, g: Node, p: Node, point: dict[str, Fraction], digits: int, real: bool) -> object:
        """The distance of two values, or None."""
        a, b = self.at(g, point, digits, real), self.at(p, point, digits, real)
        return None if a is None or b is None else self.checked(abs(a - b))

    def value(self, node: Node) -> object:
        """Raises ArithmeticError or ValueError where undefined."""
        match node:
            case ("num", x, _):
                return self.checked(x)
            case ("sym", name) if name in self.point:
                return self.point[name]
            case ("const", name) if node != _INFINITY:
                return self.checked(self.inexact({"e": "E", "i": "I"}.get(name, name)))
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

    def checked(self, x: object) -> object:
        """The value of one step within the bounds; its work, in about microseconds, is counted."""
        exact = isinstance(x, Fraction)
        self.work_left -= 3 + _bits(x) // 20 if exact else 100
        _limit(-self.work_left, 0)
        if exact:
            _limit(_bits(x), MAX_BITS)
            return x
        x = self.inexact(x)
        if not x.is_finite or self.real and not x.is_real:
            raise ZeroDivisionError("undefined")
        _limit(self.log_size(x), 2 * MAX_LOG)
        return x

    def inexact(self, x: object) -> object:
        """A sympy number of self.digits digits, real or complex."""
        import sympy  # half a second, and most answers never come here
        return x if getattr(x, "is_Float", False) else sympy.N(sympy.sympify(x), self.digits)

    def rounded(self, x: object) -> Fraction:
        """A real value as a fraction, less its last digits: ln(e^3) may come out slightly below 3."""
        return x if isinstance(x, Fraction) else Fraction(str(x.evalf(self.digits - 10)))

    def log_size(self, x: object) -> float:
        x = self.rounded(abs(x))
        return abs(math.log(x.numerator) - math.log(x.denominator)) if x else 0.0

    def power(self, a: object, b: object) -> object:
        if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
            _limit(_bits(a) * abs(b) if _bits(a) > 2 else 0, 2 * MAX_BITS)
            return a ** (b % 2 if abs(a) == 1 else b)
        a, b = map(self.inexact, (a, b))
        _limit(abs(b) * self.log_size(a), MAX_LOG)
        return a ** b

    def call(self, name: str, x: object, y: object = Fraction(0)) -> object:
        if name == "abs":
            return abs(x)
        if name == "root":  # the odd root of a negative number is real, its power is not
            odd = isinstance(y, Fraction) and y % 2 == 1 and getattr(x, "is_real", True) and x < 0
            return -self.power(-x, 1 / y) if odd else self.power(x, 1 / y)
        if name in ("floor", "ceil"):
            return Fraction(getattr(math, name)(self.rounded(x)))
        if name in ("fact", "binom"):
            if not all(isinstance(n, Fraction) and n.denominator == 1 and n >= 0 for n in (x, y)):
                raise ZeroDivisionError("undefined")
            _limit(min(y, x - y) * _bits(x) if name == "binom" else x * 10, MAX_BITS)
            return Fraction(math.factorial(int(x)) if name == "fact" else math.comb(int(x), int(y)))
        _limit(abs(x) if name in ("exp", "sinh", "cosh") else 0, MAX_LOG)
        import sympy
        return getattr(sympy, name.replace("arc", "a"))(self.inexact(x))


def _points(node: Node) -> Iterator[dict[str, Fraction]]:
    """Fixed random values for the symbols; whole numbers where only those make sense."""
    nodes, rng = _walk(node), random.Random(0)
    names = sorted({n[1] for n in nodes if n[0] == "sym"})
    whole = any(n[0] == "fn" and n[1] in ("floor", "ceil", "fact", "binom")
                or n[0] == "pow" and n[1][0] == "num" and n[1][1] < 0 for n in nodes)
    ranges = [(2, 24)] * 3 + [(2, 998)] * 2 if whole else [(1, 3), (-3, -1), (-3, 3), (-20, 20), (-1, 1)]
    parts = 1 if whole else 997
    for low, high in ranges[:5 if names else 1]:
        yield {name: Fraction(rng.randint(low * parts, high * parts), parts) for name in names}


# --- compare ------------------------------------------------------------------------------------------------
def _is_name(node: Node) -> bool:
    """x, f(2), AB, (x,y), |AB|, S_1/S_2, \\text{area}: what may stand before the = of an answer."""
    if node[0] == "mul":
        return _is_name(node[1][0]) and {n[0] for n in node[1]} <= {"sym", "text", "num", "seq", "rel", "pow"}
    several = node[0] in ("seq", "ratio") or node[:2] == ("fn", "abs")
    return all(map(_is_name, node[-1])) if several else node[0] in ("sym", "text")


def _value(node: Node) -> tuple[Node | None, Node]:
    """(name, value) of `x = 2`, `x in set` or `x = 1+1 = 2`, else (None, value), of a column a tuple."""
    if node[0] == "mat":
        return None, ("seq", str(len(node[1])) if len(node[1][0]) > 1 else "()", sum(node[1], ()))
    if node[0] != "rel":
        return None, ("list", node[1]) if node[0] == "rows" else node
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
    return None, ("rel", ops, sides)


class _Comparer(_Evaluator):
    """Are two trees the same answer? Raises Refused if that takes too much work."""

    def same(self, g: Node, p: Node) -> bool:
        if g == p:
            return True
        (g_name, g_value), (p_name, p_value) = _value(g), _value(p)
        if (g_value, p_value) != (g, p):
            names = {name[0] for name in (g_name, p_name) if name}
            return names != {"sym", "mul"} and self.same(g_value, p_value) or (  # k=1 is no function f(x)=1
                g[0] == p[0] == "rel" and self.relation(g, p))
        kinds = {g[0], p[0]}
        if kinds == {"list", "seq"}:  # x=1, y=2 is (1,2)
            named, other = (g, p) if g[0] == "list" else (p, g)
            values = dict(map(_value, named[1]))
            return None not in values and len(values) == len(named[1]) and other[1] == "()" and (
                self.same(("seq", "()", tuple(values.values())), other))
        if kinds == {"seq"}:
            return g[1] == p[1] and len(g[2]) == len(p[2]) and all(map(self.same, g[2], p[2]))
        lists = ("list", "set", "union")
        if kinds & {"rel", "minus", *lists}:
            return (bool(kinds & {*lists}) and self.cover(*(_items(n, *lists) for n in (g, p)))
                    or kinds == {"rel"} and self.relation(g, p) or kinds != {"set"} and self.same_set(g, p))
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

    def same_set(self, g: Node, p: Node) -> bool:
        """The same set of real numbers: equal at all numbers in the trees, between and beyond them?"""
        with contextlib.suppress(ArithmeticError, ValueError):  # other trees, ends without a value
            met = {self.number(n, {}) for n in _walk((g, p))} - {None}
            xs = sorted({0, *met, *(-x for x in met)})
            xs += [xs[0] - 1, *((a + b) / Fraction(2) for a, b in zip(xs, xs[1:])), xs[-1] + 1]
            return all(self.within(g, x) == self.within(p, x) for x in xs)
        return False

    def within(self, node: Node, x: Fraction) -> bool:
        """Is a number in a set, whose ends it keeps? ValueError for other trees."""
        match _value(node)[1]:
            case ("seq", pair, (a, b)) if (low := self.end(a)) < (high := self.end(b)):
                return low < x < high or x == low and pair[0] == "[" or x == high and pair[1] == "]"
            case ("set", items):
                return x in [self.end(n) for n in items]
            case ("union" | "minus" as kind, items):
                first, *others = [self.within(n, x) for n in items]
                return first or any(others) if kind == "union" else first and not any(others)
            case ("list", items) if any(n[:2] == ("rel", ("!=",)) for n in items):  # x > 0, x != 1, 2
                sets = ("rel", "seq", "union", "minus")
                names = {side for n in items if n[0] == "rel" for side in n[2] if _is_name(side)}
                if len(names) == 1:
                    return all(self.within(n, x) if n[0] in sets else x != self.end(n) for n in items)
            case ("rel", ops, sides) if set(ops) <= {"<", "<=", "!="} and sum(map(_is_name, sides)) == 1:
                at = [self.end(side, x) for side in sides]
                return all({"<": a < b, "<=": a <= b, "!=": a != b}[op] for op, a, b in zip(ops, at, at[1:]))
        raise ValueError("no set of numbers")

    def end(self, node: Node, x: Fraction | None = None) -> Fraction | float:
        """The value of an end of a set; with x, it is the value of the name in an inequality."""
        ends = {_INFINITY: math.inf, _neg(_INFINITY): -math.inf}
        variable = node[2][0] if node[:2] == ("fn", "abs") else node
        if x is not None and _is_name(variable):
            return x if node == variable else abs(x)
        if (value := ends[node] if node in ends else self.number(node, {})) is None:
            raise ValueError("no real number")
        return value

    def relation(self, g: Node, p: Node) -> bool:
        """Equations and inequalities are equal up to a constant factor, which < and <= need positive."""
        (_, g_ops, g_sides), (_, p_ops, p_sides) = g, p
        if g_ops != p_ops or len(g_ops) > 1 or g_ops[0] == "\\in":
            return g_ops == p_ops and all(map(self.same, g_sides, p_sides))
        a, b = (_add(sides[0], _neg(sides[1])) for sides in (g_sides, p_sides))
        factor = self.number(_div(a, b), next(_points(_add(a, b))))
        signed = factor and (factor > 0 or g_ops[0] in ("=", "!="))
        return bool(signed) and self.equal(a, _mul(_num(factor), b))

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
        value, near = self.number(g, {}), self.number(p, {})
        error = min(decimal[2] / 2 / abs(decimal[1]), TOLERANCE)
        return None not in (value, near) and abs(value - near) <= abs(value) * error

    def equal(self, g: Node, p: Node) -> bool:
        """Do two scalar trees agree wherever both are defined over the reals?"""
        met, real = False, ("const", "i") not in _walk((g, p))
        for point in _points((g, p)):
            gap = self.gap(g, p, point, 60, real)
            if gap and (isinstance(gap, Fraction) or self.gap(g, p, point, 120, real) > gap / 10**20):
                return False  # rounding shrinks with more digits, a difference stays
            met = met or gap is not None
        return met


# --- verdicts -----------------------------------------------------------------------------------------------
def _judge(answer: str, gold: str) -> bool:
    """Does a bare answer equal the gold? Raises Refused."""
    gold, text = _clean_gold(gold), _clean(answer)
    g, option = _parse(gold), _OPTION.fullmatch(text)  # (B) 12 is option B
    if text == gold or g[0] == "text" and _text_key(text) == g[1] or option and option[1] == gold.strip("()"):
        return True
    if re.fullmatch(r"-?\d*\.\d+", gold) and re.fullmatch(r"-?\d+,\d\d?", text):  # 2,74
        text = text.replace(",", ".")
    if g[0] == "text" or (asked := _units(gold)) and (given := _units(text)) and asked.isdisjoint(given):
        return False  # a unit may be missing, but not differ
    return _Comparer().same(g, _parse(text))


def _clean_gold(gold: str) -> str:
    """A gold answer, which may stand in a worked solution."""
    return _clean(re.search("boxed|####|answer is", gold) and extract_answer(gold) or gold)


def _units(text: str) -> set[str]:
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{2,}", text) + " ".join(_TEXT.findall(text)).split()
    return {_UNIT_OF[word] for word in map(str.lower, words) if word in _UNIT_OF}


@functools.lru_cache(4096)
def _verdict(answer: str | None, gold: str) -> str:
    """correct, wrong or refused. Never raises, whatever arithmetic on a model's text raises."""
    try:
        return "correct" if answer is not None and _judge(answer, gold) else "wrong"
    except Exception as error:
        return "refused" if isinstance(error, Refused) else "wrong"


def parse_error(gold: str) -> str | None:
    """Why a gold answer cannot be used (drop the problem: it never scores), or None if it can."""
    try:
        return _parse(_clean_gold(gold)) and None
    except Refused as error:
        return str(error)


def is_correct(response: str, gold: str, loose: bool = False) -> bool:
    """Does the response's final answer equal the gold answer? Never raises; bounded work."""
    return _verdict(extract_answer(response, loose), gold) == "correct"


class Checker:
    """is_correct for many pairs, from any thread; counts the answers that are refused."""

    def __init__(self) -> None:
        self.refused, self._lock = 0, threading.Lock()  # sympy's precision is global

    def check(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (response, gold): is it correct?"""
        with self._lock:
            verdicts = [_verdict(extract_answer(response), gold) for response, gold in pairs]
            self.refused += verdicts.count("refused")
        return [verdict == "correct" for verdict in verdicts]
