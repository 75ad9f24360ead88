"""The base class of pipeline mixins: type checkers see a `DiffusionPipeline`, which is always the pipeline's last base."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline as PipelineMixin
else:
    PipelineMixin = object
