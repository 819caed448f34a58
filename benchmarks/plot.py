"""Curves of runs from their metrics.jsonl: pass@1 and reward against steps, generated tokens and seconds.

    pip install matplotlib && python benchmarks/plot.py RUN [RUN ...] [--out FOLDER]
    python benchmarks/plot.py docs/reproduction.json --rows dapo --out docs --name reproduction

Runs whose options differ only in the seed are one curve: their mean, with a band of one standard deviation.
Of the records of reproduce.py those are drawn whose row begins with --rows. Writes NAME.png and NAME.svg.
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


def load_runs(folders: list[Path]) -> dict[str, list[list[dict]]]:
    """Metrics of the runs of each curve, by its name."""
    groups: dict[str, tuple[dict, list[list[dict]]]] = {}
    for folder in folders:
        config, rows = load(folder)
        groups.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(rows)
    names = labels([config for config, _ in groups.values()])
    return dict(zip(names, [runs for _, runs in groups.values()]))


def load_records(file: Path, rows: str) -> dict[str, list[list[dict]]]:
    """Likewise from the file that reproduce.py writes."""
    keys = {"steps": "step", "tokens": "tokens/generated", "seconds": "time/total_s",
            "accuracy": "eval/accuracy"}
    groups: dict[str, list[list[dict]]] = {}
    for record in json.loads(file.read_text()):
        if record["row"].startswith(rows) and "length reward" not in record["row"]:
            points = zip(*(record[key] for key in keys))
            groups.setdefault(record["row"], []).append([dict(zip(keys.values(), p)) for p in points])
    return groups


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
    parser.add_argument("--name", default="curves")
    parser.add_argument("--rows", default="", help="of a file of records: rows that begin with this")
    args = parser.parse_args()
    try:
        import matplotlib
        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        sys.exit("plot.py: error: the figures need matplotlib: pip install matplotlib")
    recorded = args.runs[0].suffix == ".json"
    groups = load_records(args.runs[0], args.rows) if recorded else load_runs(args.runs)
    metrics = dict(list(METRICS.items())[:1 if recorded else 2])
    height = 1 + 2.5 * len(metrics)
    figure, grid = pyplot.subplots(len(metrics), len(AXES), figsize=(11, height), sharey="row", squeeze=False)
    for row, (metric, title) in zip(grid, metrics.items()):
        for axes, (axis, unit) in zip(row, AXES.items()):
            for name, runs in groups.items():
                first = recorded and axis != "step"  # on a logarithmic axis 0 has no place
                x, mean, deviation = (values[first:] for values in curve(runs, axis, metric))
                label = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
                axes.plot(x, mean, marker="." if len(x) < 30 else "", label=label)
                axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.2)
            axes.set_xlabel(unit)
            axes.grid(alpha=0.3)
            if recorded and axis != "step":
                axes.set_xscale("log")
            elif axis == "tokens/generated":
                axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        row[0].set_ylabel(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False,
                  fontsize="small")
    figure.tight_layout(rect=(0, 0.2 * (1 + (len(groups) + 1) // 2) / height, 1, 1))
    args.out.mkdir(parents=True, exist_ok=True)
    for ending in ("png", "svg"):
        figure.savefig(args.out / f"{args.name}.{ending}", dpi=150)
    print(f"{args.out / args.name}.png, .svg: " + "; ".join(groups))


if __name__ == "__main__":
    main()
