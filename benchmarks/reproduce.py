"""Full paths, RPO by the paper's rule and by our default, and ablations, on the problems of tiny/.

    python benchmarks/reproduce.py             # everything, 6 hours on two cores; the headline comes first
    python benchmarks/reproduce.py --quick     # the headline with one seed and 80 steps: 15 minutes
    python benchmarks/reproduce.py --table     # no run: the tables again, from docs/ and the runs in --folder

Every run is `train.py` on one core with the same group size, problems per step and learning rate. Those of
the headline have 200 steps; the others have 80 and are compared with the headline's at 80. Each is a folder
in --folder: a finished one is not repeated, a killed one goes on. Writes docs/reproduction.json, .md and the
table in README.md; --quick and --rows only print.
"""
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import DOCS, ROOT, evaluate, head, mean_std, parser, read_lines, row, run, run_folder

import numpy as np

sys.path.append(str(ROOT / "tiny"))
from make import make_problems  # noqa: E402

COMMON = "@presets/tiny.args --eval-every 20 --save-every 100"
PAPER = "--cut-position uniform --no-skip-certain --no-prefix-gate --epsilon 0.5"
RULES = {  # 32 tokens of a path of 287 are what 300 are of the paper's 2690
    "full paths": "--rollout full",
    "RPO": "",
    "paper, L = 32": f"{PAPER} --max-cut 32",
    "paper, L = 0.5": f"{PAPER} --max-cut 0.5",
}
ABLATIONS = {
    **{f"L = {cut}, alpha = {alpha}": f"--max-cut {cut} --length-reward {alpha}"
       for cut in (0.1, 0.2, 0.4, 1.0) for alpha in (0, 0.01) if (cut, alpha) != (0.1, 0)},
    "epsilon = 0": "--epsilon 0", "epsilon = 0.5": "--epsilon 0.5",
    "G = 4": "--group-size 4", "G = 16": "--group-size 16",
    "uniform cut positions": "--cut-position uniform", "no visit skipped": "--no-skip-certain",
    "any path is continued": "--no-prefix-gate", "KL 0.02": "--kl-coef 0.02",
    "paper, L = 1.0": f"{PAPER} --max-cut 1.0",
}
SOLUTIONS = "dapo, RPO, worked solutions as first paths"
HEADLINE = {f"dapo, {rule}": f"--algo dapo {options}" for rule, options in RULES.items()} | {
    SOLUTIONS: "--algo dapo --cache-init solutions"}
OTHER = {f"{algo}, {rule}{shaped}": f"--algo {algo} {options}{' --length-reward 0.01' if shaped else ''}"
         for algo in ("dapo", "grpo") for shaped in ("", ", length reward") for rule, options in RULES.items()
         if algo == "grpo" or shaped}
STEPS, SHORT = 200, 80
FRESH = 2048  # problems for the final pass@1 of the headline: 256 would leave a point of doubt
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % by number of seeds


def plan() -> list[tuple[str, str, int, int]]:
    """(row, options, seed, steps), the most wanted first."""
    return ([(name, options, seed, STEPS) for seed in range(5) for name, options in HEADLINE.items()]
            + [(name, options, seed, SHORT) for seed in range(3) for name, options in OTHER.items()]
            + [(f"RPO, {name}", options, seed, SHORT) for seed in range(3)
               for name, options in ABLATIONS.items()])


def execute(name: str, options: str, seed: int, steps: int, folder: Path) -> dict:
    """One run of train.py; its record, which is only read if it is there already."""
    out = run_folder(name, seed, folder)
    finished = out / "record.json"
    if finished.exists():
        return json.loads(finished.read_text())
    options = f"{COMMON} --steps {steps} {options}".strip()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    run("train.py", *shlex.split(options), "--seed", seed, "--out", out, log=Path(f"{out}.log"))
    record = {"row": name, "seed": seed, "options": options, "commit": commit.stdout.strip() or "unknown",
              **measure(out)}
    if name in HEADLINE and steps == STEPS:
        longest = json.loads((out / "config.json").read_text())["max_response"]
        record["pass@1"] = evaluate(out / "policy", folder / "fresh.jsonl", out / "eval", "--max-response",
                                    longest)["avg"]
    finished.write_text(json.dumps(record))
    return record


