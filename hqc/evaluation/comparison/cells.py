"""One cell of the comparison, a recipe at one width with one seed: quantise, export, sample, measure.

WORK/w4a4-rtn-0.hqc         quantised                   WORK/float-0-images       the float model's images of seed 0
WORK/w4a4-rtn-0-onnx        exported, integer           WORK/training/…           what a killed recipe needs to go on
WORK/w4a4-rtn-0-images      images, trajectory          WORK/stages.json          what each was made from
WORK/w4a4-rtn-0-figures     figures.json
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from hqc import api
from hqc.capture.source import versions
from hqc.claims import remove_tree
from hqc.errors import ArtefactError, ExportError
from hqc.evaluation.bench.run import Timing, median_milliseconds
from hqc.evaluation.comparison.budget import Scaled
from hqc.evaluation.comparison.entries import Entry
from hqc.evaluation.comparison.images import IMAGES_KIND, Drawn, load_drawn, save_drawn
from hqc.evaluation.comparison.size import true_bytes
from hqc.evaluation.comparison.subject import FOLLOWED, Protocol, Subject, source_files
from hqc.evaluation.gain import at_gain_one
from hqc.evaluation.metrics import evaluate, fidelity_figures
from hqc.evaluation.sampling import Samples, as_one_line, sample_images
from hqc.evaluation.trajectory_fidelity import TrajectoryFidelity, trajectory_fidelity
from hqc.evaluation.workspace import Workspace, content, fingerprint
from hqc.export import EXPORT_KIND, export_program
from hqc.models.classifier import load_digit_classifier
from hqc.plan import QuantPlan
from hqc.program import PassRecord, Program
from hqc.recipes import Recipe
from hqc.recipes.work_folder import Run
from hqc.sampling import Update
from hqc.site_rules import rule_to_data
from hqc.stages import Stage, doing
from hqc.steps import flat_options, step_text
from hqc.storage import atomic_folder, check_manifest, load_program, save_program, write_manifest

__all__ = ["Cell", "Maker", "seeded"]

PROGRAM_KIND, FIGURES_KIND = "hqc-program", "hqc-figures"
FIGURES_FILE = "figures.json"
TRAINING = "training"
RUNS, WARM_UP = 10, 3


@dataclass(frozen=True)
class Cell:
    """A recipe as it is run, at some bits. seed: of calibration and training, and which images are drawn."""

    entry: Entry
    scaled: Scaled
    bits: str
    seed: int

    @property
    def name(self) -> str:
        """Its recipe's in the table."""
        return self.entry.name

    @property
    def stem(self) -> str:
        """How its artefacts' names begin."""
        return f"{self.bits}-{self.entry.slug}-{self.seed}"

    @property
    def recipe(self) -> Recipe:
        """With its seeds."""
        return seeded(self.scaled.recipe, self.seed)


def seeded(recipe: Recipe, number: int) -> Recipe:
    """The recipe with every seed of its steps raised by that number: of calibration, training and LoRA."""

    def raised(step: Any) -> Any:
        has = any(field.name == "seed" for field in fields(step))
        return replace(step, seed=step.seed + number) if has else step

    return replace(recipe, steps=tuple(map(raised, recipe.steps)))


