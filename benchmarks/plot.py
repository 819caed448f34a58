"""Curves of runs from their metrics.jsonl: pass@1 and reward against steps, generated tokens and seconds.

    pip install matplotlib && python benchmarks/plot.py RUN [RUN ...] [--out FOLDER]

Runs whose options differ only in the seed are one curve: their mean, with a band of one standard deviation.
Writes curves.png and curves.svg.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

METRICS = {"eval/accuracy": "pass@1 on held-out problems", "reward/mean": "mean reward of the rollout"}
AXES = {"step": "steps", "tokens/generated": "generated tokens", "time/total_s": "seconds"}
IGNORED = ("seed", "out", "resume", "resume_override", "tensorboard")  # do not make another curve


def load(folder: Path) -> tuple[dict, list[dict]]:
    """Options and metrics of a run; the first evaluation counts at 0 tokens and 0 seconds."""
    try:
        config = json.loads((folder / "config.json").read_text())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {folder}: no run folder of train.py ({error})")
    return ({k: v for k, v in config.items() if k not in IGNORED},
            [dict.fromkeys(AXES, 0) | row for row in rows])


def labels(configs: list[dict]) -> list[str]:
    """Each curve by the options in which they differ."""
    differ = [k for k in configs[0] if len({json.dumps(c.get(k)) for c in configs}) > 1]
    return [", ".join(f"{k} {c.get(k)}" for k in differ if k in ("algo", "rollout", "max_cut", *differ[:4]))
            or f"{c['algo']} {c['rollout']}" for c in configs]


def curve(runs: list[list[dict]], axis: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, standard deviation over the runs, at the steps that all of them have."""
    tables = [{row["step"]: row for row in rows if metric in row} for rows in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    x, y = (np.array([[table[s][key] for s in steps] for table in tables], dtype=float)
            for key in (axis, metric))
    return x.mean(0), y.mean(0), y.std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    try:
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("plot.py: error: the figures need matplotlib: pip install matplotlib")
    groups: dict[str, tuple[dict, list[list[dict]]]] = {}
    for folder in args.runs:
        config, rows = load(folder)
        groups.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(rows)
    names = labels([config for config, _ in groups.values()])
    figure, grid = pyplot.subplots(len(METRICS), len(AXES), figsize=(11, 6), sharey="row", squeeze=False)
    for row, (metric, title) in zip(grid, METRICS.items()):
        for axes, (axis, unit) in zip(row, AXES.items()):
            for name, (_, runs) in zip(names, groups.values()):
                x, mean, deviation = curve(runs, axis, metric)
                label = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
                axes.plot(x, mean, marker="." if len(x) < 30 else "", label=label)
                axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.2)
            axes.set_xlabel(unit)
            axes.grid(alpha=0.3)
            if axis == "tokens/generated":
                axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        row[0].set_ylabel(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False,
                  fontsize="small")
    figure.tight_layout(rect=(0, 0.04 + 0.03 * ((len(names) + 1) // 2), 1, 1))
    args.out.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(args.out / f"curves.{ending}", dpi=150)
    print(f"{args.out}/curves.png, {args.out}/curves.svg: " + "; ".join(names))


if __name__ == "__main__":
    main()
