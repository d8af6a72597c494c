"""What a recipe is: options of the passes, of calibration and of training, checked by pydantic."""

from pydantic import BaseModel, ConfigDict, Field

from hqc.passes import AttachLora, DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import Pass

__all__ = ["CalibrationSettings", "Recipe", "TrainingSettings"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CalibrationSettings(_Settings):
    """The float sampler's trajectory from which activation scales are found by MSE search.

    `samples` images are sampled in one go with the training's sampler settings; per site and timestep the scale
    minimises the squared quantisation error over `candidates` clip ranges.
    """

    samples: int = Field(default=16, ge=1, le=4096)
    candidates: int = Field(default=60, ge=2, le=1000)
    seed: int = Field(default=2024, ge=0)


class TrainingSettings(_Settings):
    """The distillation loop: an epoch is one trajectory of the float sampler, a step one timestep of it.

    Learning rates: LoRA factors of a site get `lr_lora` times the mean of the site's weight scales (scale-aware),
    weight scales `lr_weight_scale`, activation tables `lr_activation_scale`; all decay linearly to zero.
    """

    epochs: int = Field(default=30, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1, le=1024)
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.5, ge=0, le=100)
    eta: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=3407, ge=0)
    lr_lora: float = Field(default=3e-2, gt=0)
    lr_weight_scale: float = Field(default=1e-5, gt=0)
    lr_activation_scale: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    checkpoint_every: int = Field(default=200, ge=1)

    @property
    def total_steps(self) -> int:
        """Updates in all: `steps` if given, else whole epochs."""
        return self.steps or self.epochs * self.num_inference_steps


class Recipe(_Settings):
    """One published method over hqc's passes.

    `block` 0 means no rotation; `lora_rank` 0 no LoRA; `trains` says whether `hqc qat` takes it.
    """

    name: str
    source: str
    rules: str = "default"
    block: int = Field(default=0, ge=0)
    rotate_tokens: bool = True
    lora_rank: int = Field(default=0, ge=0)
    trains: bool = False
    calibration: CalibrationSettings = CalibrationSettings()
    training: TrainingSettings = TrainingSettings()

    def passes(self, bits: str, timesteps: tuple[float, ...], keep_float: tuple[str, ...] = ()) -> tuple[Pass, ...]:
        """The passes that quantise a captured program, in order."""
        selection = SelectLayers(bits=bits, rules=self.rules, keep_float=keep_float)
        chain: list[Pass] = [DropSingleKeyAttention(), selection]
        if self.block:
            chain.append(InsertHadamard(block=self.block, tokens=self.rotate_tokens))
        chain.append(InsertQdq(timesteps=timesteps))
        if self.lora_rank:
            chain.append(AttachLora(rank=self.lora_rank, seed=self.training.seed))
        return tuple(chain)
