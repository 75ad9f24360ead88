"""The published folder of BLIP3-o where the package cannot be imported."""

import numpy as np
import pytest
import torch

from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline
from echo4o.testing.processes import offline_environment, run_script

SCRIPT = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

try:
    import echo4o
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package can be imported")


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "feature_steps": 2, "output_type": "np"}
    return pipe(["a cube", "two red balls"], generator=torch.Generator().manual_seed(1), **options).images


source, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.save_pretrained(target + "/saved")
again = DiffusionPipeline.from_pretrained(target + "/saved", trust_remote_code=True)
answer = again.chat("Why?", max_new_tokens=4)
np.savez(target + "/drawn.npz", first=draw(pipe), again=draw(again), answer=answer)
"""


@pytest.mark.long
def test_the_folder_works_without_the_package(tmp_path, converted):
    (tmp_path / "home").mkdir()
    (tmp_path / "out").mkdir()
    run_script(SCRIPT, converted, tmp_path / "out", env=offline_environment(tmp_path / "home"), hide=["echo4o"])
    pipe = Blip3oPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "feature_steps": 2, "output_type": "np"}
    want = pipe(["a cube", "two red balls"], generator=torch.Generator().manual_seed(1), **options).images
    got = np.load(tmp_path / "out" / "drawn.npz")
    for name in ("first", "again"):
        np.testing.assert_allclose(got[name], want, atol=1e-5)
    assert str(got["answer"]) == pipe.chat("Why?", max_new_tokens=4)
    again = Blip3oPipeline.from_pretrained(tmp_path / "out" / "saved")
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True))
