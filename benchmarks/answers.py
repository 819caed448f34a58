"""The answer checker against labelled answers, next to math-verify: accuracy, hostile inputs, speed.

    pip install math-verify==0.9.0 antlr4-python3-runtime==4.13.2     # for the speed comparison only
    python benchmarks/answers.py [--shared ../shared] [--differences]
    python benchmarks/answers.py --responses results/NAME/responses-NAME.jsonl    # of eval.py, by both

Accuracy uses the answers of math-verify 0.9.0 recorded in the files. The last line is one JSON object.
"""

import argparse
import json
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402


def load(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def boxed(answer: str) -> str:
    return "\\boxed{" + answer + "}"


def accuracy(title: str, rows: list[dict], response: str, wrap: bool, show: bool) -> dict:
    """Print and return how many rows are judged as labelled, by us and (where recorded) by math-verify."""
    ours = [rewards.is_correct(boxed(r[response]) if wrap else r[response], r["gold"]) for r in rows]
    right = sum(o == r["expected"] for o, r in zip(ours, rows))
    theirs = sum(r["math_verify"] == r["expected"] for r in rows) if "math_verify" in rows[0] else None
    print(f"{title:44s} {len(rows):5d} {right:6d} {100 * right / len(rows):7.2f} %   {theirs or ''}")
    for o, r in zip(ours, rows):
        if show and o != r["expected"]:
            print(f"    expected {r['expected']}: gold {r['gold'][-60:]!r}, answer {r[response][-60:]!r}")
    return {"rows": len(rows), "right": right, "math_verify_right": theirs}


def golds(shared: Path) -> dict:
    """Every gold against itself, and a sample of golds against other golds of the same file."""
    total = unread = wrong = pairs = 0
    equal = set()
    for path in sorted((shared / "data").glob("*.jsonl")):
        answers = [r["answer"] for r in load(path)]
        for gold in answers:
            total += 1
            if reason := rewards.parse_error(gold):
                unread += 1
                print(f"    unparseable in {path.name}: {gold!r}: {reason}")
            elif not rewards.is_correct(boxed(gold), gold):
                wrong += 1
        others = sorted(set(answers))[:: max(1, len(set(answers)) // 120)]
        for i, a in enumerate(others):
            for b in others[i + 1 :]:
                pairs += 1
                if rewards.is_correct(boxed(a), b):
                    equal.add((path.name, a, b))
    print(f"golds against themselves: {total}, unparseable {unread}, not equal to themselves {wrong}")
    print(f"golds against other golds: {pairs} pairs, called equal {len(equal)}; each must be one:")
    for name, a, b in sorted(equal):
        print(f"    {name}: {a!r} = {b!r}")
    return {
        "golds": total,
        "unparseable": unread,
        "self_wrong": wrong,
        "other_pairs": pairs,
        "other_equal": len(equal),
    }


def hostile(rows: list[dict]) -> dict:
    """All hostile answers through one worker process, from a thread that is not the main one."""
    out: dict = {}

    def run() -> None:
        with rewards.Checker(workers=1) as checker:
            checker.check([(boxed(r"\sqrt{8}"), r"2\sqrt{2}")])  # start the worker
            checker.check_ms_max = 0.0
            slowest = []
            for row in rows:
                started = time.perf_counter()
                verdict = checker.check([(row["prediction"], row["gold"])])[0]
                slowest.append(time.perf_counter() - started)
                if verdict and row["expected"] is False:
                    print(f"    called correct: {row['id']}")
            out.update(
                returned=len(slowest),
                max_s=round(max(slowest), 3),
                median_ms=1000 * statistics.median(slowest),
                timeouts=checker.timeouts,
            )

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    out["worker_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    print(
        f"hostile: {out['returned']} of {len(rows)} returned, median {out['median_ms']:.2f} ms, "
        f"max {out['max_s']} s, worker at most {out['worker_peak_mb']} MB, timeouts {out['timeouts']}"
    )
    return out


def speed(answers: list[str]) -> dict:
    """Milliseconds per check of gold against gold: against itself, and against the next problem's gold."""
    try:
        from math_verify import parse, verify
    except ImportError:
        print("speed of math-verify left out: pip install math-verify==0.9.0 antlr4-python3-runtime==4.13.2")
        parse = verify = None

    def ours(answer: str, gold: str) -> bool:
        return rewards.is_correct(boxed(answer), gold)

    def theirs(answer: str, gold: str) -> bool:
        return verify(parse(boxed(gold)), parse(boxed(answer)))

    ours(r"\sqrt{8}", r"2\sqrt{2}")  # imports
    out = {}
    for kind, pairs in (("same", list(zip(answers, answers))), ("next", list(zip(answers, answers[1:])))):
        for name, check in (("ours", ours), ("math_verify", theirs))[: 2 if parse else 1]:
            rewards._parse.cache_clear()
            times = []
            for pair in pairs:
                started = time.perf_counter()
                check(*pair)
                times.append(1000 * (time.perf_counter() - started))
            figures = [statistics.median(times), statistics.mean(times), max(times)]
            out[f"{name}_{kind}_ms"] = [round(t, 3) for t in figures]
            print(
                f"MATH-500, {kind:4s} gold, {name:11s}: median %.3f ms, mean %.3f, max %.2f" % tuple(figures)
            )
    return out


def responses(path: Path, show: bool) -> None:
    """The responses of an evaluation as eval.py graded them, and as math-verify does."""
    from math_verify import parse, verify

    rows = [
        (record["answer"], text, correct)
        for record in load(path)[1:]
        for text, correct in zip(record["responses"], record["correct"])
    ]
    theirs = [verify(parse(boxed(gold)), parse(text)) for gold, text, _ in rows]
    apart = [(r, t) for r, t in zip(rows, theirs) if r[2] != t]
    print(
        f"{len(rows)} responses: right by rewards.py {sum(r[2] for r in rows)}, by math-verify "
        f"{sum(theirs)}, judged otherwise {len(apart)}, of them without a committed answer "
        f"{sum(rewards.extract_answer(r[1]) is None for r, _ in apart)}"
    )
    for (gold, text, ours), _ in apart if show else ():
        print(f"    gold {gold!r}, ours {ours}, answer {rewards.extract_answer(text)!r}: ...{text[-90:]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the answer checker.")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="has verifier/ and data/")
    parser.add_argument("--differences", action="store_true", help="list the rows judged otherwise")
    parser.add_argument("--responses", type=Path, help="grade these instead")
    args = parser.parse_args()
    if args.responses:
        return responses(args.responses, args.differences)
    if not (args.shared / "verifier").is_dir():
        sys.exit(f"no labelled answers at {args.shared}/verifier: give their folder with --shared")
    files = {path.stem: load(path) for path in (args.shared / "verifier").glob("*.jsonl")}
    print(f"{'':44s}  rows  right  as labelled  math-verify right")
    equal, suite = files["equivalences"], files["math_verify_tests"]
    gsm8k = [dict(r, expected=r["is_correct"]) for r in files["gsm8k_model_solutions"]]
    result = {
        "equivalences": accuracy(
            "equivalences, policy rows left out",
            [r for r in equal if not r["policy"]],
            "prediction",
            True,
            args.differences,
        ),
        "policy": accuracy(
            "equivalences, policy rows",
            [r for r in equal if r["policy"]],
            "prediction",
            True,
            args.differences,
        ),
        "math_verify_tests": accuracy(
            "math-verify's tests, suspect rows left out",
            [r for r in suite if not r.get("suspect")],
            "prediction",
            False,
            args.differences,
        ),
        "gsm8k": accuracy("GSM8K model solutions", gsm8k, "solution", False, args.differences),
        "hostile": hostile(files["hostile"]),
        "golds": golds(args.shared),
        "speed": speed([r["answer"] for r in load(args.shared / "data" / "math500.jsonl")]),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
