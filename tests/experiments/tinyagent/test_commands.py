"""The commands: a random Llama learns a plan, writes it, and it is carried out."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import kill_test
from experiments.data.text_files import TextError
from experiments.tinyagent import __main__ as command
from experiments.tinyagent import evaluation, show
from experiments.tinyagent.evaluation import MADE_UP
from experiments.tinyagent.examples import load_training
from experiments.tinyagent.job import tokenize
from experiments.tinyagent.planner import Planner
from experiments.tinyagent.presets import parse
from experiments.tinyagent.source import open_llama
from experiments.training.folder import RunFolder
from tests.experiments.tinyagent import dataset_files
from tests.experiments.tinyagent.bfcl_files import PLAY
from tests.experiments.tinyagent.small_planner import write_planner

EPOCHS, AN_EPOCH, BATCH = 6, 15, 4
COUNT = AN_EPOCH * BATCH
PLAN = '1. get_phone_number("Bob")\n2. send_sms(["$1"], "Hi")\n3. join()'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_planner(tmp_path_factory.mktemp("hub") / "llama")
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Requests of many words, all for one plan."""
    folder = tmp_path_factory.mktemp("data")
    records = {
        f"id{n}": dataset_files.record(f"Say hi to Bob, {n}.", PLAN)
        for n in range(COUNT + 4)
    }
    long = {"long": dataset_files.record("Hi " * 300, PLAN)}
    malformed = {"bad": dataset_files.record("Hi", "no plan")}
    dataset_files.write(folder / "training_data.json", long | malformed | records)
    tested = {f"test{n}": records[f"id{n}"] for n in range(6)}
    dataset_files.write(folder / "testing_data.json", tested | malformed)
    return folder


def train(model, data, run_dir, *more):
    given = (
        f"--epochs {EPOCHS} --batch-size {BATCH} --validation-examples 4 "
        "--max-length 384 "
        "--learning-rate 1e-2 --update-proj-gap 10 --scale 1 --history 3 --rank 8 "
        "--microbatches 1 --model.dtype float32 --model.remat none"
    )
    paths = {"--model.name": model, "--data": data, "--run-dir": run_dir}
    words = [str(word) for pair in paths.items() for word in pair]
    return command.main(["train", *words, *given.split(), *more])


def evaluate(model, *more):
    given = f"evaluate --model.name {model} --batch-size 4 --max-new-tokens 112 "
    given += "--model.dtype float32"
    return command.main([*given.split(), *map(str, more)])


def rows(run_dir):
    return kill_test.rows(RunFolder(run_dir))


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert train(model, data, run_dir) == 0
    return run_dir


def test_a_run_learns_and_leaves_all_that_explains_it(trained):
    table = rows(trained)
    evaluated = [row for row in table if "validation_loss" in row]
    assert [row["step"] for row in evaluated] == [
        AN_EPOCH * n for n in range(1, EPOCHS + 1)
    ]
    assert evaluated[-1]["validation_loss"] < 0.1 < 3 < table[0]["loss"]
    # Of each plan its bytes, the marker of its end, and the token that ends a text.
    a_plan = len(f"{PLAN}<END_OF_PLAN>") + 1
    assert table[0]["tokens"] == BATCH * a_plan
    assert rows(trained)[-1]["step"] == AN_EPOCH * EPOCHS
    examples = json.loads((trained / "config.json").read_text())["examples"]
    assert (examples["train"], examples["validation"]) == (COUNT, 4)
    assert examples["left_out"] == {
        "long": "more than 384 tokens",
        "bad": "its plan: no call of a tool: no plan",
    }
    report = (trained / "report.md").read_text()
    epochs = f"of {EPOCHS} |"
    for part in ("natural_galore, rank 8", epochs, "evaluate --model.name", "plan "):
        assert part in report
    copied = (trained / "model" / "tokenizer_config.json").read_text()
    assert copied == '{"add_bos_token": true}'


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model, data):
    given = f"--data {data} --model.name {model} --validation-examples 4"
    config = parse(given.split())
    examples = load_training(config.data, print).train[:2]
    source = open_llama(str(model), print)
    found, _ = tokenize(examples, source, config, print)
    largest = max(int(some.max()) for some in found.prompts + found.answers)
    shape = dataclasses.replace(source.config, vocab_size=largest)
    source = dataclasses.replace(source, config=shape)
    with pytest.raises(TextError, match=f"{model}: .* makes token {largest}, .* has"):
        tokenize(examples, source, config, print)


