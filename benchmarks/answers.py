"""How well answers.py judges labelled answers, next to math-verify: accuracy, hostile inputs, speed.

    pip install math-verify==0.9.0 antlr4-python3-runtime==4.13.2       # for speed and --responses only
    python benchmarks/answers.py FOLDER [--differences]                 # half a minute
    python benchmarks/answers.py --responses RUN/responses-NAME.jsonl   # of eval.py, by math-verify too

FOLDER has verifier/ (equivalences, math_verify_tests, gsm8k_model_solutions, hostile: .jsonl of labelled
answers, with verdicts of math-verify 0.9.0) and data/ (*.jsonl of problems with gold answers). It writes
nothing; the last line is one JSON object.
"""
import json
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import boxed, has, need, parser, read_lines

import answers


def accuracy(title: str, rows: list[dict], response: str, show: bool, wrap: bool = False,
             loose: bool = False) -> dict:
    """Print and return how many rows are judged as labelled, by us and (where recorded) by math-verify."""
    texts = [boxed(r[response]) if wrap else r[response] for r in rows]
    ours = [answers.is_correct(text, r["gold"], loose) for text, r in zip(texts, rows)]
    right = sum(o == r["expected"] for o, r in zip(ours, rows))
    theirs = sum(r["math_verify"] == r["expected"] for r in rows) if "math_verify" in rows[0] else None
    print(f"{title:44s} {len(rows):5d} {right:6d} {100 * right / len(rows):7.2f} %   {theirs or ''}")
    for o, r in zip(ours, rows):
        if show and o != r["expected"]:
            print(f"    expected {r['expected']}: gold {r['gold'][-60:]!r}, answer {r[response][-60:]!r}")
    return {"rows": len(rows), "right": right, "math_verify_right": theirs}


