"""The paper's headline in one run, and ablations: full paths, RPO by the paper's rule and by our default.

    python benchmarks/reproduce.py             # everything; the headline rows come first, with 200 steps
    python benchmarks/reproduce.py --quick     # the headline rows, one seed, 80 steps
    python benchmarks/reproduce.py --table     # only write docs/ and README.md from the runs there are

All runs are `train.py` on the problems in tiny/ with the same group size, problems per step and learning
rate; those besides the headline end after 80 steps and are compared with its rows at 80. A run is a folder in
--folder; one that is finished is not done again, one that was killed goes on. Each has one core, so that its
seconds do not depend on what runs beside it.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tiny"))

from make import make_problems  # noqa: E402

COMMON = "@presets/tiny.args --eval-every 20 --save-every 100"
PAPER = "--cut-position uniform --cut-tail 0 --no-skip-certain --no-cache-keep-correct --epsilon 0.5"
RULES = {  # 32 tokens of a path of 287 are what 300 are of the paper's 2690
    "full paths": "--rollout full",
    "RPO": "",
    "paper, L = 32": f"{PAPER} --max-cut 32",
    "paper, L = 0.5": f"{PAPER} --max-cut 0.5",
}
ABLATIONS = {
    **{f"L = {cut}, alpha = {alpha}": f"--max-cut {cut} --length-reward {alpha}"
       for cut in (0.1, 0.2, 0.4, 1.0) for alpha in (0, 0.01) if (cut, alpha) != (0.2, 0)},
    "L adaptive": "--max-cut adaptive", "epsilon = 0": "--epsilon 0", "epsilon = 0.5": "--epsilon 0.5",
    "G = 4": "--group-size 4", "G = 16": "--group-size 16",
    "cut anywhere alike": "--cut-position uniform", "nothing skipped": "--no-skip-certain",
    "no long cuts": "--cut-tail 0", "more long cuts": "--cut-tail 1",
    "any path kept": "--no-cache-keep-correct",
    "every 2nd visit a full path": "--full-every 2", "KL 0.02": "--kl-coef 0.02",
    "paper, L = 1.0": f"{PAPER} --max-cut 1.0",
}
SOLUTIONS = "dapo, RPO, worked solutions first"
HEADLINE = {f"dapo, {rule}": f"--algo dapo {options}" for rule, options in RULES.items()} | {
    SOLUTIONS: "--algo dapo --cache-init solutions"}
OTHER = {f"{algo}, {rule}{shaped}": f"--algo {algo} {options}{' --length-reward 0.01' if shaped else ''}"
         for algo in ("dapo", "grpo") for shaped in ("", ", length reward") for rule, options in RULES.items()
         if algo == "grpo" or shaped}
STEPS, SHORT = 200, 80
FRESH = 2048  # problems for the pass@1 of the headline's last policies: 256 would leave a point of doubt
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # 97.5 % by number of seeds


def plan() -> list[tuple[str, str, int, int]]:
    """(row, options, seed, steps), the most wanted first."""
    return ([(row, options, seed, STEPS) for seed in range(5) for row, options in HEADLINE.items()]
            + [(row, options, seed, SHORT) for seed in range(3) for row, options in OTHER.items()]
            + [(f"RPO, {row}", options, seed, SHORT) for seed in range(3)
               for row, options in ABLATIONS.items()])


def folder_of(row: str, seed: int, folder: Path) -> Path:
    return folder / f"{re.sub('[^a-z0-9.]+', '-', row.lower())}-{seed}"


def execute(row: str, options: str, seed: int, steps: int, folder: Path) -> dict:
    """One run of train.py; its record, which is read where it is there already."""
    out = folder_of(row, seed, folder)
    finished = out / "record.json"
    if finished.exists():
        return json.loads(finished.read_text())
    options = f"{COMMON} --steps {steps} {options}".strip()
    out.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.strip()
    with open(folder / f"{out.name}.log", "w") as log:
        subprocess.run([sys.executable, "train.py", *shlex.split(options), "--seed", str(seed),
                        "--out", str(out)], cwd=ROOT, check=True, stdout=log, stderr=log,
                       env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    points, evaluation = [], 0.0
    for m in metrics[1:]:
        if "eval/accuracy" in m:
            evaluation += m["time/eval_s"]
            points.append((m["step"], m["tokens/generated"], m["time/total_s"] - metrics[0]["time/eval_s"]
                           - evaluation, m["eval/accuracy"]))
    points.insert(0, (0, 0, 0.0, metrics[0]["eval/accuracy"]))
    record = dict(zip(("steps", "tokens", "seconds", "accuracy"), zip(*points)))
    # of all steps, for the cost model
    record |= {name: sum(m.get(name, 0) for m in metrics) for name in (
        "time/rollout_s", "time/update_s", "tokens/trained", "tokens/forwarded", "group/sampled")}
    config = json.loads((out / "config.json").read_text())
    read = sum(m["group/sampled"] * m["response/prefix_length"] for m in metrics[1:])
    if config["rollout"] == "rpo" and (config["skip_certain"] or config["cut_position"] == "uncertain"):
        read += metrics[-1]["tokens/full_path"] / config["group_size"]  # the paths of all visits
    record["tokens/read"] = read
    fresh = row in HEADLINE and steps == STEPS
    record["pass@1"] = evaluate(out, folder) if fresh else record["accuracy"][-1]
    record = {"row": row, "seed": seed, "options": options, "commit": commit, **record}
    finished.write_text(json.dumps(record))
    return record


def evaluate(out: Path, folder: Path) -> float:
    """Greedy pass@1 of a run's last policy on FRESH problems that nothing else uses."""
    results, problems = out / "eval" / "results.json", folder / "fresh.jsonl"
    if not results.exists():
        config = json.loads((out / "config.json").read_text())
        subprocess.run([sys.executable, "eval.py", "--model", str(out / "policy"), "--data", str(problems),
                        "--max-response", str(config["max_response"]), "--out", str(out / "eval")],
                       cwd=ROOT, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(results.read_text())["results"]["fresh"]["avg"]


def write_fresh(folder: Path) -> None:
    used = [json.loads(line)["problem"] for name in ("train", "test")
            for line in (ROOT / "tiny" / f"{name}.jsonl").read_text().splitlines()]
    problems = make_problems(random.Random(FRESH), FRESH, set(used))
    (folder / "fresh.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))


def mean_of(runs: list[dict], value: Callable[[dict], float], form: str) -> str:
    values = [value(r) for r in runs]
    spread = f" ± {format(np.std(values, ddof=1), form)}" if len(values) > 1 else ""
    return format(np.mean(values), form) + spread


def difference(runs: list[dict], others: list[dict]) -> str:
    """Final pass@1 in points, paired by seed, with a 95 % interval (Student)."""
    final = {r["seed"]: r["pass@1"] for r in others}
    gaps = [100 * (r["pass@1"] - final[r["seed"]]) for r in runs if r["seed"] in final]
    if len(gaps) < 2:
        return f"{gaps[0]:+.1f}" if gaps else ""
    half = STUDENT[len(gaps)] * np.std(gaps, ddof=1) / len(gaps) ** 0.5
    return f"{np.mean(gaps):+.1f} ({np.mean(gaps) - half:+.1f} to {np.mean(gaps) + half:+.1f})"


def reaches(runs: list[dict], target: float) -> str:
    """Steps, tokens and seconds until the mean over the seeds is at least `target` for the first time."""
    accuracy = np.mean([r["accuracy"] for r in runs], axis=0)
    if (accuracy < target).all():
        return "not reached"
    at = int((accuracy >= target).argmax())
    tokens, seconds = (np.mean([r[key][at] for r in runs]) for key in ("tokens", "seconds"))
    return f"{runs[0]['steps'][at]}; {tokens / 1000:,.0f} k; {seconds:.0f} s"


def until(record: dict, steps: int) -> dict:
    """The record as it was after so many steps; pass@1 on FRESH problems is known at the end only."""
    if steps == record["steps"][-1]:
        return record
    at = record["steps"].index(steps)
    curves = {key: record[key][:at + 1] for key in ("steps", "tokens", "seconds", "accuracy")}
    return record | curves | {"pass@1": record["accuracy"][at]}


def table(records: list[dict], rows: list[str], steps: int) -> str:
    """Markdown; every row against the full paths of its kind, as all were after so many steps."""
    records = [until(r, steps) for r in records if steps in r["steps"]]
    head = ["row", "seeds", "pass@1 at the end", "points against full paths", "tokens generated",
            "of full paths'", "training seconds", "of full paths'",
            "steps; tokens; seconds to full paths' end less a point"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    by_row = {row: [r for r in records if r["row"] == row] for row in {r["row"] for r in records}}
    for row in rows:
        runs, base = by_row.get(row), by_row.get(baseline(row))
        if not runs or not base:
            continue
        share = [np.mean([r[key][-1] for r in runs]) / np.mean([r[key][-1] for r in base])
                 for key in ("tokens", "seconds")]
        target = np.mean([r["accuracy"][-1] for r in base]) - 0.01
        cells = [row, str(len(runs)), mean_of(runs, lambda r: r["pass@1"], ".4f"),
                 difference(runs, base) if runs is not base else "",
                 mean_of(runs, lambda r: r["tokens"][-1], ",.0f"), f"{share[0]:.1%}",
                 mean_of(runs, lambda r: r["seconds"][-1], ",.0f"), f"{share[1]:.1%}", reaches(runs, target)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "Not run yet."


def baseline(row: str) -> str:
    """Full paths with the same objective and reward, or with DAPO and without the length reward."""
    shaped = ", length reward" if "length reward" in row else ""
    return f"{'grpo' if row.startswith('grpo') else 'dapo'}, full paths{shaped}"


def against_trl(records: list[dict]) -> str:
    """One sentence from the steps of TRL's trainer that versus_trl.py --tiny timed, where it did."""
    file = ROOT / "docs" / "trl_tiny.json"
    if not file.exists():
        return ""
    trl = json.loads(file.read_text())
    seconds = {row: np.mean(own) for row in ("dapo, RPO", "dapo, full paths")
               if (own := [r["seconds"][-1] for r in records if r["row"] == row])}
    whole = trl["seconds_per_step"] * STEPS
    return (f"GRPOTrainer of TRL {trl['trl']} takes {trl['seconds_per_step']:.1f} s for a step of full paths "
            f"on the same problems (one core, mean of {trl['steps']} steps, `benchmarks/versus_trl.py "
            f"--tiny`), which makes {whole:,.0f} s for as many steps: "
            + ", ".join(f"{row[6:]} {value / whole:.1%} of it" for row, value in seconds.items()) + ".")


def write(records: list[dict], args: argparse.Namespace) -> None:
    """docs/reproduction.json, .md (not of a quick run) and README.md's table, from the same records."""
    docs, steps = ROOT / "docs", SHORT if args.quick else STEPS
    commits = ", ".join(sorted({r["commit"] for r in records}))
    command = "python benchmarks/reproduce.py" + " --quick" * args.quick
    note = (f"Written by `{command}` (commit {commits}; {platform.machine()}, one core a run): "
            f"{steps} steps of 16 problems and 8 responses; mean and standard deviation over seeds, "
            "differences paired by seed with a 95 % interval. Cache initialisation is included, evaluation "
            f"is not.{'' if args.quick else f' The last pass@1 is of {FRESH} problems used nowhere else.'}")
    headline = table(records, list(HEADLINE), steps)
    readme = ROOT / "README.md"
    marked = f"<!-- results -->\n{headline}\n\n{note}\n<!-- /results -->"
    readme.write_text(re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: marked, readme.read_text(),
                             flags=re.S))
    if args.quick:
        return
    (docs / "reproduction.json").write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
    (docs / "reproduction.md").write_text(
        f"# Full paths, RPO by the paper's rule and by our default\n\n{note}\n\nAll: `{COMMON}`\n\n"
        f"{headline}\n\n{against_trl(records)}\n\n![curves](reproduction.svg)\n\n"
        f"## GRPO, and with the length-aware reward: {SHORT} steps, pass@1 of the 256 held-out problems\n\n"
        f"{table(records, list(OTHER), SHORT)}\n\n"
        f"## Ablations of RPO: {SHORT} steps, likewise\n\nThe paper's rule is `{PAPER}`; the others differ "
        "from our default (dapo, RPO) in what their names say.\n\n"
        f"{table(records, ['dapo, RPO', SOLUTIONS, *(f'RPO, {row}' for row in ABLATIONS)], SHORT)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="headline rows, seed 0, 80 steps")
    parser.add_argument("--write", action="store_true", help="with --quick: the table in README.md")
    parser.add_argument("--table", action="store_true", help="no run; from the finished ones")
    parser.add_argument("--rows", default="", help="only rows whose name holds this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "reproduce")
    args = parser.parse_args()
    folder = args.folder.absolute() / ("quick" if args.quick else "")
    folder.mkdir(parents=True, exist_ok=True)
    write_fresh(folder)
    todo = [run for run in plan() if args.rows in run[0]]
    if args.quick:
        todo = [(*run[:3], SHORT) for run in todo if run[0] in HEADLINE and run[2] == 0]
    if args.table:
        todo = [run for run in todo if (folder_of(run[0], run[2], folder) / "record.json").exists()]
    records: list[dict] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for record in pool.map(lambda run: execute(*run, folder), todo):
            records.append(record)
            print(f"{record['row']}, seed {record['seed']}: pass@1 {record['accuracy'][-1]:.3f}, "
                  f"{record['tokens'][-1]:,} tokens, {record['seconds'][-1]:.0f} s", flush=True)
            if not args.rows and args.write >= args.quick:
                write(records, args)
    for steps in sorted({r["steps"][-1] for r in records}, reverse=True):
        print(f"after {steps} steps", table(records, list(dict.fromkeys(r["row"] for r in records)), steps),
              sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
