"""The planner against what a tiny run really holds: exact for what is counted, close for activations."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState

from echo4o.common.sizes import parse_bytes
from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack, text_segment
from echo4o.planning.training_memory import _share, nearest, plan, precision_of, print_plan, skeleton
from echo4o.training.backbones.bagel import BagelBatch, BagelRecipe
from echo4o.training.model import TrainedModel, load_backbone, set_up
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import bundled_recipe, load_recipe
from echo4o.training.train import Trainer

ACTIVATION_TOLERANCE = 0.06  # with checkpointing, where little is kept on so small a model, twice that
TOKENS = SpecialTokens(317, 318, 325, 326)
LORA = {"method": "lora", "rank": 4, "alpha": 4}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first precision of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def model_dir(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def recipe(model_dir, **changes) -> BagelRecipe:
    values = {"model": str(model_dir), "output_dir": model_dir.parent / "run", "data": {"path": "unused"}, "steps": 1}
    values |= {"batch_size": 2, "device": "cpu", "checkpoints": {"every": 1}}
    return BagelRecipe.model_validate(values | changes)


WAYS = {
    "full": {},
    "full bf16": {"mixed_precision": "bf16"},
    "a part": {"tune": {"method": "full", "parts": ["gen", "vision"]}, "ema": {"decay": 0.9}},
    "muon": {"optimizer": {"name": "muon", "muon_lr": 1e-2}, "ema": {"decay": 0.9}},
    "lora": {"tune": LORA},
    "lora bf16": {"tune": LORA, "mixed_precision": "bf16", "ema": {"decay": 0.9}},
    "dora on both": {"tune": LORA | {"dora": True, "experts": ["gen", "und"]}},
}


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
def test_counts_equal_what_a_run_holds(model_dir, rows, way):
    asked = recipe(model_dir, **WAYS[way])
    trainer, gradients = Trainer(asked, dataset=rows), []
    for optimizer in trainer.optimizers:
        inner = optimizer.optimizer
        inner.register_step_pre_hook(
            lambda o, *_: gradients.append(sum(p.grad.nbytes for g in o.param_groups for p in g["params"]))
        )
    held = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.pipeline.vae.state_dict().values()]
    weights = sum(t.nbytes for t in held)
    trainer.run()

    planned = plan(asked, 80e9)
    assert planned.weights == weights
    assert planned.gradients == sum(gradients)
    states = [v for o in trainer.optimizers for s in o.optimizer.state.values() for v in s.values()]
    assert planned.optimizer == sum(t.nbytes for t in states)
    assert planned.ema == sum(t.nbytes for t in (trainer.average.values.values() if trainer.average else []))
    assert planned.checkpoint == checkpoint_bytes(asked.output_dir / "checkpoints" / "step-00000001" / "weights")


def test_the_disk_of_a_run_has_room_for_its_best_checkpoint(model_dir):
    """The last ones, the one being written, and the best one, which may be older than all of them."""
    validation = {"split": "validation", "every": 1}
    kept, best = (
        plan(recipe(model_dir, checkpoints={"every": 1, "keep": 2, "keep_best": best}, validation=validation), 80e9)
        for best in (False, True)
    )
    assert kept.checkpoint == best.checkpoint > 0
    assert best.disk - kept.disk == best.checkpoint
    assert kept.disk > 3 * kept.checkpoint  # two, the one being written, and the result


def checkpoint_bytes(folder) -> int:
    """Tensors in a checkpoint, by its own metadata."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    tensors = [e for e in entries if hasattr(e, "properties")]
    return sum(e.size.numel() * e.properties.dtype.itemsize for e in tensors)


