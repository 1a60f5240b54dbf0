"""`alignkit publish`: a run's model on the Hub, with its card, checked before and after."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.output import AsJson, console, print_json

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder that a trainer saved its model to.", show_default=False)
]
RepoId = Annotated[str, typer.Argument(metavar="REPO", help="Where to: owner/name.", show_default=False)]
Public = Annotated[
    bool | None,
    typer.Option(
        "--public/--private",
        help="Who can see a new repository; by default only you. An existing one stays as it is.",
        show_default=False,
    ),
]
Branch = Annotated[str | None, typer.Option(help="Branch to commit to; made where it does not exist.")]
PullRequest = Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base's id on the Hub, where the adapter was trained on a local copy.")
]
Message = Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the card and the files that would go up; send nothing.")]


def publish(
    run: RunFolder,
    repo_id: RepoId,
    public: Public = None,
    branch: Branch = None,
    pull_request: PullRequest = False,
    base_model: BaseModel = None,
    message: Message = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter or model with an honest card, and check what arrived.

    Nothing goes up before all of it is ready and searched for secrets and paths of this machine. The token is the one
    of `hf auth login`, or HF_TOKEN.

    [bold]Examples[/bold]

      alignkit publish outputs/dpo_lora me/my-adapter --dry-run

      alignkit publish outputs/dpo_lora me/my-adapter --public

      alignkit publish outputs/dpo_lora team/adapter --pull-request -m "Train on the new pairs"
    """
    from alignkit.hub import publish as publishing

    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):  # what a dry run shows
        published = publishing.publish(
            run,
            repo_id,
            private=None if public is None else not public,
            branch=branch,
            create_pr=pull_request,
            dry_run=dry_run,
            commit_message=message,
            base_model=base_model,
        )
    if as_json:
        print_json(published._asdict())
        return
    if dry_run:
        return
    screen = console()
    screen.print(f"Published: {published.url} ({'private' if published.private else 'public'})", markup=False)
    for name, value in (("Commit", published.commit), ("Pull request", published.pull_request)):
        if value is not None:
            screen.print(f"{name}: {value}", markup=False)
    screen.print(f"Checked: {published.verified}", markup=False)
