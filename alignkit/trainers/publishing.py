"""`push_to_hub=True`: a trainer publishes the way `alignkit.publish` does, and never a whole checkpoint."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy

from alignkit.errors import AlignkitError, ConfigError, PublishError
from alignkit.hub.card import write_card
from alignkit.hub.publish import Published, check_repo_id, make_target, pack, require_token, send
from alignkit.hub.record import RunRecord
from alignkit.hub.staging import Staged
from alignkit.hub.trouble import Patience
from alignkit.hub.upload import Target
from alignkit.hub.verify import Verify, verify, verify_bytes
from alignkit.trainers.recording import save_description

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)


class PublishesToHub(_Base):
    """What replaces the ways in which `Trainer` pushes. It stands before `Trainer` among a trainer's parents.

    `Trainer` makes the repository when the trainer is made, public by default, and uploads whole folders with the
    pickled arguments. Here nothing is made before there is something to publish, a new repository is private unless
    `hub_private_repo=False`, and only the policy's adapter (or the model), tokenizer, card and record go up.
    """

    record: RunRecord
    _pushes: list[Future[Published | None]]
    _pusher: ThreadPoolExecutor | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Note where to publish, without asking the Hub: the repository is made with the first push.

        Raises:
            ConfigError: there is no token, or the name is none, so that the run could not publish in the end.
        """
        self._pushes = []
        try:
            require_token(token or self.args.hub_token)
        except PublishError as error:
            raise ConfigError(f"push_to_hub=True, but {error}") from error
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        check_repo_id(name if "/" in name else f"owner/{name}")
        self.hub_model_id = name

    def create_model_card(self, *, license: str | None = None, **unread: Any) -> None:
        """Write the run's card into the output directory; a card that a person wrote there keeps its text.

        Raises:
            ConfigError: any other argument than `license`: the card is made from what the run recorded.
        """
        _refuse_unread(unread)
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self.record, license=license)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **unread: Any,
    ) -> Published | Future[Published | None] | None:
        """Save the model into the output directory and publish it.

        Args:
            commit_message: of the commit.
            blocking: wait until it is there and checked; else return a future.
            token: by default `hub_token`, or the one of this machine.
            revision: a branch; by default `hub_revision`.
            private: by default `hub_private_repo`.

        Returns:
            Where it went; `None` on every process but the first.

        Raises:
            ConfigError, ModelError, PublishError: as `alignkit.publish`; the model stays in the output directory.
        """
        _refuse_unread(unread)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        job = _Job.prepare(
            self, Path(str(self.args.output_dir)), commit_message, token=token, revision=revision, private=private
        )
        if not blocking:
            return self._submit(job, verify_bytes)
        try:
            return job.run(verify)
        except PublishError as error:
            folder, name = self.args.output_dir, job.target.repo_id
            raise PublishError(
                f"{error} The model is saved in '{folder}': alignkit.publish('{folder}', '{name}') publishes it."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish what a checkpoint holds of the model, in the background; trouble is logged and ends no training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and any(not push.done() for push in self._pushes):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        progress = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        try:
            job = _Job.prepare(self, Path(checkpoint_folder), f"Training in progress, {progress}")
        except AlignkitError as error:
            logger.warning("This checkpoint is not published: %s", error)
            return
        self._submit(job, verify_bytes)

    def _submit(self, job: _Job, check: Verify) -> Future[Published | None]:
        if self._pusher is None:
            self._pusher = ThreadPoolExecutor(1, thread_name_prefix="alignkit-publish")
        self._pushes = [push for push in self._pushes if not push.done()]
        self._pushes.append(self._pusher.submit(job.run_quietly, check))
        return self._pushes[-1]

    def _finish_current_push(self) -> None:
        """Wait for what is being published."""
        if self._pusher is None:
            return
        if any(not push.done() for push in self._pushes):
            logger.info("Waiting until what is being published is there.")
        self._pusher.shutdown(wait=True)
        self._pusher, self._pushes = None, []


class _Job:
    """A copy of what is to be published, made at once, and sent now or later."""

    def __init__(self, scratch: contextlib.ExitStack, staged: Staged, target: Target, token: str | None) -> None:
        self._scratch = scratch  # removes the copy
        self.staged = staged
        self.target = target
        self.token = token

    @classmethod
    def prepare(
        cls,
        trainer: PublishesToHub,
        folder: Path,
        message: str | None,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> _Job:
        """Copy the model out of `folder`, with the run's card and record as they are now."""
        args, token = trainer.args, token or trainer.args.hub_token
        secrets = {"hub_token": args.hub_token} if args.hub_token else {}
        repo_id = _full_name(str(trainer.hub_model_id), token)
        target = make_target(
            repo_id,
            private=args.hub_private_repo if private is None else private,
            branch=revision or args.hub_revision,
            create_pr=False,
            commit_message=message,
        )
        with contextlib.ExitStack() as on_error:
            scratch = on_error.enter_context(tempfile.TemporaryDirectory(prefix="alignkit-publish-"))
            described = Path(scratch) / "described"
            save_description(trainer, described)
            sources = [folder, described, Path(str(args.output_dir))]
            staged = pack(sources, Path(scratch) / "staged", repo_id, token=token, secrets=secrets)
            return cls(on_error.pop_all(), staged, target, token)

    def run(self, check: Verify) -> Published:
        """Send it."""
        with self._scratch:
            return send(self.staged, self.target, token=self.token, patience=Patience(), verify=check)

    def run_quietly(self, check: Verify) -> Published | None:
        """Send it; what goes wrong is logged, since training goes on."""
        try:
            return self.run(check)
        except AlignkitError as error:
            logger.warning("Not published: %s", error)
            return None


def _full_name(name: str, token: str | None) -> str:
    """Put the user's name before a repository's, where none is given."""
    if "/" in name:
        return name
    api = HfApi(token=require_token(token))
    user = Patience().ask(lambda: str(api.whoami()["name"]), f"ask {constants.ENDPOINT} for your name", name)
    return f"{user}/{name}"


def _refuse_unread(arguments: dict[str, Any]) -> None:
    if arguments:
        raise ConfigError(
            f"{', '.join(sorted(arguments))}: the card is written from the run's record, which says this already; to "
            "say more, write a README.md into the output directory. Leave it out."
        )