def saved_bytes(model: TrainedModel, batch: BagelBatch, bf16: bool) -> int:
    """What autograd keeps for the backward pass, weights and their casts aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {s for p in model.parameters() if p.ndim == 2 for s in (p.shape, p.shape[::-1])}
    held = {}

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in own and not (tensor.dtype == torch.bfloat16 and tensor.shape in shapes):
            held[place] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            model(batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["full", "full bf16", "lora", "lora bf16"])
def test_activations_are_close(model_dir, way, checkpointing):
    asked = recipe(model_dir, **WAYS[way], gradient_checkpointing=checkpointing)
    backbone = load_backbone(asked)
    model = TrainedModel(backbone).train()
    set_up(model, asked, backbone.component_classes)
    sample = [
        image_segment("vae", (10, 10), TOKENS, torch.randn(100, 64)),
        image_segment("vit", (8, 9), TOKENS, torch.randn(72, 588)),
        text_segment([5] * 61, TOKENS),
        image_segment("noise", (13, 8), TOKENS, torch.randn(104, 64)),
    ]
    samples = [sample, [sample[0], *sample[2:]]]
    sequence = pack(samples, latent_positions=16, patch_positions=16)
    batch = BagelBatch(["a", "b"], sequence, torch.randn(208, 64), torch.randn(2))
    und, gen = len(sequence.input_ids), len(sequence.gen_segment)
    lengths = tuple(sum(map(len, sample)) for sample in samples)
    components, precision = skeleton(asked).components, precision_of(asked)
    widths = {"compute": precision.compute, "residual": precision.residual}
    rank = asked.tune.rank if asked.tune.method == "lora" else 0
    planned = components["transformer"].activation_bytes(
        gen, und, rank=rank, masked_samples=lengths, checkpointing=checkpointing, **widths
    )
    if components["vision_model"].trains():
        planned += components["vision_model"].activation_bytes(72, checkpointing=checkpointing, **widths)
    measured = saved_bytes(model, batch, asked.mixed_precision == "bf16")
    assert planned == pytest.approx(measured, rel=ACTIVATION_TOLERANCE * (1 + checkpointing))


def test_the_fullest_share_is_torchs_first_chunk():
    for shape in ((10, 3), (7,), (1, 5), (16, 2)):
        for ways in (1, 2, 4, 8):
            assert _share(torch.empty(shape), ways) == torch.empty(shape).chunk(ways)[0].numel()


@pytest.mark.long
def test_release_fits_as_the_recipes_promise():
    """Also: nothing is allocated, or this would need 28 GB."""
    for name, gpu, count in (("lora_single_gpu", 80e9, 1), ("qlora_24gb", 24e9, 1), ("full_fsdp2_8gpu", 80e9, 8)):
        asked = load_recipe(bundled_recipe(name), {"model": "release"})
        made = plan(asked, gpu, count)
        assert made.fits, (name, made)
        assert made.weights > 2 * 14.5e9 / (1 if count == 1 else 8) or name == "qlora_24gb"


@pytest.mark.long
def test_a_plan_that_does_not_fit_is_reported_with_one_that_does(capsys):
    asked = load_recipe(bundled_recipe("full_fsdp2_8gpu"), {"model": "release"})
    assert not print_plan(asked, "24GB", 8)
    told = capsys.readouterr().out
    assert "does NOT fit on 8 GPUs" in told and "nearest that fits: qlora_24gb --set processes=8" in told
    one = load_recipe(bundled_recipe("lora_single_gpu"), {"model": "release"})
    assert nearest(one, 24e9, 1) == "qlora_24gb"
    assert nearest(one, 8e9, 1) is None


@pytest.mark.long
def test_checkpointing_is_the_first_advice():
    asked = load_recipe(bundled_recipe("lora_single_gpu"), {"model": "release", "gradient_checkpointing": False})
    assert not plan(asked, 40e9).fits
    assert nearest(asked, 48e9, 1) == "--set gradient_checkpointing=true"


def test_sizes_are_read():
    assert parse_bytes("80GB") == 80e9 and parse_bytes("16 GiB") == 2**34 and parse_bytes("1.5t") == 1.5e12
    with pytest.raises(ValueError, match="'lots' is not an amount of memory"):
        parse_bytes("lots")
    with pytest.raises(ValueError, match="'24' is not an amount of memory"):  # not 24 bytes
        parse_bytes("24")


def test_a_model_that_cannot_be_read_is_one_line(tmp_path):
    asked = recipe(tmp_path / "absent")
    with pytest.raises(RecipeError, match="no configuration of its transformer.*--set model=release"):
        print_plan(asked, "80GB")
