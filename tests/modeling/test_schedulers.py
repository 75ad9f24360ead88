"""Schedulers: those that give Euler's results, or are known to be right, are allowed; all others are refused by name."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from echo4o.modeling.common.flow_schedulers import check_scheduler

UNIPC = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EQUAL = ("FlowMatchEulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler")


@pytest.fixture
def mine(pipe):
    original = pipe.scheduler
    yield pipe
    pipe.scheduler = original


def latents(pipe, steps: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": steps, "output_type": "latent"}
    return pipe("a red dot", generator=generator, guidance_interval=(0.0, 1.0), **options).images


def all_schedulers() -> list[str]:
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    return [name for name in names if isinstance(getattr(diffusers, name), type)]


@pytest.mark.parametrize("name", all_schedulers())
def test_every_scheduler_of_diffusers_gives_eulers_result_or_is_refused(mine, name):
    want, config = latents(mine), mine.scheduler.config
    try:
        mine.scheduler = getattr(diffusers, name).from_config(config)
    except (TypeError, ImportError, ValueError):  # needs arguments or a package that are not here
        assert name not in EQUAL
        return
    if name in EQUAL:
        for _ in range(2):
            torch.testing.assert_close(latents(mine), want, atol=1e-5, rtol=0)
        return
    with pytest.raises(ValueError, match=f"{name} cannot generate with this model"):
        latents(mine)


@pytest.mark.parametrize(
    "setting, value",
    [
        ("stochastic_sampling", True),
        ("invert_sigmas", True),
        ("use_dynamic_shifting", True),
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("shift_terminal", 0.1),
    ],
)
def test_settings_that_change_the_times_or_add_noise_are_refused_by_name(mine, setting, value):
    mine.scheduler = FlowMatchEulerDiscreteScheduler.from_config(mine.scheduler.config, **{setting: value})
    with pytest.raises(ValueError, match=f"FlowMatchEulerDiscreteScheduler cannot generate.*{setting}={value!r}"):
        latents(mine)


def test_another_shift_is_followed(mine):
    before = latents(mine)
    mine.scheduler = FlowMatchEulerDiscreteScheduler.from_config(mine.scheduler.config, shift=1.5)
    assert not torch.allclose(latents(mine), before, atol=1e-2)


@pytest.mark.long
def test_unipc_with_flow_sigmas_approaches_the_same_image_faster(mine):
    fine, coarse = latents(mine, steps=200), latents(mine, steps=12)
    mine.scheduler = UniPCMultistepScheduler.from_config(mine.scheduler.config, **UNIPC)
    unipc = latents(mine, steps=12)
    assert torch.equal(latents(mine, steps=12), unipc)
    assert (unipc - fine).norm() < 0.5 * (coarse - fine).norm()


@pytest.mark.parametrize("shift", [-1.0, float("nan"), float("inf")])
def test_a_shift_that_gives_no_times_is_refused(mine, shift):
    with pytest.raises(ValueError, match=f"shift={shift:g} must be above 0"):
        check_scheduler(FlowMatchEulerDiscreteScheduler.from_config(mine.scheduler.config, shift=shift))
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot generate"):
        check_scheduler(UniPCMultistepScheduler(**UNIPC | {"flow_shift": shift}))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unipc_of_any_order_gives_numbers_or_is_refused(mine, order, solver):
    for final in (True, False):
        settings = UNIPC | {"solver_order": order, "solver_type": solver, "lower_order_final": final}
        mine.scheduler = UniPCMultistepScheduler.from_config(mine.scheduler.config, **settings)
        try:
            assert latents(mine).isfinite().all()
        except ValueError as error:
            assert solver == "bh1" or not final
            assert "its updates fail where the velocity is constant" in str(error)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"flow_shift": 1.0}, "shift=3; give flow_shift=3"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas=False must be True"),
        ({"prediction_type": "epsilon"}, "prediction_type='epsilon' must be 'flow_prediction'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min' must be 'zero'"),
        ({"thresholding": True}, "thresholding=True must be False"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True must be False"),
    ],
)
def test_unipc_with_other_settings_is_refused(mine, change, named):
    scheduler = UniPCMultistepScheduler.from_config(mine.scheduler.config, **UNIPC | change)
    with pytest.raises(ValueError, match=named):
        check_scheduler(scheduler)


def test_a_scheduler_of_ones_own_is_judged_by_what_it_does():
    class Same(FlowMatchEulerDiscreteScheduler):
        pass

    class Backwards(FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, *args, **kwargs):
            return super().step(-model_output, *args, **kwargs)

    check_scheduler(Same(shift=3.0))
    with pytest.raises(ValueError, match="Backwards cannot generate.*not those of Euler"):
        check_scheduler(Backwards(shift=3.0))
    with pytest.raises(ValueError, match="object cannot generate"):
        check_scheduler(object())


def test_the_check_leaves_the_scheduler_and_the_random_numbers_alone(pipe):
    pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5])
    before, state = pipe.scheduler.sigmas.clone(), torch.get_rng_state()
    check_scheduler(pipe.scheduler)
    assert torch.equal(pipe.scheduler.sigmas, before) and torch.equal(torch.get_rng_state(), state)


def test_methods_replaced_on_the_scheduler_are_left_to_the_call(mine):
    """A recorder that wraps `step` sees the updates of the call and nothing of the check."""
    steps, original = [], mine.scheduler.step
    want = latents(mine)
    mine.scheduler.step = lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs)
    try:
        assert torch.equal(latents(mine), want) and len(steps) == 6
    finally:
        del mine.scheduler.step
