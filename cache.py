"""The experience cache: one reasoning path per problem as token ids, its cut, its epsilon-greedy update."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass
class Entry:
    """The cached path of one problem."""

    response_ids: list[int]  # the whole response, EOS included when it finished: never decoded and re-encoded
    reward: float
    shortest: int  # tokens in the shortest response of the problem's last group (l in eq. 4)
    step: int  # when it was written; 0: by the initialisation


def parse_max_cut(text: str) -> int | float:
    """'300' -> 300 tokens; '0.5' -> that fraction of the last group's shortest response. Else ValueError."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if isinstance(value, int) and value >= 1 or isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(f"--max-cut {text}: give a whole number of tokens from 1 (300), or a fraction above 0 "
                     "and at most 1 with a decimal point (0.5: half of the last group's shortest response)")


def cut(entry: Entry, max_cut: int | float, rng: np.random.Generator) -> list[int]:
    """The kept prefix: `entry` without its last m ~ Uniform{1..L} tokens (eq. 3 and 4). [RPO-1]

    L = max_cut tokens, or that fraction of entry.shortest; at least 1 and at most the whole path. The paper's
    {0..L} has one value without anything to sample in it, so ours starts at 1.
    """
    limit = max_cut if isinstance(max_cut, int) else int(max_cut * entry.shortest)
    limit = min(max(limit, 1), len(entry.response_ids))
    drop = int(rng.integers(1, limit + 1))
    return entry.response_ids[:len(entry.response_ids) - drop]


def choose(rewards: Sequence[float], epsilon: float, rng: np.random.Generator) -> int:
    """Which response of a group becomes the entry (eq. 10). [RPO-4]

    With probability `epsilon` the one of highest reward, otherwise a uniformly random OTHER one.
    """
    best = int(np.argmax(rewards))
    if len(rewards) == 1 or rng.random() < epsilon:
        return best
    other = int(rng.integers(len(rewards) - 1))
    return other + (other >= best)


def save(entries: dict[str, Entry], path: Path) -> None:
    """One JSON line an entry, written to a temporary file that is renamed when it is whole."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        for problem_id, entry in entries.items():
            file.write(json.dumps({"id": problem_id, **asdict(entry)}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
