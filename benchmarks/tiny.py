"""RPO against full paths on the embedded default: same steps, group size and problems per step, one run each.

    python benchmarks/tiny.py [--seeds 0,1,2] [--write]     # about 20 minutes a seed on 2 CPU cores

Prints a table; --write also puts it into README.md between the results marks, with commit and machine.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROLLOUTS = {"full": "full paths (plain DAPO)", "rpo": "RPO"}
COLUMNS = {"accuracy_before": ("pass@1 before", ".3f"), "accuracy_after": ("pass@1 after", ".3f"),
           "tokens_generated": ("tokens generated", ",.0f"),
           "seconds_without_evaluation": ("training seconds", ",.0f")}


def run(rollout: str, seed: int, folder: Path) -> dict:
    out = folder / f"{rollout}-{seed}"
    subprocess.run([sys.executable, "train.py", "@presets/tiny.args", "--rollout", rollout,
                    "--seed", str(seed), "--out", out], cwd=ROOT, check=True)
    return json.loads((out / "summary.json").read_text())


def table(results: dict[str, list[dict]]) -> str:
    def cell(summaries: list[dict], key: str, form: str) -> str:
        values = [s[key] for s in summaries]
        spread = f" +- {format(np.std(values, ddof=1), form)}" if len(values) > 1 else ""
        return format(np.mean(values), form) + spread

    header = " | ".join(["rollout", *(name for name, _ in COLUMNS.values())])
    lines = [f"| {header} |", "|---|---|---|---|---|"]
    for rollout, name in ROLLOUTS.items():
        cells = [cell(results[rollout], key, form) for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for key, what in (("tokens_generated", "generated tokens"),
                      ("seconds_without_evaluation", "training time")):
        ratio = sum(r[key] for r in results["rpo"]) / sum(r[key] for r in results["full"])
        lines.append(f"\nRPO: {1 - ratio:.1%} less {what} than full paths.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    results: dict[str, list[dict]] = {rollout: [] for rollout in ROLLOUTS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in map(int, args.seeds.split(",")):  # alternated, so that a noisy neighbour hits both
            for rollout in ROLLOUTS:
                results[rollout].append(run(rollout, seed, Path(folder)))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    text = (f"{table(results)}\n\nWritten by `{' '.join(['python', 'benchmarks/tiny.py', *sys.argv[1:]])}` "
            f"at commit {commit}, seeds {args.seeds}, {platform.machine()}, {cores} cores; mean +- standard "
            "deviation over seeds.")
    print(text)
    if args.write:
        readme = ROOT / "README.md"
        marked = f"<!-- results -->\n{text}\n<!-- /results -->"
        readme.write_text(re.sub(r"<!-- results -->.*<!-- /results -->", lambda _: marked, readme.read_text(),
                                 flags=re.S))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