def measure(out: Path) -> dict:
    """What the tables and cost_model.py need of a run folder. Seconds are those of training."""
    metrics = read_lines(out / "metrics.jsonl")
    points = [m for m in metrics if "eval/accuracy" in m]
    evaluation = np.cumsum([m["time/eval_s"] for m in points])
    record = {"steps": [m["step"] for m in points],
              "tokens": [m.get("tokens/generated", 0) for m in points],
              "seconds": [m["time/total_s"] - s for m, s in zip(points, evaluation)],
              "accuracy": [m["eval/accuracy"] for m in points]}
    for name in ("time/rollout_s", "time/update_s", "tokens/trained", "tokens/forwarded", "group/sampled"):
        record[name] = sum(m.get(name, 0) for m in metrics)
    read = sum(m["group/sampled"] * m.get("response/prefix_length", 0) for m in metrics[1:])
    read += sum(m["tokens/read"] for m in metrics[1:])
    return record | {"tokens/read": read, "pass@1": record["accuracy"][-1]}


def write_fresh(folder: Path) -> None:
    """Problems that nothing else uses."""
    used = {r["problem"] for name in ("train", "test") for r in read_lines(ROOT / "tiny" / f"{name}.jsonl")}
    problems = make_problems(random.Random(FRESH), FRESH, used)
    (folder / "fresh.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))


def known_records(folder: Path) -> list[dict]:
    """The records in docs/, also of rows no longer planned; those of runs in the folder replace them."""
    stored = json.loads((DOCS / "reproduction.json").read_text())
    finished = [json.loads(path.read_text()) for path in sorted(folder.glob("*/record.json"))]
    return list({(r["row"], r["seed"]): r for r in stored + finished}.values())


def difference(runs: Sequence[dict], others: Sequence[dict]) -> str:
    """Final pass@1 in points, paired by seed, with a 95 % interval (Student)."""
    final = {r["seed"]: r["pass@1"] for r in others}
    gaps = [100 * (r["pass@1"] - final[r["seed"]]) for r in runs if r["seed"] in final]
    if len(gaps) < 2:
        return f"{gaps[0]:+.1f}" if gaps else ""
    half = STUDENT[len(gaps)] * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return f"{np.mean(gaps):+.1f} ({np.mean(gaps) - half:+.1f} to {np.mean(gaps) + half:+.1f})"


def reaches(runs: Sequence[dict], target: float) -> str:
    """Steps, tokens and seconds until the mean over the seeds is at least `target` for the first time."""
    accuracy = np.mean([r["accuracy"] for r in runs], axis=0)
    if (accuracy < target).all():
        return "not reached"
    at = int((accuracy >= target).argmax())
    tokens, seconds = (np.mean([r[key][at] for r in runs]) for key in ("tokens", "seconds"))
    return f"{runs[0]['steps'][at]} / {tokens / 1000:,.0f} k / {seconds:.0f} s"


def until(record: dict, steps: int) -> dict:
    """The record as it was after so many steps; pass@1 on fresh problems is known at the end only."""
    if steps == record["steps"][-1]:
        return record
    at = record["steps"].index(steps)
    curves = {key: record[key][:at + 1] for key in ("steps", "tokens", "seconds", "accuracy")}
    return record | curves | {"pass@1": record["accuracy"][at]}


def table(records: Sequence[dict], names: Sequence[str], steps: int) -> str:
    """Markdown; every row against its baseline, as all were after so many steps."""
    by_row: dict[str, list[dict]] = {}
    for record in records:
        if steps in record["steps"]:
            by_row.setdefault(record["row"], []).append(until(record, steps))
    lines = [head("run", "seeds", "final pass@1", "points vs. full paths", "tokens generated",
                  "of full paths", "training seconds", "of full paths",
                  "steps / tokens / seconds to reach (full-path accuracy - 1 point)")]
    for name in names:
        runs, base = by_row.get(name), by_row.get(baseline(name))
        if runs and base:
            def column(value: Callable[[dict], float], form: str) -> tuple[str, str]:
                ours, theirs = ([value(r) for r in group] for group in (runs, base))
                return mean_std(ours, form), f"{np.mean(ours) / np.mean(theirs):.1%}"

            target = np.mean([r["accuracy"][-1] for r in base]) - 0.01
            lines.append(row(name, len(runs), mean_std([r["pass@1"] for r in runs], ".4f"),
                             difference(runs, base) if runs is not base else "",
                             *column(lambda r: r["tokens"][-1], ",.0f"),
                             *column(lambda r: r["seconds"][-1], ",.0f"), reaches(runs, target)))
    return "\n".join(lines) if len(lines) > 1 else "Not run yet."


def baseline(name: str) -> str:
    """Full paths with the same objective and reward, or with DAPO and without the length reward."""
    shaped = ", length reward" if "length reward" in name else ""
    return f"{'grpo' if name.startswith('grpo') else 'dapo'}, full paths{shaped}"


def against_trl(records: Sequence[dict]) -> str:
    """One sentence from the steps of TRL's trainer that versus_trl.py --tiny timed, if it did."""
    file = DOCS / "trl_tiny.json"
    own = [r["seconds"][-1] for r in records if r["row"] == "dapo, full paths"]
    if not file.exists() or not own:
        return ""
    trl = json.loads(file.read_text())
    whole = trl["seconds_per_step"] * STEPS
    return (f"GRPOTrainer of TRL {trl['trl']} takes {trl['seconds_per_step']:.1f} s for a step of full paths "
            f"on the same problems (one core, mean of {trl['steps']} steps, `benchmarks/versus_trl.py "
            f"--tiny 10`), {whole:,.0f} s for as many steps. Our full paths take {np.mean(own) / whole:.1%} of "
            "this. (Tests ran beside some of RPO's runs.)")


def write(records: Sequence[dict]) -> None:
    """docs/reproduction.json, .md and README.md's table, from the same records."""
    commits = ", ".join(sorted({r["commit"] for r in records}))
    note = (f"Written by `python benchmarks/reproduce.py` (commit {commits}; {platform.machine()}, one core "
            f"a run): {STEPS} steps of 16 problems and 8 responses; mean ± standard deviation over seeds, "
            "differences paired by seed with a 95 % interval. Tokens and seconds include first paths, not "
            f"evaluation. The final pass@1 is on {FRESH} problems that nothing else uses.")
    headline, readme = table(records, list(HEADLINE), STEPS), ROOT / "README.md"
    marked = f"<!-- results -->\n{headline}\n\n{note}\n<!-- /results -->"
    readme.write_text(re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: marked, readme.read_text(),
                             flags=re.S))
    names = list(dict.fromkeys(r["row"] for r in records))
    before = [name for name in names if "without the gate" in name]  # rows of older code, which are kept
    ablations = [name for name in names if name.startswith("RPO, ")]
    (DOCS / "reproduction.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    (DOCS / "reproduction.md").write_text(
        f"# Full paths, RPO by the paper's rule and by our default\n\n{note}\n\nAll: `{COMMON}`\n\n"
        f"{headline}\n\n{against_trl(records)}\n\n![curves](reproduction.svg)\n\n"
        f"## GRPO, and the length-aware reward: {SHORT} steps, pass@1 on the 256 held-out problems\n\n"
        f"{table(records, list(OTHER), SHORT)}\n\n"
        f"## Ablations of RPO: {SHORT} steps, pass@1 on the 256 held-out problems\n\nThe paper's rule is "
        f"`{PAPER}`; the others differ from our default (dapo, RPO) in what their names say.\n\n"
        f"{table(records, ['dapo, RPO', SOLUTIONS, *ablations], SHORT)}\n\n"
        "## Before prefixes had to pay\n\nThese rows are of older code (their commits are in "
        "reproduction.json): any path was cut within its last L tokens and continued, a correct one was "
        "replaced by correct ones only, and in a wrong one no cut came behind a prefix without a right "
        "suffix. The options' defaults were chosen by them.\n\n"
        f"{table(records, before, SHORT)}\n\n{table(records, before, STEPS)}\n")


