"""What a run of fine-tuning a Llama trains, and how it is judged."""

import dataclasses
from collections.abc import Callable, Sequence

import optax
from rich.console import Console

from experiments.assembly import fetch_merged, make_parts
from experiments.configs.finetuning import check_positions
from experiments.configs.run import MeshConfig
from experiments.configs.tinyagent import PlannerModelConfig, TinyAgentConfig
from experiments.data.answers import Answered, encode_answers
from experiments.data.example_batches import TrainingExamples, evaluation_batches
from experiments.data.text_files import TextError
from experiments.data.tokenizer import check_tokens, copy_tokenizer_settings
from experiments.models.formats import Remat
from experiments.models.functional import functional_llama
from experiments.models.llama_checkpoint import save_llama
from experiments.models.llama_config import LlamaConfig
from experiments.tinyagent.dataset import Example
from experiments.tinyagent.examples import load_training, tell_left_out
from experiments.tinyagent.prompt import put
from experiments.tinyagent.source import LlamaSource, open_llama
from experiments.tinyagent.trained import write_settings
from experiments.training import distributed
from experiments.training.folder import RunFolder
from experiments.training.loop import Plan
from experiments.training.run import Job, Layout, reporter
from experiments.training.step import make_evaluate, next_token_loss
from experiments.training.step_log import Row


def prepare(
    config: TinyAgentConfig, folder: RunFolder, layout: Layout, console: Console
) -> Job:
    """Reads model and examples, and makes what is trained on them."""
    report = reporter(console)
    with console.status("Reading model and examples", spinner="line"):
        source = open_llama(config.model.name, report)
        check_positions(config.data.max_length, source.positions, config.model.name)
        shape = llama_config(config.model, config.mesh, source, config.model.remat)
        examples = load_training(config.data, report)
        train, long = tokenize(examples.train, source, config, report)
        validation, more = tokenize(examples.validation, source, config, report)
    init_params, apply = functional_llama(shape, config.optimization.adapter)
    batches = TrainingExamples(
        train, config.run.batch_size, config.run.seed, layout.share
    )
    plan = Plan.of_epochs(
        config.run.epochs, batches.steps_an_epoch, config.run.max_skipped
    )
    loss_fn = next_token_loss(apply)
    mean_loss = make_evaluate(loss_fn, layout.place)

    def evaluate(params: optax.Params) -> Row:
        found = evaluation_batches(validation, config.microbatch_size, layout.share)
        return {"validation_loss": mean_loss(params, (batch for _, batch in found))}

    def finish(params: optax.Params) -> None:
        merged = fetch_merged(params, config)
        if distributed.is_first():
            save_llama(folder.model, shape, merged, source.facts)
            source.tokenizer.save(str(folder.model / "tokenizer.json"))
            if source.folder is not None:
                copy_tokenizer_settings(source.folder, folder.model)
            write_settings(folder.model, config.as_dict() | data)

    facts = {
        "train": train.fingerprint,
        "validation": validation.fingerprint,
        "model": source.fingerprint,
    }
    data = {
        "examples": {
            "train": len(train.prompts),
            "validation": len(validation.prompts),
            "left_out": examples.left_out | long | more,
            "fingerprints": facts,
        }
    }
    return Job(
        parts=make_parts(config, plan.steps, init_params, loss_fn),
        plan=plan,
        batches=batches,
        evaluate=evaluate,
        fingerprints=facts,
        data=data,
        throughput=lambda tokens, seconds: {"tokens_per_second": tokens / seconds},
        pretrained=source.load,
        finish=finish,
    )


def llama_config(
    wanted: PlannerModelConfig,
    mesh: MeshConfig,
    source: LlamaSource,
    remat: Remat = "none",
) -> LlamaConfig:
    """Returns a model's shape with the settings of a command.

    Raises:
        ValueError: The mesh does not divide its heads.
    """
    shape = dataclasses.replace(
        source.config,
        param_dtype=wanted.param_dtype,
        dtype=wanted.dtype,
        remat=remat,
    )
    if shape.kv_heads % mesh.tensor:
        raise ValueError(
            f"--mesh.tensor {mesh.tensor} must divide the {shape.kv_heads} heads of "
            f"keys and values of {wanted.name}."
        )
    return shape


def tokenize(
    examples: Sequence[Example],
    source: LlamaSource,
    config: TinyAgentConfig,
    report: Callable[[str], None],
) -> tuple[Answered, dict[str, str]]:
    """Returns examples with their prompts, and why others are left out, by name.

    Raises:
        ValueError: None is short enough.
    """
    max_length = config.data.max_length
    texts = [(put(one.system, one.request), one.text) for one in examples]
    found, long = encode_answers(
        source.tokenizer,
        texts,
        end=source.end,
        max_length=max_length,
        pad_to_max_length=config.run.pad_to_max_length,
    )
    if not found.prompts:
        raise TextError(
            f"no example has at most {max_length} tokens: give a larger --max-length."
        )
    tokens = [*found.prompts, *found.answers]
    check_tokens(tokens, source.config.vocab_size, config.model.name)
    too_long = {examples[at].name: f"more than {max_length} tokens" for at in long}
    why = f"longer than --max-length {max_length}"
    tell_left_out(too_long, len(examples), why, report)
    return found, too_long
