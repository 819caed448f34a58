"""The experience cache: one reasoning path per problem, where to cut it, which response replaces it."""
from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Entry:
    """The cached path of one problem."""
    response_ids: list[int]  # whole, EOS included when it finished: never decoded and re-encoded
    reward: float
    correct: bool
    shortest: int  # tokens in the shortest response of the problem's last group (l in eq. 4)
    step: int  # when the path was written
    failed: int = 0  # responses from the bare prompt since one of the problem's responses was right


def parse_max_cut(text: str) -> int | float:
    """'300' -> 300 tokens; '0.5' -> that fraction of the last group's shortest response. Else ValueError."""
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if value >= 1 if isinstance(value, int) else 0 < value <= 1:
        return value
    raise ValueError(f"--max-cut {text}: give a whole number of tokens from 1 (300), or a fraction of the "
                     "last group's shortest response with a decimal point, above 0 and at most 1 (0.5)")


def longest_cut(entry: Entry, max_cut: int | float) -> int:
    """L of eq. 3 and 4: max_cut tokens, or that fraction of entry.shortest.
    At least 1 and at most the whole path."""
    limit = max_cut if isinstance(max_cut, int) else max_cut * entry.shortest
    return int(min(max(limit, 1), len(entry.response_ids)))


def uniform_cuts(logprobs: np.ndarray, longest: int) -> np.ndarray:
    """(n,): the chance of a cut before each token of a path; m ~ Uniform{1..L} of them are cut off (eq. 3).
    They add up to the policy's probability of not repeating the last L. [RPO-1]
    logprobs (n,): of the path's tokens under the policy; longest: L. The paper's {0..L} has one value that
    leaves nothing to sample."""
    chances = np.zeros(len(logprobs))
    chances[-longest:] = -np.expm1(logprobs[-longest:].sum()) / longest
    return chances


def branch_cuts(logprobs: np.ndarray, longest: int) -> np.ndarray:
    """The same, before the token at which the policy would leave the path first. [RPO-6]
    If more than L tokens are left there, only with the chance of L to their number: L bounds the mean."""
    follows = np.cumsum(logprobs) - logprobs  # log-prob of all that precedes
    return np.exp(follows) * -np.expm1(logprobs) * np.minimum(1, longest / np.arange(len(logprobs), 0, -1))


def cut(entry: Entry, chances: np.ndarray, rng: np.random.Generator) -> list[int]:
    """The kept prefix. chances (n,): of a cut before each token, up to a factor."""
    chances = chances + 1e-12  # all are 0 where a visit that repeats its path is not skipped
    return entry.response_ids[:int(rng.choice(len(chances), p=chances / chances.sum()))]


def fail_probability(entry: Entry, group_size: int) -> float:
    """The chance that no response from the bare prompt is right, with which such a visit is skipped. [RPO-7]
    Each is right with the chance 1 / (n + 2) after n that were not (Laplace's rule of succession)."""
    return (1 - 1 / (entry.failed + 2)) ** group_size


GOOD = 1 / 2  # pass rate from bare prompts from which on paths are continued. [RPO-9]
NO_PATH = Entry([], 0.0, False, 0, 0)  # of a problem that has none yet


def visit_rate(entry: Entry, prefix: Sequence[int] | None, correct: Sequence[bool],
               max_cut: int | float) -> float:
    """The policy's pass rate from the bare prompt, by one visit: right on average over cuts, not each time.
    prefix: None of a skipped visit, for which the path stands, that the policy would have repeated. correct:
    of the group otherwise. A cut that is taken with the chance of L to the tokens left counts as often more.
    """
    if prefix is None:
        return float(entry.correct)
    wrong = 1 - sum(correct) / len(correct)
    if entry.correct:
        wrong *= max(1, (len(entry.response_ids) - len(prefix)) / longest_cut(entry, max_cut))
    return 1 - wrong


def choose(rewards: Sequence[float], epsilon: float, rng: np.random.Generator) -> int:
    """Which response of a group replaces the path (eq. 10). [RPO-4]
    With probability `epsilon` the one of highest reward, otherwise a uniformly random OTHER one."""
    best = int(np.argmax(rewards))
    if len(rewards) == 1 or rng.random() < epsilon:
        return best
    other = int(rng.integers(len(rewards) - 1))
    return other + (other >= best)


def update(entry: Entry, responses: Sequence[list[int]], rewards: Sequence[float], correct: Sequence[bool],
           step: int, rng: np.random.Generator, epsilon: float, gate: bool, whole: bool) -> Entry:
    """The entry after a group of its problem. gate: a correct response is cached if there is one; else the
    path is given up, for a wrong one is not continued. whole: they are from the bare prompt."""
    entry = replace(entry, shortest=min(map(len, responses)),
                    failed=0 if any(correct) else entry.failed + whole * len(responses))
    allowed = [i for i, ok in enumerate(correct) if ok or not (gate and any(correct))]
    pick = allowed[choose([rewards[i] for i in allowed], epsilon, rng)]
    return replace(entry, response_ids=responses[pick], reward=rewards[pick], correct=correct[pick],
                   step=step)


def fingerprint(value: object) -> str:
    """Short hash of a JSON value, such as the vocabulary that token ids belong to."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def save(entries: dict[str, Entry], path: Path, tokenizer: str) -> None:
    """One JSON line an entry, each with a checksum, after a line that names their tokenizer."""
    records = [{"tokenizer": tokenizer}, *({"id": i, **asdict(entry)} for i, entry in entries.items())]
    with open(path, "w") as file:
        for text in map(json.dumps, records):
            file.write(f"{text[:-1]}, \"crc\": {zlib.crc32(text.encode())}}}\n")


def load(path: Path, tokenizer: str, problems: set[str], vocab_size: int,
         say: Callable[[str], None]) -> dict[str, Entry]:
    """The entries in a file. A damaged line is reported to `say` by number; its problem gets a new path.
    So are a path of an unknown problem and one with a token id of vocab_size or more. Raises ValueError if
    the file was made with another tokenizer, or does not say with which."""
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
                             "start a new run in another folder")
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
