"""Schedulers without torch: diffusers' timesteps, levels and samples, to float rounding."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.errors import ArtefactError, EvaluationError
from hqc.lite.schedulers import SCHEDULERS, new_scheduler
from hqc.models import digits_path

# What torch says to numpy 2 when diffusers makes an array of a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

THEIRS = {kind.__name__: kind for kind in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler)}
SHAPE = (2, 3, 4, 4)
# A step is some ten operations of float32, and torch's sqrt, log and exp differ from numpy's in the last bit. Two dozen
# roundings of the largest number that the step adds up, times what `condition` says.
ROUNDINGS = 24 * 2.0**-24

BETAS = st.fixed_dictionaries(
    {
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "beta_start": st.sampled_from([0.0001, 0.00085, 0.0015]),
        "beta_end": st.sampled_from([0.012, 0.0195, 0.02]),
        "num_train_timesteps": st.sampled_from([100, 1000]),
        "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.sampled_from([0, 1]),
    }
)
LEVELS = st.fixed_dictionaries(
    {"final_sigmas_type": st.sampled_from(["zero", "sigma_min"])},
    optional={"use_karras_sigmas": st.just(True)},
) | st.just({"use_exponential_sigmas": True})
OWN = {
    "DDIMScheduler": st.fixed_dictionaries(
        {"clip_sample": st.booleans(), "clip_sample_range": st.just(1.5), "set_alpha_to_one": st.booleans()}
    ),
    "EulerDiscreteScheduler": LEVELS,
    "DPMSolverMultistepScheduler": st.tuples(
        LEVELS,
        st.fixed_dictionaries(
            {
                "solver_order": st.sampled_from([1, 2]),
                "solver_type": st.sampled_from(["midpoint", "heun"]),
                "lower_order_final": st.booleans(),
                "euler_at_final": st.booleans(),
                "lambda_min_clipped": st.sampled_from([-float("inf"), -5.1]),
            }
        ),
    ).map(lambda both: {**both[0], **both[1]}),
}


def stored(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as diffusers writes it."""
    return dict(json.loads(THEIRS[kind](**config).to_json_string()))


def condition(theirs: Any, i: int) -> float:
    """By what roundings of a step grow: 1/α where x is α·x₀ + σ·ε, and |λ|/h where it goes by the width h of λ."""
    if isinstance(theirs, EulerDiscreteScheduler):
        return 1.0
    found = float(theirs.alphas_cumprod[int(theirs.timesteps[i])]) ** -0.5
    if isinstance(theirs, DPMSolverMultistepScheduler):
        sigmas = theirs.sigmas.double()
        heights = torch.log(sigmas[max(0, i - 1) : i + 2]).neg()
        widths = heights.diff()
        found *= max(1.0, float(heights[heights.isfinite()].abs().max() / widths[widths > 0].min()))
    return found