def run_all(todo: Sequence[tuple], folder: Path, jobs: int, partial: bool) -> list[dict]:
    """Do all runs, unless partial writing what there is after each; their records."""
    write_fresh(folder)
    records: list[dict] = []
    with ThreadPoolExecutor(jobs) as pool:
        for record in pool.map(lambda one: execute(*one, folder), todo):
            records.append(record)
            print(f"{record['row']}, seed {record['seed']}: pass@1 {record['accuracy'][-1]:.3f}, "
                  f"{record['tokens'][-1]:,} tokens, {record['seconds'][-1]:.0f} s", flush=True)
            if not partial:
                write(known_records(folder))
    return records


def main() -> None:
    command = parser(__doc__)
    add = command.add_argument
    add("--quick", action="store_true", help="the headline with seed 0 and 80 steps")
    add("--table", action="store_true", help="no run")
    add("--rows", default="", help="only runs whose name contains this")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    add("--folder", type=Path, default=ROOT / "runs" / "reproduce", help="of the runs")
    args = command.parse_args()
    if args.table and (args.quick or args.rows):
        command.error("--table is of all runs: give it without --quick and --rows")
    folder = args.folder.absolute() / ("quick" if args.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    todo = [one for one in plan() if args.rows in one[0]]
    if args.quick:
        todo = [(*one[:3], SHORT) for one in todo if one[0] in HEADLINE and one[2] == 0]
    if args.table:
        write(records := known_records(folder))
    else:
        records = run_all(todo, folder, args.jobs, partial=bool(args.rows) or args.quick)
    for steps in sorted({r["steps"][-1] for r in records}, reverse=True):
        print(f"after {steps} steps", table(records, list(dict.fromkeys(r["row"] for r in records)), steps),
              sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
