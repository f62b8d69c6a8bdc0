"""What a user can paste runs: flags, entry points, shell and YAML of every recipe."""

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import tyro
import yaml

from experiments import compile_tpu, kill_test, mesh_test, presets
from experiments.bench import config as bench_config
from experiments.glue import presets as glue_presets
from experiments.glue import table, table_config
from experiments.study import config as study_config
from experiments.study import report, sensitivity
from experiments.tinyagent import evaluation, make, show
from experiments.tinyagent import presets as tinyagent_presets
from experiments.tinyagent import table as tinyagent_table

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments" / "launch"
RECIPES = sorted(LAUNCH.iterdir())
SHELL = [path for path in RECIPES if path.suffix in (".sh", ".sbatch")]
GUIDE = sorted((ROOT / "notebooks").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md", *GUIDE, *RECIPES]


def commands(text):
    """Module and arguments of every `python -m experiments...` of a text."""
    joined = re.sub(r"\\\n[\s#]*", " ", text)
    for module, rest in re.findall(
        r"python3? -m (experiments[\w.]*)([^\n`|;&)<>]*)", joined
    ):
        # Comments end a command; variables are some text.
        words = shlex.split(rest.split(" #")[0])
        yield module, [re.sub(r"\$\{?\w+\}?", "x", word) for word in words]


ALL = [
    pytest.param(module, args, id=f"{page.name}: {module} {' '.join(args)}"[:90])
    for page in PAGES
    for module, args in commands(page.read_text("utf-8"))
]


def parse(module, args):
    """Reads arguments as the command does; a mistake ends with SystemExit."""
    match module.removeprefix("experiments."):
        case "pretrain":
            presets.parse(args)
        case "compile_tpu":
            compile_tpu.parse_args(args)
        case "bench":
            bench_config.parse_args(args)
        case "glue":
            (table_config.parse_args if "all" in args else glue_presets.parse)(args)
        case "glue.table":
            tyro.cli(table.TableFolder, args=args)
        case "tinyagent":
            parse_tinyagent(args)
        case "kill_test":
            tyro.cli(kill_test.KillTestConfig, args=args)
        case "mesh_test":
            tyro.cli(mesh_test.MeshTestConfig, args=args)
        case "study":
            study_config.parse_args(args)
        case "study.sensitivity":
            sensitivity.parse_args(args)
        case "study.report":
            tyro.cli(report.ReportConfig, args=args)
        case _:
            pytest.fail(f"say here how {module} reads its arguments")


def parse_tinyagent(args):
    match args:
        case ["train", *rest]:
            tinyagent_presets.parse(rest)
        case ["tools", *rest]:
            tinyagent_presets.parse_tools(rest)
        case ["evaluate", *rest]:
            evaluation.parse(rest)
        case ["plan", *rest]:
            show.parse(rest)
        case ["table", *rest]:
            tyro.cli(tinyagent_table.TableConfig, args=rest)
        case ["make", *rest]:
            tyro.cli(make.MakeConfig, args=rest)
        case [_, *_]:
            raise SystemExit(2)


@pytest.mark.parametrize(("module", "args"), ALL)
def test_every_command_is_understood(module, args, capsys):
    assert importlib.util.find_spec(module), f"no entry point {module}"
    if "--help" in args:
        return
    try:
        parse(module, args)
    except SystemExit as stopped:
        pytest.fail(f"code {stopped.code}: {capsys.readouterr()}")


def test_commands_are_found_and_mistakes_in_them_noticed():
    text = (
        "uv run python -m experiments.pretrain \\\n  --preset llama_7b --rank 4 # x\n"
    )
    ((module, args),) = commands(text)
    assert (module, args) == (
        "experiments.pretrain",
        ["--preset", "llama_7b", "--rank", "4"],
    )
    assert len(ALL) >= 8
    with pytest.raises(SystemExit):
        parse(module, [*args, "--no-such-flag", "3"])
    with pytest.raises(SystemExit):
        parse("experiments.compile_tpu", ["--no-such-flag", "3"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_how_it_is_used(path):
    assert f"experiments/launch/{path.name}" in path.read_text("utf-8")
    assert path.name in (ROOT / "experiments" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_is_shell(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


def test_every_cluster_recipe_can_be_started_again():
    runs = [
        (path, presets.parse(args))
        for path in RECIPES
        for module, args in commands(path.read_text("utf-8"))
        if module == "experiments.pretrain"
    ]
    assert len(runs) == 4
    for path, config in runs:
        assert config.run.auto_resume and config.run.run_dir, path
        assert config.text.data == ("c4",), path
        assert config.mesh.distributed == (path.name != "node_8gpu.sh")
        # Disks that go with the machine are not the place.
        there = {"gke_jobset.yaml": "gs:", "tpu_queued_resource.sh": "gs:"}
        kept = config.run.checkpoint_dir
        assert (kept and kept.partition("//")[0]) == there.get(path.name), path


def test_the_mesh_of_a_recipe_has_the_devices_it_asks_for():
    def devices(name):
        text = (LAUNCH / name).read_text("utf-8")
        ((_, args),) = commands(text)
        return text, presets.parse(args).devices

    text, count = devices("slurm.sbatch")
    nodes, tasks, gpus = (
        int(re.search(rf"^#SBATCH --{flag}=(\d+)$", text, re.MULTILINE)[1])
        for flag in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus  # JAX gives each process of a node one GPU
    assert count == nodes * gpus
    text, count = devices("tpu_queued_resource.sh")
    assert f"--accelerator-type=v5litepod-{count}" in text
    assert devices("node_8gpu.sh")[1] == 8


def test_the_jobset_is_one_slice_whose_pods_fill_it():
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text("utf-8"))
    assert jobset["kind"] == "JobSet"
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    script = container["args"][0]
    ((_, args),) = commands(script)
    config = presets.parse(args)
    assert config.devices == int(sides[0]) * int(sides[1])
    assert job["parallelism"] == job["completions"] == config.devices // chips
    # The policy below needs it, and the whole set is to be restarted, not a pod.
    assert pod["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert "exec python" in script  # or bash would keep SIGTERM to itself
    subprocess.run(["bash", "-n", "-c", script], check=True)


def test_the_image_copies_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