def test_what_is_learnt_is_planned_and_the_score_says_so(model, data, trained, capsys):
    assert evaluate(trained / "model", "--data", data) == 0
    found = json.loads((trained / f"evaluation-{data.name}.json").read_text())
    assert found["count"] == 6 and set(found["left_out"]) == {"bad"}
    expected = {"success": 1, "exact": 1, "tools": 1, "parsed": 1, "distance": 0}
    assert found["scores"] == expected
    assert {one["plan"] for one in found["plans"]} == {f"{PLAN}<END_OF_PLAN>"}
    assert found["trained"]["method"] == "natural_galore"
    assert found["data"] == f"of {data}" and found["tokens_per_second"] > 0
    assert "share of plans whose graph" in capsys.readouterr().out
    assert evaluate(trained / "model", "--data", data) == 1
    assert "is there already: give --out or" in capsys.readouterr().err
    assert evaluate(trained / "model", "--data", data, "--overwrite") == 0


def test_foreign_questions_have_prompts_of_their_own(model, tmp_path):
    questions, out = tmp_path / "parallel.jsonl", tmp_path / "out.json"
    questions.write_text(json.dumps(PLAY) + "\n")
    asked = ("--brief", "--max-new-tokens", "16", "--bfcl", questions, "--out", out)
    assert evaluate(model, *asked) == 0
    found = json.loads(out.read_text())
    assert found["data"] == "BFCL's parallel" and found["count"] == 1
    settings = {"brief": True, "shown_examples": 0, "other_tools": 0}
    assert found["settings"].items() >= settings.items()
    assert command.main(["table", str(out), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    assert "| before fine-tuning, names of tools alone | 0.0 |" in text


def test_before_and_after_stand_in_a_table(model, data, trained, tmp_path, capsys):
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    made = tmp_path / "made.json"
    assert evaluate(model, "--data", data, "--out", before) == 0
    assert evaluate(trained / "model", "--data", data, "--out", after) == 0
    brief = "--brief --shown-examples 0 --test-examples 4".split()
    assert evaluate(model, *brief, "--out", made) == 0
    files = [str(path) for path in (before, after, made)]
    assert command.main(["table", *files, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "table.md").read_text()
    before = "| before fine-tuning, tools and rules told, 3 examples shown |"
    assert f"{before} 0.0 | 0.0 | 0.0 | 0.0 | 3.00 |" in text
    assert "| before fine-tuning, names of tools alone | 0.0 |" in text
    assert f"trained on requests {data}" in text
    assert "| natural_galore, rank 8, lr 0.01 | 100.0 | 100.0 | 100.0 | 100.0" in text
    assert MADE_UP in text and f"evaluate --model.name {model}" in text
    assert (tmp_path / "table.png").stat().st_size > 5000
    for bad, message in (
        ([str(trained / "config.json")], "config.json is no evaluation"),
        ([str(after), str(after)], "are of one seed"),
    ):
        assert command.main(["table", *bad, "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
    other = json.loads(after.read_text())
    other["trained"] |= {"seed": 1, "epochs": 99}
    (tmp_path / "other.json").write_text(json.dumps(other))
    files = [str(after), str(tmp_path / "other.json")]
    assert command.main(["table", *files, "--out", str(tmp_path)]) == 1
    assert "differ in more than the seed" in capsys.readouterr().err
    other["trained"]["epochs"] = EPOCHS
    other["trained"]["optimization"]["update_proj_gap"] = 200
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert command.main(["table", *files, "--out", str(tmp_path)]) == 1
    assert "differ in more than the seed" in capsys.readouterr().err
    other["trained"]["optimization"]["update_proj_gap"] = 10
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert command.main(["table", *files, "--out", str(tmp_path)]) == 0
    assert "100.0 (100.0 to 100.0)" in (tmp_path / "table.md").read_text()


def test_a_plan_is_carried_out(tmp_path, capsys):
    path = tmp_path / "plan.txt"
    path.write_text(PLAN)
    given = ["plan", "Say hi to Bob.", "--plan-file", str(path)]
    assert command.main(given) == 0
    said = capsys.readouterr().out
    for part in ("Request: Say hi to Bob.", PLAN, "+1 555 0102", "message 'Hi'"):
        assert part in said
    path.write_text(PLAN.replace("Bob", "Zoe"))
    assert command.main(given) == 1
    said = capsys.readouterr().out
    assert "failed: LookupError: nobody in the address book" in said
    assert "2. send_sms() -> failed: step 1, which it needs" in said
    assert said.endswith("not before:\n  nothing\n")
    path.write_text("1. eval('1')\n2. join()")
    assert command.main(given) == 1
    assert "error: step 1 calls eval" in capsys.readouterr().err


def test_a_model_plans_it(trained, monkeypatch, tmp_path, capsys):
    """On the prompt that it has learnt with."""
    prompt = dataset_files.SYSTEM
    monkeypatch.setattr(show, "write_prompt", lambda *given, brief: prompt)
    given = f"--model.name {trained / 'model'} --max-new-tokens 112".split()
    assert command.main(["plan", "Say hi to Bob, 3.", *given]) == 0
    assert "message: to ['+1 555 0102'], message 'Hi'" in capsys.readouterr().out
    path = tmp_path / "prompt.txt"
    path.write_text(prompt)
    more = ["--system-file", str(path), "--mesh.data", "2"]
    assert command.main(["plan", "Say hi to Bob, 3.", *given[:2], *more]) == 0
    given[-1] = "5"
    assert command.main(["plan", "Say hi to Bob, 3.", *given]) == 1
    said = capsys.readouterr()
    assert "Plan:\n1. ge" in said.out and "error: " in said.err


def test_prompts_are_as_the_run_had_them(model, data, tmp_path):
    more = ("--epochs", "1", "--brief", "--other-tools", "1", "--shown-examples", "0")
    given = [f"--model.name={model}", f"--run-dir={tmp_path / 'run'}", *more]
    given += "--train-examples 8 --validation-examples 8 --batch-size 8".split()
    given += "--microbatches 1 --model.dtype float32 --model.remat none".split()
    assert command.main(["train", *given, "--max-length", "800"]) == 0
    trained = f"--model.name {tmp_path / 'run' / 'model'}".split()
    prompt = evaluation.parse(trained).data.prompt
    assert (prompt.brief, prompt.other_tools, prompt.shown_examples) == (True, 1, 0)
    assert show.parse(["x", *trained]).prompt.brief
    assert (
        evaluation.parse([*trained, "--other-tools", "2"]).data.prompt.other_tools == 2
    )
    # Also where the model is taken.
    best = tmp_path / "best-1.1"
    shutil.copytree(tmp_path / "run" / "model", best)
    config = evaluation.parse(["--model.name", str(best)])
    assert config.data.prompt == prompt
    assert config.file == tmp_path / "evaluation-made.json"
    (best / "training.json").write_text("{}")
    assert command.main(["evaluate", "--model.name", str(best)]) == 1


def test_names_of_evaluations():
    for more, expected in (
        ("org/TinyLlama-1.1B", "runs/TinyLlama-1.1B-evaluation-made.json"),
        ("x/SmolLM2.Q4_1.gguf", "runs/SmolLM2.Q4_1-evaluation-made.json"),
        ("m --retriever tools", "runs/m-evaluation-made-retrieved.json"),
        ("m --bfcl a.jsonl b.jsonl", "runs/m-evaluation-bfcl-a-b.json"),
    ):
        config = evaluation.parse(["--model.name", *more.split()])
        assert str(config.file) == expected


def test_an_evaluation_goes_on_where_it_was_cut(
    trained, data, tmp_path, monkeypatch, capsys
):
    given = (trained / "model", "--data", data, "--out")
    assert evaluate(*given, tmp_path / "straight.json") == 0
    write, asked = Planner.write, []

    def cut(self, prompts, *rest):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return write(self, prompts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Planner, "write", cut)
        assert evaluate(*given, tmp_path / "cut.json") == 130
        assert "Start the same command again" in capsys.readouterr().err
        left = tmp_path / "cut.unfinished.jsonl"
        with left.open("a") as file:
            file.write('{"name": "te')  # as a kill leaves it
        assert evaluate(*given, tmp_path / "cut.json", "--max-new-tokens", "9") == 1
        said = capsys.readouterr().err
        assert "settings.max_new_tokens: 112 there, 9 now" in said
        assert "--overwrite deletes them" in said
        assert evaluate(*given, tmp_path / "cut.json") == 0
    assert asked == [4, 2, 2]
    assert "4 of 6 plans are there already" in capsys.readouterr().out
    assert not left.exists()
    straight, resumed = (
        json.loads((tmp_path / f"{name}.json").read_text())
        for name in ("straight", "cut")
    )
    for name in straight.keys() - {"command", "tokens_per_second"}:
        assert straight[name] == resumed[name]


def test_what_was_learnt_is_not_asked(model, data, tmp_path, capsys):
    file = data / "training_data.json"
    assert train(model, file, tmp_path / "run", "--epochs", "1") == 0
    learnt = tmp_path / "run" / "model"
    with pytest.raises(SystemExit):
        train(learnt, data, tmp_path / "run", "--overwrite")
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert "--overwrite would delete" in said and "another --run-dir than" in said
    said = (tmp_path / "run" / "report.md").read_text()
    assert f"--data {data / 'testing_data.json'}" in said
    assert evaluate(tmp_path / "run" / "model", "--data", file) == 1
    assert "is what the model was trained on" in capsys.readouterr().err


def test_a_mesh_learns_and_plans_the_same(model, data, trained, tmp_path):
    mesh = ("--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert train(model, data, tmp_path / "run", "--epochs", "1", *mesh) == 0
    for name in ("loss", "gradient_norm"):  # learning rates differ from the next on
        ours, theirs = rows(tmp_path / "run")[0][name], rows(trained)[0][name]
        assert ours == pytest.approx(theirs, rel=1e-3)
    out = tmp_path / "there.json"
    assert evaluate(trained / "model", "--data", data, *mesh, "--out", out) == 0
    assert json.loads(out.read_text())["scores"]["exact"] == 1


def test_lora_trains_factors_and_output_layer_and_is_merged(model, data, tmp_path):
    more = ("--method", "lora", "--epochs", "1", "--warmup-fraction", "0")
    assert train(model, data, tmp_path / "run", *more) == 0
    before = load_file(model / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    projections = {name for name in before if "_proj" in name}
    assert changed == projections | {"lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "train",
            "--max-length 20 --validation-examples 4",
            "no example has at most 20 tokens",
        ),
        ("train", "--method low_rank", "low_rank has no kernels"),
        ("train", "--model.name no/such/model", "is no folder .*OWNER/MODEL"),
        ("train", "--mesh.tensor 8", "tensor 8 must divide the 2 heads of keys"),
        ("train", "--data nowhere", "is no folder .*OWNER/DATASET"),
        ("evaluate", "--data nowhere", "is no folder .*OWNER/DATASET"),
        ("evaluate", "--model.name nothing.gguf", "nothing.gguf cannot be read"),
        ("evaluate", "--bfcl nowhere.jsonl", "nowhere.jsonl"),
        ("evaluate", "--mesh.distributed", "one process writes plans"),
    ],
)
def test_mistakes_are_explained(name, more, message, model, data, tmp_path, capsys):
    given = f"{name} --model.name {model} --data {data} {more}"
    if name == "train":
        given += f" --run-dir {tmp_path}"
    assert command.main(given.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("evaluate --mesh.fsdp 3", "batch_size=16 must be a multiple of the 3"),
        ("evaluate --retriever x --data y", "--retriever is for made requests"),
        ("make x.json --count 0", "count=0 must be at least 1"),
        ("train --other-tools -1", "other_tools=-1 must be at least 0"),
        ("plan", "REQUEST"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(given, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(given.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in re.sub(r"[\s│]+", " ", error), error


def test_commands_by_name(capsys):
    assert command.main(["--help"]) == 0
    told = capsys.readouterr().out
    for name in ("train", "evaluate", "table", "plan", "tools", "make"):
        assert f"\n  {name} " in told
        with pytest.raises(SystemExit) as end:
            command.main([name, "--help"])
        assert end.value.code == 0
        capsys.readouterr()
    assert command.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_made_examples_are_a_file_that_is_read(tmp_path, capsys):
    out = tmp_path / "made" / "training_data.json"
    assert command.main(["make", str(out), "--count", "25", "--brief"]) == 0
    assert "25 examples, made up by a grammar" in capsys.readouterr().out
    assert len(json.loads(out.read_text())) == 25
    assert command.main(["make", str(out), "--count", "3"]) == 1
    assert "is there already: give --overwrite" in capsys.readouterr().err
    assert len(json.loads(out.read_text())) == 25
