"""Coverage-guided fuzzing of the answer checker: no unexpected exception, no check beyond the limit.

    pip install atheris
    python benchmarks/fuzz_answers.py --seconds 60

Inputs are built from tokens of LaTeX and plain mathematics, so that the fuzzer reaches the arithmetic. Each
is judged as an answer against some golds, as a gold answer and as a whole response. The last line is JSON.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
try:
    import atheris
except ImportError:
    sys.exit("This benchmark needs atheris: pip install atheris")
with atheris.instrument_imports(include=["rewards"]):
    import rewards

TOKENS = (
    r"0 1 2 7 9 10 12 100 2004 0.5 .25 1,000 3e8 1e-9 99999999999 x y n a e i pi \pi \infty "
    r"\theta + - * / ^ ^ _ ! % ° ' = < > <= >= != \le \ge \ne \in \approx \pm \mp \cdot \times \div \cup "
    r"( ) [ ] { } \{ \} | , ; : & $ \$ . \\ \frac \dfrac \sqrt \sqrt[3] \binom \log_2 \ln \sin \cos^2 \tan "
    r"\arcsin \exp \lfloor \rfloor \lceil \rceil \overline{3} \begin{pmatrix} \end{pmatrix} "
    r"\text{cm} \text{B} \text{even} \text{or} \mathrm{e} \mathbb{R} \emptyset \left( \right) "
    r"\boxed{ \fbox{ \quad \, \! ^\circ \% and or sqrt( sin( apples percent #### </think> "
    r"A: f(x) (1,2) [0,1) x^2 52_8 1\frac{1}{2} 9^{9^9}"
).split() + [" ", "\n", "the answer is ", "\ud800", "８", "∞", "√", "\x00"]
GOLDS = [
    "7",
    r"\sqrt{2}",
    "0.5",
    "(1,2)",
    "[0,1)",
    "x^2+1",
    "x>5",
    r"\{1,2\}",
    r"\text{B}",
    r"1\pm\sqrt{3}",
    "50\\%",
    "y=2x",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"90^\circ",
    "n!",
    "e^x",
    "1+i",
]
state = {"runs": 0, "slowest_s": 0.0, "slowest": "", "errors": {}}


def expression(choose: Iterator[int], depth: int = 0) -> str:
    """A mostly well-formed expression from a stream of bytes, which lets the fuzzer get past the parser."""
    pick = next(choose, 0)
    if depth > 4 or pick % 4 == 0:
        return TOKENS[next(choose, 0) % 26]
    a, b = expression(choose, depth + 1), expression(choose, depth + 1)
    forms = [
        "{a}+{b}",
        "{a}-{b}",
        "{a}{b}",
        "{a}/{b}",
        "\\frac{{{a}}}{{{b}}}",
        "({a})^{{{b}}}",
        "\\sqrt{{{a}}}",
        "({a},{b})",
        "\\sqrt[{a}]{{{b}}}",
        "{a}={b}",
        "{a}<{b}",
        "\\sin {a}",
        "\\ln({a})",
        "|{a}|",
        "{a}!",
        "\\{{{a},{b}\\}}",
        "[{a},{b})",
        "{a}\\pm{b}",
        "\\log_{{{a}}}{b}",
        "\\binom{{{a}}}{{{b}}}",
        "\\lfloor {a}\\rfloor",
        "{a}\\cup{b}",
        "{a} \\text{{ or }} {b}",
        "\\begin{{pmatrix}}{a}&{b}\\end{{pmatrix}}",
        "{a}:{b}",
        "{a}\\%",
        "\\exp({a})",
        "{a}^\\circ",
        "{a}\\approx {b}",
    ]
    return forms[next(choose, 0) % len(forms)].format(a=a, b=b)


def one_input(data: bytes) -> None:
    stream = iter(data)
    if next(stream, 0) % 2:
        text = "".join(TOKENS[b % len(TOKENS)] for b in stream)
    else:
        text = expression(stream)
    gold = GOLDS[len(data) % len(GOLDS)]
    watched(rewards._judge, text, gold, True)  # is_correct would swallow what this raises
    watched(rewards._judge, gold, text, True)
    watched(rewards._judge, text, text + "+0", True)
    watched(rewards.is_correct, text, gold)
    watched(rewards.is_correct, "\\boxed{" + text + "}", gold)
    state["runs"] += 1
    if time.perf_counter() - state["start"] > options.seconds:
        for kind, (count, answer, truth) in state["errors"].items():
            print(f"{count:6d} x {kind}\n        answer {answer!r}\n        gold   {truth!r}")
        print("slowest", repr(state["slowest"]))
        print(
            json.dumps(
                {
                    "runs": state["runs"],
                    "seconds": options.seconds,
                    "unexpected_exceptions": len(state["errors"]),
                    "slowest_s": round(state["slowest_s"], 3),
                }
            ),
            flush=True,
        )
        os._exit(bool(state["errors"]) or state["slowest_s"] > options.limit)


def watched(check: Callable, answer: str, gold: str, *more: bool) -> None:
    started = time.perf_counter()
    try:
        check(answer, gold, *more)
    except rewards.Refused:
        pass
    except Exception as error:
        kind = f"{type(error).__name__}: {str(error)[:60]}"
        state["errors"].setdefault(kind, [0, answer, gold])[0] += 1
    took = time.perf_counter() - started
    if took > state["slowest_s"]:
        state["slowest_s"], state["slowest"] = took, (answer, gold)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz the answer checker.")
    parser.add_argument("--seconds", type=float, default=60, help="how long to run")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds that one check may take")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rewards.is_correct(r"\boxed{\sqrt{2}}", r"\sqrt{3}")  # load sympy before the clock starts
    state["start"] = time.perf_counter()
    atheris.Setup(
        [
            sys.argv[0],
            f"-seed={options.seed + 1}",
            "-max_len=160",
            "-timeout=5",
            "-verbosity=0",
            f"-artifact_prefix={tempfile.gettempdir()}/",
        ],
        one_input,
    )
    atheris.Fuzz()
