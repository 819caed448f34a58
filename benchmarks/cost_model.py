"""What a step costs as a function of its tokens: fitted to our runs, checked on the paper's.

    python benchmarks/cost_model.py     # docs/cost_model.md, from docs/reproduction.json
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

# arXiv 2601.19404, tables 2 and 3: 7,000 problems, 4 epochs, G = 6; tokens generated per response, hours
SAMPLES, GROUP = 7000 * 4 * 6, 6
PAPER = {"1.5B": {"parameters": 1.54e9, "full": (2690, 77.3), "L = 800": (382, 8.4), "L = 300": (146, None)},
         "7B": {"parameters": 7.6e9, "full": (2458, 84.5), "L = 800": (398, 23.5), "L = 300": (147, None)}}
PROMPT = 150  # tokens of a question and its instruction, our guess; it hardly matters


def fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients of least relative squares."""
    return np.linalg.lstsq(features / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]


def forwarded(prefix: float, suffix: float, group: int) -> float:
    """Tokens of an update's forward per response, where the prefix is shared by the group."""
    return prefix / group + suffix


def ours() -> list[str]:
    """The runs of reproduce.py against the model."""
    records = [r for r in json.loads((ROOT / "docs" / "reproduction.json").read_text())
               if "--kl-coef" not in r["options"]]  # a second model's forward is not counted
    rollout = np.array([[r["tokens"][-1], r["tokens/read"]] for r in records], dtype=float)
    update = np.array([[r["tokens/forwarded"]] for r in records], dtype=float)
    seconds = {key: np.array([r[f"time/{key}_s"] for r in records]) for key in ("rollout", "update")}
    decode, prefill = fit(rollout, seconds["rollout"])
    (train,) = fit(update, seconds["update"])
    lines = [f"Fitted (least relative squares over {len(records)} runs, one core each): {1e3 * decode:.3f} "
             f"ms per generated token, {1e3 * prefill:.3f} ms per token of a path or prefix that is read, "
             f"{1e3 * train:.3f} ms per token through the update.", "",
             "| row | runs | rollout s | model | update s | model |", "|---|---|---|---|---|---|"]
    for row in dict.fromkeys(r["row"] for r in records):
        at = [i for i, r in enumerate(records) if r["row"] == row]
        means = [seconds["rollout"][at].mean(), (rollout[at] @ [decode, prefill]).mean(),
                 seconds["update"][at].mean(), (update[at, 0] * train).mean()]
        lines.append(f"| {row} | {len(at)} | " + " | ".join(f"{x:.0f}" for x in means) + " |")
    return lines


def papers() -> list[str]:
    """Two unknowns from two rows of each model; then the same with the prefix shared in the update."""
    lines = ["| model | seconds per generated token | seconds of the update per response | full h | "
             "L = 800 h, paper | L = 800 h, shared prefix | L = 300 h, shared prefix |", "|---" * 7 + "|"]
    for name, rows in PAPER.items():
        (long, hours), (short, hours_short) = rows["full"], rows["L = 800"]
        slope = (hours - hours_short) * 3600 / SAMPLES / (long - short)
        constant = max(0.0, hours * 3600 / SAMPLES - slope * long)  # forward and backward of whole responses
        token = hours * 3600 / SAMPLES / long if constant == 0 else slope
        predicted = []
        for suffix in (short, rows["L = 300"][0]):
            share = forwarded(PROMPT + long - suffix, suffix, GROUP) / (PROMPT + long)
            predicted.append(SAMPLES * (token * suffix + constant * share) / 3600)
        less = " | ".join(f"{p:.1f} ({1 - p / hours:.0%} less)" for p in predicted)
        lines.append(f"| {name} | {token:.2e} | {constant:.3f} | {hours} | {hours_short} | {less} |")
    return lines


def limits() -> list[str]:
    """FLOPs and bytes per response: the same work at the limits of an H100 (989 TFLOP/s, 3.35 TB/s)."""
    lines = ["| model | way | training, TFLOP | with the prefix shared | decoding, GB read at 64 rows | "
             "seconds at least (shared) |", "|---" * 6 + "|"]
    for name, rows in PAPER.items():
        n, whole = rows["parameters"], PROMPT + rows["full"][0]
        for way in ("full", "L = 800", "L = 300"):
            suffix = rows[way][0]
            plain, shared = (6 * n * tokens for tokens in (
                whole, whole if way == "full" else forwarded(whole - suffix, suffix, GROUP)))
            read = 2 * n * suffix / 64
            lines.append(f"| {name} | {way} | {plain / 1e12:.1f} | {shared / 1e12:.1f} | {read / 1e9:.1f} | "
                         f"{shared / 989e12 + read / 3.35e12:.3f} |")
    return lines


def main() -> None:
    text = "\n".join([
        "# What a step costs", "", "Written by `python benchmarks/cost_model.py`. Seconds = a * tokens "
        "generated + b * tokens of paths and prefixes read + c * tokens through the update's forward and "
        "backward; with a shared prefix these are P + G*S per group, else G*(P + S).", "", "## Our runs", "",
        "The small policy of tiny/, runs of docs/reproduction.json.", "", *ours(), "",
        "## The paper's hours", "",
        f"Tables 2 and 3 of arXiv 2601.19404, {SAMPLES:,} responses of each. Assumed: hours are a * tokens "
        "generated + an update whose cost depends on the length of whole responses only, the same for all "
        "cuts (their code trains on the prefix, too). Two rows of each model give the two unknowns.", "",
        *papers(), "",
        "7B: the update is half of the hours of L = 800, because it runs over whole responses however "
        "short the suffix is; with a shared prefix three tenths of it are left. 1.5B: the two rows would "
        "make the update cost less than nothing, so full paths cost more per token than suffixes do "
        "(batches wait for their longest response), which is not in the model; the update is set to 0 "
        "there, all hours go to the tokens, and L = 800 comes out higher than the paper's. Not in it "
        "either: evaluation, moving weights from the trainer to the sampler, and what skipping visits "
        "saves, which was measured on the small policy only.",
        "", "## Limits of the machine", "",
        "Per response; weights in bfloat16 read once per decoded token for 64 rows, 6 FLOPs per parameter "
        "and trained token, attention and keys and values left out. The paper's hours are far above: a few "
        "percent of the machine's rate, which this model cannot explain.", "", *limits(), ""])
    (ROOT / "docs" / "cost_model.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