def compare(
    kind: str, config: dict[str, Any], steps: int, seed: int, eta: float = 0.0, name: str | None = None
) -> None:
    """Both schedulers, every step from the same sample: differences do not add up."""
    theirs = THEIRS[SCHEDULERS[name] if name else kind].from_config(dict(config))
    theirs.set_timesteps(steps)
    exact = theirs.timesteps.numpy()
    if steps > 1 and exact[0] == exact[1]:  # diffusers begins at the second and has one step too few
        with pytest.raises(EvaluationError, match=f"^{steps} steps: begin twice at timestep {exact[0]:g}. Ask"):
            new_scheduler(config, steps, name=name, eta=eta)
        return
    ours = new_scheduler(config, steps, name=name, eta=eta)
    assert ours.timesteps.dtype == exact.dtype
    # Those of Karras' and exponential levels are looked up by logarithms, and DPM-Solver makes them whole.
    found_by_level = config.get("use_karras_sigmas") or config.get("use_exponential_sigmas")
    whole = exact.dtype == np.int64
    np.testing.assert_allclose(
        ours.timesteps, exact, rtol=0 if whole else 2.0**-21, atol=1 if whole and found_by_level else 1e-4
    )
    np.testing.assert_allclose(ours.init_noise_sigma, float(theirs.init_noise_sigma), rtol=2.0**-22)
    draw = np.random.default_rng(seed)
    x = draw.standard_normal(SHAPE).astype(np.float32) * ours.init_noise_sigma
    before = None
    for i, t in enumerate(theirs.timesteps):
        output, noise = (draw.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
        given_x, given_output = torch.from_numpy(x.copy()), torch.from_numpy(output)
        np.testing.assert_allclose(ours.scaled(x, i), theirs.scale_model_input(given_x, t).numpy(), rtol=2.0**-21)
        given = {"eta": eta, "variance_noise": torch.from_numpy(noise)} if eta else {}
        step = theirs.step(given_output, t, given_x, **given)
        found = ours.step(output, i, x, noise if ours.draws_noise else None, before)
        if not np.isfinite(wanted := step.prev_sample.numpy()).all():
            # diffusers divides 0 by 0 in Heun's step over no width, and takes the root of a rounding error below 0.
            assert config.get("solver_type") == "heun" or eta > 0
            assert np.isfinite(found.sample).all()
            return
        predicted = getattr(step, "pred_original_sample", None)
        if predicted is None:
            predicted = theirs.model_outputs[-1]
        size = max(float(np.abs(a).max()) for a in (x, output, wanted, predicted.numpy())) * condition(theirs, i)
        assert found.sample.dtype == np.float32
        np.testing.assert_allclose(found.predicted, predicted.numpy(), rtol=0, atol=ROUNDINGS * size)
        np.testing.assert_allclose(found.sample, wanted, rtol=0, atol=ROUNDINGS * size)
        np.testing.assert_array_equal(ours.predicted(output, i, x), found.predicted)
        x, before = wanted, predicted.numpy()


@pytest.mark.parametrize("kind", THEIRS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), steps=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_step_is_diffusers(kind: str, data: st.DataObject, steps: int, seed: int) -> None:
    config = stored(kind, {**data.draw(BETAS), **data.draw(OWN[kind])})
    eta = data.draw(st.sampled_from([0.0, 0.5, 1.0])) if kind == "DDIMScheduler" else 0.0
    compare(kind, config, steps, seed, eta)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_scheduler_takes_the_settings_of_the_folders(name: str) -> None:
    config = json.loads((digits_path() / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    compare("EulerDiscreteScheduler" if name != "ddim" else "DDIMScheduler", config, 7, 0, name=name)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("levels", [{}, {"use_karras_sigmas": True}])
def test_rounding_that_makes_one_step_more(kind: str, levels: dict[str, Any]) -> None:
    """100/29·29 is a little less than 100, and counting down from 100 ends below 0."""
    config = {"_class_name": kind, "num_train_timesteps": 100, "timestep_spacing": "trailing"}
    compare(kind, config if kind == "DDIMScheduler" else {**config, **levels}, 29, 0)


@pytest.mark.parametrize("kind", THEIRS)
def test_betas_of_a_list(kind: str) -> None:
    betas = np.linspace(0.0002, 0.02, 50).tolist()
    compare(kind, {"_class_name": kind, "num_train_timesteps": 50, "trained_betas": betas}, 5, 0)


@pytest.mark.parametrize("kind", THEIRS)
def test_betas_down_to_no_signal(kind: str) -> None:
    """Each ᾱ is a product of 1 - β with β = 1 - (1 - β): in float32 the roundings of a thousand of them add up."""
    config = {"_class_name": kind, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    config["timestep_spacing"] = "trailing"
    theirs, ours = THEIRS[kind].from_config(config), new_scheduler(config, 10)
    theirs.set_timesteps(10)
    np.testing.assert_array_equal(ours.timesteps, theirs.timesteps.numpy())
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(SHAPE) * float(theirs.init_noise_sigma)).astype(np.float32)
    before = None
    for i, t in enumerate(theirs.timesteps):
        output = draw.standard_normal(SHAPE).astype(np.float32)
        theirs.scale_model_input(torch.from_numpy(x), t)
        wanted = theirs.step(torch.from_numpy(output), t, torch.from_numpy(x)).prev_sample.numpy()
        found = ours.step(output, i, x, before=before)
        np.testing.assert_allclose(found.sample, wanted, rtol=0, atol=1e-4 * np.abs(x).max())
        x, before = wanted, found.predicted


def test_a_scheduler_keeps_nothing_of_an_image() -> None:
    scheduler = new_scheduler({"_class_name": "DPMSolverMultistepScheduler"}, 4)
    x = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    first = scheduler.step(x[0], 1, x[1], before=x[0])
    scheduler.step(x[1], 3, x[0], before=x[1])
    np.testing.assert_array_equal(scheduler.step(x[0], 1, x[1], before=x[0]).sample, first.sample)


REFUSED = [
    ({"thresholding": True}, "scheduler DDIMScheduler: has 'True' as thresholding; without torch it takes False"),
    ({"beta_schedule": "sigmoid"}, "has 'sigmoid' as beta_schedule; without torch it takes one of linear, "),
    ({"prediction_type": "flow_prediction"}, "as prediction_type; without torch it takes one of epsilon, "),
    ({"num_train_timesteps": 10**9}, "has '1000000000' as num_train_timesteps; without torch it takes 1 to 100000"),
    ({"steps_offset": True}, "has 'True' as steps_offset; without torch it takes 0 to 100000"),
    ({"clip_sample": 1}, "has '1' as clip_sample; without torch it takes true or false"),
    ({"beta_end": float("nan")}, "has 'nan' as beta_end; without torch it takes 0 to 1"),
    ({"trained_betas": [0.1]}, "as trained_betas; without torch it takes one a timestep of training"),
    ({"brand_new": 1}, "has '1' as brand_new; without torch it takes no such setting"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "as interpolation_type"),
    ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "as use_beta_sigmas"),
    (
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_exponential_sigmas": True},
        "takes no use_exponential_sigmas beside it",
    ),
    (
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
        "as solver_order; without torch it takes 1 to 2",
    ),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "as algorithm_type"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED, ids=[str(list(config)[-1]) for config, _ in REFUSED])
def test_what_a_configuration_asks_for_beyond_that_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ArtefactError) as error:
        new_scheduler({"_class_name": "DDIMScheduler", **config}, 4)
    assert said in error.value.line
    assert "Run the pipeline with torch, or ask for another scheduler." in error.value.line


def test_settings_of_other_classes_are_not_read() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "thresholding": True, "skip_prk_steps": True, "clip_sample": 1}
    compare("EulerDiscreteScheduler", config, 3, 0)


@pytest.mark.parametrize(
    ("config", "steps", "options", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, 4, {}, "scheduler: the pipeline has a PNDMScheduler, which runs with torch"),
        ({}, 4, {"name": "heun"}, "scheduler 'heun': unknown; there are ddim, dpmsolver++, euler. Use one of them."),
        ({}, 4, {"name": "euler", "eta": 0.5}, "eta 0.5: the EulerDiscreteScheduler takes none. Leave it out, or"),
        ({}, 0, {"name": "ddim"}, "0 steps: expected 1 to 1000, those of training. Ask for fewer."),
        ({}, 1001, {"name": "ddim"}, "1001 steps: expected 1 to 1000"),
        ({"steps_offset": 1}, 1000, {"name": "ddim"}, "1000 steps: would begin at 1000 of 1000 timesteps. Ask for"),
    ],
)
def test_what_cannot_be_asked_for(config: dict[str, Any], steps: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError) as error:
        new_scheduler(config, steps, **options)
    assert error.value.line.startswith(said)
