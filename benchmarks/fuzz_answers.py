"""Coverage-guided fuzzing of answers.py: no unexpected exception, no check slower than the limit.

    pip install atheris
    python benchmarks/fuzz_answers.py --seconds 60

Inputs are built from tokens of LaTeX and plain mathematics, so that the fuzzer reaches the arithmetic. Each
is judged as an answer, as a gold answer, and as a whole response. Writes nothing; exit code 1 if anything was
found. The last line is one JSON object.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from common import boxed, need, parser

atheris = need("atheris")
with atheris.instrument_imports(include=["answers"]):
    import answers

TOKENS = (
    r"0 1 2 7 9 10 12 100 2004 0.5 .25 1,000 3e8 1e-9 99999999999 x y n a e i pi \pi \infty "
    r"\theta + - * / ^ ^ _ ! % ° ' = < > <= >= != \le \ge \ne \in \approx \pm \mp \cdot \times \div \cup "
    r"( ) [ ] { } \{ \} | , ; : & $ \$ . \\ \frac \dfrac \sqrt \sqrt[3] \binom \log_2 \ln \sin \cos^2 \tan "
    r"\arcsin \exp \lfloor \rfloor \lceil \rceil \overline{3} \begin{pmatrix} \end{pmatrix} "
    r"\text{cm} \text{B} \text{even} \text{or} \mathrm{e} \mathbb{R} \emptyset \left( \right) "
    r"\boxed{ \fbox{ \quad \, \! ^\circ \% and or sqrt( sin( apples percent #### </think> "
    r"A: f(x) (1,2) [0,1) x^2 52_8 1\frac{1}{2} 9^{9^9}"
).split() + [" ", "\n", "the answer is ", "\ud800", "８", "∞", "√", "\x00"]
GOLDS = ["7", r"\sqrt{2}", "0.5", "(1,2)", "[0,1)", "x^2+1", "x>5", r"\{1,2\}", r"\text{B}", r"1\pm\sqrt{3}",
         "50\\%", "y=2x", r"\begin{pmatrix}1\\2\end{pmatrix}", r"90^\circ", "n!", "e^x", "1+i"]
FORMS = [
    "{a}+{b}", "{a}-{b}", "{a}{b}", "{a}/{b}", r"\frac{{{a}}}{{{b}}}", "({a})^{{{b}}}", r"\sqrt{{{a}}}",
    "({a},{b})", r"\sqrt[{a}]{{{b}}}", "{a}={b}", "{a}<{b}", r"\sin {a}", r"\ln({a})", "|{a}|", "{a}!",
    r"\{{{a},{b}\}}", "[{a},{b})", r"{a}\pm{b}", r"\log_{{{a}}}{b}", r"\binom{{{a}}}{{{b}}}",
    r"\lfloor {a}\rfloor", r"{a}\cup{b}", r"{a} \text{{ or }} {b}",
    r"\begin{{pmatrix}}{a}&{b}\end{{pmatrix}}", "{a}:{b}", r"{a}\%", r"\exp({a})", r"{a}^\circ",
    r"{a}\approx {b}"]
state = {"runs": 0, "slowest_s": 0.0, "slowest": "", "errors": {}}


def expression(choose: Iterator[int], depth: int = 0) -> str:
    """A mostly well-formed expression from a stream of bytes, which lets the fuzzer get past the parser."""
    pick = next(choose, 0)
    if depth > 4 or pick % 4 == 0:
        return TOKENS[next(choose, 0) % 26]
    a, b = expression(choose, depth + 1), expression(choose, depth + 1)
    return FORMS[next(choose, 0) % len(FORMS)].format(a=a, b=b)


def one_input(data: bytes, args: argparse.Namespace, start: float) -> None:
    stream = iter(data)
    if next(stream, 0) % 2:
        text = "".join(TOKENS[b % len(TOKENS)] for b in stream)
    else:
        text = expression(stream)
    gold = GOLDS[len(data) % len(GOLDS)]
    watched(answers._judge, text, gold)  # is_correct would swallow what this raises
    watched(answers._judge, gold, text)
    watched(answers._judge, text, text + "+0")
    watched(answers.is_correct, text, gold, True)  # loose
    watched(answers.is_correct, boxed(text), gold)
    state["runs"] += 1
    if time.perf_counter() - start > args.seconds:
        report(args)


def watched(check: Callable[..., bool], answer: str, gold: str, *more: bool) -> None:
    started = time.perf_counter()
    try:
        check(answer, gold, *more)
    except answers.Refused:
        pass
    except Exception as error:
        kind = f"{type(error).__name__}: {str(error)[:60]}"
        state["errors"].setdefault(kind, [0, answer, gold])[0] += 1
    took = time.perf_counter() - started
    if took > state["slowest_s"]:
        state["slowest_s"], state["slowest"] = took, (answer, gold)


def report(args: argparse.Namespace) -> None:
    """Print what was found and end the process, which the fuzzer would not."""
    for kind, (count, answer, gold) in state["errors"].items():
        print(f"{count:6d} x {kind}\n        answer {answer!r}\n        gold   {gold!r}")
    print("slowest", repr(state["slowest"]))
    print(json.dumps({"runs": state["runs"], "seconds": args.seconds,
                      "unexpected_exceptions": len(state["errors"]),
                      "slowest_s": round(state["slowest_s"], 3)}), flush=True)
    os._exit(bool(state["errors"]) or state["slowest_s"] > args.limit)


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--seconds", type=float, default=60, help="how long to run")
    command.add_argument("--limit", type=float, default=1.0, help="seconds that one check may take")
    command.add_argument("--seed", type=int, default=0)
    args = command.parse_args()
    answers.is_correct(r"\boxed{\sqrt{2}}", r"\sqrt{3}")  # load sympy before the clock starts
    start = time.perf_counter()
    atheris.Setup([sys.argv[0], f"-seed={args.seed + 1}", "-max_len=160", "-timeout=5", "-verbosity=0",
                   f"-artifact_prefix={tempfile.gettempdir()}/"], lambda data: one_input(data, args, start))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
