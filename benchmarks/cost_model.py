"""What a step costs as a function of its tokens: fitted to our runs, compared with the paper's hours.

    python benchmarks/cost_model.py     # seconds; writes docs/cost_model.md from docs/reproduction.json
"""
import json

from common import DOCS, head, parser, row

import numpy as np

# arXiv 2601.19404, tables 2 and 3: 7,000 problems, 4 epochs, G = 6; (tokens generated per response, hours)
RESPONSES, GROUP = 7000 * 4 * 6, 6
PAPER = {"1.5B": {"size": 1.54e9, "full": (2690, 77.3), "L = 800": (382, 8.4), "L = 300": (146, None)},
         "7B": {"size": 7.6e9, "full": (2458, 84.5), "L = 800": (398, 23.5), "L = 300": (147, None)}}
PROMPT = 150  # tokens of a question and its instruction, our guess; it hardly matters

TEXT = """# What a step costs

Written by `python benchmarks/cost_model.py`. Seconds = a * tokens generated + b * tokens of paths and
prefixes read + c * tokens through the update's forward and backward: P + G*S per group if the prefix is
shared, else G*(P + S).

## Our runs

The small policy of tiny/, runs of docs/reproduction.json.

{ours}

## The paper's hours

Tables 2 and 3 of arXiv 2601.19404, {responses:,} responses each. Assumed: hours are a * tokens generated + an
update whose cost depends only on the length of the whole response (their code trains on the prefix, too).
The two rows of each model give the two unknowns.

{papers}

7B: half of the hours of L = 800 are the update, which runs over whole responses however short the suffix is;
a shared prefix leaves three tenths of it. 1.5B: the two rows would make the cost of the update negative, so
full paths cost more per token than suffixes (batches wait for their longest response), which is not modelled;
the update is set to 0 there, all hours go to the tokens, and L = 800 comes out higher than in the paper. Also
left out: evaluation, moving weights from the trainer to the sampler, and what skipping visits saves, which
was measured on the small policy only.

## Limits of the machine

Per response, on an H100 (989 TFLOP/s, 3.35 TB/s): bfloat16 weights read once per decoded token for 64 rows,
6 FLOPs per parameter and trained token; no attention, no keys and values. The paper's hours are far above: a
few percent of the machine's rate, which this model cannot explain.

{limits}
"""


def fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients of least squares of the relative errors."""
    return np.linalg.lstsq(features / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]


def forwarded(prefix: float, suffix: float) -> float:
    """Tokens of an update's forward per response if the group shares its prefix."""
    return prefix / GROUP + suffix


def our_table() -> str:
    """The runs of reproduce.py against the model."""
    records = [r for r in json.loads((DOCS / "reproduction.json").read_text())
               if "--kl-coef" not in r["options"]]  # the forward of the reference policy is not counted
    rollout = np.array([[r["tokens"][-1], r["tokens/read"]] for r in records], dtype=float)
    update = np.array([[r["tokens/forwarded"]] for r in records], dtype=float)
    seconds = {key: np.array([r[f"time/{key}_s"] for r in records]) for key in ("rollout", "update")}
    costs = fit(rollout, seconds["rollout"]), fit(update, seconds["update"])
    (decode, prefill), (train,) = (1e3 * cost for cost in costs)
    columns = [seconds["rollout"], rollout @ costs[0], seconds["update"], update @ costs[1]]
    lines = [f"Fitted (least squares of relative errors over {len(records)} runs, one core each): "
             f"{decode:.3f} ms per generated token, {prefill:.3f} ms per token of a path or prefix read, "
             f"{train:.3f} ms per token through the update.", "",
             head("run", "seeds", "rollout s", "model", "update s", "model")]
    for name in dict.fromkeys(r["row"] for r in records):
        at = [i for i, r in enumerate(records) if r["row"] == name]
        lines.append(row(name, len(at), *(f"{column[at].mean():.0f}" for column in columns)))
    return "\n".join(lines)


def paper_table() -> str:
    """Two unknowns from two rows of each model; then the same with the prefix shared in the update."""
    lines = [head("model", "seconds per generated token", "seconds of the update per response", "full h",
                  "L = 800 h, paper", "L = 800 h, shared prefix", "L = 300 h, shared prefix")]
    for name, rows in PAPER.items():
        (long, hours), (short, hours_short) = rows["full"], rows["L = 800"]
        slope = (hours - hours_short) * 3600 / RESPONSES / (long - short)
        constant = max(0.0, hours * 3600 / RESPONSES - slope * long)  # the update of whole responses
        token = hours * 3600 / RESPONSES / long if constant == 0 else slope
        predicted = []
        for suffix in (short, rows["L = 300"][0]):
            share = forwarded(PROMPT + long - suffix, suffix) / (PROMPT + long)
            predicted.append(RESPONSES * (token * suffix + constant * share) / 3600)
        lines.append(row(name, f"{token:.2e}", f"{constant:.3f}", hours, hours_short,
                         *(f"{p:.1f} ({1 - p / hours:.0%} less)" for p in predicted)))
    return "\n".join(lines)


def limit_table() -> str:
    """FLOPs and bytes per response: the same work at the limits of an H100."""
    lines = [head("model", "run", "training, TFLOP", "with the prefix shared", "decoding, GB read at 64 rows",
                  "least seconds (shared)")]
    for name, rows in PAPER.items():
        parameters, whole = rows["size"], PROMPT + rows["full"][0]
        for way in ("full", "L = 800", "L = 300"):
            suffix = rows[way][0]
            plain, shared = (6 * parameters * tokens for tokens in (
                whole, whole if way == "full" else forwarded(whole - suffix, suffix)))
            read = 2 * parameters * suffix / 64
            lines.append(row(name, way, f"{plain / 1e12:.1f}", f"{shared / 1e12:.1f}", f"{read / 1e9:.1f}",
                             f"{shared / 989e12 + read / 3.35e12:.3f}"))
    return "\n".join(lines)


def main() -> None:
    parser(__doc__).parse_args()
    text = TEXT.format(ours=our_table(), papers=paper_table(), limits=limit_table(), responses=RESPONSES)
    (DOCS / "cost_model.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