class Maker:
    """Makes the cells of a comparison in a work folder; a stage that is there already is taken."""

    def __init__(self, subject: Subject, protocol: Protocol, space: Workspace) -> None:
        self.subject, self.protocol, self.space = subject, protocol, space
        self.source = source_files(subject.path)

    def figures(self, cell: Cell) -> dict[str, Any]:
        """Everything that is measured of a cell.

        Raises:
            HqcError: what calibration, training or sampling says. What the export says is a figure.
        """
        quantised = self._quantised(cell)
        exported, refusal = self._exported(cell, quantised)
        images = self._images(cell, exported or quantised)
        measured = self._measured(cell, images, exported)
        plan = QuantPlan.from_dict(json.loads((quantised / "plan.json").read_text(encoding="utf-8")))
        return {
            "evaluations": cell.scaled.evaluations,
            "factor": cell.scaled.factor,
            "seconds": plan.training["seconds"],
            "size_bytes": plan.training["true_bytes"],
            "sites": len(plan.quantised),
            "weight_only": sum(site.weight_only for site in plan.sites),
            **_export_figures(plan, exported, refusal),
            **json.loads((measured / FIGURES_FILE).read_text(encoding="utf-8")),
        }

    # ---- quantise --------------------------------------------------------------------------------------------------

    def _quantised(self, cell: Cell) -> Path:
        recipe = cell.recipe
        depends: dict[str, Any] = {
            "program": self.source,
            "recipe": recipe.name,
            "steps": flat_options(recipe.steps),
            "sampler": recipe.sampler.settings(),
            "bits": cell.bits,
            "conditions": self.subject.task.drawn_from,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        if cell.entry.plan.rules:  # without one the key is what it was before there were plans
            depends["rules"] = [rule_to_data(rule) for rule in cell.entry.plan.rules]
        name = f"{cell.stem}.hqc"
        work = self.space.folder / TRAINING / f"{cell.stem}-{fingerprint(name, depends)[:12]}"
        return self.space.make(name, PROGRAM_KIND, depends, lambda target: self._quantise(cell, recipe, work, target))

    def _quantise(self, cell: Cell, recipe: Recipe, work: Path, target: Path) -> None:
        self._clear_other_runs(cell, work)
        run = Run(work)
        try:
            result = self._run(cell, recipe, work, resume=run.unfinished)
        except ArtefactError:  # what a killed run left cannot be gone on with
            result = self._run(cell, recipe, work, restart=True)
        records = result.history[len(self.subject.program.history) :]
        made = {"seconds": round(_seconds(records, recipe, run), 3), "true_bytes": true_bytes(result)}
        plan = replace(result.plan, training={**result.plan.training, **made})
        save_program(result.evolve(plan=plan), target, force=True)
        remove_tree(work)

    def _run(self, cell: Cell, recipe: Recipe, work: Path, *, resume: bool = False, restart: bool = False) -> Program:
        subject, what = self.subject, f"{cell.name} {cell.bits}, seed {cell.seed}"
        with doing(what), ExitStack() as stack:
            stages: list[Stage] = []

            def hear(update: Update) -> None:
                if not stages:  # above that of the step, which knows no numbers
                    stages.append(stack.enter_context(doing(f"training {what}")))
                stages[0](update.step, update.total, f"loss {update.loss:.4g}")

            return api.quantise(
                subject.program,
                recipe,
                cell.bits,
                task=subject.task,
                plan=cell.entry.plan,
                work_dir=work,
                resume=resume,
                restart=restart,
                on_update=hear,
            )

    def _clear_other_runs(self, cell: Cell, own: Path) -> None:
        """Drops what killed runs of this cell left that began from something else."""
        pattern = re.compile(re.escape(cell.stem) + "-[0-9a-f]{12}")
        for path in own.parent.iterdir() if own.parent.is_dir() else ():
            if path != own and pattern.fullmatch(path.name):
                remove_tree(path)

    # ---- export ----------------------------------------------------------------------------------------------------

    def _exported(self, cell: Cell, quantised: Path) -> tuple[Path | None, str]:
        """The integer form for ONNX Runtime, or why there is none."""
        name, depends = f"{cell.stem}-onnx", {"program": content(quantised), "versions": versions()}
        try:
            return self.space.make(name, EXPORT_KIND, depends, lambda target: _export(quantised, target)), ""
        except ExportError as error:
            return None, f"{error.where}: {error.found}"

    # ---- sample ----------------------------------------------------------------------------------------------------

    def reference(self, seed: int) -> Path:
        """The float model's images, which every cell of that seed is compared with."""
        depends = {**self._drawing(seed), "program": self.source}
        return self.space.make(
            f"float-{seed}-images",
            IMAGES_KIND,
            depends,
            lambda target: save_drawn(Drawn(self._draw(self.subject.pipeline, seed, "float")), target),
            measures=True,
        )

    def _images(self, cell: Cell, model: Path) -> Path:
        depends = {**self._drawing(cell.seed), "float": self.source, "model": content(model)}
        return self.space.make(
            f"{cell.stem}-images",
            IMAGES_KIND,
            depends,
            lambda target: save_drawn(self._drawn(cell, model), target),
            measures=True,
        )

    def _drawing(self, seed: int) -> dict[str, Any]:
        """What decides how images are drawn."""
        protocol = {**self.protocol.to_dict(), "gain_1": self.protocol.scored}
        return {"protocol": protocol, "seed": seed, "threads": torch.get_num_threads(), "versions": versions()}

    def _draw(self, pipe: Any, seed: int, what: str) -> Samples:
        protocol = self.protocol
        with as_one_line(what, pipe), doing(f"sampling {what}, seed {seed}") as stage:
            return sample_images(
                pipe,
                protocol.labels(protocol.images),
                protocol.seeds(seed),
                batch_size=protocol.at_once,
                progress=stage,
                **protocol.options,
            )

    def _drawn(self, cell: Cell, model: Path) -> Drawn:
        pipe, what = self.subject.pipeline_of(model), f"{cell.name} {cell.bits}"
        samples = self._draw(pipe, cell.seed, what)
        trajectory = self._followed(pipe, cell.seed, what)
        if not self.protocol.scored or not trajectory.gain.divides:
            return Drawn(samples, None, trajectory.to_dict())
        with at_gain_one(pipe, trajectory.gain):
            return Drawn(samples, self._draw(pipe, cell.seed, f"{what} at gain 1"), trajectory.to_dict())

    def _followed(self, pipe: Any, seed: int, what: str) -> TrajectoryFidelity:
        protocol = self.protocol
        count = min(FOLLOWED, protocol.images)
        with as_one_line(what, pipe), doing(f"following {what}, seed {seed}") as stage:
            return trajectory_fidelity(
                pipe,
                self.subject.pipeline,
                protocol.labels(count),
                protocol.seeds(seed)[:count],
                batch_size=protocol.at_once,
                progress=stage,
                **protocol.options,
            )

    # ---- measure ---------------------------------------------------------------------------------------------------

    def _measured(self, cell: Cell, images: Path, exported: Path | None) -> Path:
        reference = self.reference(cell.seed)
        depends = {
            "images": content(images),
            "float": content(reference),
            "export": None if exported is None else content(exported),
            "scored": self.protocol.scored,
            "threads": torch.get_num_threads(),
        }
        return self.space.make(
            f"{cell.stem}-figures",
            FIGURES_KIND,
            depends,
            lambda target: _save_figures(self._measure(images, reference, exported), target),
            measures=True,
        )

    def _measure(self, images: Path, reference: Path, exported: Path | None) -> dict[str, Any]:
        drawn, wanted = load_drawn(images), load_drawn(reference)
        if self.protocol.scored:
            classifier = load_digit_classifier()
            found = evaluate(drawn.samples, wanted.samples, classifier, at_gain_one=drawn.at_gain_1).to_dict()
        else:
            found = fidelity_figures(drawn.samples, wanted.samples)
        trajectory = dict(drawn.trajectory or {})
        shown = {key: trajectory.get(key) for key in ("gain", "latent_cosine_mean")}
        return {**found, **shown, "trajectory": trajectory, "ort_milliseconds": self._milliseconds(exported)}

    def _milliseconds(self, exported: Path | None) -> float | None:
        """Of one denoiser call in ONNX Runtime, as a step of one image needs it: twice the batch with guidance."""
        if exported is None:
            return None
        batch = 2 if self.subject.task.doubles(self.protocol.sampler["guidance_scale"]) else 1
        timing = Timing(batch, torch.get_num_threads(), RUNS, WARM_UP)
        return median_milliseconds({"export": exported}, timing=timing)["export"]


def _export(quantised: Path, target: Path) -> None:
    # A sampler gives every image of a call one timestep.
    export_program(load_program(quantised), "onnxruntime", target, force=True, one_timestep=True)


def _save_figures(figures: Mapping[str, Any], folder: Path) -> None:
    with atomic_folder(folder, force=True) as temporary:
        (temporary / FIGURES_FILE).write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write_manifest(temporary, FIGURES_KIND, {})


def _export_figures(plan: QuantPlan, exported: Path | None, refusal: str) -> dict[str, Any]:
    """What the export's files hold, layers that run on integers, and how far it is from torch with equal codes.

    Quantisers within attention are verified too, and are no layers; the export's report counts their products.
    """
    if exported is None:
        return {"file_bytes": None, "integer_sites": None, "export_error": None, "export_refused": refusal}
    manifest = check_manifest(exported, EXPORT_KIND)
    found = manifest["verification"]
    layers = found["sites"] - sum(one.quantisers for one in plan.attentions)
    return {
        "file_bytes": manifest["size_bytes"],
        "integer_sites": layers,
        "export_error": found["network"]["forced_error"],
        "export_refused": None,
    }


def _seconds(records: Sequence[PassRecord], recipe: Recipe, run: Run) -> float:
    """Of all steps; of one that was killed and went on, those of its updates in all processes."""
    logged, texts, done, total = _logged(run), [step_text(step) for step in recipe.steps], 0, 0.0
    for record in records:  # a pass that a step ran by itself has one too
        done += done < len(texts) and record.text == texts[done]
        total += max(record.seconds, logged.pop(done, 0.0))
    return total


def _logged(run: Run) -> dict[int, float]:
    """Seconds of the updates of each step."""
    found: dict[int, float] = {}
    lines = run.log_path.read_text(encoding="utf-8").splitlines() if run.log_path.exists() else []
    keys = {field.name for field in fields(Update)}
    for line in lines:
        update = json.loads(line)
        if keys <= update.keys():
            found[update["of"]] = found.get(update["of"], 0.0) + update["seconds"]
    return found
