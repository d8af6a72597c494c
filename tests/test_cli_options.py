"""Options that have no effect are refused, over the whole table of commands: whoever adds one says when it applies."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click import Group, Option
from PIL import Image
from test_cli import ok, refused
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.cli import main
from hqc.commands.applies import RULES
from hqc.storage import load_program, save_program

QUICK = "--n-steps 2 --calib-size 1"

# One command line of each kind of misuse, and the option that the refusal begins with.
# {captured}: of a class-conditional pipeline. {plain}: of a model without conditions, with a scheduler without eta.
MISUSED = [
    ("trace digits -o x --config c.yaml", "source 'digits'"),
    ("trace digits -o x --outliers", "source 'digits'"),
    ("trace digits -o x --revision main", "source 'digits'"),
    ("trace digits -o x --weights ema", "source 'digits'"),
    ("trace digits -o x --variant fp16", "source 'digits'"),
    ("trace mine:build -o x --part vae-decoder", "source 'mine:build'"),
    ("trace mine:build -o x --latent-size 16", "source 'mine:build'"),
    ("trace mine:build -o x --condition-length 4", "source 'mine:build'"),
    ("explain {captured} --recipe rtn --block 16", "--block 16"),
    ("explain {captured} --target portable --recipe rtn", "--recipe"),
    ("explain {captured} --target portable --bits w4a4", "--bits"),
    ("explain {captured} --target portable --rules all", "--rules"),
    ("explain {captured} --target portable --no-hadamard", "--no-hadamard"),
    ("explain {captured} --target portable --block 16", "--block"),
    ("explain {captured} --target portable --hadamard", "--hadamard"),
    ("explain {captured} --target portable --set distil.epochs=1", "--set"),
    ("explain {captured} --target portable --plan {words}", "--plan"),
    ("explain {captured} --target portable --yaml", "--yaml"),
    ("explain {captured} --yaml --json", "--yaml: and --json exclude each other"),
    ("explain {captured} --plan {words}", "plan {words}: is no mapping"),
    ("explain {quantised} --plan {words}", "--plan"),
    ("explain {captured} --hadamard --no-hadamard", "--hadamard"),
    ("explain {captured} --set select_layers.rule=all", "--set select_layers.rule"),
    ("explain {captured} --target portable --keep-float conv_in", "--keep-float"),
    ("ptq {captured} -o x --block 16", "--block 16"),
    ("ptq {captured} -o x --hadamard --no-hadamard", "--hadamard"),
    ("ptq {captured} -o x --set distil.epochs=1", "option distil.epochs"),
    ("ptq {captured} -o x --through {quantised}", "--through"),
    ("ptq {captured} -o x --images nowhere", "--images"),
    ("qat {captured} -o x.hqc --through {quantised}", "--through"),
    ("qat {captured} -o x.hqc --images nowhere", "--images"),
    ("ptq {captured} -o x --plan {words}", "plan {words}: is no mapping"),
    ("qat {captured} -o x.hqc --plan {words}", "plan {words}: is no mapping"),
    ("ptq {captured} -o x --resume", "--resume"),
    ("ptq {captured} -o x --restart", "--restart"),
    ("ptq {captured} -o x --work-dir w --resume --restart", "--resume: and --restart exclude each other"),
    ("ptq {plain} -o x --synthetic --guidance-scale 3", "--guidance-scale 3"),
    ("ptq {plain} -o x --eta 0.5", "--eta 0.5"),
    ("ptq {captured} -o x --prompts {words} --synthetic", "--prompts"),
    ("ptq {plain} -o x --prompts {words}", "program from"),
    ("qat {captured} -o x.hqc --resume --restart", "--resume: and --restart exclude each other"),
    ("qat {captured} -o x --no-hadamard --block 16", "--block 16"),
    ("qat {captured} -o x --epochs 1 --steps 1", "--epochs"),
    ("qat {captured} -o x --recipe passionsr --n-steps 4", "--num-inference-steps 4"),
    ("qat {captured} -o x --hadamard --no-hadamard", "--hadamard"),
    ("qat {captured} -o x --set distil.epoch=1", "--set distil.epoch"),
    ("recipes export rtn --force", "--force"),
    ("search {captured} -o x.yaml --budget much", "--budget much"),
    ("search {captured} -o x.yaml --budget 50% --candidates w4a4", "--candidates w4a4"),
    ("search {captured} -o x.yaml --budget 9TBOPs --count bits", "--count bits"),
    ("search {captured} -o x.yaml --budget 50% --block 16", "--block 16"),
    ("search {captured} -o x.yaml --budget 50% --hadamard --no-hadamard", "--hadamard"),
    ("search {captured} -o x.yaml --budget 50% --set distil.epochs=1", "option distil.epochs"),
    ("search {captured} -o x.yaml --budget 50% --prompts {words} --synthetic", "--prompts"),
    ("search {plain} -o x.yaml --budget 50% --guidance-scale 3", "--guidance-scale 3"),
    ("search {plain} -o x.yaml --budget 50% --eta 1", "--eta 1"),
    ("qr-adaptor {captured} -o x.yaml --budget much", "--budget much"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --ranks 0", "--ranks 0"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --chart x.pdf", "--chart x.pdf"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --candidates w4a4", "--candidates w4a4"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --no-hadamard --block 16", "--block 16"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --hadamard --no-hadamard", "--hadamard"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --set distil.epoch=1", "--set distil.epoch"),
    ("qr-adaptor {captured} -o x.yaml --budget 50% --prompts {words} --synthetic", "--prompts"),
    ("qr-adaptor {plain} -o x.yaml --budget 50% --guidance-scale 3", "--guidance-scale 3"),
    ("qr-adaptor {plain} -o x.yaml --budget 50% --eta 1", "--eta 1"),
    ("search {quantised} -o x.yaml --budget 50%", "search: takes a program that is captured"),
    ("qat {plain} -o x --guidance-scale 3", "--guidance-scale 3"),
    ("qat {plain} -o x --eta 1", "--eta 1"),
    ("qat {captured} -o x --prompts {words} --synthetic", "--prompts"),
    ("export {quantised} -o x --dtype fp16", "--dtype fp16"),
    ("export {quantised} -o x --plugins none", "--plugins none"),
    ("export {quantised} -o x --weight-only *", "--weight-only *"),
    ("export {quantised} -o x --target tensorrt --plugin-arch sm_80", "--plugin-arch sm_80"),
    ("export {quantised} -o x --functions", "target onnxruntime"),
    ("export {quantised} -o x --merge-lora", "--merge-lora: merges what --lora names"),
    ("export {quantised} -o x --target tensorrt --names optimum", "target tensorrt"),
    ("export {quantised} -o x --target tensorrt --pipeline", "--pipeline"),
    ("export {captured} -o x --against {captured}", "--against"),
    ("export {quantised} -o x --arch sm_80", "--arch"),
    ("export {quantised} -o x --min-batch 1", "--min-batch"),
    ("export {quantised} -o x --opt-batch 1", "--opt-batch"),
    ("export {quantised} -o x --max-batch 1", "--max-batch"),
    ("export {quantised} -o x --workspace 1", "--workspace"),
    ("export {quantised} -o x --no-tf32", "--tf32/--no-tf32"),
    ("export {quantised} -o x --cache c", "--cache"),
    ("export {quantised} -o x --engine rtx", "--engine rtx"),
    ("export {quantised} -o x --target diffusers --one-timestep", "--one-timestep"),
    ("export {quantised} -o x --target diffusers --pipeline", "--pipeline"),
    ("export {quantised} -o x --target diffusers --max-batch-size 2", "--max-batch-size"),
    ("export {captured} -o x --target diffusers", "target diffusers: the program is captured"),
    ("export {quantised} -o x --target triton --opset 21", "--opset"),
    ("export {quantised} -o x --target triton --against {captured}", "--against"),
    ("export {quantised} -o x --target triton --one-timestep", "--one-timestep"),
    ("export {quantised} -o x --target triton --functions", "--functions"),
    ("export {quantised} -o x --target triton --names hqc", "--names"),
    ("export {quantised} -o x --target triton --pipeline", "--pipeline"),
    ("export {quantised} -o x --target triton --lora {words}", "--lora"),
    ("export {quantised} -o x --target triton --merge-lora", "--merge-lora"),
    ("export {quantised} -o x --max-batch-size 4", "--max-batch-size"),
    ("export {quantised} -o x --device cpu", "--device"),
    ("analyze {quantised} --recipe hq-dm -o x.html", "--recipe"),
    ("analyze {quantised} --bits w4a4 -o x.html", "--bits"),
    ("analyze {quantised} --rules all -o x.html", "--rules"),
    ("analyze {quantised} --keep-float conv_in -o x.html", "--keep-float"),
    ("analyze {quantised} --block 0 -o x.html", "--block 0"),
    ("analyze {captured} --no-sensitivity --sensitivity-samples 2 -o x.html", "--sensitivity-samples"),
    ("analyze {plain} --guidance-scale 3 -o x.html", "--guidance-scale 3"),
    ("analyze {plain} --eta 1 -o x.html", "--eta 1"),
    ("analyze {captured} --prompts {words} --synthetic -o x.html", "--prompts"),
    ("compare {captured} {captured} --inputs noise --n-steps 2", "--num-inference-steps"),
    ("compare {captured} {captured} --inputs noise --guidance-scale 1", "--guidance-scale"),
    ("compare {captured} {captured} --inputs noise --eta 0", "--eta"),
    ("compare {plain} {plain} --guidance-scale 3", "--guidance-scale 3"),
    ("compare {plain} {plain} --eta 1", "--eta 1"),
    ("compare {captured} {captured} --json --top 3", "--top"),
    ("compare {captured} {captured} --force", "--force"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes rtn --budget-qat 9", "--budget-qat"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes rtn --budget-ptq 9", "--budget-ptq"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes hqc --own-budgets --budget-qat 9", "--own-budgets"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes rtn-hadamard", "recipe 'rtn-hadamard'"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes hq-dm+hadamard", "recipe 'hq-dm+hadamard'"),
    ("compare-recipes {captured} -o x.md --bits w4a4 --recipes rtn,nothing", "recipe 'nothing'"),
    ("compare-recipes {captured} -o x.md --bits w4a4,w9a4 --recipes rtn", "bits 'w9a4'"),
    ("compare-recipes {quantised} -o x.md --bits w4a4 --recipes rtn", "{quantised}"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --labels 0-1", "--labels"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --prompt cat", "--prompt"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --prompts {words}", "--prompts"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --negative-prompt cat", "--negative-prompt"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --guidance-scale 3", "--guidance-scale 3"),
    ("compare-recipes {plain} -o x.md --bits w4a4 --recipes rtn --eta 1", "--eta 1"),
    ("bench {quantised} --bits w4a4", "--bits w4a4"),
    ("bench {quantised} --no-hadamard", "--no-hadamard"),
    ("bench {quantised} --rules all", "--rules"),
    ("bench {quantised} --calib-size 1", "--calib-size"),
    ("bench {quantised} --n-steps 4", "--num-inference-steps"),
    ("bench {captured} --float {captured}", "--float"),
    ("bench {captured} --batch-size 1,2 --chart x.png", "--chart"),
    ("bench {captured} --force", "--force"),
    ("sample {plain} --labels 0-1", "--labels"),
    ("sample {plain} --prompt cat", "--prompt"),
    ("sample {plain} --prompts {words}", "--prompts"),
    ("sample {plain} --negative-prompt cat", "--negative-prompt"),
    ("sample {plain} --guidance-scale 3", "--guidance-scale 3"),
    ("sample {plain} --eta 1", "--eta 1"),
    ("sample {plain} --lora-scale pixel=1", "LoRA pixel"),
    (
        "restore {captured} {captured} {captured} --images {images} -o x --label 1",
        "encoder captured.hqc: is the denoiser",
    ),
    ("restore {encoder} {plain} {decoder} --images {images} -o x --label 1", "--label"),
    ("restore {encoder} {plain} {decoder} --images {images} -o x --prompt cat", "--prompt"),
    ("eval {plain} --against {plain} --labels 0-1", "--labels"),
    ("eval {plain} --against {plain} --prompt cat", "--prompt"),
    ("eval {plain} --against {plain} --prompts {words}", "--prompts"),
    ("eval {plain} --against {plain} --negative-prompt cat", "--negative-prompt"),
    ("eval {plain} --against {plain} --guidance-scale 3", "--guidance-scale 3"),
    ("eval {plain} --against {plain} --eta 1", "--eta 1"),
    ("eval {plain} --against {plain} --lora-scale pixel=1", "LoRA pixel"),
    ("eval {plain} --against {plain} --no-gain-1", "--no-gain-1: {plain} draws no digits"),
    ("eval {captured} --against {captured} --gain-images 0 --no-gain-1", "--no-gain-1: is about what"),
    ("bench-serve {captured} --threads 2", "--threads"),
    ("bench-serve {captured} --lanes 2", "--lanes"),
    ("bench-serve {captured} --force", "--force"),
    ("bench-serve {captured} --work-dir w", "--work-dir"),
    ("bench-serve {captured} --chart {words}", "--chart {words}"),
    ("serve {captured} --port 0 --threads 2", "--threads"),
    ("serve {captured} --port 0 --lanes 2", "--lanes 2: runtime torch takes one call at a time"),
    ("serve {captured} --port 0 --cache-dir c", "--cache-dir"),
    ("serve {captured} --port 0 --against {plain}", "--against"),
    ("serve {captured} --port 0 --api-key-file {words}", "--api-key-file"),
]

# Options that have an effect whatever else is asked for, or are refused with the value (bits, recipe, runtime, labels).
ALWAYS = {
    "trace": "output loras force as_json",
    "explain": "target as_json",
    "inspect": "graph as_json",
    "recipes list": "as_json",
    "recipes show": "as_json",
    "recipes export": "output",
    "search": "budget output recipe candidates samples timesteps seed rules keep_float calib_size synthetic "
    "num_inference_steps work_dir force as_json",
    "qr-adaptor": "budget output recipe candidates ranks trials population trainings epochs samples timesteps seed "
    "rules keep_float calib_size synthetic num_inference_steps work_dir force as_json",
    "ptq": "output recipe bits rules keep_float calib_size synthetic num_inference_steps work_dir force as_json",
    "qat": "output recipe bits rules keep_float calib_size synthetic num_inference_steps batch_size seed "
    "lr_lora lr_weight_scale lr_activation_scale checkpoint_every work_dir resume steps force as_json",
    "attach-lora": "output loras force",
    "export": "output target opset one_timestep loras force as_json",
    "build-engine": "builder arch min_batch opt_batch max_batch workspace tf32 cache force as_json",
    "tune": "batch_sizes dtype weights output limit_seconds as_json",
    "sample": "output runtime compare_with per_class seed batch_size scheduler num_inference_steps force",
    "restore": "images output timestep batch_size runtime force as_json",
    "eval": "against runtime images seed gain_images batch_size num_inference_steps as_json",
    "analyze": "output csv_file calib_size synthetic batch_size num_inference_steps seed sensitivity force as_json",
    "compare": "batch_size timesteps kind seed by csv_file as_json",
    "compare-recipes": "bits recipes seeds images num_inference_steps output html chart work_dir force as_json",
    "bench": "against runtime batch_sizes threads runs warm_up work_dir as_json",
    "bench-serve": "runtime requests steps guidance_scale max_batch seed as_json",
    "serve": "runtime host port allowed_host cors_origin max_images max_steps max_batch max_queue max_body_bytes "
    "max_connections batching request_timeout shutdown_grace scheduler",
    "deploy ray": "runtime replicas cpus gpus host port allowed_host api_key_file max_images max_steps max_batch "
    "max_queue",
    "doctor": "as_json",
}


def options() -> Iterator[tuple[str, Option]]:
    """Every option of every command, and of the commands in it."""
    for name, command in main.commands.items():
        inner = command.commands.items() if isinstance(command, Group) else ()
        for path, one in [(name, command), *((f"{name} {sub}", found) for sub, found in inner)]:
            yield from ((path, parameter) for parameter in one.params if isinstance(parameter, Option))


def misused(command: str, option: Option) -> bool:
    """Whether a line above misuses it."""
    spelled = {*option.opts, *option.secondary_opts}
    lines = [line.split() for line, _ in MISUSED if line.startswith(f"{command} ")]
    return any(spelled & set(words) for words in lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    work = tmp_path_factory.mktemp("options")
    source = saved_pipeline("classes")
    captured, quantised, plain = (work / f"{name}.hqc" for name in ("captured", "quantised", "plain"))
    save_program(traced_pipeline("classes"), captured, pipeline=source)
    ok("ptq", captured, "-o", quantised, *QUICK.split())
    save_program(traced_pipeline("ddpm"), plain, pipeline=saved_pipeline("ddpm"))
    words = work / "words.txt"
    words.write_text("a cat\n")
    (work / "mine.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n    def forward(self, sample, timestep):\n"
        "        return sample * timestep[:, None]\n\n\ndef build():\n"
        "    return Net(), {'sample': torch.randn(2, 3), 'timestep': torch.zeros(2)}\n"
    )
    halves = {part: work / f"{part}.hqc" for part in ("encoder", "decoder")}
    for part, path in halves.items():
        save_program(traced_pipeline("classes", f"vae-{part}"), path)
    images = work / "images"
    images.mkdir()
    Image.new("L", (8, 8)).save(images / "grey.png")
    return SimpleNamespace(
        work=work, captured=captured, quantised=quantised, plain=plain, words=words, images=images, **halves
    )


@pytest.mark.parametrize(("line", "named"), MISUSED, ids=[line for line, _ in MISUSED])
def test_an_option_without_an_effect_is_refused(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(made.work)
    arguments = [word.format(**vars(made)) for word in line.split()]
    said = refused(tmp_path, *arguments)
    assert said.startswith(named.format(**vars(made))), said
    assert len(said) <= 300


def test_every_option_is_misused_above_or_always_has_an_effect() -> None:
    always = {(name, option) for name, text in ALWAYS.items() for option in text.split()}
    there = {(name, str(option.name)): misused(name, option) for name, option in options()}
    undecided = {key for key, tried in there.items() if not tried and key not in always}
    assert undecided == set(), "say in ALWAYS that they apply whatever else is asked for, or misuse them in MISUSED"
    assert always <= there.keys()


@pytest.mark.parametrize("command", RULES)
def test_rules_are_of_options_that_there_are_and_are_tried(command: str) -> None:
    there = {str(o.name): o for name, o in options() if name == command}
    for rule in RULES[command]:
        assert misused(command, there[rule.parameter]), rule.parameter


def test_the_defaults_never_misuse_anything(made: SimpleNamespace, tmp_path: Path) -> None:
    """A model without conditions and a scheduler without eta take the default guidance of 1.5."""
    ok("ptq", made.plain, "-o", tmp_path / "x.hqc", "--calib-size", "1", "--n-steps", "2", "--eta", "0")
    assert load_program(tmp_path / "x.hqc").plan.quantised
