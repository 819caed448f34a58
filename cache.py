"""The experience cache: one reasoning path per problem as token ids, its cut, its epsilon-greedy update."""
from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Entry:
    """The cached path of one problem."""

    response_ids: list[int]  # the whole response, EOS included when it finished: never decoded and re-encoded
    reward: float
    correct: bool
    shortest: int  # tokens in the shortest response of the problem's last group (l in eq. 4)
    step: int  # when the path was written; 0: by the initialisation
    visits: int = 0  # groups of the problem so far
    limit: float = 0.0  # L of this problem where it is adaptive; 0: not set yet
    dead_end: int = 0  # no suffix of this many tokens of the wrong path was right; 0: none known


def parse_max_cut(text: str) -> int | float | str:
    """'300' -> 300 tokens; '0.5' -> that fraction of the last group's shortest response; 'adaptive'.

    Raises ValueError for anything else.
    """
    if text == "adaptive":
        return text
    value = _number(text)
    if isinstance(value, int) and value >= 1 or isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError(f"--max-cut {text}: give a whole number of tokens from 1 (300), a fraction above 0 and "
                     "at most 1 with a decimal point (0.5: half of the last group's shortest response), "
                     "or adaptive")


def parse_max_suffix(text: str) -> int | float | None:
    """'400' -> 400 tokens; '1.5' -> that multiple of the cut; '' -> None, no limit. Else ValueError."""
    value = _number(text)
    if not text or value >= 1:
        return value if text else None
    raise ValueError(f"--max-suffix {text}: give a whole number of tokens from 1 (400), a multiple of the "
                     "cut of at least 1 with a decimal point (1.5), or nothing for no limit but "
                     "--max-response")


def _number(text: str) -> int | float:
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        return 0
    return value if math.isfinite(value) else 0


def longest_cut(entry: Entry, max_cut: int | float | str, stretch: float = 1.0) -> int:
    """L of eq. 3 and 4: max_cut tokens, that fraction of entry.shortest, or the entry's own limit.

    Times `stretch`; at least 1 and at most the whole path.
    """
    limit = max_cut if isinstance(max_cut, int) else entry.limit if max_cut == "adaptive" else \
        max_cut * entry.shortest
    return int(min(max(limit * stretch, 1), len(entry.response_ids)))


def stretch_of(tail: float, rng: np.random.Generator) -> float:
    """How much longer L is in this step: above x with chance x ** -tail (Pareto); 0: never longer. [RPO-9]

    So a token r from the end can be cut with chance (L / r) ** tail: the early part of paths stays trained.
    Drawn for a whole step, whose rollout takes as long as its longest suffix: most steps stay short.
    """
    return 1 + rng.pareto(tail) if tail else 1.0


def turns(entry: Entry, logprobs: Sequence[float]) -> np.ndarray:
    """(L,): the policy's chance 1 - p of another token in each of the last L places. [RPO-10]

    0 where it would come too late, behind the prefix of a wrong path that has led nowhere. logprobs: of the
    path's last L tokens under the policy.
    """
    places = len(entry.response_ids) - len(logprobs) + np.arange(len(logprobs))
    return np.where((places >= entry.dead_end) & (entry.dead_end > 0), 0, -np.expm1(logprobs))


def is_certain(turns: np.ndarray, rng: np.random.Generator) -> bool:
    """True with the policy's chance of taking none of these turns: the visit is skipped. [RPO-11]"""
    return rng.random() < np.prod(1 - turns)


def cut(entry: Entry, weights: np.ndarray, rng: np.random.Generator) -> list[int]:
    """The kept prefix: the path without its last m tokens, m from 1 to L (eq. 3). [RPO-1]

    weights (L,): of m = L, L - 1, ..., 1; if they are all alike, m ~ Uniform{1..L}. The paper's {0..L} has
    one value without anything to sample in it.
    """
    weights = weights + 1e-9  # all are 0 where a visit that is certain is not skipped
    kept = int(rng.choice(len(weights), p=weights / weights.sum()))
    return entry.response_ids[:len(entry.response_ids) - len(weights) + kept]


def suffix_budget(cut: int, max_suffix: int | float | None, room: int) -> int:
    """Most tokens of a suffix: `room` is what --max-response leaves. A multiple lets it outgrow the cut."""
    limit = room if max_suffix is None else max_suffix if isinstance(max_suffix, int) else cut * max_suffix
    return min(room, math.ceil(limit))


