"""Function calling: `python -m experiments.tinyagent --help`.

Flow of `train`: config -> examples (TinyAgent's, or made up) -> prompts and plans ->
tokens -> batches -> the loop that pretraining has -> the best epoch's model. Of
`evaluate`: model and examples -> plans -> scores; of `plan`: a request -> plan -> steps
carried out on tools in memory.
"""

import sys
from collections.abc import Callable, Sequence

from experiments.command import INTERRUPTED, Command
from experiments.tinyagent import evaluation, job, make, show, table, tools_job
from experiments.tinyagent.presets import PROGRAM, parse, parse_tools
from experiments.tinyagent.report import make_report

_MODULE = "experiments.tinyagent"
TRAIN = Command(f"{_MODULE} train", parse, job.prepare, make_report)
TOOLS = Command(f"{_MODULE} tools", parse_tools, tools_job.prepare, make_report)

_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (TRAIN.main, "fine-tune a Llama to plan calls of tools"),
    "evaluate": (evaluation.main, "let a model plan requests, and score the plans"),
    "table": (table.main, "make a table of evaluations"),
    "plan": (show.main, "plan a request and carry it out, on tools in memory"),
    "tools": (TOOLS.main, "fine-tune an encoder to tell the tools of a request"),
    "make": (make.main, "write made-up requests with their plans"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    args = list(sys.argv[1:] if args is None else args)
    name = args[0] if args else "--help"
    if name in _COMMANDS:
        try:
            return _COMMANDS[name][0](args[1:])
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return INTERRUPTED
    lines = [f"  {name:<10}{what}" for name, (_, what) in _COMMANDS.items()]
    told = "\n".join([f"usage: {PROGRAM} COMMAND --help", "", *lines])
    if name in ("-h", "--help"):
        print(told)
        return 0
    print(f"error: there is no command {name!r}.\n{told}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