def golds(folder: Path) -> dict:
    """Every gold answer against itself, and a sample of them against others of the same file."""
    total = unread = wrong = pairs = 0
    equal = set()
    for path in sorted(folder.glob("*.jsonl")):
        found = [r["answer"] for r in read_lines(path)]
        for gold in found:
            total += 1
            if reason := answers.parse_error(gold):
                unread += 1
                print(f"    unparseable in {path.name}: {gold!r}: {reason}")
            elif not answers.is_correct(boxed(gold), gold):
                wrong += 1
        others = sorted(set(found))[::max(1, len(set(found)) // 120)]
        for i, a in enumerate(others):
            for b in others[i + 1:]:
                pairs += 1
                if answers.is_correct(boxed(a), b):
                    equal.add((path.name, a, b))
    print(f"gold answers against themselves: {total}, unparseable {unread}, not equal to themselves {wrong}")
    print(f"gold answers against others: {pairs} pairs, judged equal {len(equal)}, which they must be:")
    for name, a, b in sorted(equal):
        print(f"    {name}: {a!r} = {b!r}")
    return {"golds": total, "unparseable": unread, "self_wrong": wrong, "other_pairs": pairs,
            "other_equal": len(equal)}


def hostile(rows: list[dict]) -> dict:
    """All hostile answers; run it in a thread that is not the main one."""
    checker = answers.Checker()
    checker.check([(boxed(r"\sqrt{8}"), r"2\sqrt{2}")])  # imports
    times = []
    for r in rows:
        started = time.thread_time()
        verdict = checker.check([(r["prediction"], r["gold"])])[0]
        times.append(time.thread_time() - started)
        if verdict and r["expected"] is False:
            print(f"    judged correct: {r['id']}")
    out = {"returned": len(times), "max_s": round(max(times), 3), "median_ms": 1000 * statistics.median(times),
           "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    print(f"hostile: {out['returned']} of {len(rows)} returned, CPU time: median {out['median_ms']:.2f} ms, "
          f"max {out['max_s']} s; peak memory of this process {out['peak_mb']} MB")
    return out


def speed(bare: list[str]) -> dict:
    """Milliseconds per check of a gold answer against itself, and against that of the next problem."""
    checks = {"ours": lambda answer, gold: answers.is_correct(boxed(answer), gold)}
    if has("math_verify", "speed of math-verify"):
        math = need("math_verify")
        checks["math_verify"] = lambda a, gold: math.verify(math.parse(boxed(gold)), math.parse(boxed(a)))
    checks["ours"](r"\sqrt{8}", r"2\sqrt{2}")  # imports
    out = {}
    for kind, pairs in (("same", list(zip(bare, bare))), ("next", list(zip(bare, bare[1:])))):
        for name, check in checks.items():
            answers._parse.cache_clear(), answers._verdict.cache_clear()
            times = []
            for pair in pairs:
                started = time.perf_counter()
                check(*pair)
                times.append(1000 * (time.perf_counter() - started))
            figures = [statistics.median(times), statistics.mean(times), max(times)]
            out[f"{name}_{kind}_ms"] = [round(t, 3) for t in figures]
            print(f"MATH-500, {kind:4s} gold, {name:11s}: median {figures[0]:.3f} ms, mean {figures[1]:.3f}, "
                  f"max {figures[2]:.2f}")
    return out


def responses(path: Path, show: bool) -> None:
    """Responses as eval.py graded them, and as math-verify does."""
    math = need("math_verify")
    rows = [(record["answer"], text, correct) for record in read_lines(path)[1:]
            for text, correct in zip(record["responses"], record["correct"])]
    theirs = [math.verify(math.parse(boxed(gold)), math.parse(text)) for gold, text, _ in rows]
    apart = [r for r, t in zip(rows, theirs) if r[2] != t]
    silent = sum(answers.extract_answer(text) is None for _, text, _ in apart)
    print(f"{len(rows)} responses: {sum(r[2] for r in rows)} correct by us, {sum(theirs)} by math-verify; "
          f"{len(apart)} judged differently, {silent} of them without a committed answer")
    for gold, text, ours in apart if show else ():
        print(f"    gold {gold!r}, ours {ours}, answer {answers.extract_answer(text)!r}: ...{text[-90:]!r}")


def main() -> None:
    command = parser(__doc__)
    command.add_argument("folder", type=Path, nargs="?", help="has verifier/ and data/")
    command.add_argument("--differences", action="store_true", help="list what is judged differently")
    command.add_argument("--responses", type=Path, help="compare the grades of these responses instead")
    args = command.parse_args()
    if args.responses:
        return responses(args.responses, args.differences)
    if not args.folder or not (args.folder / "verifier").is_dir():
        command.error("give the folder of the labelled answers, or --responses")
    show = args.differences
    files = {path.stem: read_lines(path) for path in (args.folder / "verifier").glob("*.jsonl")}
    print(f"{'':44s}  rows  right  as labelled  math-verify right")
    equal, suite = files["equivalences"], files["math_verify_tests"]
    gsm8k = [dict(r, expected=r["is_correct"]) for r in files["gsm8k_model_solutions"]]
    print(json.dumps({
        "equivalences": accuracy("equivalences without policy rows", [r for r in equal if not r["policy"]],
                                 "prediction", show, wrap=True),
        "policy": accuracy("equivalences, policy rows", [r for r in equal if r["policy"]], "prediction", show,
                           wrap=True),
        "math_verify_tests": accuracy("math-verify's tests without suspect rows",
                                      [r for r in suite if not r.get("suspect")], "prediction", show,
                                      loose=True),  # their formulas are not boxed
        "gsm8k": accuracy("GSM8K model solutions", gsm8k, "solution", show),
        "hostile": ThreadPoolExecutor(1).submit(hostile, files["hostile"]).result(),
        "golds": golds(args.folder / "data"),
        "speed": speed([r["answer"] for r in read_lines(args.folder / "data" / "math500.jsonl")])}))


if __name__ == "__main__":
    main()
