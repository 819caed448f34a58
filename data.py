"""Problems and prompts: read a file or a hub data set, find a model by name, apply the chat template."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import answers

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
DEFAULT_DATA = "agentica-org/DeepScaleR-Preview-Dataset:deepscaler.json"  # 40k competition problems, MIT
# who publishes the models whose short names begin like this
ORGANISATIONS = {"Qwen": "Qwen", "DeepSeek": "deepseek-ai", "SmolLM": "HuggingFaceTB"}
QUESTION_KEYS = ("problem", "question", "prompt")
ANSWER_KEYS = ("answer", "final_answer")
# everything a policy needs, safetensors only: pickled weights can run code
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Problem:
    """One problem with its gold answer."""
    id: str  # hash of question and answer: the same in every file and order, so a cache can be keyed by it
    question: str
    answer: str
    solution: str = ""


def load_problems(source: str, option: str) -> list[Problem]:
    """Problems of a .jsonl or .json file, or of a hub data set `owner/name` or `owner/name:file`, in order.
    What is dropped is counted on the screen. Raises ValueError, with `option` in it, for what cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{option} {source}: this is a folder; give a .jsonl or .json file in it")
    if not path.exists():
        path = _download(source, option)
    problems: dict[str, Problem] = {}
    dropped = {"no answer": 0, "duplicate": 0, "gold answer cannot be checked": 0}
    for where, record in _records(path, f"{option} {source}"):
        problem = _problem(record, f"{option} {source}: {where}")
        error = problem and answers.parse_error(problem.answer)
        if problem is None:
            dropped["no answer"] += 1
        elif problem.id in problems:
            dropped["duplicate"] += 1
        elif error:
            dropped["gold answer cannot be checked"] += 1
            tqdm.write(f"{option} {source}: {where}, id {problem.id}: "
                       f"answer {problem.answer[:60]!r}: {error}")
        else:
            problems[problem.id] = problem
    total = len(problems) + sum(dropped.values())
    for reason, count in dropped.items():
        if count:
            tqdm.write(f"{option} {source}: dropped {count} of {total}: {reason}")
    return list(problems.values())


def _records(path: Path, source: str) -> Iterable[tuple[str, dict]]:
    """(place in the file, record) pairs."""
    if path.suffix not in (".jsonl", ".json"):
        yield from _records_by_datasets(path, source)
        return
    where = "the file"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.split("\n"), 1):
                where = f"line {number}"
                if line.strip():
                    yield where, json.loads(line)
            return
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: {where} is not valid JSON ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read as UTF-8 text ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"{source}: a .json file holds one list of records; if one a line, name it .jsonl")
    yield from ((f"record {number}", record) for number, record in enumerate(records, 1))


def _records_by_datasets(path: Path, source: str) -> Iterable[tuple[str, dict]]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{source}: only .jsonl and .json are read without the optional package datasets, "
                         "which is not installed: pip install datasets, or convert the file") from error
    kind = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}.get(path.suffix)
    if kind is None:
        raise ValueError(f"{source}: the file name ends in none of .jsonl .json .parquet .csv .arrow")
    for number, record in enumerate(datasets.load_dataset(kind, data_files=str(path), split="train"), 1):
        yield f"record {number}", record


