"""Results in the Hub's form for leaderboards: `.eval_results/<benchmark>.yaml` in the repository of a model.

The older form, `model-index` in the card, is in [`cards`](cards.py). See https://huggingface.co/docs/hub/eval-results.
"""

import math

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from echo4o.common.hub_names import require_repository_name
from echo4o.model_cards.facts import Result

# The Hub datasets of benchmarks whose dataset is known; others are named by the user.
DATASETS = {"omnicontext": "OmniGen2/OmniContext"}
FOLDER = ".eval_results"


def eval_results_path(result: Result) -> str:
    """The file of a result in the repository."""
    return f"{FOLDER}/{result.values['benchmark']}.yaml"


def eval_results_yaml(result: Result, dataset: str, task: str = "default") -> str:
    """The file of a result.

    Args:
        dataset: the Hub dataset of the benchmark.
        task: its task there.

    Raises:
        ValueError: the result has no overall score, or the name of the dataset is not one of the Hub.
    """
    require_repository_name(dataset)
    values = result.values
    score = values["score"]
    if not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{result.title}: there is no overall score to publish ({values.get('withheld')})")
    if not task.strip():
        raise ValueError(f"{result.title}: the task of {dataset} is empty")
    entry = EvalResultEntry(dataset_id=dataset, task_id=task, value=score, notes=_notes(result))
    rows = eval_result_entries_to_yaml([entry])
    if parse_eval_result_entries(rows) != [entry]:
        raise ValueError(f"{result.title}: the result does not survive being written for the Hub")
    return yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=1000)


def _notes(result: Result) -> str:
    values = result.values
    low, high = values["intervals"]["score"]
    official = {True: "official prompts", False: "other prompts", None: "prompts not checked"}
    parts = [
        values.get("measure", {}).get("name", result.title),
        f"judge {result.judge}",
        f"95% interval {low:.4g} to {high:.4g}",
        f"coverage {values['coverage']:.1%}",
        official[values["prompts"]["official"]],
    ]
    return ", ".join(parts)
