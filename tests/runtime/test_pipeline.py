"""The whole pipeline against diffusers: the same weights, the same noise, latents and final image.

diffusers' networks are built from the bundle's configs and weights, and run by its own schedulers. Where a
scheduler cannot walk Kiln's levels it is given them as its training table, as test_samplers.py explains.
"""

import json
import math

import numpy as np
import pytest

from kiln.benchmarks.parity import THRESHOLDS, psnr_db, relative_l2
from kiln.bundle import open_bundle
from kiln.errors import InvalidOutputError, UsageError
from kiln.exporters.resolve import bundled_models
from kiln.runtime.events import ImageReady, PhaseFinished, StepFinished, Warned
from kiln.runtime.images import read_parameters, save_png
from kiln.runtime.pipeline import Pipeline
from kiln.runtime.request import Request
from kiln.runtime.samplers import SAMPLERS
from kiln.runtime.schedules import SCHEDULES, NoiseSchedule
from kiln.runtime.settings import Settings

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

NEAR = THRESHOLDS["sampler_latents_relative_l2"]
SAME = THRESHOLDS["sampler_image_psnr_db"]
SEED = 7
PROMPT, NEGATIVE = "red apple", "cat face"
VP = ("ddim", "dpmpp_2m")


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def bundle(request):
    if request.param == "tiny":
        return open_bundle(request.getfixturevalue("tiny_bundle"))
    if "emoji" not in bundled_models():
        pytest.skip("the bundled model is not in this checkout")
    return open_bundle(bundled_models()["emoji"])


