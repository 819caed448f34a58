"""Curves of runs: pass@1 and reward against steps, generated tokens and seconds.

    pip install matplotlib && python benchmarks/plot.py RUN [RUN ...] [--out FOLDER] [--name NAME]
    python benchmarks/plot.py docs/reproduction.json --rows dapo --out docs --name reproduction

RUN is a run folder of train.py; runs that differ only in the seed are one curve, their mean, with a band of
one standard deviation. Of the records of reproduce.py it draws the longest runs whose row begins with --rows.
Takes seconds; writes NAME.png and NAME.svg.
"""
import json
import sys
from pathlib import Path

from common import parser, pyplot, read_lines, save_figure

import numpy as np

METRICS = {"eval/accuracy": "pass@1 on held-out problems", "reward/mean": "mean reward of the rollout"}
AXES = {"step": "steps", "tokens/generated": "generated tokens", "time/total_s": "seconds"}
IGNORED = ("seed", "out", "resume")  # do not make another curve
Curves = dict[str, list[list[dict]]]  # by name: of each run the metrics, one dict a step


def load(folder: Path) -> tuple[dict, list[dict]]:
    """Options and metrics of a run; the first evaluation counts at 0 tokens and 0 seconds."""
    try:
        config, rows = json.loads((folder / "config.json").read_text()), read_lines(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: error: {folder}: no run folder of train.py ({error})")
    return ({k: v for k, v in config.items() if k not in IGNORED}, [dict.fromkeys(AXES, 0) | r for r in rows])


def load_runs(folders: list[Path]) -> Curves:
    groups: dict[str, tuple[dict, list[list[dict]]]] = {}
    for folder in folders:
        config, rows = load(folder)
        groups.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(rows)
    names = labels([config for config, _ in groups.values()])
    return dict(zip(names, [runs for _, runs in groups.values()]))


def labels(configs: list[dict]) -> list[str]:
    """Each curve is named by the options in which they differ."""
    differ = [k for k in configs[0] if len({json.dumps(c.get(k)) for c in configs}) > 1]
    return [", ".join(f"{k} {c.get(k)}" for k in differ if k in ("algo", "rollout", "max_cut", *differ[:4]))
            or f"{c['algo']} {c['rollout']}" for c in configs]


def load_records(file: Path, rows: str) -> Curves:
    keys = {"steps": "step", "tokens": "tokens/generated", "seconds": "time/total_s",
            "accuracy": "eval/accuracy"}
    records = [r for r in json.loads(file.read_text()) if r["row"].startswith(rows)]
    curves: Curves = {}
    for record in records:
        if record["steps"][-1] == max(r["steps"][-1] for r in records):
            points = zip(*(record[key] for key in keys))
            curves.setdefault(record["row"], []).append([dict(zip(keys.values(), p)) for p in points])
    return curves


def mean_curve(runs: list[list[dict]], axis: str, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, standard deviation over the runs, at the steps that all of them have."""
    tables = [{r["step"]: r for r in rows if metric in r} for rows in runs]
    steps = sorted(set.intersection(*(set(table) for table in tables)))
    x, y = (np.array([[table[s][key] for s in steps] for table in tables], dtype=float)
            for key in (axis, metric))
    return x.mean(0), y.mean(0), y.std(0)


def draw(curves: Curves, recorded: bool) -> object:
    """The figure: a row of axes a metric, tokens and seconds of recorded runs on a logarithmic scale."""
    metrics = dict(list(METRICS.items())[:1 if recorded else 2])
    height = 1 + 2.5 * len(metrics)
    figure, grid = pyplot().subplots(len(metrics), len(AXES), figsize=(11, height), sharey="row",
                                     squeeze=False)
    for line, (metric, title) in zip(grid, metrics.items()):
        for axes, (axis, unit) in zip(line, AXES.items()):
            logarithmic = recorded and axis != "step"
            for name, runs in curves.items():
                # a logarithmic axis has no place for step 0
                x, mean, deviation = (v[int(logarithmic):] for v in mean_curve(runs, axis, metric))
                label = name + (f" ({len(runs)} seeds)" if len(runs) > 1 else "")
                axes.plot(x, mean, marker="." if len(x) < 30 else "", label=label)
                axes.fill_between(x, mean - deviation, mean + deviation, alpha=0.2)
            axes.set_xlabel(unit)
            axes.grid(alpha=0.3)
            if logarithmic:
                axes.set_xscale("log")
            elif axis == "tokens/generated":
                axes.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
        line[0].set_ylabel(title)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncol=2, frameon=False,
                  fontsize="small")
    figure.tight_layout(rect=(0, 0.2 * (1 + (len(curves) + 1) // 2) / height, 1, 1))
    return figure


def main() -> None:
    command = parser(__doc__)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, default=Path("."))
    command.add_argument("--name", default="curves")
    command.add_argument("--rows", default="", help="of a file of records: rows that begin with this")
    args = command.parse_args()
    recorded = args.runs[0].suffix == ".json"
    curves = load_records(args.runs[0], args.rows) if recorded else load_runs(args.runs)
    if not curves:
        sys.exit(f"plot.py: error: --rows {args.rows}: no row begins with this")
    args.out.mkdir(parents=True, exist_ok=True)
    save_figure(draw(curves, recorded), args.out / args.name)
    print(f"{args.out / args.name}.png, .svg: " + "; ".join(curves))


if __name__ == "__main__":
    main()