def is_full_visit(entry: Entry, full_every: int) -> bool:
    """Every `full_every`th visit of a problem samples full paths; 0: none does. [RPO-6]"""
    return full_every > 0 and (entry.visits + 1) % full_every == 0


def steer(entry: Entry, pass_rate: float, low: int, high: int, gain: float) -> Entry:
    """The adaptive limit: log L moves by gain * (pass_rate - 1/2), within low..high and the path. [RPO-7]

    So it grows while more than half of the suffixes succeed, and shrinks while fewer do. high 0: the whole
    path. It starts at the geometric mean of its bounds.
    """
    top = max(low, min(high or len(entry.response_ids), len(entry.response_ids)))
    limit = entry.limit or math.sqrt(low * top)
    return replace(entry, limit=min(max(limit * math.exp(gain * (pass_rate - 0.5)), low), top))


def choose(rewards: Sequence[float], epsilon: float, rng: np.random.Generator) -> int:
    """Which response of a group becomes the entry (eq. 10). [RPO-4]

    With probability `epsilon` the one of highest reward, otherwise a uniformly random OTHER one.
    """
    best = int(np.argmax(rewards))
    if len(rewards) == 1 or rng.random() < epsilon:
        return best
    other = int(rng.integers(len(rewards) - 1))
    return other + (other >= best)


def update(entry: Entry, responses: Sequence[list[int]], rewards: Sequence[float], accuracy: Sequence[float],
           kept: int, step: int, rng: np.random.Generator, epsilon: float, keep_correct: bool) -> Entry:
    """The entry after a group of its problem. keep_correct: a correct path gives way to correct ones only.

    kept: tokens of the path that the responses begin with.
    """
    entry = replace(entry, visits=entry.visits + 1, shortest=min(map(len, responses)))
    allowed = [i for i, a in enumerate(accuracy) if a > 0 or not (keep_correct and entry.correct)]
    if not allowed:
        return entry
    pick = allowed[choose([rewards[i] for i in allowed], epsilon, rng)]
    return replace(entry, response_ids=responses[pick], reward=rewards[pick], correct=accuracy[pick] > 0,
                   step=step, dead_end=0 if entry.correct or any(accuracy) else kept)


def fingerprint(value: object) -> str:
    """Short hash of a JSON value: of the vocabulary that token ids belong to, of a list of problems."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def save(entries: dict[str, Entry], path: Path, tokenizer: str) -> None:
    """One JSON line an entry, each with a checksum, after a line that names their tokenizer."""
    with open(path, "w") as file:
        file.write(_line({"tokenizer": tokenizer}))
        for problem_id, entry in entries.items():
            file.write(_line({"id": problem_id, **asdict(entry)}))


def _line(record: dict) -> str:
    text = json.dumps(record)
    return f"{text[:-1]}, \"crc\": {zlib.crc32(text.encode())}}}\n"


def load(path: Path, tokenizer: str, problems: set[str], vocab_size: int,
         say: Callable[[str], None]) -> dict[str, Entry]:
    """The entries in a file. A damaged line is reported to `say` by number: its problem gets a new path.

    So is a path of an unknown problem, or with a token id from vocab_size on. Raises ValueError where the
    file was made with another tokenizer, or does not say.
    """
    entries = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            text, _, crc = line.decode().rpartition(', "crc": ')
            sound = crc == f"{zlib.crc32(f'{text}}}'.encode())}}}"
            record = json.loads(text + "}") if sound else None
        except ValueError:
            record = None
        if number == 1 and (record is None or record.get("tokenizer") != tokenizer):
            raise ValueError(f"{path}: its first line does not name the tokenizer of --model: "
                             "these paths were made with another one, or the file is damaged; "
                             "delete it to sample all paths anew")
        if number == 1 or not line:
            continue
        if record is None or not {"id", *Entry.__dataclass_fields__} == record.keys():
            say(f"{path}: line {number} is damaged: that problem gets a fresh path")
        elif record["id"] not in problems or max(record["response_ids"], default=0) >= vocab_size:
            say(f"{path}: line {number} has an unknown problem or token id: left out")
        else:
            problem_id = record.pop("id")
            entries[problem_id] = Entry(**record)
    return entries