@pytest.fixture(scope="module")
def pipeline(bundle):
    with Pipeline.open(bundle, Settings("onnxruntime", "fp32", cache=False)) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(bundle):
    """diffusers' pipeline over the bundle's weights, in fp32."""
    from safetensors.torch import load_file

    def weights(*components):
        merged = {}
        for component in components:
            merged |= load_file(bundle.source(component).weights_path)
        return {name: tensor.float() for name, tensor in merged.items()}

    vae_config = bundle.config("vae_decoder")
    vae = getattr(diffusers, vae_config["_class_name"]).from_config(vae_config)
    vae.load_state_dict(weights("vae_encoder", "vae_decoder"))
    unet = diffusers.UNet2DConditionModel.from_config(bundle.config("unet"))
    unet.load_state_dict(weights("unet"))
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig.from_dict(bundle.config("text_encoder")))
    encoder.load_state_dict(weights("text_encoder"))
    scheduler = diffusers.EulerDiscreteScheduler.from_config(
        bundle.scheduler_config, timestep_spacing="linspace"
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=encoder.eval(),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(bundle.tokenizer_dir),
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request_for(pipeline, **changes):
    side = max(64, pipeline.vae_factor * 16)
    base = {"width": side, "height": side, "seed": SEED, "cfg_scale": 4.0}
    return Request(PROMPT, NEGATIVE, **(base | changes))


def kiln_run(pipeline, request):
    """Latents after each step, and the images."""
    events = list(pipeline.generate(request))
    latents = [e.latents for e in events if isinstance(e, StepFinished)]
    return latents, [e.image for e in events if isinstance(e, ImageReady)]


def tabled_scheduler(sampler, sigmas):
    kept = 1 / (1 + np.asarray(sigmas[:-1])[::-1] ** 2)
    betas = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    common = {"num_train_timesteps": len(betas), "trained_betas": betas}
    made = {
        "euler": lambda: diffusers.EulerDiscreteScheduler(**common, timestep_spacing="linspace"),
        "euler_a": lambda: diffusers.EulerAncestralDiscreteScheduler(**common, timestep_spacing="linspace"),
        "ddim": lambda: diffusers.DDIMScheduler(
            **common, timestep_spacing="leading", steps_offset=0, clip_sample=False, set_alpha_to_one=True
        ),
        "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**common, timestep_spacing="trailing"),
    }[sampler]()
    made.set_timesteps(len(betas))
    return made


def oracle_latents(oracle, bundle, request, sampler, schedule):
    """Latents after each step in k-diffusion's space, by diffusers' networks and stepping code."""
    table = NoiseSchedule.from_config(bundle.scheduler_config)
    sigmas = SCHEDULES[schedule].function(table, request.steps)
    scheduler = tabled_scheduler(sampler, sigmas)
    embedded, negative = oracle.encode_prompt(
        request.prompt, "cpu", 1, True, negative_prompt=request.negative_prompt
    )
    states = torch.cat([negative, embedded])
    cells = request.height // (request.height // 16)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 4, cells, cells, generator=generator)
    norms = [math.sqrt(1 + s * s) if sampler in VP else 1.0 for s in sigmas]
    x, latents = noise * (sigmas[0] / norms[0]), []
    extra = {"generator": generator} if sampler == "euler_a" else {}
    with torch.inference_mode():
        for i, told in enumerate(scheduler.timesteps):
            timestep = torch.tensor(table.sigma_to_timestep(sigmas[i]), dtype=torch.float32)
            sample = scheduler.scale_model_input(torch.cat([x, x]).float(), told)
            without, prompted = oracle.unet(sample, timestep, states).sample.chunk(2)
            guided = without + request.cfg_scale * (prompted - without)
            x = scheduler.step(guided, told, x, **extra).prev_sample
            latents.append(x.numpy() * np.float32(norms[i + 1]))
    return latents


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_equal_diffusers(pipeline, oracle, bundle, sampler, schedule, steps):
    request = request_for(pipeline, sampler=sampler, schedule=schedule, steps=steps)
    actual, _ = kiln_run(pipeline, request)
    expected = oracle_latents(oracle, bundle, request, sampler, schedule)
    assert len(actual) == len(expected) == steps
    assert actual[-1].shape == expected[-1].shape
    assert actual[-1].dtype == np.float32
    assert np.isfinite(actual[-1]).all()
    for step in {1, 5, steps} & set(range(1, steps + 1)):
        assert NEAR.holds(relative_l2(actual[step - 1], expected[step - 1])), step


@pytest.mark.parametrize("planted", ["seed", "cfg_scale", "prompt", "shift"])
def test_latents_tell_a_planted_error(pipeline, oracle, bundle, planted):
    request = request_for(pipeline, steps=5)
    changed = {"seed": {"seed": SEED + 1}, "cfg_scale": {"cfg_scale": 4.04}}.get(planted, {})
    asked = request_for(pipeline, steps=5, **changed)
    if planted == "prompt":
        asked = Request(
            "green apple",
            NEGATIVE,
            **{k: getattr(request, k) for k in ("width", "height", "seed", "cfg_scale", "steps")},
        )
    actual, _ = kiln_run(pipeline, asked)
    expected = oracle_latents(oracle, bundle, request, "euler", "normal")
    step = 3 if planted == "shift" else 4
    assert not NEAR.holds(relative_l2(actual[step], expected[4]))


def test_image_equals_diffusers_own_pipeline(pipeline, oracle):
    request = request_for(pipeline, steps=20)
    (image,) = kiln_run(pipeline, request)[1]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(SEED))
    if request.height // pipeline.vae_factor != 16:
        pytest.fail("the request and the noise differ in size")
    made = oracle(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=request.width,
        height=request.height,
        num_inference_steps=20,
        guidance_scale=4.0,
        latents=noise,
        output_type="np",
    ).images
    expected = np.round(made[0] * 255).astype(np.uint8)
    assert image.shape == expected.shape
    assert SAME.holds(psnr_db(image, expected))
    assert not SAME.holds(psnr_db(np.roll(image, 1, axis=0), expected))


def test_images_follow_their_seeds_whatever_the_batch(pipeline):
    alone = [kiln_run(pipeline, request_for(pipeline, steps=2, seed=SEED + i))[1][0] for i in range(3)]
    together = kiln_run(pipeline, request_for(pipeline, steps=2, count=3, batch_size=2))[1]
    for one, other in zip(alone, together, strict=True):
        assert THRESHOLDS["backend_image_psnr_db"].holds(psnr_db(one, other))
    assert not THRESHOLDS["backend_image_psnr_db"].holds(psnr_db(alone[0], alone[1]))


