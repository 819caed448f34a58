"""What a response is paid: is its answer right, and which reward follows."""
from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from answers import Checker
from data import Problem

OVERLONG_BUFFER = 0.2  # last share of the longest response in which the overlong penalty grows


@dataclass(frozen=True)
class Group:
    """One problem's rollout: everything that happened, as ragged lists with one item per response."""
    problem: Problem
    prompt: list[int]  # token ids
    prefix: list[int]  # the kept part of the cached path; empty: a full path
    budget: int  # tokens that a suffix could have had
    suffixes: list[list[int]]  # token ids, EOS included when finished
    logprobs: list[list[float]]  # of the sampling forward: only compared, never trained on
    finished: list[bool]  # ended by an EOS id, not by the budget
    correct: list[bool]
    rewards: list[float]  # what the advantages are made of
    parts: dict[str, list[float]] = field(default_factory=dict)  # of the rewards, besides correctness

    @property
    def context(self) -> list[int]:
        return self.prompt + self.prefix

    @property
    def responses(self) -> list[list[int]]:
        return [self.prefix + suffix for suffix in self.suffixes]


@dataclass(frozen=True)
class RewardRule:
    """What a response is graded by and `reward` adds up."""
    checker: Checker  # of final answers
    max_response: int  # tokens
    length_alpha: float  # of the length-aware reward, 0: off
    overlong_penalty: float  # largest penalty near max_response, 0: off
    own: RewardFile | None = None


def grade(responses: Sequence[tuple[Problem, str]], checker: Checker) -> list[bool]:
    """Is a response correct? The one place that says so, in training and in evaluation."""
    return checker.check([(text, problem.answer) for problem, text in responses])


def reward(problem: Problem, texts: Sequence[str], lengths: Sequence[int], correct: Sequence[bool],
           rule: RewardRule) -> tuple[list[float], dict[str, list[float]]]:
    """Rewards of the responses of one group, and their parts besides correctness, for the log.
    texts: the whole responses; lengths: theirs in tokens. Raises RewardFileError."""
    total, parts = length_rewards(correct, lengths, rule.length_alpha), {}
    if rule.overlong_penalty:
        buffer = OVERLONG_BUFFER * rule.max_response
        parts["overlong"] = [overlong_reward(n, rule.max_response, buffer) for n in lengths]
        total = [x + rule.overlong_penalty * part for x, part in zip(total, parts["overlong"])]
    if rule.own:
        own = rule.own(problem, texts, lengths, correct)
        total = [sum(column) for column in zip(total, *own.values())]
        parts |= own
    return total, parts


def length_rewards(correct: Sequence[bool], lengths: Sequence[int], alpha: float) -> list[float]:
    """Eq. 11 of arXiv 2601.19404 within one group: a correct response of `len` tokens gets
    clip(1 / (1 + exp(-alpha * (mean length - len))), 0.5, 1); a wrong one stays 0. [RPO-5]
    alpha 0: 1 for a correct response. Raises ValueError if the two do not have the same number."""
    if len(correct) != len(lengths):
        raise ValueError(f"{len(correct)} verdicts but {len(lengths)} lengths: give one of each per response")
    if alpha == 0 or not lengths:
        return [float(c) for c in correct]
    mean = sum(lengths) / len(lengths)
    gains = [0.5 + 0.5 * math.tanh(0.5 * alpha * (mean - n)) for n in lengths]  # the sigmoid without overflow
    return [min(max(gain, 0.5), 1.0) if c else 0.0 for c, gain in zip(correct, gains)]


def overlong_reward(length: int, longest: int, buffer: float) -> float:
    """0, within the last `buffer` tokens below `longest` falling to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (longest - buffer - length) / buffer))


class RewardFileError(ValueError):
    """A user's reward function is missing, fails, or returns what is no reward."""


class RewardFile:
    """A user's `reward(problem, texts, lengths, correct)`: one number for each response of a group.
    problem has id, question, answer and solution; texts are whole responses, lengths theirs in tokens. It
    returns a list, or a dict of named lists; all are added to the reward, and each is logged apart."""

    def __init__(self, path: str) -> None:
        self.name = f"--reward-file {path}"
        spec = importlib.util.spec_from_file_location("reward_file", path)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except Exception as error:
            raise RewardFileError(f"{self.name}: cannot be loaded as Python: {error!r}") from error
        self.reward = getattr(module, "reward", None)
        if not callable(self.reward):
            raise RewardFileError(f"{self.name}: has no function reward(problem, texts, lengths, correct)")

    def __call__(self, problem: Problem, texts: Sequence[str], lengths: Sequence[int],
                 correct: Sequence[bool]) -> dict[str, list[float]]:
        """{"file": rewards} or {"file/NAME": rewards, ...}. Raises RewardFileError."""
        try:
            value = self.reward(problem, list(texts), list(lengths), list(correct))
        except Exception as error:
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else "?"
            raise RewardFileError(f"{self.name}: reward() failed at line {line}: {error!r}") from error
        named = {f"file/{k}": v for k, v in value.items()} if isinstance(value, dict) else {"file": value}
        try:
            parts = {name: [float(x) for x in values] for name, values in named.items()}
        except (TypeError, ValueError):
            parts = {"file": []}  # neither a list of numbers nor a dict of such lists
        if not all(len(x) == len(texts) and all(map(math.isfinite, x)) for x in parts.values()):
            raise RewardFileError(f"{self.name}: reward() must return one finite number per response, "
                                  f"{len(texts)} here, in a list or a dict of lists, not {value!r:.200}")
        return parts
