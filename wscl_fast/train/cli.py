"""The command `wscl-fast`: reads its line, and says what went wrong in one line."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import logging
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

from wscl_fast import __version__
from wscl_fast.data.extras import train_extra

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
SETTING = re.compile(r"--([A-Za-z_]+(?:\.[A-Za-z0-9_-]+)+)(?:=(.*))?", re.DOTALL)

COMMANDS = {
    "cluster": "stage 1 alone: make clusters out of auxiliary information, report how good they are",
    "train": "both stages: cluster, train an encoder, evaluate it",
    "evaluate": "linear probe and k-NN on the encoder of a run",
    "embed": "write the features of every image",
    "compare": "several methods under several seeds on one budget: one table and pictures",
}
EXAMPLES = {
    "cluster": "wscl-fast cluster --cluster.tags.n-clusters 100",
    "train": (
        "wscl-fast train --data.folder photos --data.table photos.csv --data.tag-column hashtags\n"
        "  wscl-fast train --name night --set train.epochs=100 --set optim.lr=1e-3\n"
        "  wscl-fast train --name night --resume"
    ),
    "evaluate": "wscl-fast evaluate --run runs/train",
    "embed": "wscl-fast embed --run runs/train --out features --format parquet",
    "compare": "wscl-fast compare --compare.methods none,tags --compare.seeds 0,1,2",
}


DEFAULT_RECIPE = "openmoji"

# What decides which images there are features of.
DATA_OF_FEATURES = tuple(
    f"data.{name}"
    for name in (
        "folder",
        "table",
        "fold",
        "on_error",
        "path_column",
        "split_column",
        "label_columns",
        "cluster_column",
    )
)

# What a command needs at its end is asked for at its start.
NEEDED = {
    "train": ("matplotlib", "sklearn"),
    "compare": ("matplotlib", "sklearn"),
}


class UsageError(ValueError):
    """A command line that does not hold."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 2 after a user's mistake, 1 after a failure, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _show_log()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _dispatch(_parse(arguments))
    except KeyboardInterrupt:
        print(f"\nwscl-fast: interrupted; {_how_to_resume(arguments)}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if "--traceback" in arguments:
            raise
        print(f"wscl-fast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "--traceback" in arguments or not type(error).__module__.startswith("wscl_fast."):
            raise
        print(f"wscl-fast: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _dispatch(args: argparse.Namespace) -> int:
    if args.command is None:
        _parser().print_help()
        return 0
    with train_extra():
        from wscl_fast.train import jobs
        from wscl_fast.train.config import Config
        from wscl_fast.train.runs import CONFIG, resumed_config
        from wscl_fast.train.settings import differences, load_config

        for module in NEEDED.get(args.command, ()):
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(module, name=module)
    overrides = [_key_and_text(text) for text in args.set]
    overrides += [(key, value) for key in ("name", "runs_dir") if (value := getattr(args, key)) is not None]
    if args.command in ("evaluate", "embed"):
        config = load_config(_existing(args.run / CONFIG, f"no run at {args.run}"), overrides)
        if args.command == "evaluate":
            jobs.run_evaluate(config, args.run)
        else:
            out = args.out or args.run
            own = out.resolve() == args.run.resolve()
            if not own and (out / CONFIG).exists():  # its features, which no other encoder made
                raise UsageError(
                    f"{out} holds another run, whose features these would replace: name another folder with "
                    "--out"
                )
            changed = differences(load_config(args.run / CONFIG), config)
            other = [key for key in changed if key in DATA_OF_FEATURES]
            if other and own:
                raise UsageError(
                    f"{args.run} keeps the features of its own data and '{other[0]}' differs: name a folder "
                    "with --out"
                )
            jobs.run_embed(config, args.run, out, args.format)
        return 0
    asked = _recipe(args.recipe) if args.recipe else args.config
    if args.command == "cluster" and args.run:
        stored = _existing(args.run / CONFIG, f"no run at {args.run}")
        if not asked:  # all of the run's settings but where it lies itself
            asked, overrides = stored, [("name", ""), ("runs_dir", Config().runs_dir), *overrides]
    own_data = any(key.replace("-", "_") in ("data.folder", "data.table") for key, _ in overrides)
    config = load_config(asked if asked or own_data else _recipe(DEFAULT_RECIPE), overrides)
    folder = Path(config.runs_dir) / (config.name or args.command)
    if args.command == "cluster":
        jobs.run_cluster(config, folder, args.run)
    elif args.command == "compare":
        jobs.run_compare(config, folder, overwrite=args.overwrite)
    else:
        if args.resume:
            config = resumed_config(folder, lambda stored: load_config(asked or stored, overrides))
        jobs.run_train(config, folder, resume=args.resume, overwrite=args.overwrite)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    with train_extra():
        from wscl_fast.train.settings import describe_settings

    parser = _parser()
    command = next((a for a in arguments if not a.startswith("-")), None)
    if command is not None and arguments and not arguments[0].startswith("-") and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UsageError(f"unknown command '{command}': {hint}")
    args, rest = parser.parse_known_args(_dotted_to_set(arguments))
    if rest:
        known = [key for key, _, _ in describe_settings()]
        leaves = {key.split(".")[-1]: key for key in reversed(known)}
        name = rest[0].lstrip("-").split("=")[0].replace("-", "_")
        near = difflib.get_close_matches(name, [*leaves, *known], n=1)
        key = leaves.get(near[0], near[0]) if near else ""
        flag = key if "." in key else key.replace("_", "-")  # of its own, beside the settings: --runs-dir
        hint = f": did you mean '--{flag}'?" if near else ""
        raise UsageError(f"unknown argument '{rest[0]}'{hint}")
    return args


def _dotted_to_set(arguments: Sequence[str]) -> list[str]:
    """`--data.folder DIR` and `--data.folder=DIR` as `--set data.folder=DIR`."""
    rewritten: list[str] = []
    coming = iter(arguments)
    for argument in coming:
        match = SETTING.fullmatch(argument)
        if match is None:
            rewritten.append(argument)
            continue
        key, text = match.groups()
        if text is None:
            text = next(coming, None)
            if text is None or text.startswith("--"):
                raise UsageError(f"--{key} needs a value")
        rewritten.append(f"--set={key}={text}")
    return rewritten


def _key_and_text(assignment: str) -> tuple[str, str]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UsageError(f"--set takes key=value, got '{assignment}'")
    return key.strip(), text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="wscl-fast",
        description="Weakly-supervised contrastive learning: clusters, then Cl-InfoNCE.",
        epilog="`wscl-fast COMMAND --help` lists a command's options and every setting.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"wscl-fast {__version__}")
    parser.set_defaults(set=[], name=None, runs_dir=None, config=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.\n\nExample:\n  {EXAMPLES[name]}",
            epilog=_settings_text(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_options(command, name)
    return parser


def _add_options(command: argparse.ArgumentParser, name: str) -> None:
    if name in ("cluster", "train", "compare"):
        text = f"packaged settings: {', '.join(_recipes())} (default: {DEFAULT_RECIPE}; none for own images)"
        either = command.add_mutually_exclusive_group()
        either.add_argument("--config", type=Path, metavar="FILE", help="YAML file of settings")
        either.add_argument("--recipe", metavar="NAME", help=text)
        command.add_argument("--name", help=f"name of the run: its folder is runs/NAME (default: {name})")
        command.add_argument("--runs-dir", metavar="DIR", help="folder of all runs (default: runs)")
    if name in ("evaluate", "embed", "cluster"):
        needed = name != "cluster"
        text = (
            "folder of a finished run"
            if needed
            else "folder of a finished run: its settings and data, and for k-means its features"
        )
        command.add_argument("--run", type=Path, metavar="DIR", required=needed, help=text)
    if name in ("train", "compare"):
        again = command.add_mutually_exclusive_group()
        again.add_argument("--overwrite", action="store_true", help="replace a run of this name")
        if name == "train":
            again.add_argument(
                "--resume", action="store_true", help="continue the run from its last checkpoint"
            )
    if name == "embed":
        command.add_argument(
            "--out",
            type=_folder,
            metavar="DIR",
            help="where to write, no other run's folder (default: the run's, for its own data)",
        )
        command.add_argument("--format", choices=("npy", "parquet"), default="npy", help="default: npy")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one setting; also --KEY VALUE, see below",
    )
    command.add_argument("--traceback", action="store_true", help="show where an error came from")


def _settings_text() -> str:
    from wscl_fast.train.settings import describe_settings

    lines = ["settings (YAML by section, --set KEY=VALUE, or --KEY VALUE) and their defaults:"]
    section = ""
    for key, default, text in describe_settings():
        if "." not in key:
            continue
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            lines.append("")
        start = f"  {key} = {default}"
        lines.append(
            f"{start:<48} {text}".rstrip() if len(start) < 48 else f"{start}\n{'':<48} {text}".rstrip()
        )
    return "\n".join(lines)


def _folder(text: str) -> Path:
    """A folder to write to, which a file's name is not."""
    if Path(text).suffix in (".npy", ".parquet"):
        raise argparse.ArgumentTypeError(f"expected a folder, got the file name '{text}'")
    return Path(text)


def _recipes() -> list[str]:
    folder = resources.files("wscl_fast.train") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _recipe(name: str) -> Path:
    if name not in _recipes():
        near = difflib.get_close_matches(name, _recipes(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(_recipes())}"
        raise UsageError(f"unknown recipe '{name}': {hint}")
    return Path(str(resources.files("wscl_fast.train") / "recipes" / f"{name}.yaml"))


def _existing(file: Path, otherwise: str) -> Path:
    if not file.exists():
        raise FileNotFoundError(otherwise)
    return file


class _Lines(logging.Handler):
    """What the library logs, as plain lines on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def _show_log() -> None:
    logger = logging.getLogger("wscl_fast")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)
        logger.propagate = False


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"wscl-fast: warning: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).replace("\n", "\n  ") or type(error).__name__


def _how_to_resume(arguments: Sequence[str]) -> str:
    if arguments[:1] == ["compare"]:
        return "the same command goes on where it stood"
    if arguments[:1] == ["train"]:
        again = [a for a in arguments if a not in ("--resume", "--overwrite")]
        return f"continue with: wscl-fast {shlex.join(again)} --resume"
    return "nothing was written"


if __name__ == "__main__":
    sys.exit(main())