def _problem(record: object, where: str) -> Problem | None:
    """None if the record has no answer anywhere."""
    question = _first(record, QUESTION_KEYS) if isinstance(record, dict) else ""
    if not question:
        raise ValueError(f"{where} has no question: it needs one of the fields {', '.join(QUESTION_KEYS)}")
    solution = _first(record, ("solution",))
    answer = _first(record, ANSWER_KEYS)
    if "####" in answer:  # GSM8K as published keeps the worked solution in the answer field
        solution, answer = solution or answer, answers.extract_answer(answer) or ""
    answer = answer or answers.extract_answer(solution) or ""
    if not answer:
        return None
    digest = hashlib.sha256(f"{question}\0{answer}".encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return Problem(digest, question, answer, solution)


def _first(record: dict, keys: Iterable[str]) -> str:
    for key in keys:
        if record.get(key) is not None and str(record[key]).strip():
            return str(record[key]).strip()
    return ""


def _download(source: str, option: str) -> Path:
    """One file of a hub data set."""
    repo, _, name = source.partition(":")
    if source.endswith((".jsonl", ".json")) and not name or repo.count("/") != 1:
        raise ValueError(f"{option} {source}: no such file, nor a hub data set owner/name[:file]")
    try:
        if not name:
            files = [f for f in HfApi().list_repo_files(repo, repo_type="dataset")
                     if f.endswith((".jsonl", ".json", ".parquet"))]
            train = [f for f in files if "train" in f] or files
            if len(train) != 1:
                raise ValueError(f"{option} {source}: choose one of its files as {repo}:FILE, there are "
                                 + (", ".join(files[:8]) or "none that can be read"))
            name = train[0]
        return Path(hf_hub_download(repo, name, repo_type="dataset"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{option} {source}: no such file, and the hub data set could not be downloaded "
                         f"({_reason(error)})") from error


def find_model(name: str) -> Path:
    """Folder of a model: a local folder, a hub id (owner/name), or a short name such as Qwen2.5-Math-1.5B.
    Downloads it if need be. Raises ValueError saying what was tried, or what the folder lacks."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        owner = next((o for start, o in ORGANISATIONS.items() if name.startswith(start)), "")
        repo = name if "/" in name else f"{owner}/{name}"
        if not owner and "/" not in name:
            raise ValueError(f"--model {name}: no such folder, and not a short name (those begin with "
                             f"{', '.join(ORGANISATIONS)}); give a folder or a hub id owner/name")
        try:
            folder = Path(snapshot_download(repo, allow_patterns=MODEL_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"--model {name}: no such folder, and downloading {repo} from the hub failed "
                             f"({_reason(error)})") from error
    if not (folder / "config.json").exists():
        raise ValueError(f"--model {name}: {folder} has no config.json, so it is not a model folder")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"--model {name}: {folder} has no weights (*.safetensors)")
    return folder


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, instruction: str = INSTRUCTION,
                  role: str = "system") -> list[int]:
    """Token ids of the prompt, up to where the response begins.
    role "system": the instruction is the system turn; "user": it follows the question. A tokenizer without a
    chat template gets a plain one."""
    if role == "user":
        messages = [{"role": "user", "content": f"{question}\n\n{instruction}".strip()}]
    else:
        messages = [{"role": "system", "content": instruction}] if instruction else []
        messages += [{"role": "user", "content": question}]
    if tokenizer.chat_template:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    return list(tokenizer(f"{instruction}\n\nProblem: {question}\n\nSolution:".strip())["input_ids"])


def encode_prompts(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, instruction: str,
                   role: str, max_prompt: int) -> dict[str, list[int]]:
    """Prompt ids by problem id; those longer than max_prompt tokens are left out and counted."""
    prompts = {p.id: encode_prompt(tokenizer, p.question, instruction, role)
               for p in tqdm(problems, "prompts", leave=False, delay=5)}
    short = {key: ids for key, ids in prompts.items() if len(ids) <= max_prompt}
    if len(short) < len(prompts):
        tqdm.write(f"dropped {len(prompts) - len(short)} of {len(prompts)} problems: prompt longer than "
                   f"--max-prompt {max_prompt} tokens")
    return short


def eos_ids(tokenizer: PreTrainedTokenizerBase, generation_eos: int | list[int] | None) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, the generation config's, and what ends a chat turn.
    The last one matters for base models, whose own end token is another (Qwen2.5: <|im_end|>, <|endoftext|>).
    """
    others = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    ids = {tokenizer.eos_token_id, *others, *_turn_end(tokenizer)}
    return tuple(sorted(i for i in ids if i is not None))


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[the special token that the chat template puts after a response], or []."""
    if not tokenizer.chat_template:
        return []
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "response"}]
    chat = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in chat[len(prompt):] if i in special][:1]


def encode_solutions(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase,
                     max_response: int, option: str, otherwise: str) -> dict[str, list[int]]:
    """The worked solutions as responses: token ids by problem id, with the token that ends a response.
    Those without a solution, or with one of more than max_response tokens, are left out and counted;
    `otherwise` says what becomes of them. Raises ValueError, with `option` in it, if none is left."""
    end = (_turn_end(tokenizer) or [tokenizer.eos_token_id])
    paths = {p.id: [*tokenizer(p.solution, add_special_tokens=False)["input_ids"], *end]
             for p in problems if p.solution}
    short = {key: ids for key, ids in paths.items() if len(ids) <= max_response}
    if not short:
        raise ValueError(f"{option} solutions: no problem has a worked solution (field solution) of at most "
                         f"--max-response {max_response} tokens; use {option} policy or other --data")
    if len(short) < len(problems):
        tqdm.write(f"{option} solutions: {len(problems) - len(paths)} of {len(problems)} problems have "
                   f"no worked solution, {len(paths) - len(short)} one longer than --max-response "
                   f"{max_response} tokens: {otherwise}")
    return short
