"""One of two processes that train together and then both call `alignkit.publish`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import alignkit
from tests.hub_server.training import make_trainer


def main(folder: str, base: str, repo_id: str) -> None:
    trainer = make_trainer("dpo", folder, base, {"push_to_hub": False}, {})
    trainer.train()
    try:
        outcome = alignkit.publish(trainer, repo_id)._asdict()
    except alignkit.PublishError as error:
        outcome = {"error": str(error)}
    Path(folder, f"outcome-{trainer.args.process_index}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