@pytest.mark.parametrize("backend", ["openvino", "torch"])
def test_backends_agree(pipeline, bundle, backend):
    pytest.importorskip({"openvino": "openvino", "torch": "torch"}[backend])
    request = request_for(pipeline, steps=8)
    with Pipeline.open(bundle, Settings(backend, "fp32", cache=False)) as other:
        (actual,) = kiln_run(other, request)[1]
        (unlike,) = kiln_run(other, request_for(pipeline, steps=8, cfg_scale=4.5))[1]
    (expected,) = kiln_run(pipeline, request)[1]
    limit = THRESHOLDS["backend_image_psnr_db"]
    assert limit.holds(psnr_db(actual, expected))
    if bundle.name != "emoji":
        return  # a random model's image hardly moves with the guidance
    assert not limit.holds(psnr_db(unlike, expected))


def test_wide_and_odd_sizes(pipeline):
    factor = pipeline.vae_factor
    request = request_for(pipeline, width=factor * 22, height=factor * 17 // 8 * 8, steps=2)
    (image,) = kiln_run(pipeline, request)[1]
    assert image.shape == (request.height, request.width, 3)


def test_record_says_what_was_in_force(pipeline, tmp_path):
    events = list(
        pipeline.generate(request_for(pipeline, steps=2, sampler="euler_a", schedule="karras", rng="cuda"))
    )
    (ready,) = [e for e in events if isinstance(e, ImageReady)]
    assert ready.record.in_force["unet"].backend == "onnxruntime"
    assert ready.record.in_force["unet"].precision == "fp32"
    path = tmp_path / "image.png"
    save_png(ready.image, path, ready.record.parameters)
    text = read_parameters(path)
    assert text == ready.record.parameters
    for fact in (PROMPT, f"Seed: {SEED}", "Sampler: Euler a", "Schedule type: Karras", "RNG: NV", "Steps: 2"):
        assert fact in text
    assert {e.phase for e in events if isinstance(e, PhaseFinished)} >= {"denoise", "decode"}


def test_long_prompts_warn(pipeline):
    request = Request("cat " * 200, seed=1, steps=1, width=128, height=128)
    warned = [e for e in pipeline.generate(request) if isinstance(e, Warned)]
    assert len(warned) == 1
    assert "longer than" in warned[0].text


def test_too_small_is_refused(pipeline):
    with pytest.raises(UsageError, match="needs at least"):
        next(pipeline.generate(Request("x", width=8, height=8)))


def test_unguided_needs_half(pipeline):
    latents, _ = kiln_run(pipeline, request_for(pipeline, cfg_scale=1.0, steps=2))
    guided, _ = kiln_run(pipeline, request_for(pipeline, cfg_scale=1.0001, steps=2))
    assert relative_l2(latents[-1], guided[-1]) < 1e-3


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_nan_names_the_component(bundle, component):
    class Broken:
        def __init__(self, session):
            self.session, self.in_force = session, session.in_force

        def run(self, feeds):
            return {name: np.full_like(value, np.nan) for name, value in self.session.run(feeds).items()}

        def close(self):
            self.session.close()

    with Pipeline.open(bundle, Settings("onnxruntime", "fp32", cache=False)) as broken:
        prepare = broken.sessions.backend.prepare

        class Backend:
            name = "onnxruntime"

            def prepare(self, source, options):
                session = prepare(source, options)
                return Broken(session) if source.component == component else session

        broken.sessions.backend = Backend()
        with pytest.raises(InvalidOutputError, match=component):
            list(broken.generate(request_for(broken, steps=1)))


def test_manifest_lists_every_file(bundle):
    listed = set(json.loads((bundle.path / "kiln.json").read_text())["files"])
    found = {str(p.relative_to(bundle.path)) for p in bundle.path.rglob("*") if p.is_file()}
    assert found - listed == {"kiln.json"}
