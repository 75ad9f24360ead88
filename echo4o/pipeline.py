"""`echo4o.load_pipeline`, and `echo4o.Echo4oPipeline`: the pipeline class with the package's `push_to_hub`."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfApi

from echo4o.modeling.bagel import pipeline_echo4o
from echo4o.modeling.common.loading import HUB_OPTIONS
from echo4o.modeling.pipelines import pipeline_class

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as _Pipeline
else:
    _Pipeline = object


class HubPublishingMixin(_Pipeline):
    """Replaces `push_to_hub` of a pipeline by one with the card and the checks of `echo4o push`."""

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, repo_id: str | None = None, **kwargs):
        """Saves the pipeline; with `push_to_hub=True` and `repo_id`, also publishes it, see `push_to_hub`."""
        if push_to_hub and not repo_id:
            raise ValueError("push_to_hub=True needs repo_id='owner/name'.")
        push_options = {
            n: kwargs.pop(n) for n in ("commit_message", "private", "token") if push_to_hub and n in kwargs
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        if repo_id and push_to_hub:
            self.push_to_hub(repo_id, **push_options)

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]  # other options than diffusers'
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool = True,
        token: str | None = None,
        *,
        base_model: str | None = None,
        datasets: Iterable[str] = (),
        results: Iterable[str | Path] = (),
        branch: str | None = None,
        overwrite: bool = False,
        verify: bool = True,
    ) -> str:
        """Saves the pipeline and publishes it with a card, as `echo4o push` does. Returns the URL of the commit.

        Args:
            private: visibility of a new repository (the default of diffusers is False); an existing repository keeps its
                visibility.
            base_model, datasets, results: facts for the card: the Hub repositories of the base model and of the
                training data, and folders of `echo4o evaluate`.
            branch: push to this branch instead of `main`.
            overwrite: replace a repository that holds something else.
            verify: load the upload back from the Hub.

        Raises:
            ValueError: the name or the card is not valid.
            OSError: the Hub refuses the request or does not answer.
        """
        from echo4o.hub.kinds.base import PushDetails
        from echo4o.hub.push import push

        details = PushDetails(base_model, tuple(datasets), tuple(Path(place) for place in results))
        options = {"private": private, "branch": branch, "message": commit_message, "overwrite": overwrite}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            result = push(folder, repo_id, details=details, api=HfApi(token=token), verify=verify, **options)
        return result.commit or result.address


class Echo4oPipeline(HubPublishingMixin, pipeline_echo4o.Echo4oPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    __doc__ = pipeline_echo4o.Echo4oPipeline.__doc__


def public_class(cls: type) -> type:
    """Returns the class of this name that the package exports, whose `push_to_hub` works like `echo4o push`."""
    return globals().get(cls.__name__, cls)


def load_pipeline(pretrained_model_name_or_path: str | Path, **kwargs):
    """Loads a pipeline of any class that this package supports, from a folder or the Hub.

    `model_index.json` names the class; `kwargs` are passed to its `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such pipeline.
        ValueError: the pipeline is of a class that this package does not support.
    """
    options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    cls = public_class(pipeline_class(pretrained_model_name_or_path, **options))
    return cls.from_pretrained(pretrained_model_name_or_path, **kwargs)
