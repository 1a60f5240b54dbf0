"""A process of its own in which the real client runs, because it reads HF_ENDPOINT and its like once, at import.

It reads one task a line from its input, `{"task": name, "arguments": {…}}`, and answers each with one line: what the
task returned or raised, and everything that was logged or printed meanwhile.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

import alignkit
from tests.hub_server import training

IDS = [[5, 17, 23, 42, 7, 99, 64, 12]]


def publish(folder: str, repo_id: str, **options: Any) -> dict[str, Any]:
    return alignkit.publish(folder, repo_id, **options)._asdict()


def load(repo_id: str, revision: str = "main", subclass: str = "peft") -> list:
    """Load what was published by its name, with plain peft or transformers, and return its logits."""
    kind: Any = {"peft": AutoPeftModelForCausalLM, "classifier": AutoModelForSequenceClassification}[subclass]
    model = kind.from_pretrained(repo_id, revision=revision).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.tolist()


def train(**arguments: Any) -> Any:
    return training.train(**arguments)


def setenv(**variables: str | None) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def limit_files(size: int | None) -> None:
    """Let this process write no file beyond `size` bytes: the nearest to a full disk that needs no rights."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


TASKS = {task.__name__: task for task in (publish, load, train, setenv, limit_files)}


def answer(line: str) -> dict[str, Any]:
    asked, printed = json.loads(line), io.StringIO()
    handler = logging.StreamHandler(printed)
    loggers = [logging.getLogger(), logging.getLogger("huggingface_hub"), logging.getLogger("transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    reply: dict[str, Any] = {}
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(record=True) as w,
    ):
        warnings.simplefilter("always")
        try:
            reply["result"] = TASKS[asked["task"]](**asked["arguments"])
        except Exception as error:  # noqa: BLE001 (whatever it is, the test that asked is told)
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply["error"] = {"kinds": kinds, "message": str(error)}
    for logger in loggers:
        logger.removeHandler(handler)
    reply["output"] = printed.getvalue() + "".join(f"{each.category.__name__}: {each.message}\n" for each in w)
    return reply


def main() -> None:
    logging.getLogger().setLevel(logging.INFO)
    transformers_logging.set_verbosity_info()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints to the real output must not garble the replies
    torch.set_num_threads(1)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=replies, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
